"""Operators that send have no gradients, and warn once where their inputs require some."""

from __future__ import annotations

import warnings

import pytest
import torch
from harness import call_combine, call_dispatch, run_world
from worked_examples import BASIC, example_calls

from moe_triton.ascend.distributed import schemas

OPERATORS = {1: (schemas.dispatch, schemas.combine), 2: (schemas.dispatch_v2, schemas.combine_v2)}


def warnings_of(version, mode):
    """Texts of the warnings of two layers, where the inputs of one rank require gradients."""
    calls = example_calls(BASIC)

    def fn(ctx):
        call = {op: dict(args) for op, args in calls[ctx.ep_rank].items()}
        for args in call.values() if ctx.ep_rank == 0 else ():
            for name, value in args.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    args[name] = value.clone().requires_grad_()
        with mode():
            for _ in range(2):
                outputs = call_dispatch(ctx, call, version=version)
                combined = call_combine(ctx, call, outputs, version=version)
        assert not combined.requires_grad

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_world("local", 2, fn)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("version", [1, 2])
def test_each_operator_warns_once(version, monkeypatch):
    for operator in OPERATORS[version]:
        monkeypatch.setattr(operator, "warned", False)
    suffix = "" if version == 1 else "_v2"
    advice = (
        "moe_triton.ExpertParallel has gradients, and torch.no_grad() says that none are needed"
    )
    problem = "outputs have no gradients, got inputs that require them"
    dispatch, combine = warnings_of(version, torch.enable_grad)
    assert dispatch.startswith(f"npu_moe_distribute_dispatch{suffix}: {problem}: x")
    assert dispatch.endswith(advice)
    assert combine.startswith(
        f"npu_moe_distribute_combine{suffix}: {problem}: expand_x, expert_scales"
    )
    assert combine.endswith(advice)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_does_not_warn(mode, monkeypatch):
    for operator in OPERATORS[2]:
        monkeypatch.setattr(operator, "warned", False)
    assert not warnings_of(2, mode)

"""Drawn configurations of combine with RMSNorm against the definition.

x is equal bit for bit. The order in which squares are summed is free, so that rstd may differ by a
few roundings, and y by two of its own.
"""

from __future__ import annotations

import dataclasses

import definition
import drawn
import harness
import numpy as np
import pytest
import torch
from definition import Norm
from hypothesis import given
from hypothesis import strategies as st

from moe_triton.compat import torch_npu

FULL = 300
HEADING = "Drawn configurations of combine with RMSNorm against the definition"
# Two units in the last place of y, which is rounded twice.
TOLERANCE = {"bfloat16": 2 * 2.0**-7, "float16": 2 * 2.0**-10}


@st.composite
def configs(draw):
    """Either version's dispatch, before the op that takes the outputs of both."""
    config = draw(drawn.configs(draw(st.sampled_from([1, 2]))))
    return dataclasses.replace(config, comm_alg="", measured=False)


def draw_norms(config: drawn.Config) -> list[Norm]:
    rng = np.random.default_rng(config.seed + 1)
    gamma = drawn.draw_bits(rng, config, 1)[0]
    epsilon = float(rng.choice([0.5, 1e-6]))
    return [Norm(drawn.draw_bits(rng, config, batch), gamma, epsilon) for batch in config.batches]


def run(ctx, case: drawn.Case, norms: list[Norm]):
    """The three outputs on this rank; None on a lost rank."""
    call, dtype = case.calls[ctx.rank], case.config.group.dtype
    if call is None:
        return None
    norm = norms[ctx.rank]
    outputs = harness.call_dispatch(ctx, call, version=case.config.version)
    return torch_npu.npu_moe_distribute_combine_add_rms_norm(
        expand_idx=outputs[2],
        ep_send_counts=outputs[4],
        tp_send_counts=outputs[5],
        expand_scales=outputs[6],
        residual_x=definition.to_tensor(norm.residual, dtype)[:, None],
        gamma=definition.to_tensor(norm.gamma, dtype),
        norm_eps=norm.epsilon,
        **harness.groups_of(ctx),
        **call["combine"],
    )


def check(config: drawn.Config) -> None:
    case, norms = drawn.build(config), draw_norms(config)
    expected = definition.combine(
        config.group, case.tokens, case.received, case.expert_rows, case.shared_x, norms
    )
    results = harness.run_world(
        "local",
        len(config.batches),
        lambda ctx: run(ctx, case, norms),
        tp_world_size=config.group.tp_world_size,
    )
    for rank, actual in enumerate(results):
        if expected[rank] is None:
            assert actual is None
            continue
        y, rstd, x = actual
        wanted_y, wanted_rstd, wanted_x = expected[rank]
        batch = config.batches[rank]
        assert y.shape == x.shape == (batch, 1, config.group.hidden)
        assert (rstd.shape, rstd.dtype) == ((batch, 1, 1), torch.float32)
        definition.same_bits(x[:, 0], wanted_x, f"rank {rank} x")
        wanted_rstd = torch.from_numpy(wanted_rstd)
        torch.testing.assert_close(rstd[:, 0, 0], wanted_rstd, rtol=1e-5, atol=0)
        dtype = config.group.dtype
        wanted_y = definition.to_tensor(wanted_y, dtype)
        torch.testing.assert_close(y[:, 0], wanted_y, rtol=TOLERANCE[dtype], atol=1e-6)


@drawn.profile(30)
@given(configs())
def test_threads(config):
    check(config)


@pytest.mark.full
def test_many_in_threads(record_evidence):
    tally = drawn.Tally()

    @drawn.profile(FULL + FULL // 10)
    @given(configs())
    def draw_and_check(config):
        check(config)
        tally.add(config)

    draw_and_check()
    assert len(tally.distinct) >= FULL
    summary = tally.summary("threads")
    equal = "all with x equal bit for bit, y and rstd within rounding"
    record_evidence(HEADING, summary.replace("all equal bit for bit", equal))

"""Launches of the steps over windows; the rows are compared in test_window_steps.py."""

from __future__ import annotations

import pytest
import torch
from lockstep_windows import Case, Group, Tokens
from triton.runtime import interpreter, jit

from moe_triton import kernels
from moe_triton.kernels import launch_config


@pytest.mark.parametrize("more, launches", [(0, 1), (1, 4)])
def test_number_of_launches(more, launches, device, monkeypatch):
    """One launch a step; the three of a plan by blocks come before a dispatch of many slots."""
    launched = []
    for runner in (jit.JITFunction, interpreter.InterpretedFunction):

        def run(self, *args, run=runner.run, **kwargs):
            launched.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(runner, "run", run)
    num_tokens = launch_config.policy(device).compared // 8 + more
    group = Group(Case(world_size=2, top_k=8, max_tokens=num_tokens, hidden=16), device)
    mine = Tokens(
        torch.zeros((num_tokens, 16), dtype=torch.bfloat16, device=device),
        torch.zeros((num_tokens, 8), dtype=torch.int32, device=device),
        torch.ones((num_tokens, 8), device=device),
        None,
    )
    layout = group.layout
    positions = kernels.dispatch_send(
        group.windows["dispatch"][0], layout, mine.x, mine.ids, mine.weights, None, None, digest=1
    )
    assert len(launched) == launches, launched
    launched.clear()
    received = kernels.dispatch_recv(
        group.windows["dispatch"][0], layout, 8, None, totals_dtype=torch.int64, digest=1, timeout=0
    )
    assert launched == ["_dispatch_recv_kernel"]
    launched.clear()
    combine = group.windows["combine"][0]
    starts = torch.zeros_like(received.group_starts)
    kernels.combine_send(combine, layout, mine.x[:8], starts, None, digest=1)
    out = torch.empty_like(mine.x)
    kernels.combine_recv(
        combine, layout, mine.ids, positions, mine.weights, None, None, out, None, digest=1,
        timeout=0,
    )  # fmt: skip
    assert launched == ["_combine_send_kernel", "_combine_recv_kernel"]

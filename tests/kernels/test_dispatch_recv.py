"""Rows of a worked example; drawn ones are compared in test_window_steps.py."""

from __future__ import annotations

import torch
from lockstep_windows import DIGEST, Case, Group


def test_example(steps, device):
    """The numbers of the kernels' docstrings."""
    group = Group(Case(world_size=2, top_k=2, max_tokens=2, alignment=1), device)
    layout, dispatch = group.layout, group.windows["dispatch"]
    for windows, ids in zip(dispatch, ([[1, 0]], [[0, 3], [1, 2]]), strict=True):
        expert_ids = torch.tensor(ids, dtype=torch.int32, device=device)
        x = torch.full((len(ids), 40), 1.0 + windows.rank, dtype=torch.bfloat16, device=device)
        weights = torch.ones(expert_ids.shape, device=device)
        steps.dispatch_send(windows, layout, x, expert_ids, weights, None, None, digest=DIGEST)
    totals = steps.dispatch_totals(dispatch[0], layout, digest=DIGEST, timeout=0)
    assert totals.tolist() == [4, 2, 4]
    received = steps.dispatch_recv(
        dispatch[0], layout, 6, None, totals_dtype=torch.int32, digest=DIGEST, timeout=0
    )
    assert received.counts.tolist() == [[1, 1], [1, 1]]
    assert received.offsets.tolist() == [2, 4]
    assert received.group_starts.tolist() == [[0, 1, 2], [2, 3, 4]]
    assert received.source.tolist() == [0, 1, 0, 1, -1, -1]
    assert received.slot_ids.tolist() == [1, 0, 0, 2, -1, -1]
    assert received.x[:4, 0].tolist() == [1, 2, 1, 2]
    assert received.totals.dtype == torch.int32

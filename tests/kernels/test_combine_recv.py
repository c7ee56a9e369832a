"""Rows that come back; the sums are compared in test_window_steps.py."""

from __future__ import annotations

import pytest
import torch
from lockstep_windows import DIGEST, Case, Group

from moe_triton import kernels
from moe_triton.errors import ArgumentValueError


def test_rows_apart(steps, device):
    """Each row comes back from where it went; slots without a row are zeros."""
    group = Group(Case(with_weights=False), device)
    tokens, positions, received = group.exchanged(steps)
    group.returned(steps, received)
    for windows, mine, places in zip(group.windows["combine"], tokens, positions, strict=True):
        out = torch.full((*mine.ids.shape, 40), torch.nan, dtype=mine.x.dtype, device=device)
        steps.combine_recv(
            windows, group.layout, mine.ids, places._replace(active_position=None), None, None,
            None, out, None, digest=DIGEST, timeout=0,
        )  # fmt: skip
        sent = (mine.ids >= 0) & (mine.ids < group.case.num_experts)
        assert torch.equal(out, mine.x[:, None] * sent[:, :, None])


def test_rows_apart_with_gaps_are_refused(device):
    group = Group(Case(with_weights=False), device)
    windows, layout = group.windows["combine"][0], group.layout
    (mine, *_), (places, *_), _ = group.exchanged(kernels)
    num_tokens, num_slots = mine.ids.shape
    out = torch.empty((num_tokens, num_slots + 1, 40), dtype=mine.x.dtype, device=device)
    with pytest.raises(ArgumentValueError, match="combine_recv: out must be contiguous"):
        kernels.combine_recv(
            windows, layout, mine.ids, places, None, None, None, out[:, :-1], None, digest=DIGEST,
            timeout=0,
        )  # fmt: skip

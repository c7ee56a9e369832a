"""Helpers for tests of row indices: drawn ids, capacities, and equality of results."""

from __future__ import annotations

import pytest
import torch

from moe_triton import ref
from moe_triton.layout import NOWHERE

ALIGNMENTS = pytest.mark.parametrize("alignment", [1, 8])
# Rows to number: exactly as many, more, and fewer than without padding.
CAPACITIES = pytest.mark.parametrize("spare", [None, 0, 5, -13])


def same(actual, expected):
    """Equal in every field, tuples in tuples included."""
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        if isinstance(other, tuple):
            same(one, other)
        elif other is None:
            assert one is None, name
        else:
            assert one.dtype == other.dtype, name
            assert one.shape == other.shape, name
            assert one.tolist() == other.tolist(), name


def capacity_of(counts: torch.Tensor, alignment: int, spare: int | None) -> int | None:
    if spare is None:
        return None
    return max(int(ref.recv_permutation(counts.cpu(), alignment).offsets[-1]) + spare, 0)


def drawn_ids(T, K, E, device, seed=0, masked=0.2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((T, E), generator=generator).argsort(1)[:, :K].int()
    ids[torch.rand((T, K), generator=generator) < masked] = NOWHERE
    # Zero-computation experts: active slots without a row.
    ids[torch.rand((T, K), generator=generator) < masked / 2] = E + 1
    return ids.to(device)

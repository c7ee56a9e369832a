"""Helpers of several files of this package."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 2**17  # elements of a block, so that fp32 intermediates stay in a core's L2 cache


def blocks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Slices of the rows of one block each."""
    rows = max(BLOCK // max(row_elements, 1), 1)
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def row_sums(weights: torch.Tensor) -> torch.Tensor:
    """Sum [T, K] to [T, 1] in ascending order; the order of torch depends on K."""
    total = torch.zeros_like(weights[:, :1])
    for column in weights.split(1, dim=1):
        total = total + column
    return total

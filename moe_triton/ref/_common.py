"""What several files of this package use."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 2**17  # elements worked on together, so that fp32 intermediates stay in a core's L2 cache


def exclusive_cumsum(counts: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Sum of the entries before each one, in the dtype of ``counts``."""
    return counts.cumsum(dim, dtype=counts.dtype) - counts


def fitted(values: torch.Tensor, size: int, fill: int) -> torch.Tensor:
    """[n] cut or filled up to [size]."""
    return torch.nn.functional.pad(values[:size], (0, max(size - len(values), 0)), value=fill)


def blocks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Slices of as many rows as make one block."""
    rows = max(BLOCK // max(row_elements, 1), 1)
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))

"""Gathers, sums and sorts of rows by the device steps of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import NOWHERE, RowFormat
from ...ops.device_steps import steps_on
from ...ref import accumulator

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_bytes(rows: Tensor) -> tuple[Tensor, RowFormat]:
    """[N, H] rows as [N, H * itemsize] uint8, as the device steps take them."""
    if rows.stride(1) != 1:
        # contiguous() keeps any stride of a single column.
        rows = rows.clone(memory_format=torch.contiguous_format)
    hidden = rows.shape[1]
    return rows.view(torch.uint8), RowFormat(rows.dtype, hidden, hidden * rows.itemsize)


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """[n, H]: rows[index] of rows [N, H]; zeros where the index is ``NOWHERE``."""
    out = rows.new_empty((len(index), rows.shape[1]))
    if out.numel():
        row_bytes, fmt = as_bytes(rows)
        steps_on(rows.device).gather_rows(row_bytes, index, fmt, out)
    return out


def weighted_sums(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """[T, H] sums over s of weights[t, s] * rows[index[t, s]].

    In float32 (float64 for float64), in the order of s, rounded once. Indices outside [0, N) are
    left out.

    Args:
        rows: [N, H] of one of ``FLOATS``.
        index: [T, S] integers.
        weights: [T, S] of one of ``FLOATS``, or None for all 1.
    """
    out = rows.new_empty((len(index), rows.shape[1]))
    if out.numel():
        row_bytes, fmt = as_bytes(rows)
        index = index.long()
        index = index.where((index >= 0) & (index < len(rows)), NOWHERE)
        if weights is not None:
            weights = weights.to(accumulator(rows.dtype))
        weighted_sum = steps_on(rows.device).weighted_sum
        weighted_sum(row_bytes, index, fmt, weights, None, None, out)
    return out


def sort_order(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The stable sort of [n] integers, and its inverse.

    Returns:
        order: [n] int64, the index of the i-th smallest key.
        position: [n] int32, the sorted position of each key.
    """
    order = torch.argsort(keys, stable=True)
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return order, position

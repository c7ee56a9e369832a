"""Rows of tensors from one place to another, and sums of rows, by the steps of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import NOWHERE, RowFormat
from ...ops.device_steps import steps_on
from ...ref import accumulator

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_bytes(rows: Tensor) -> tuple[Tensor, RowFormat]:
    """[N, H] rows as [N, H * bytes] uint8, the form in which the steps take rows."""
    if rows.stride(1) != 1:
        # Not contiguous(): of one column, torch keeps any stride.
        rows = rows.clone(memory_format=torch.contiguous_format)
    hidden = rows.shape[1]
    return rows.view(torch.uint8), RowFormat(rows.dtype, hidden, hidden * rows.itemsize)


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """[n, H] the rows [N, H] that an index [n] names; zeros where it is ``NOWHERE``."""
    out = rows.new_empty((len(index), rows.shape[1]))
    if out.numel():
        taken, fmt = as_bytes(rows)
        steps_on(rows.device).gather_rows(taken, index, fmt, out)
    return out


def weighted_sums(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """[T, H] sums of the rows [N, H] that an index [T, S] names, each times its weight.

    In float32 (float64 for float64), in the order of the index, rounded once. What the index names
    and is not there is left out.

    Args:
        rows: of one of ``FLOATS``.
        index: integers.
        weights: [T, S] of one of ``FLOATS``, or None for all 1.
    """
    out = rows.new_empty((len(index), rows.shape[1]))
    if out.numel():
        taken, fmt = as_bytes(rows)
        index = index.long()
        index = index.where((index >= 0) & (index < len(rows)), NOWHERE)
        if weights is not None:
            weights = weights.to(accumulator(rows.dtype))
        reduce = steps_on(rows.device).weighted_sum
        reduce(taken, index, fmt, weights, None, None, out)
    return out


def grouped(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The places of [n] integers in ascending order, those of equals in their own order.

    Returns:
        order: [n] int64, the place of the i-th one in order.
        position: [n] int32, its inverse.
    """
    order = torch.argsort(groups, stable=True)
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return order, position

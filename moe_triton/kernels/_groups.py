"""Groups of received rows: one for each (local expert, source), one for the padding of an expert.

One program sums the counts to the first row of each group. Kernels of rows then find the group of a
row by bisection.

Shapes: L local experts, W sources.
Bytes:  about L * W * 24.
Source: ``moe_triton.ref.recv_permutation``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ..layout import NOWHERE
from . import launch_config
from ._checks import check_tensor
from ._common import divide

_NOWHERE = tl.constexpr(NOWHERE)
UNLIMITED = 2**31 - 1


@triton.jit(
    do_not_specialize=["num_experts", "world", "alignment", "capacity", "by_expert", "by_source"]
)
def _groups_kernel(
    counts_ptr,  # [L, W] int32
    recv_counts_cumsum_ptr,  # [L * W] int32
    offsets_ptr,  # [L] int32
    group_starts_ptr,  # [L, W + 1] int32 first row of each group, padding last
    first_index_ptr,  # [L, W + 1] int32 index of that row in the slot ids of its source
    load_ptr,  # [L] int64, the rows of each expert are added; or None
    totals_ptr,  # [L] int32 | int64 rows of each expert, or None
    num_experts,
    world,
    alignment,
    capacity,
    by_expert,  # strides of the counts
    by_source,
    EXPERTS: tl.constexpr,
    WORLD: tl.constexpr,  # a power of two above W
):
    """Sum the counts of rows over experts and sources.

    Example: counts [[1, 0, 2], [2, 1, 0]], alignment 4:
        recv_counts_cumsum [1, 1, 3, 5, 6, 6], offsets [4, 8],
        group_starts [[0, 1, 1, 3], [4, 6, 7, 7]].
    """
    source = tl.arange(0, WORLD)
    num_from_source = tl.zeros([WORLD], tl.int32)
    num_rows, num_padded = 0, 0
    for first in range(0, num_experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        is_expert = (expert < num_experts)[:, None]
        mask = is_expert & (source < world)[None, :]
        at = expert[:, None] * by_expert + source[None, :] * by_source
        counts = tl.load(counts_ptr + at, mask=mask, other=0)
        rows = tl.sum(counts, axis=1)
        padded = divide(rows + alignment - 1, alignment) * alignment
        within = tl.cumsum(counts, axis=1)
        row_ends = num_rows + tl.cumsum(rows, axis=0)
        offsets = num_padded + tl.cumsum(padded, axis=0)
        at = expert[:, None] * world + source[None, :]
        tl.store(recv_counts_cumsum_ptr + at, (row_ends - rows)[:, None] + within, mask=mask)
        clamped = tl.minimum(offsets, capacity)
        tl.store(offsets_ptr + expert, clamped, mask=expert < num_experts)
        if load_ptr is not None:
            load = tl.load(load_ptr + expert, mask=expert < num_experts, other=0)
            tl.store(load_ptr + expert, load + rows, mask=expert < num_experts)
        if totals_ptr is not None:
            totals = rows.to(totals_ptr.dtype.element_ty)
            tl.store(totals_ptr + expert, totals, mask=expert < num_experts)
        group = expert[:, None] * (world + 1) + source[None, :]
        mask = is_expert & (source <= world)[None, :]
        # Padding is the column W, whose counts are 0: it starts where the rows end.
        tl.store(group_starts_ptr + group, (offsets - padded)[:, None] + within - counts, mask=mask)
        before = num_from_source[None, :] + tl.cumsum(counts, axis=0) - counts
        tl.store(first_index_ptr + group, before, mask=mask)
        num_from_source += tl.sum(counts, axis=0)
        num_rows += tl.sum(rows)
        num_padded += tl.sum(padded)


@triton.jit
def find_row(row, num_rows, group_starts_ptr, first_index_ptr, num_groups, world, steps):
    """Source and index in the source's slot ids of each row.

    Padding has the source ``NOWHERE``, a row from ``num_rows`` on the index 0 as well.

    Args:
        row: [BLOCK] int32.
        num_rows: of all groups together.
        group_starts_ptr: [L * (W + 1)] int32 of ``sum_groups``.
        first_index_ptr: likewise.
        num_groups: L * (W + 1).
        world: W.
        steps: of the bisection, log2 of the groups rounded up.
    """
    present = row < num_rows
    # Find the last group that starts at or before the row: earlier ones of that start are empty.
    low = tl.zeros_like(row)
    high = tl.zeros_like(row) + num_groups
    for _ in range(steps):
        middle = (low + high) >> 1
        at_or_before = tl.load(group_starts_ptr + middle, mask=present, other=0) <= row
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    within = row - tl.load(group_starts_ptr + low, mask=present, other=0)
    index_in_source = tl.load(first_index_ptr + low, mask=present, other=0) + within
    source = low - divide(low, world + 1) * (world + 1)
    source = tl.where(present & (source < world), source, _NOWHERE)
    return source, tl.where(present, index_in_source, 0)


class Groups(NamedTuple):
    """Groups of received rows: one for each (local expert, source), one for an expert's padding.

    Attributes:
        recv_counts_cumsum: as in ``RecvPermutation``.
        offsets: as in ``RecvPermutation``.
        group_starts: as in ``RecvPermutation``.
        first_index: [L, W + 1] index of a group's first row in the slot ids of its source.
    """

    recv_counts_cumsum: torch.Tensor
    offsets: torch.Tensor
    group_starts: torch.Tensor
    first_index: torch.Tensor

    @property
    def steps(self) -> int:
        """Steps of a bisection of the groups."""
        return (self.group_starts.numel() - 1).bit_length()

    def rows(self, capacity: int | None) -> int:
        """``capacity``, or n, which waits for the device."""
        return int(self.offsets[-1]) if capacity is None else capacity


def check_load(op: str, load: torch.Tensor | None, num_experts: int, device: torch.device) -> None:
    """Raise unless ``load`` is None or a counter for each expert."""
    if load is not None:
        shape, int64 = (num_experts,), (torch.int64,)
        check_tensor(
            op, "load", load, dtypes=int64, shape=shape, device=device, strided_columns=False
        )


def sum_groups(
    op: str,
    counts: torch.Tensor,
    alignment: int,
    capacity: int | None = None,
    load: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
) -> Groups:
    """Sum the counts of rows to groups; arguments and errors as in ``recv_permutation``.

    The rows of each expert are added to ``load``, [L] int64 or None, and written to ``totals``, [L]
    int32 or int64 or None. ``op`` is for messages.
    """
    device = counts.device
    check_tensor(op, "counts", counts, dtypes=(torch.int32,), shape=(None, None), device=device)
    if alignment < 1:
        raise ArgumentValueError(op, "alignment", "be at least 1", alignment)
    if counts.numel() == 0:
        raise ArgumentValueError(op, "counts", "have an expert and a source", tuple(counts.shape))
    num_experts, world = counts.shape
    check_load(op, load, num_experts, device)
    recv_counts_cumsum = torch.empty(num_experts * world, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    group_starts, first_index = torch.empty(
        (2, num_experts, world + 1), dtype=torch.int32, device=device
    ).unbind()
    tile = launch_config.one_program(device, num_experts, world + 1)
    _groups_kernel[(1,)](
        counts,
        recv_counts_cumsum,
        offsets,
        group_starts,
        first_index,
        load,
        totals,
        num_experts,
        world,
        alignment,
        UNLIMITED if capacity is None else capacity,
        *counts.stride(),
        EXPERTS=tile.rows,
        WORLD=tile.block,
        num_warps=tile.num_warps,
    )
    return Groups(recv_counts_cumsum, offsets, group_starts, first_index)

"""The rows of each (local expert, source): where each group begins, and which group a row is in.

One program sums the counts: a group for each (expert, source), and one for the padding of each
expert. Then each row looks up its group by bisection.
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

_NOWHERE = tl.constexpr(NOWHERE)
UNLIMITED = 2**31 - 1


@triton.jit(
    do_not_specialize=["num_experts", "world", "alignment", "capacity", "by_expert", "by_source"]
)
def _groups_kernel(
    counts_ptr,  # [L, W] int32
    ends_ptr,  # [L * W] int32
    offsets_ptr,  # [L] int32
    begins_ptr,  # [L, W + 1] int32 first row of each group, the last one being padding
    slot_ids_ptr,  # [L, W + 1] int32 first copy of each group in its source's list
    load_ptr,  # [L] int64 to add the rows of each expert to, or None
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
    source = tl.arange(0, WORLD)
    slot_ids = tl.zeros([WORLD], tl.int32)
    num_rows, num_padded = 0, 0
    for first in range(0, num_experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        is_expert = (expert < num_experts)[:, None]
        mask = is_expert & (source < world)[None, :]
        at = expert[:, None] * by_expert + source[None, :] * by_source
        counts = tl.load(counts_ptr + at, mask=mask, other=0)
        rows = tl.sum(counts, axis=1)
        padded = (rows + alignment - 1) // alignment * alignment
        within = tl.cumsum(counts, axis=1)
        row_ends = num_rows + tl.cumsum(rows, axis=0)
        offsets = num_padded + tl.cumsum(padded, axis=0)
        at = expert[:, None] * world + source[None, :]
        tl.store(ends_ptr + at, (row_ends - rows)[:, None] + within, mask=mask)
        kept = tl.minimum(offsets, capacity)
        tl.store(offsets_ptr + expert, kept, mask=expert < num_experts)
        if load_ptr is not None:
            load = tl.load(load_ptr + expert, mask=expert < num_experts, other=0)
            tl.store(load_ptr + expert, load + rows, mask=expert < num_experts)
        if totals_ptr is not None:
            totals = rows.to(totals_ptr.dtype.element_ty)
            tl.store(totals_ptr + expert, totals, mask=expert < num_experts)
        group = expert[:, None] * (world + 1) + source[None, :]
        mask = is_expert & (source <= world)[None, :]
        # Padding is in the column W, which counts nothing: it begins where the rows end.
        tl.store(begins_ptr + group, (offsets - padded)[:, None] + within - counts, mask=mask)
        before = slot_ids[None, :] + tl.cumsum(counts, axis=0) - counts
        tl.store(slot_ids_ptr + group, before, mask=mask)
        slot_ids += tl.sum(counts, axis=0)
        num_rows += tl.sum(rows)
        num_padded += tl.sum(padded)


@triton.jit
def find_row(row, num_rows, begins_ptr, slot_ids_ptr, num_groups, world, steps):
    """Source and copy of each row, ``NOWHERE`` and anything for padding and from ``num_rows`` on.

    Args:
        row: [BLOCK] int32.
        num_rows: of all groups together.
        begins_ptr: [L * (W + 1)] int32, as ``number_groups`` made them.
        slot_ids_ptr: likewise.
        num_groups: L * (W + 1).
        world: W.
        steps: of the bisection, log2 of the groups rounded up.
    """
    present = row < num_rows
    # The last group that begins at or before the row; those that begin with it are empty.
    low = tl.zeros_like(row)
    high = tl.zeros_like(row) + num_groups
    for _ in range(steps):
        middle = (low + high) // 2
        at_or_before = tl.load(begins_ptr + middle, mask=present, other=0) <= row
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    within = row - tl.load(begins_ptr + low, mask=present, other=0)
    copy = tl.load(slot_ids_ptr + low, mask=present, other=0) + within
    source = low % (world + 1)
    source = tl.where(present & (source < world), source, _NOWHERE)
    return source, tl.where(present, copy, 0)


class Groups(NamedTuple):
    """The rows of each (local expert, source), and of the padding of each expert.

    Attributes:
        recv_counts_cumsum: as in ``RecvPermutation``.
        offsets: as in ``RecvPermutation``.
        group_starts: as in ``RecvPermutation``.
        slot_ids: [L, W + 1] the first copy of each group in its source's list.
    """

    recv_counts_cumsum: torch.Tensor
    offsets: torch.Tensor
    group_starts: torch.Tensor
    slot_ids: torch.Tensor

    @property
    def steps(self) -> int:
        """Of a bisection of the groups."""
        return (self.group_starts.numel() - 1).bit_length()

    def rows(self, capacity: int | None) -> int:
        """``capacity``, or the number of rows, which waits for the device."""
        return int(self.offsets[-1]) if capacity is None else capacity


def check_load(op: str, load: torch.Tensor | None, num_experts: int, device: torch.device) -> None:
    """None, or a counter for each expert."""
    if load is not None:
        shape, int64 = (num_experts,), (torch.int64,)
        check_tensor(
            op, "load", load, dtypes=int64, shape=shape, device=device, strided_columns=False
        )


def number_groups(
    op: str,
    counts: torch.Tensor,
    alignment: int,
    capacity: int | None = None,
    load: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
) -> Groups:
    """Sum the counts; arguments and errors as in ``recv_permutation``, which are those of ``op``.

    ``load``, where there is one, is [L] int64 and gets the rows of each expert added; ``totals``,
    where there is one, is [L] and gets them as they are.
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
    group_starts, slot_ids = torch.empty(
        (2, num_experts, world + 1), dtype=torch.int32, device=device
    ).unbind()
    tile = launch_config.one_program(device, num_experts, world + 1)
    _groups_kernel[(1,)](
        counts,
        recv_counts_cumsum,
        offsets,
        group_starts,
        slot_ids,
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
    return Groups(recv_counts_cumsum, offsets, group_starts, slot_ids)

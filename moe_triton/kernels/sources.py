"""Number the rows that a rank receives: from whom each is, and which of that rank's copies.

Rows are in (local expert, source, flat position) order, so their numbers follow from the counts of
all sources for this rank's experts. Rows of each expert are padded to a multiple of the alignment.

Example: two local experts, three sources, counts [[1, 0, 2], [2, 1, 0]]:
    ends [1, 1, 3, 5, 6, 6], offsets [3, 6]
    source [0, 2, 2, 0, 0, 1], copy [0, 0, 1, 1, 2, 0]

One program sums the counts: a group for each (expert, source), and one for the padding of each
expert. Then each row looks up its group by bisection.

Shapes: L local experts, W sources, n rows.
Bytes:  about L * W * 24 + n * (16 + 4 * log2(L * W)), the latter from the cache.
Source: ``moe_triton.ref.sources``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ..layout import NOWHERE, Sources
from . import launch
from ._checks import check_tensor

_NOWHERE = tl.constexpr(NOWHERE)


@triton.jit(do_not_specialize=["num_experts", "world", "alignment"])
def _groups_kernel(
    counts_ptr,  # [L, W] int32
    ends_ptr,  # [L * W] int32
    offsets_ptr,  # [L] int32
    begins_ptr,  # [L, W + 1] int32 first row of each group, the last one being padding
    copies_ptr,  # [L, W + 1] int32 first copy of each group in its source's list
    num_experts,
    world,
    alignment,
    EXPERTS: tl.constexpr,
    WORLD: tl.constexpr,  # a power of two above W
):
    source = tl.arange(0, WORLD)
    copies = tl.zeros([WORLD], tl.int32)
    num_rows, num_padded = 0, 0
    for first in range(0, num_experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        is_expert = (expert < num_experts)[:, None]
        mask = is_expert & (source < world)[None, :]
        at = expert[:, None] * world + source[None, :]
        counts = tl.load(counts_ptr + at, mask=mask, other=0)
        rows = tl.sum(counts, axis=1)
        padded = (rows + alignment - 1) // alignment * alignment
        within = tl.cumsum(counts, axis=1)
        row_ends = num_rows + tl.cumsum(rows, axis=0)
        offsets = num_padded + tl.cumsum(padded, axis=0)
        tl.store(ends_ptr + at, (row_ends - rows)[:, None] + within, mask=mask)
        tl.store(offsets_ptr + expert, offsets, mask=expert < num_experts)
        group = expert[:, None] * (world + 1) + source[None, :]
        mask = is_expert & (source <= world)[None, :]
        # Padding is in the column W, which counts nothing: it begins where the rows end.
        tl.store(begins_ptr + group, (offsets - padded)[:, None] + within - counts, mask=mask)
        before = copies[None, :] + tl.cumsum(counts, axis=0) - counts
        tl.store(copies_ptr + group, before, mask=mask)
        copies += tl.sum(counts, axis=0)
        num_rows += tl.sum(rows)
        num_padded += tl.sum(padded)


@triton.jit(do_not_specialize=["num_groups", "num_experts", "world", "capacity", "steps"])
def _sources_kernel(
    begins_ptr,  # [L * (W + 1)] int32
    copies_ptr,  # [L * (W + 1)] int32
    offsets_ptr,  # [L] int32
    source_ptr,  # [capacity] int64
    copy_ptr,  # [capacity] int64
    num_groups,
    num_experts,
    world,
    capacity,
    steps,  # of the bisection, log2 of the groups rounded up
    BLOCK: tl.constexpr,
):
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    for begin in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        present = row < num_rows
        # The last group that begins at or before the row; those that begin with it are empty.
        low = tl.zeros([BLOCK], tl.int32)
        high = tl.zeros([BLOCK], tl.int32) + num_groups
        for _ in range(steps):
            middle = (low + high) // 2
            at_or_before = tl.load(begins_ptr + middle, mask=present, other=0) <= row
            low = tl.where(at_or_before, middle, low)
            high = tl.where(at_or_before, high, middle)
        within = row - tl.load(begins_ptr + low, mask=present, other=0)
        copy = tl.load(copies_ptr + low, mask=present, other=0) + within
        source = low % (world + 1)
        source = tl.where(present & (source < world), source, _NOWHERE)
        copy = tl.where(present, copy, 0)
        tl.store(source_ptr + row, source.to(tl.int64), mask=row < capacity)
        tl.store(copy_ptr + row, copy.to(tl.int64), mask=row < capacity)


def sources(counts: torch.Tensor, alignment: int = 1, capacity: int | None = None) -> Sources:
    """Number the rows that [L, W] int32 ``counts`` (local expert, source) announce.

    Args:
        counts: rows for each local expert from each source.
        alignment: the rows of each expert are padded to a multiple of this.
        capacity: rows to return numbers for, where it is known without asking the device; those
            after the n-th have the source ``NOWHERE`` and the copy 0. None for the n rows there
            are, which waits for the device.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
    """
    op, device = "sources", counts.device
    check_tensor(op, "counts", counts, dtypes=(torch.int32,), shape=(None, None), device=device)
    if alignment < 1:
        raise ArgumentValueError(op, "alignment", "be at least 1", alignment)
    if counts.numel() == 0:
        raise ArgumentValueError(op, "counts", "have an expert and a source", tuple(counts.shape))
    num_experts, world = counts.shape
    num_groups = num_experts * (world + 1)
    ends = torch.empty(num_experts * world, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    begins, copies = torch.empty((2, num_groups), dtype=torch.int32, device=device)
    tile = launch.one_program(device, num_experts, world + 1)
    _groups_kernel[(1,)](
        counts.contiguous(),
        ends,
        offsets,
        begins,
        copies,
        num_experts,
        world,
        alignment,
        EXPERTS=tile.rows,
        WORLD=tile.block,
        num_warps=tile.num_warps,
    )
    num_rows = int(offsets[-1]) if capacity is None else capacity
    source, copy = torch.empty((2, num_rows), dtype=torch.int64, device=device)
    if num_rows:
        line = launch.line(device, num_rows)
        _sources_kernel[(line.num_programs,)](
            begins,
            copies,
            offsets,
            source,
            copy,
            num_groups,
            num_experts,
            world,
            num_rows,
            (num_groups - 1).bit_length(),
            BLOCK=line.block,
            num_warps=line.num_warps,
        )
    return Sources(source, copy, ends, offsets)

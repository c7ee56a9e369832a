"""Number the rows that a rank receives: from whom each is, and which of that rank's copies.

Rows are in (local expert, source, flat position) order, so their numbers follow from the counts of
all sources for this rank's experts. Rows of each expert are padded to a multiple of the alignment.

Example: two local experts, three sources, counts [[1, 0, 2], [2, 1, 0]]:
    ends [1, 1, 3, 5, 6, 6], offsets [3, 6]
    source [0, 2, 2, 0, 0, 1], copy [0, 0, 1, 1, 2, 0]

Shapes: L local experts, W sources, n rows.
Bytes:  about L * W * 24 + n * (16 + 4 * log2(L * W)), the latter from the cache.
Source: ``moe_triton.ref.recv_permutation``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import RecvPermutation
from . import launch_config
from ._groups import find_row, number_groups


@triton.jit(do_not_specialize=["num_groups", "num_experts", "world", "capacity", "steps"])
def _sources_kernel(
    begins_ptr,  # [L * (W + 1)] int32
    slot_ids_ptr,  # [L * (W + 1)] int32
    offsets_ptr,  # [L] int32
    source_ptr,  # [capacity] int64
    copy_ptr,  # [capacity] int64
    num_groups,
    num_experts,
    world,
    capacity,
    steps,
    BLOCK: tl.constexpr,
):
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    for begin in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        source, copy = find_row(row, num_rows, begins_ptr, slot_ids_ptr, num_groups, world, steps)
        tl.store(source_ptr + row, source.to(tl.int64), mask=row < capacity)
        tl.store(copy_ptr + row, copy.to(tl.int64), mask=row < capacity)


def recv_permutation(
    counts: torch.Tensor, alignment: int = 1, capacity: int | None = None
) -> RecvPermutation:
    """Number the rows that [L, W] int32 ``counts`` (local expert, source) announce.

    Args:
        counts: rows for each local expert from each source.
        alignment: the rows of each expert are padded to a multiple of this.
        capacity: rows to return numbers for, where it is known without asking the device; those
            after the n-th have the source ``NOWHERE`` and the copy 0, and no offset is beyond it.
            None for the n rows there are, which waits for the device.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
    """
    groups = number_groups("recv_permutation", counts, alignment, capacity)
    device, (num_experts, world) = counts.device, counts.shape
    num_rows = groups.rows(capacity)
    source, copy = torch.empty((2, num_rows), dtype=torch.int64, device=device).unbind()
    if num_rows:
        line = launch_config.line(device, num_rows)
        _sources_kernel[(line.num_programs,)](
            groups.group_starts,
            groups.slot_ids,
            groups.offsets,
            source,
            copy,
            groups.group_starts.numel(),
            num_experts,
            world,
            num_rows,
            groups.steps,
            BLOCK=line.block,
            num_warps=line.num_warps,
        )
    return RecvPermutation(
        source, copy, groups.recv_counts_cumsum, groups.offsets, groups.group_starts
    )

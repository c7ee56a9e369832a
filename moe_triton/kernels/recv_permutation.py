"""Order the rows that a rank receives: the source of each, and its index in the source's slot ids.

Rows are in (local expert, source, slot id) order, so their numbers follow from the counts of all
sources for this rank's experts. Rows of each expert are padded to a multiple of the alignment.

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
from ._groups import find_row, sum_groups


@triton.jit(do_not_specialize=["num_groups", "num_experts", "world", "capacity", "steps"])
def _recv_permutation_kernel(
    group_starts_ptr,  # [L * (W + 1)] int32
    first_index_ptr,  # [L * (W + 1)] int32
    offsets_ptr,  # [L] int32
    source_ptr,  # [capacity] int64
    index_in_source_ptr,  # [capacity] int64
    num_groups,
    num_experts,
    world,
    capacity,
    steps,
    BLOCK: tl.constexpr,
):
    """Find source and index of each row.

    Example: two local experts, three sources, counts [[1, 0, 2], [2, 1, 0]]:
        source [0, 2, 2, 0, 0, 1], index_in_source [0, 0, 1, 1, 2, 0].
    """
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    for begin in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        source, index_in_source = find_row(
            row, num_rows, group_starts_ptr, first_index_ptr, num_groups, world, steps
        )
        tl.store(source_ptr + row, source.to(tl.int64), mask=row < capacity)
        tl.store(index_in_source_ptr + row, index_in_source.to(tl.int64), mask=row < capacity)


def recv_permutation(
    counts: torch.Tensor, alignment: int = 1, capacity: int | None = None
) -> RecvPermutation:
    """Order the received rows by (local expert, source, slot id).

    Arguments as in ``ref.recv_permutation``; a capacity of None waits for the device.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
    """
    groups = sum_groups("recv_permutation", counts, alignment, capacity)
    device, (num_experts, world) = counts.device, counts.shape
    num_rows = groups.rows(capacity)
    source, index_in_source = torch.empty((2, num_rows), dtype=torch.int64, device=device).unbind()
    if num_rows:
        line = launch_config.line(device, num_rows)
        _recv_permutation_kernel[(line.num_programs,)](
            groups.group_starts,
            groups.first_index,
            groups.offsets,
            source,
            index_in_source,
            groups.group_starts.numel(),
            num_experts,
            world,
            num_rows,
            groups.steps,
            BLOCK=line.block,
            num_warps=line.num_warps,
        )
    return RecvPermutation(
        source, index_in_source, groups.recv_counts_cumsum, groups.offsets, groups.group_starts
    )

"""Indices of rows: those that a rank receives, and those that combine reads.

    recv_row_index     row i is at ``table[source, slot_ids[source, j] // slots_per_row]`` for the
                       index j of the row in its source
    combine_row_index  slot (t, k) is at ``group_starts[expert, 0] + position``

Both follow from counts that the rank knows, row by row and slot by slot.

Shapes: T tokens, K experts of a token, L local experts, E experts, W ranks, C slot ids of a source,
        R rows of a source, n rows.
Bytes:  recv_row_index about n * (36 + 4 * log2(L * W)), combine_row_index T * K * 20.
Source: ``moe_triton.ref.row_index``.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch
import triton
import triton.language as tl

from ..layout import NOWHERE, RecvPermutation, RecvRowIndex, RoutingPlan
from . import launch_config
from ._checks import FLOATS, INDICES, check_tensor, with_memory
from ._common import divide
from ._groups import UNLIMITED, find_row, sum_groups

_NOWHERE = tl.constexpr(NOWHERE)


@triton.jit(
    do_not_specialize=[
        "num_groups",
        "num_experts",
        "world",
        "capacity",
        "steps",
        "num_slot_ids",
        "slot_ids_stride",
        "weights_stride",
        "slots_per_row",
        "table_stride",
    ]
)
def _recv_row_index_kernel(
    group_starts_ptr,  # [L * (W + 1)] int32
    first_index_ptr,  # [L * (W + 1)] int32
    offsets_ptr,  # [L] int32
    slot_ids_ptr,  # [W, C] int32 of each source
    weights_ptr,  # [W, C] fp32 | fp64, or None
    table_ptr,  # [W, R] int64
    source_ptr,  # [capacity] int64
    index_in_source_ptr,  # [capacity] int64
    row_slot_ids_ptr,  # [capacity] int32
    row_index_ptr,  # [capacity] int64
    row_weights_ptr,  # [capacity] of the weights' dtype, or None
    num_groups,
    num_experts,
    world,
    capacity,
    steps,
    num_slot_ids,
    slot_ids_stride,
    weights_stride,
    slots_per_row,
    table_stride,
    BLOCK: tl.constexpr,
):
    """Find source, slot id, index and weight of each row.

    Example: counts [[1, 0], [1, 2]], slot_ids [[4, 1], [0, 5]], weights [[0.5, 0.25], [0.125, 1]],
        table [[100, 110, 120], [200, 210, 220]], slots_per_row 2, capacity 6:
        source [0, 0, 1, 1, -1, -1], slot_ids [4, 1, 0, 5, -1, -1],
        row_index [120, 100, 200, 220, -1, -1], row_weights [0.5, 0.25, 0.125, 1, 0, 0].
    """
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    for begin in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < capacity
        source, index = find_row(
            row, num_rows, group_starts_ptr, first_index_ptr, num_groups, world, steps
        )
        # Clamp: duplicate expert ids of a token must not overflow the slot ids of its source.
        real = inside & (source >= 0) & (index < num_slot_ids)
        tl.store(source_ptr + row, source.to(tl.int64), mask=inside)
        tl.store(index_in_source_ptr + row, index.to(tl.int64), mask=inside)
        # NPUs load masked lanes, too: what these read must exist.
        source = tl.where(real, source, 0).to(tl.int64)
        index = tl.where(real, index, 0)
        sent_at = slot_ids_ptr + source * slot_ids_stride + index
        slot_id = tl.load(sent_at, mask=real, other=_NOWHERE)
        sent = divide(tl.maximum(slot_id, 0), slots_per_row)
        at = tl.load(table_ptr + source * table_stride + sent, mask=real, other=0)
        tl.store(row_slot_ids_ptr + row, slot_id, mask=inside)
        tl.store(row_index_ptr + row, tl.where(real, at, _NOWHERE), mask=inside)
        if weights_ptr is not None:
            weight_at = weights_ptr + source * weights_stride + index
            tl.store(row_weights_ptr + row, tl.load(weight_at, mask=real, other=0.0), mask=inside)


def recv_row_index(
    counts: torch.Tensor,
    slot_ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    table: torch.Tensor,
    slots_per_row: int,
    alignment: int = 1,
    capacity: int | None = None,
    load: torch.Tensor | None = None,
    totals_dtype: torch.dtype = torch.int64,
) -> RecvRowIndex:
    """Order the rows that all sources sent this rank, with the index of each.

    Arguments as in ``ref.recv_row_index``; a capacity of None waits for the device.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
    """
    op, device = "recv_row_index", counts.device
    totals = torch.empty(counts.shape[:1], dtype=totals_dtype, device=device)
    groups = sum_groups(op, counts, alignment, capacity, load, totals)
    num_experts, world = counts.shape
    _check_sources(op, "slot_ids", slot_ids, (torch.int32,), counts)
    if weights is not None:
        _check_sources(op, "weights", weights, FLOATS, counts)
    _check_sources(op, "table", table, (torch.int64,), counts)
    num_rows = groups.rows(capacity)
    source, index_in_source, row_index = torch.empty(
        (3, num_rows), dtype=torch.int64, device=device
    ).unbind()
    row_slot_ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    row_weights = None
    if weights is not None:
        row_weights = torch.empty(num_rows, dtype=weights.dtype, device=device)
    if num_rows:
        line = launch_config.line(device, num_rows)
        _recv_row_index_kernel[(line.num_programs,)](
            groups.group_starts,
            groups.first_index,
            groups.offsets,
            with_memory(slot_ids),
            None if weights is None else with_memory(weights),
            with_memory(table),
            source,
            index_in_source,
            row_slot_ids,
            row_index,
            row_weights,
            groups.group_starts.numel(),
            num_experts,
            world,
            num_rows,
            groups.steps,
            slot_ids.shape[1],
            slot_ids.stride(0),
            0 if weights is None else weights.stride(0),
            slots_per_row,
            table.stride(0),
            BLOCK=line.block,
            num_warps=line.num_warps,
        )
    permutation = RecvPermutation(
        source, index_in_source, groups.recv_counts_cumsum, groups.offsets, groups.group_starts
    )
    return RecvRowIndex(permutation, row_slot_ids, row_index, row_weights, totals)


def _check_sources(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtypes: Collection[torch.dtype],
    counts: torch.Tensor,
) -> None:
    """Raise unless a tensor has a row for each source."""
    shape = (counts.shape[1], None)
    check_tensor(
        op, name, tensor, dtypes=dtypes, shape=shape, device=counts.device, strided_columns=False
    )


@triton.jit(do_not_specialize=["num_slots", "capacity"])
def _combine_row_index_kernel(
    group_starts_ptr,  # [E, 2] int32
    expert_ids_ptr,  # [T * K] int32 | int64
    position_in_expert_ptr,  # [T * K] int32
    row_index_ptr,  # [T * K] int64
    num_slots,
    capacity,
    BLOCK: tl.constexpr,
):
    """Find the index of each slot's row.

    Example: expert_ids [[0, 1], [-1, 0], [1, 0]], group_starts [[0, 3], [3, 5]]:
        [[0, 3], [-1, 1], [4, 2]].
    """
    for begin in range(tl.program_id(0) * BLOCK, num_slots, tl.num_programs(0) * BLOCK):
        slot_id = begin + tl.arange(0, BLOCK)
        inside = slot_id < num_slots
        position = tl.load(position_in_expert_ptr + slot_id, mask=inside, other=_NOWHERE)
        sent = position != _NOWHERE
        # NPUs load masked lanes, too, unless the mask is of bounds.
        expert = tl.load(expert_ids_ptr + slot_id, mask=inside, other=0)
        expert = tl.where(sent, expert, 0).to(tl.int32)
        row = tl.load(group_starts_ptr + expert * 2, mask=sent, other=0) + position
        row = tl.where(sent & (row < capacity), row, _NOWHERE)
        tl.store(row_index_ptr + slot_id, row.to(tl.int64), mask=inside)


def combine_row_index(
    group_starts: torch.Tensor,
    plan: RoutingPlan,
    expert_ids: torch.Tensor,
    *,
    capacity: int | None = None,
) -> torch.Tensor:
    """Find the index of each slot's row.

    Arguments as in ``ref.combine_row_index``.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape.
    """
    op, device = "combine_row_index", group_starts.device
    check = functools.partial(check_tensor, op, device=device)
    check("group_starts", group_starts, dtypes=(torch.int32,), shape=(len(plan.counts), 2))
    check("expert_ids", expert_ids, dtypes=INDICES, shape=(None, None))
    row_index = torch.empty(expert_ids.shape, dtype=torch.int64, device=device)
    if row_index.numel():
        line = launch_config.line(device, row_index.numel())
        _combine_row_index_kernel[(line.num_programs,)](
            group_starts.contiguous(),
            expert_ids.contiguous(),
            plan.position_in_expert,
            row_index,
            row_index.numel(),
            UNLIMITED if capacity is None else capacity,
            BLOCK=line.block,
            num_warps=line.num_warps,
        )
    return row_index

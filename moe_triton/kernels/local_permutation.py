"""Permute the tokens of a rank by its own experts: the row of each slot, the slot of each row.

    slot_ids[row_index[t, k]] = t * K + k

Without alignment row i is the i-th of the plan's sorted slot ids, so one launch does everything.
With it each row finds its expert by bisection, after a launch that sums the counts.

Shapes: T tokens, K experts of a token, E experts, n rows.
Bytes:  about n * 28 + T * K * 12, and E * 4 for each program; aligned n * 4 * log2(E) more.
Source: ``moe_triton.ref.local_permutation``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ..layout import NOWHERE, LocalPermutation, RecvPermutation, RoutingPlan
from . import launch_config
from ._checks import FLOATS, INDICES, check_tensor, with_memory
from ._groups import check_load, find_row, sum_groups

_NOWHERE = tl.constexpr(NOWHERE)
_MAX_EXPERTS = 512  # of a block: with more, an NPU has no room to load the next one meanwhile


@triton.jit(do_not_specialize=["num_experts", "num_slots", "capacity"])
def _local_permutation_kernel(
    counts_ptr,  # [E] int32
    sorted_slot_ids_ptr,  # [T * K] int32
    weights_ptr,  # [T * K] fp16 | bf16 | fp32 | fp64, or None
    recv_counts_cumsum_ptr,  # [E] int32
    offsets_ptr,  # [E] int32
    group_starts_ptr,  # [E, 2] int32
    source_ptr,  # [capacity] int64
    index_in_source_ptr,  # [capacity] int64
    slot_ids_ptr,  # [capacity] int32
    row_index_ptr,  # [T * K] int64
    row_weights_ptr,  # [capacity] of the weights' dtype, or None
    load_ptr,  # [E] int64, the rows of each expert are added; or None
    totals_ptr,  # [E] int32 | int64 rows of each expert
    num_experts,
    num_slots,
    capacity,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Permute without alignment.

    Example: expert_ids [[2, 0], [-1, 2]], E = 3, weights [[0.5, 0.25], [0.75, 1]], capacity 4:
        row_index [[1, 0], [-1, 2]], slot_ids [1, 0, 3, -1], row_weights [0.25, 0.5, 1, 0],
        offsets [1, 1, 3].
    """
    first_program = tl.program_id(0) == 0
    num_rows = 0
    for begin in range(0, num_experts, EXPERTS):
        expert = begin + tl.arange(0, EXPERTS)
        inside = expert < num_experts
        counts = tl.load(counts_ptr + expert, mask=inside, other=0)
        recv_counts_cumsum = num_rows + tl.cumsum(counts, axis=0)
        tl.store(recv_counts_cumsum_ptr + expert, recv_counts_cumsum, mask=inside & first_program)
        clamped = tl.minimum(recv_counts_cumsum, capacity)
        tl.store(offsets_ptr + expert, clamped, mask=inside & first_program)
        # Both columns at once: triton-ascend has no store with a stride of two.
        column = tl.arange(0, 2)[None, :]
        group_starts = recv_counts_cumsum[:, None] - tl.where(column == 0, counts[:, None], 0)
        at = expert[:, None] * 2 + column
        tl.store(group_starts_ptr + at, group_starts, mask=(inside & first_program)[:, None])
        totals = counts.to(totals_ptr.dtype.element_ty)
        tl.store(totals_ptr + expert, totals, mask=inside & first_program)
        if load_ptr is not None:
            load = tl.load(load_ptr + expert, mask=inside & first_program, other=0)
            tl.store(load_ptr + expert, load + counts, mask=inside & first_program)
        num_rows += tl.sum(counts)
    most = tl.maximum(capacity, num_slots)
    for begin in range(tl.program_id(0) * BLOCK, most, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < capacity
        sent = row < num_rows
        slot_id = tl.load(sorted_slot_ids_ptr + row, mask=row < num_slots, other=0)
        row_of_slot = tl.where(sent & inside, row, _NOWHERE)
        tl.store(row_index_ptr + slot_id, row_of_slot.to(tl.int64), mask=row < num_slots)
        tl.store(source_ptr + row, tl.where(sent, 0, _NOWHERE).to(tl.int64), mask=inside)
        tl.store(index_in_source_ptr + row, tl.where(sent, row, 0).to(tl.int64), mask=inside)
        tl.store(slot_ids_ptr + row, tl.where(sent, slot_id, _NOWHERE), mask=inside)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + slot_id, mask=inside & sent, other=0.0)
            tl.store(row_weights_ptr + row, weight, mask=inside)


@triton.jit(do_not_specialize=["num_groups", "num_experts", "num_slots", "capacity", "steps"])
def _aligned_permutation_kernel(
    group_starts_ptr,  # [E * 2] int32
    first_index_ptr,  # [E * 2] int32
    offsets_ptr,  # [E] int32
    expert_ids_ptr,  # [T * K] int32 | int64
    position_in_expert_ptr,  # [T * K] int32
    sorted_slot_ids_ptr,  # [T * K] int32
    weights_ptr,  # [T * K] fp16 | bf16 | fp32 | fp64, or None
    source_ptr,  # [capacity] int64
    index_in_source_ptr,  # [capacity] int64
    slot_ids_ptr,  # [capacity] int32
    row_index_ptr,  # [T * K] int64
    row_weights_ptr,  # [capacity] of the weights' dtype, or None
    num_groups,
    num_experts,
    num_slots,
    capacity,
    steps,
    BLOCK: tl.constexpr,
):
    """Permute with an alignment.

    Example: as ``_local_permutation_kernel``, alignment 2, capacity 5:
        row_index [[2, 0], [-1, 3]], slot_ids [1, -1, 0, 3, -1], row_weights [0.25, 0, 0.5, 1, 0],
        offsets [2, 2, 4].
    """
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    for begin in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < capacity
        source, index = find_row(
            row, num_rows, group_starts_ptr, first_index_ptr, num_groups, 1, steps
        )
        real = inside & (source >= 0)
        # NPUs load masked lanes, too: what these read must exist.
        slot_at = sorted_slot_ids_ptr + tl.where(real, index, 0)
        slot_id = tl.load(slot_at, mask=real, other=_NOWHERE)
        tl.store(source_ptr + row, source.to(tl.int64), mask=inside)
        tl.store(index_in_source_ptr + row, index.to(tl.int64), mask=inside)
        tl.store(slot_ids_ptr + row, slot_id, mask=inside)
        if weights_ptr is not None:
            weight_at = weights_ptr + tl.maximum(slot_id, 0)
            weight = tl.load(weight_at, mask=real, other=0.0)
            tl.store(row_weights_ptr + row, weight, mask=inside)
    for begin in range(tl.program_id(0) * BLOCK, num_slots, tl.num_programs(0) * BLOCK):
        slot_id = begin + tl.arange(0, BLOCK)
        inside = slot_id < num_slots
        position = tl.load(position_in_expert_ptr + slot_id, mask=inside, other=_NOWHERE)
        sent = position != _NOWHERE
        expert = tl.load(expert_ids_ptr + slot_id, mask=inside, other=0)
        # NPUs load masked lanes, too: what these read must exist.
        expert = tl.where(sent, expert, 0)
        row = tl.load(group_starts_ptr + expert * 2, mask=sent, other=0) + position
        row = tl.where(sent & (row < capacity), row, _NOWHERE)
        tl.store(row_index_ptr + slot_id, row.to(tl.int64), mask=inside)


def local_permutation(
    plan: RoutingPlan,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    alignment: int = 1,
    capacity: int | None = None,
    load: torch.Tensor | None = None,
    totals_dtype: torch.dtype = torch.int64,
) -> LocalPermutation:
    """Permute the slots of a rank whose experts are its own.

    Arguments as in ``ref.local_permutation``; a capacity of None waits for the device.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
    """
    op, device = "local_permutation", expert_ids.device
    shape = tuple(expert_ids.shape)
    check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=(None, None), device=device)
    if weights is not None:
        check_tensor(op, "weights", weights, dtypes=FLOATS, shape=shape, device=device)
        weights = with_memory(weights.contiguous())
    if alignment < 1:
        raise ArgumentValueError(op, "alignment", "be at least 1", alignment)
    totals = torch.empty(len(plan.counts), dtype=totals_dtype, device=device)
    if alignment == 1:
        check_load(op, load, len(plan.counts), device)
        return _unaligned(plan, weights, shape, capacity, load, totals)
    return _aligned(plan, expert_ids, weights, alignment, capacity, load, totals)


def _unaligned(
    plan: RoutingPlan,
    weights: torch.Tensor | None,
    shape: tuple[int, ...],
    capacity: int | None,
    load: torch.Tensor | None,
    totals: torch.Tensor,
) -> LocalPermutation:
    device, num_experts = plan.counts.device, len(plan.counts)
    num_slots = plan.sorted_slot_ids.numel()
    recv_counts_cumsum, offsets = torch.empty(
        (2, num_experts), dtype=torch.int32, device=device
    ).unbind()
    group_starts = torch.empty((num_experts, 2), dtype=torch.int32, device=device)
    num_rows = int(plan.counts.sum()) if capacity is None else capacity
    rows = _rows(num_rows, shape, weights, device)
    line = launch_config.line(device, max(num_rows, num_slots, 1))
    _local_permutation_kernel[(line.num_programs,)](
        plan.counts,
        plan.sorted_slot_ids,
        weights,
        recv_counts_cumsum,
        offsets,
        group_starts,
        *rows,
        load,
        totals,
        num_experts,
        num_slots,
        num_rows,
        EXPERTS=min(launch_config.line(device, num_experts).block, _MAX_EXPERTS),
        BLOCK=line.block,
        num_warps=line.num_warps,
    )
    source, index_in_source, slot_ids, row_index, row_weights = rows
    permutation = RecvPermutation(
        source, index_in_source, recv_counts_cumsum, offsets, group_starts
    )
    return LocalPermutation(permutation, slot_ids, row_index, row_weights, totals)


def _aligned(
    plan: RoutingPlan,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    alignment: int,
    capacity: int | None,
    load: torch.Tensor | None,
    totals: torch.Tensor,
) -> LocalPermutation:
    device = expert_ids.device
    counts = plan.counts[:, None]
    groups = sum_groups("local_permutation", counts, alignment, capacity, load, totals)
    num_rows = groups.rows(capacity)
    rows = _rows(num_rows, tuple(expert_ids.shape), weights, device)
    line = launch_config.line(device, max(num_rows, expert_ids.numel(), 1))
    _aligned_permutation_kernel[(line.num_programs,)](
        groups.group_starts,
        groups.first_index,
        groups.offsets,
        expert_ids.contiguous(),
        plan.position_in_expert,
        with_memory(plan.sorted_slot_ids),
        weights,
        *rows,
        groups.group_starts.numel(),
        len(plan.counts),
        expert_ids.numel(),
        num_rows,
        groups.steps,
        BLOCK=line.block,
        num_warps=line.num_warps,
    )
    source, index_in_source, slot_ids, row_index, row_weights = rows
    permutation = RecvPermutation(
        source, index_in_source, groups.recv_counts_cumsum, groups.offsets, groups.group_starts
    )
    return LocalPermutation(permutation, slot_ids, row_index, row_weights, totals)


def _rows(
    num_rows: int, shape: tuple[int, ...], weights: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Memory for source, index in the source, slot id, row index and weight."""
    source, index_in_source = torch.empty((2, num_rows), dtype=torch.int64, device=device).unbind()
    slot_ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    row_index = torch.empty(shape, dtype=torch.int64, device=device)
    row_weights = None
    if weights is not None:
        row_weights = torch.empty(num_rows, dtype=weights.dtype, device=device)
    return source, index_in_source, slot_ids, row_index, row_weights

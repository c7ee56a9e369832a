"""Plan and permute the tokens of a rank by its own experts: slot to row, row to slot.

    slot_ids[row_index[t, k]] = t * K + k

Few slots are compared with each other, all with all, in one launch: a slot's row is the number of
slots before it in the order of (expert, slot id). Many are planned first; then row i is the i-th
of the plan's sorted slot ids. With an alignment each row finds its expert by bisection, after a
launch that sums the counts.

Shapes: T tokens, K experts of a token, E experts, n rows.
Bytes:  about n * 24 + T * K * 20, and few: T * K * 4 for each program; many: E * 4 for each
        program; aligned n * 4 * log2(E) more.
Source: ``moe_triton.ref.local_permutation``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ..layout import NOWHERE, LocalPermutation, RecvPermutation, RoutingCopies, RoutingPlan
from . import launch_config
from ._checks import FLOATS, INDICES, check_tensor, with_memory
from ._groups import check_load, find_row, sum_groups
from .routing_plan import check_copies, compare_slots, copy_routing, experts_of, routing_plan

_NOWHERE = tl.constexpr(NOWHERE)
_NO_COPIES = (None,) * len(RoutingCopies._fields)
_MAX_EXPERTS = 512  # of a block: with more, an NPU has no room to load the next one meanwhile


@triton.jit
def _store_experts(
    recv_counts_cumsum_ptr,
    offsets_ptr,
    group_starts_ptr,
    load_ptr,
    totals_ptr,
    expert,
    counts,
    first_row,
    capacity,
    mask,
) -> None:
    """Store what follows from the number of rows of some experts and the first row of each."""
    row_ends = first_row + counts
    tl.store(recv_counts_cumsum_ptr + expert, row_ends, mask=mask)
    tl.store(offsets_ptr + expert, tl.minimum(row_ends, capacity), mask=mask)
    # Both columns at once: triton-ascend has no store with a stride of two.
    column = tl.arange(0, 2)[None, :]
    group_starts = tl.where(column == 0, first_row[:, None], row_ends[:, None])
    at = expert[:, None] * 2 + column
    tl.store(group_starts_ptr + at, group_starts, mask=mask[:, None])
    tl.store(totals_ptr + expert, counts.to(totals_ptr.dtype.element_ty), mask=mask)
    if load_ptr is not None:
        load = tl.load(load_ptr + expert, mask=mask, other=0)
        tl.store(load_ptr + expert, load + counts, mask=mask)


@triton.jit(do_not_specialize=["num_experts", "num_slots", "capacity"])
def _compared_permutation_kernel(
    expert_ids_ptr,  # [T * K] int32 | int64
    weights_ptr,  # [T * K] fp16 | bf16 | fp32 | fp64, or None
    ids_copy_ptr,  # [T * K] int32, or None
    weights_copy_ptr,  # [T * K] of the weights' dtype, or None
    counts_ptr,  # [E] int32
    position_in_expert_ptr,  # [T * K] int32
    recv_counts_cumsum_ptr,  # [E] int32
    offsets_ptr,  # [E] int32
    group_starts_ptr,  # [E, 2] int32
    source_ptr,  # [capacity] int64
    slot_ids_ptr,  # [capacity] int32
    row_index_ptr,  # [T * K] int64
    row_weights_ptr,  # [capacity] of the weights' dtype, or None
    load_ptr,  # [E] int64, the rows of each expert are added; or None
    totals_ptr,  # [E] int32 | int64 rows of each expert
    num_experts,
    num_slots,
    capacity,
    OWN: tl.constexpr,  # slots, or experts, that a program works on at a time
    OTHERS: tl.constexpr,  # slots that they are compared with at a time
    BLOCK: tl.constexpr,
):
    """Plan and permute few slots without alignment.

    Example: expert_ids [[2, 0], [-1, 2]], E = 3, weights [[0.5, 0.25], [0.75, 1]], capacity 4:
        counts [1, 0, 2], position_in_expert [0, 0, -1, 1], row_index [[1, 0], [-1, 2]],
        slot_ids [1, 0, 3, -1], row_weights [0.25, 0.5, 1, 0], offsets [1, 1, 3].
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    for own in range(program * OWN, num_slots, num_programs * OWN):
        slot_id = own + tl.arange(0, OWN)
        inside = slot_id < num_slots
        expert = experts_of(expert_ids_ptr, slot_id, num_slots, num_experts)
        earlier, lower = compare_slots(
            expert_ids_ptr, slot_id, expert, num_slots, num_experts, OWN, OTHERS
        )
        copy_routing(expert_ids_ptr, ids_copy_ptr, weights_ptr, weights_copy_ptr, slot_id, inside)
        sent = expert < num_experts
        tl.store(position_in_expert_ptr + slot_id, tl.where(sent, earlier, _NOWHERE), mask=inside)
        row = lower + earlier
        placed = sent & (row < capacity)
        row_of_slot = tl.where(placed, row, _NOWHERE)
        tl.store(row_index_ptr + slot_id, row_of_slot.to(tl.int64), mask=inside)
        tl.store(slot_ids_ptr + row, slot_id, mask=inside & placed)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + slot_id, mask=inside, other=0.0)
            tl.store(row_weights_ptr + row, weight, mask=inside & placed)
    for own in range(program * OWN, num_experts, num_programs * OWN):
        expert = own + tl.arange(0, OWN)
        # To a slot past the end all others are earlier.
        past = tl.zeros([OWN], tl.int32) + num_slots
        counts, lower = compare_slots(
            expert_ids_ptr, past, expert, num_slots, num_experts, OWN, OTHERS
        )
        is_expert = expert < num_experts
        tl.store(counts_ptr + expert, counts, mask=is_expert)
        _store_experts(
            recv_counts_cumsum_ptr, offsets_ptr, group_starts_ptr, load_ptr, totals_ptr, expert,
            counts, lower, capacity, is_expert,
        )  # fmt: skip
    num_rows = 0
    for begin in range(0, num_slots, OTHERS):
        slot_id = begin + tl.arange(0, OTHERS)
        expert = experts_of(expert_ids_ptr, slot_id, num_slots, num_experts)
        num_rows += tl.sum((expert < num_experts).to(tl.int32))
    for begin in range(program * BLOCK, capacity, num_programs * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < capacity
        sent = row < num_rows
        tl.store(source_ptr + row, tl.where(sent, 0, _NOWHERE).to(tl.int64), mask=inside)
        nothing = tl.zeros([BLOCK], tl.int32) + _NOWHERE
        tl.store(slot_ids_ptr + row, nothing, mask=inside & (row >= num_rows))
        if row_weights_ptr is not None:
            zero = tl.zeros([BLOCK], row_weights_ptr.dtype.element_ty)
            tl.store(row_weights_ptr + row, zero, mask=inside & (row >= num_rows))


@triton.jit(do_not_specialize=["num_experts", "num_slots", "capacity"])
def _local_permutation_kernel(
    counts_ptr,  # [E] int32
    sorted_slot_ids_ptr,  # [T * K] int32
    weights_ptr,  # [T * K] fp16 | bf16 | fp32 | fp64, or None
    recv_counts_cumsum_ptr,  # [E] int32
    offsets_ptr,  # [E] int32
    group_starts_ptr,  # [E, 2] int32
    source_ptr,  # [capacity] int64
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
    """Permute planned slots without alignment.

    Example: as ``_compared_permutation_kernel``.
    """
    first_program = tl.program_id(0) == 0
    num_rows = 0
    for begin in range(0, num_experts, EXPERTS):
        expert = begin + tl.arange(0, EXPERTS)
        inside = expert < num_experts
        counts = tl.load(counts_ptr + expert, mask=inside, other=0)
        _store_experts(
            recv_counts_cumsum_ptr, offsets_ptr, group_starts_ptr, load_ptr, totals_ptr, expert,
            counts, num_rows + tl.cumsum(counts, axis=0) - counts, capacity, inside & first_program,
        )  # fmt: skip
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
    """Permute planned slots with an alignment.

    Example: as ``_compared_permutation_kernel``, alignment 2, capacity 5:
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
    expert_ids: torch.Tensor,
    num_experts: int,
    weights: torch.Tensor | None,
    copies: RoutingCopies | None = None,
    *,
    alignment: int = 1,
    capacity: int | None = None,
    load: torch.Tensor | None = None,
    totals_dtype: torch.dtype = torch.int64,
) -> LocalPermutation:
    """Plan the slots of a rank whose experts are its own, and permute them.

    Arguments as in ``ref.local_permutation``; the outputs of ``copies`` are contiguous, and a
    capacity of None waits for the device.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
    """
    ids_copy, _, weights_copy = copies or _NO_COPIES
    launch = _plan(
        expert_ids, num_experts, weights, alignment, capacity, load, ids_copy, weights_copy
    )
    totals = torch.empty(num_experts, dtype=totals_dtype, device=expert_ids.device)
    if weights is not None:
        weights = with_memory(weights.contiguous())
    if launch is not None:
        if weights is None:
            weights_copy = None
        outputs = ids_copy, weights_copy, load, totals
        return _compare(launch, expert_ids, weights, capacity, *outputs)
    plan = routing_plan(expert_ids, num_experts, copies)
    if alignment == 1:
        return _unaligned(plan, expert_ids, weights, capacity, load, totals)
    return _aligned(plan, expert_ids, weights, alignment, capacity, load, totals)


class _Launch(NamedTuple):
    """Launch of ``_compared_permutation_kernel``."""

    num_programs: int
    constants: dict[str, int]


@launch_config.planned
def _plan(
    expert_ids: torch.Tensor,
    num_experts: int,
    weights: torch.Tensor | None,
    alignment: int,
    capacity: int | None,
    load: torch.Tensor | None,
    ids_copy: torch.Tensor | None,
    weights_copy: torch.Tensor | None,
) -> _Launch | None:
    """Check the arguments of ``local_permutation``; None where the plan is a step of its own."""
    op, device, shape = "local_permutation", expert_ids.device, tuple(expert_ids.shape)
    check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=(None, None), device=device)
    if weights is not None:
        check_tensor(op, "weights", weights, dtypes=FLOATS, shape=shape, device=device)
    if alignment < 1:
        raise ArgumentValueError(op, "alignment", "be at least 1", alignment)
    check_load(op, load, num_experts, device)
    check_copies(op, expert_ids, ids_copy, weights, weights_copy)
    num_slots = expert_ids.numel()
    plan = launch_config.plan_launch(device, num_slots)
    if alignment > 1 or not plan.compare:
        return None
    line = launch_config.line(device, num_slots if capacity is None else capacity)
    work = launch_config.cdiv(max(num_slots, num_experts, 1), plan.own)
    constants = {
        "OWN": plan.own,
        "OTHERS": plan.others,
        "BLOCK": line.block,
        "num_warps": plan.num_warps,
    }
    return _Launch(min(max(work, line.num_programs), plan.num_programs), constants)


def _compare(
    launch: _Launch,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    capacity: int | None,
    ids_copy: torch.Tensor | None,
    weights_copy: torch.Tensor | None,
    load: torch.Tensor | None,
    totals: torch.Tensor,
) -> LocalPermutation:
    device, num_experts, num_slots = expert_ids.device, totals.shape[0], expert_ids.numel()
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    position_in_expert = torch.empty(num_slots, dtype=torch.int32, device=device)
    ends = _ends(num_experts, device)
    num_rows = num_slots if capacity is None else capacity
    source, slot_ids, row_index, row_weights = rows = _rows(num_rows, expert_ids, weights)
    _compared_permutation_kernel[(launch.num_programs,)](
        expert_ids.contiguous(),
        weights,
        ids_copy,
        weights_copy,
        counts,
        position_in_expert,
        *ends,
        *rows,
        load,
        totals,
        num_experts,
        num_slots,
        num_rows,
        **launch.constants,
    )
    if capacity is None:
        num_rows = int(counts.sum())
        source, slot_ids = source[:num_rows], slot_ids[:num_rows]
        row_weights = None if row_weights is None else row_weights[:num_rows]
    permutation = RecvPermutation(source, None, *ends)
    return LocalPermutation(
        counts, position_in_expert, permutation, slot_ids, row_index, row_weights, totals
    )


def _unaligned(
    plan: RoutingPlan,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    capacity: int | None,
    load: torch.Tensor | None,
    totals: torch.Tensor,
) -> LocalPermutation:
    device, num_experts, num_slots = expert_ids.device, totals.shape[0], expert_ids.numel()
    ends = _ends(num_experts, device)
    num_rows = int(plan.counts.sum()) if capacity is None else capacity
    source, slot_ids, row_index, row_weights = rows = _rows(num_rows, expert_ids, weights)
    line = launch_config.line(device, max(num_rows, num_slots, 1))
    _local_permutation_kernel[(line.num_programs,)](
        plan.counts,
        plan.sorted_slot_ids,
        weights,
        *ends,
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
    permutation = RecvPermutation(source, None, *ends)
    return LocalPermutation(*plan[:2], permutation, slot_ids, row_index, row_weights, totals)


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
    source, slot_ids, row_index, row_weights = rows = _rows(num_rows, expert_ids, weights)
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
    permutation = RecvPermutation(
        source, None, groups.recv_counts_cumsum, groups.offsets, groups.group_starts
    )
    return LocalPermutation(*plan[:2], permutation, slot_ids, row_index, row_weights, totals)


def _ends(
    num_experts: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for the prefix sums of the counts, the offsets and the starts of the groups."""
    return (
        torch.empty(num_experts, dtype=torch.int32, device=device),
        torch.empty(num_experts, dtype=torch.int32, device=device),
        torch.empty(num_experts, 2, dtype=torch.int32, device=device),
    )


def _rows(
    num_rows: int, expert_ids: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Memory for source, slot id, row index and weight."""
    device = expert_ids.device
    source = torch.empty(num_rows, dtype=torch.int64, device=device)
    slot_ids = torch.empty(num_rows, dtype=torch.int32, device=device)
    row_index = torch.empty(*expert_ids.shape, dtype=torch.int64, device=device)
    row_weights = None
    if weights is not None:
        row_weights = torch.empty(num_rows, dtype=weights.dtype, device=device)
    return source, slot_ids, row_index, row_weights

"""Sort the tokens of a rank by its own experts: where each slot goes, what each row is.

    row places[t, k] is slot (t, k);  copies[places[t, k]] = t * K + k

Without alignment row i is position ``order[i]`` of the plan, so that one launch does everything.
With it each row looks up its expert by bisection, after a launch that sums the counts.

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
from ._checks import FLOATS, INDICES, check_tensor
from ._groups import check_load, find_row, number_groups

_NOWHERE = tl.constexpr(NOWHERE)


@triton.jit(do_not_specialize=["num_experts", "num_positions", "capacity"])
def _sorted_kernel(
    counts_ptr,  # [E] int32
    sorted_slot_ids_ptr,  # [T * K] int32
    weights_ptr,  # [T * K] fp16 | bf16 | fp32 | fp64, or None
    ends_ptr,  # [E] int32
    offsets_ptr,  # [E] int32
    begins_ptr,  # [E, 2] int32
    source_ptr,  # [capacity] int64
    copy_ptr,  # [capacity] int64
    found_ptr,  # [capacity] int32
    places_ptr,  # [T * K] int64
    received_ptr,  # [capacity] of the weights' dtype, or None
    load_ptr,  # [E] int64 to add the rows of each expert to, or None
    totals_ptr,  # [E] int32 | int64 rows of each expert
    num_experts,
    num_positions,
    capacity,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_program = tl.program_id(0) == 0
    num_rows = 0
    for begin in range(0, num_experts, EXPERTS):
        expert = begin + tl.arange(0, EXPERTS)
        inside = expert < num_experts
        counts = tl.load(counts_ptr + expert, mask=inside, other=0)
        recv_counts_cumsum = num_rows + tl.cumsum(counts, axis=0)
        tl.store(ends_ptr + expert, recv_counts_cumsum, mask=inside & first_program)
        kept = tl.minimum(recv_counts_cumsum, capacity)
        tl.store(offsets_ptr + expert, kept, mask=inside & first_program)
        # Both columns at once: triton-ascend has no store with a stride of two.
        column = tl.arange(0, 2)[None, :]
        group_starts = recv_counts_cumsum[:, None] - tl.where(column == 0, counts[:, None], 0)
        at = expert[:, None] * 2 + column
        tl.store(begins_ptr + at, group_starts, mask=(inside & first_program)[:, None])
        totals = counts.to(totals_ptr.dtype.element_ty)
        tl.store(totals_ptr + expert, totals, mask=inside & first_program)
        if load_ptr is not None:
            load = tl.load(load_ptr + expert, mask=inside & first_program, other=0)
            tl.store(load_ptr + expert, load + counts, mask=inside & first_program)
        num_rows += tl.sum(counts)
    most = tl.maximum(capacity, num_positions)
    for begin in range(tl.program_id(0) * BLOCK, most, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < capacity
        sent = row < num_rows
        flat = tl.load(sorted_slot_ids_ptr + row, mask=row < num_positions, other=0)
        place = tl.where(sent & inside, row, _NOWHERE)
        tl.store(places_ptr + flat, place.to(tl.int64), mask=row < num_positions)
        tl.store(source_ptr + row, tl.where(sent, 0, _NOWHERE).to(tl.int64), mask=inside)
        tl.store(copy_ptr + row, tl.where(sent, row, 0).to(tl.int64), mask=inside)
        tl.store(found_ptr + row, tl.where(sent, flat, _NOWHERE), mask=inside)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + flat, mask=inside & sent, other=0.0)
            tl.store(received_ptr + row, weight, mask=inside)


@triton.jit(do_not_specialize=["num_groups", "num_experts", "num_positions", "capacity", "steps"])
def _aligned_kernel(
    begins_ptr,  # [E * 2] int32
    firsts_ptr,  # [E * 2] int32
    offsets_ptr,  # [E] int32
    expert_ids_ptr,  # [T * K] int32 | int64
    expand_idx_ptr,  # [T * K] int32
    sorted_slot_ids_ptr,  # [T * K] int32
    weights_ptr,  # [T * K] fp16 | bf16 | fp32 | fp64, or None
    source_ptr,  # [capacity] int64
    copy_ptr,  # [capacity] int64
    found_ptr,  # [capacity] int32
    places_ptr,  # [T * K] int64
    received_ptr,  # [capacity] of the weights' dtype, or None
    num_groups,
    num_experts,
    num_positions,
    capacity,
    steps,
    BLOCK: tl.constexpr,
):
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    for begin in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < capacity
        source, copy = find_row(row, num_rows, begins_ptr, firsts_ptr, num_groups, 1, steps)
        real = inside & (source >= 0)
        flat = tl.load(sorted_slot_ids_ptr + copy, mask=real, other=_NOWHERE)
        tl.store(source_ptr + row, source.to(tl.int64), mask=inside)
        tl.store(copy_ptr + row, copy.to(tl.int64), mask=inside)
        tl.store(found_ptr + row, flat, mask=inside)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + flat, mask=real, other=0.0)
            tl.store(received_ptr + row, weight, mask=inside)
    for begin in range(tl.program_id(0) * BLOCK, num_positions, tl.num_programs(0) * BLOCK):
        flat = begin + tl.arange(0, BLOCK)
        inside = flat < num_positions
        place = tl.load(expand_idx_ptr + flat, mask=inside, other=_NOWHERE)
        sent = place != _NOWHERE
        expert = tl.load(expert_ids_ptr + flat, mask=sent, other=0)
        row = tl.load(begins_ptr + expert * 2, mask=sent, other=0) + place
        row = tl.where(sent & (row < capacity), row, _NOWHERE)
        tl.store(places_ptr + flat, row.to(tl.int64), mask=inside)


def local_permutation(
    routing: RoutingPlan,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    alignment: int = 1,
    capacity: int | None = None,
    load: torch.Tensor | None = None,
    totals_dtype: torch.dtype = torch.int64,
) -> LocalPermutation:
    """Number the rows of a rank whose tokens and experts are its own.

    Args:
        routing: the plan of ``expert_ids``.
        expert_ids: [T, K] int32 or int64.
        weights: [T, K], or None.
        alignment: as in ``recv_permutation``.
        capacity: as in ``recv_permutation``.
        load: as in ``recv_row_index``.
        totals_dtype: as in ``recv_row_index``.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
    """
    op, device = "local_permutation", expert_ids.device
    shape = tuple(expert_ids.shape)
    check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=(None, None), device=device)
    if weights is not None:
        check_tensor(op, "weights", weights, dtypes=FLOATS, shape=shape, device=device)
        weights = weights.contiguous()
    if alignment < 1:
        raise ArgumentValueError(op, "alignment", "be at least 1", alignment)
    totals = torch.empty(len(routing.counts), dtype=totals_dtype, device=device)
    if alignment == 1:
        check_load(op, load, len(routing.counts), device)
        return _sorted(routing, weights, shape, capacity, load, totals)
    return _aligned(routing, expert_ids, weights, alignment, capacity, load, totals)


def _sorted(
    routing: RoutingPlan,
    weights: torch.Tensor | None,
    shape: tuple[int, ...],
    capacity: int | None,
    load: torch.Tensor | None,
    totals: torch.Tensor,
) -> LocalPermutation:
    device, num_experts = routing.counts.device, len(routing.counts)
    num_positions = routing.sorted_slot_ids.numel()
    recv_counts_cumsum, offsets = torch.empty(
        (2, num_experts), dtype=torch.int32, device=device
    ).unbind()
    group_starts = torch.empty((num_experts, 2), dtype=torch.int32, device=device)
    num_rows = int(routing.counts.sum()) if capacity is None else capacity
    rows = _rows(num_rows, shape, weights, device)
    line = launch_config.line(device, max(num_rows, num_positions, 1))
    _sorted_kernel[(line.num_programs,)](
        routing.counts,
        routing.sorted_slot_ids,
        weights,
        recv_counts_cumsum,
        offsets,
        group_starts,
        *rows,
        load,
        totals,
        num_experts,
        num_positions,
        num_rows,
        EXPERTS=launch_config.line(device, num_experts).block,
        BLOCK=line.block,
        num_warps=line.num_warps,
    )
    source, copy, found, row_index, received = rows
    numbering = RecvPermutation(source, copy, recv_counts_cumsum, offsets, group_starts)
    return LocalPermutation(numbering, found, row_index, received, totals)


def _aligned(
    routing: RoutingPlan,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    alignment: int,
    capacity: int | None,
    load: torch.Tensor | None,
    totals: torch.Tensor,
) -> LocalPermutation:
    device = expert_ids.device
    counts = routing.counts[:, None]
    groups = number_groups("local_permutation", counts, alignment, capacity, load, totals)
    num_rows = groups.rows(capacity)
    rows = _rows(num_rows, tuple(expert_ids.shape), weights, device)
    line = launch_config.line(device, max(num_rows, expert_ids.numel(), 1))
    _aligned_kernel[(line.num_programs,)](
        groups.group_starts,
        groups.slot_ids,
        groups.offsets,
        expert_ids.contiguous(),
        routing.position_in_expert,
        routing.sorted_slot_ids,
        weights,
        *rows,
        groups.group_starts.numel(),
        len(routing.counts),
        expert_ids.numel(),
        num_rows,
        groups.steps,
        BLOCK=line.block,
        num_warps=line.num_warps,
    )
    source, copy, found, row_index, received = rows
    numbering = RecvPermutation(
        source, copy, groups.recv_counts_cumsum, groups.offsets, groups.group_starts
    )
    return LocalPermutation(numbering, found, row_index, received, totals)


def _rows(
    num_rows: int, shape: tuple[int, ...], weights: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Memory for source, copy, number, place and weight."""
    source, copy = torch.empty((2, num_rows), dtype=torch.int64, device=device).unbind()
    found = torch.empty(num_rows, dtype=torch.int32, device=device)
    row_index = torch.empty(shape, dtype=torch.int64, device=device)
    received = None
    if weights is not None:
        received = torch.empty(num_rows, dtype=weights.dtype, device=device)
    return source, copy, found, row_index, received

"""Addresses of rows: those that a rank receives, and those that combine reads.

    recv_row_index     row i is at ``origins[source] + slot_ids[source, j] // slots_per_row * step``
                       for the index j of the row in its source
    combine_row_index  slot (t, k) is at
                       ``origins[owner] + (group_starts[owner, expert, rank] + position) * step``

Both follow from counts that all ranks know, row by row and slot by slot.

Shapes: T tokens, K experts and NS shared experts of a token, L local experts, W ranks, C slot ids
        of a source, n rows.
Bytes:  recv_row_index about n * (36 + 4 * log2(L * W)), combine_row_index T * (K + NS) * 20.
Source: ``moe_triton.ref.row_index``.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError, MissingArgumentError
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
        "row_step",
        "table_stride",
    ]
)
def _recv_row_index_kernel(
    group_starts_ptr,  # [L * (W + 1)] int32
    first_index_ptr,  # [L * (W + 1)] int32
    offsets_ptr,  # [L] int32
    slot_ids_ptr,  # [W, C] int32 of each source
    weights_ptr,  # [W, C] fp32 | fp64, or None
    origins_ptr,  # [W] int64, or None
    table_ptr,  # [W, R] int64, or None
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
    row_step,
    table_stride,
    BLOCK: tl.constexpr,
):
    """Find source, slot id, address and weight of each row.

    Example: counts [[1, 0], [1, 2]], slot_ids [[4, 1], [0, 5]], weights [[0.5, 0.25], [0.125, 1]],
        origins [100, 200], row_step 10, slots_per_row 2, capacity 6:
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
        if table_ptr is not None:
            address = tl.load(table_ptr + source * table_stride + sent, mask=real, other=0)
        else:
            origin = tl.load(origins_ptr + source, mask=real, other=0)
            address = origin + sent.to(tl.int64) * row_step
        tl.store(row_slot_ids_ptr + row, slot_id, mask=inside)
        tl.store(row_index_ptr + row, tl.where(real, address, _NOWHERE), mask=inside)
        if weights_ptr is not None:
            weight_at = weights_ptr + source * weights_stride + index
            tl.store(row_weights_ptr + row, tl.load(weight_at, mask=real, other=0.0), mask=inside)


def recv_row_index(
    counts: torch.Tensor,
    slot_ids: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    slots_per_row: int,
    origins: torch.Tensor | None = None,
    step: int = 1,
    table: torch.Tensor | None = None,
    alignment: int = 1,
    capacity: int | None = None,
    load: torch.Tensor | None = None,
    totals_dtype: torch.dtype = torch.int64,
) -> RecvRowIndex:
    """Order the rows that all sources sent this rank, with the address of each in the windows.

    Row r of source s is at ``origins[s] + r * step``, or at ``table[s, r]``.

    Arguments as in ``ref.recv_row_index``; a capacity of None waits for the device.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
        MissingArgumentError: neither origins nor a table.
    """
    op, device = "recv_row_index", counts.device
    totals = torch.empty(counts.shape[:1], dtype=totals_dtype, device=device)
    groups = sum_groups(op, counts, alignment, capacity, load, totals)
    num_experts, world = counts.shape
    _check_sources(op, "slot_ids", slot_ids, (torch.int32,), counts)
    if weights is not None:
        _check_sources(op, "weights", weights, FLOATS, counts)
    if table is not None:
        _check_sources(op, "table", table, (torch.int64,), counts)
    elif origins is None:
        raise MissingArgumentError(op, "origins", "be a tensor without a table", None)
    else:
        int64 = (torch.int64,)
        check_tensor(op, "origins", origins, dtypes=int64, shape=(world,), device=device)
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
            origins,
            table,
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
            step,
            0 if table is None else table.stride(0),
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


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "top_k",
        "num_shared",
        "local",
        "world",
        "rank",
        "num_shared_ranks",
        "row_step",
        "capacity",
        "shared_capacity",
    ]
)
def _combine_row_index_kernel(
    group_starts_ptr,  # [W, L, W + 1] int32
    expert_ids_ptr,  # [T, K] int32 | int64
    position_in_expert_ptr,  # [T * K] int32
    shared_ranks_ptr,  # [NS] int64, or None
    origins_ptr,  # [W] int64
    row_index_ptr,  # [T, K + NS] int64
    num_tokens,
    top_k,
    num_shared,
    local,
    world,
    rank,
    num_shared_ranks,
    row_step,
    capacity,
    shared_capacity,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two
):
    """Find the address of each slot's row.

    Example: expert_ids [[0, 1], [-1, 0], [1, 0]], one shared expert on rank 0, this rank is 0,
        group_starts [[[0, 3, 3], [0, 0, 0]], [[0, 3, 3], [3, 5, 5]]], origins [100, 200]:
        [[200, 203, 100], [-1, 201, 101], [204, 202, 102]].
    """
    num_slots = top_k + num_shared
    slot = tl.arange(0, SLOTS)
    rank_stride = (local * (world + 1)).to(tl.int64)
    for begin in range(tl.program_id(0) * TOKENS, num_tokens, tl.num_programs(0) * TOKENS):
        token = begin + tl.arange(0, TOKENS)
        inside = (token < num_tokens)[:, None] & (slot < top_k)[None, :]
        slot_id = (token * top_k)[:, None] + slot[None, :]
        position = tl.load(position_in_expert_ptr + slot_id, mask=inside, other=_NOWHERE)
        sent = position != _NOWHERE
        expert = tl.load(expert_ids_ptr + slot_id, mask=sent, other=0).to(tl.int32)
        holder = divide(expert, local)
        owner = num_shared_ranks + holder
        number = expert - holder * local
        group = owner.to(tl.int64) * rank_stride + number * (world + 1) + rank
        row = tl.load(group_starts_ptr + group, mask=sent, other=0) + position
        sent = sent & (row < capacity)
        address = tl.load(origins_ptr + owner, mask=sent, other=0)
        address += row.to(tl.int64) * row_step
        at = (token * num_slots)[:, None] + slot[None, :]
        tl.store(row_index_ptr + at, tl.where(sent, address, _NOWHERE), mask=inside)

        if shared_ranks_ptr is not None:
            # A shared expert gets the active tokens in order: count those before each token.
            earlier = 0
            for other in range(0, begin, TOKENS):
                others = other + tl.arange(0, TOKENS)
                mask = (others < begin)[:, None] & (slot < top_k)[None, :]
                ids_at = (others * top_k)[:, None] + slot[None, :]
                ids = tl.load(expert_ids_ptr + ids_at, mask=mask, other=_NOWHERE)
                earlier += tl.sum(tl.max((ids != _NOWHERE).to(tl.int32), axis=1))
            ids = tl.load(expert_ids_ptr + slot_id, mask=inside, other=_NOWHERE)
            active = tl.max((ids != _NOWHERE).to(tl.int32), axis=1)
            active_before = earlier + tl.cumsum(active, axis=0) - active
            for shared in range(num_shared):
                shared_rank = tl.load(shared_ranks_ptr + shared)
                first = tl.load(group_starts_ptr + shared_rank * rank_stride + rank)
                origin = tl.load(origins_ptr + shared_rank)
                shared_row = first + active_before
                shared_address = origin + shared_row.to(tl.int64) * row_step
                has_row = (active > 0) & (shared_row < shared_capacity)
                shared_address = tl.where(has_row, shared_address, _NOWHERE)
                shared_at = token * num_slots + top_k + shared
                tl.store(row_index_ptr + shared_at, shared_address, mask=token < num_tokens)


def combine_row_index(
    group_starts: torch.Tensor,
    plan: RoutingPlan,
    expert_ids: torch.Tensor,
    *,
    rank: int,
    num_shared_ranks: int,
    shared_ranks: Sequence[int],
    origins: torch.Tensor,
    step: int = 1,
    capacity: int | None = None,
    shared_capacity: int | None = None,
) -> torch.Tensor:
    """Find the address of each slot's row: row r of rank h is at ``origins[h] + r * step``.

    Arguments as in ``ref.combine_row_index``.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape.
    """
    op, device = "combine_row_index", group_starts.device
    check = functools.partial(check_tensor, op, device=device)
    check("group_starts", group_starts, dtypes=(torch.int32,), shape=(None, None, None))
    world, local, columns = group_starts.shape
    if columns != world + 1:
        contract = "have the shape (W, L, W + 1)"
        raise ArgumentValueError(op, "group_starts", contract, tuple(group_starts.shape))
    check("expert_ids", expert_ids, dtypes=INDICES, shape=(None, None))
    check("origins", origins, dtypes=(torch.int64,), shape=(world,))
    num_tokens, top_k = expert_ids.shape
    num_shared = len(shared_ranks)
    row_index = torch.empty((num_tokens, top_k + num_shared), dtype=torch.int64, device=device)
    if row_index.numel():
        slots = launch_config.next_power_of_2(top_k)
        line = launch_config.line(device, num_tokens * slots)
        _combine_row_index_kernel[(line.num_programs,)](
            group_starts.contiguous(),
            expert_ids.contiguous(),
            plan.position_in_expert,
            _rank_tensor(tuple(shared_ranks), device) if num_shared else None,
            origins,
            row_index,
            num_tokens,
            top_k,
            num_shared,
            local,
            world,
            rank,
            num_shared_ranks,
            step,
            UNLIMITED if capacity is None else capacity,
            UNLIMITED if shared_capacity is None else shared_capacity,
            TOKENS=max(line.block // slots, 1),
            SLOTS=slots,
            num_warps=line.num_warps,
        )
    return row_index


# Cached forever: a graph that replays a launch does not keep the tensor alive.
@functools.cache
def _rank_tensor(ranks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ranks, dtype=torch.int64, device=device)

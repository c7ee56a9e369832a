"""Where rows are: those that arrive, and those that come back.

    arrivals  row i is copy ``slot_ids[source, copy]``, at ``origins[source] + row * step``
    returns   slot (t, k) is at ``origins[holder] + (group_starts[holder, expert, rank] + place) *
    step``

Everything is computed from counts that all ranks know, row by row and slot by slot.

Shapes: T tokens, K experts and NS shared experts of a token, L local experts, W ranks, n rows.
Bytes:  arrivals about n * (36 + 4 * log2(L * W)), returns T * (K + NS) * 20.
Source: ``moe_triton.ref``.
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
from ._checks import FLOATS, INDICES, check_tensor
from ._groups import UNLIMITED, find_row, number_groups

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
def _arrivals_kernel(
    begins_ptr,  # [L * (W + 1)] int32
    firsts_ptr,  # [L * (W + 1)] int32
    offsets_ptr,  # [L] int32
    slot_ids_ptr,  # [W, C] int32
    weights_ptr,  # [W, C] fp32 | fp64, or None
    origins_ptr,  # [W] int64, or None
    table_ptr,  # [W, R] int64, or None
    source_ptr,  # [capacity] int64
    copy_ptr,  # [capacity] int64
    found_ptr,  # [capacity] int32
    index_ptr,  # [capacity] int64
    received_ptr,  # [capacity] of the weights' dtype, or None
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
    num_rows = tl.load(offsets_ptr + num_experts - 1)
    for begin in range(tl.program_id(0) * BLOCK, capacity, tl.num_programs(0) * BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < capacity
        source, copy = find_row(row, num_rows, begins_ptr, firsts_ptr, num_groups, world, steps)
        # A source that names an expert twice for a token has no room for all of its copies.
        real = inside & (source >= 0) & (copy < num_slot_ids)
        source, copy = source.to(tl.int64), copy.to(tl.int64)
        found = tl.load(slot_ids_ptr + source * slot_ids_stride + copy, mask=real, other=_NOWHERE)
        sent = found // slots_per_row
        if table_ptr is not None:
            index = tl.load(table_ptr + source * table_stride + sent, mask=real, other=0)
        else:
            index = tl.load(origins_ptr + source, mask=real, other=0) + sent.to(tl.int64) * row_step
        tl.store(source_ptr + row, source, mask=inside)
        tl.store(copy_ptr + row, copy, mask=inside)
        tl.store(found_ptr + row, found, mask=inside)
        tl.store(index_ptr + row, tl.where(real, index, _NOWHERE), mask=inside)
        if weights_ptr is not None:
            weight_at = weights_ptr + source * weights_stride + copy
            tl.store(received_ptr + row, tl.load(weight_at, mask=real, other=0.0), mask=inside)


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
    """Number the rows that all sources sent this rank, and say where each lies.

    Row r of source s is at ``origins[s] + r * step``, or at ``table[s, r]``.

    Args:
        counts: [L, W] int32 rows for each local expert from each source.
        slot_ids: [W, C] int32 the sources' lists of copies for this rank.
        weights: [W, C] their weights, or None.
        slots_per_row: K + NS where the copies of a token share its row, or 1.
        origins: [W] int64, or None with a table.
        step: from one row of a source to its next.
        table: [W, R] int64, or None.
        alignment: as in ``recv_permutation``.
        capacity: as in ``recv_permutation``.
        load: [L] int64 to add the rows of each local expert to, padding left out, or None.
        totals_dtype: int32 or int64, of ``totals``.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape, or an alignment below 1.
        MissingArgumentError: neither origins nor a table.
    """
    op, device = "recv_row_index", counts.device
    totals = torch.empty(counts.shape[:1], dtype=totals_dtype, device=device)
    groups = number_groups(op, counts, alignment, capacity, load, totals)
    num_experts, world = counts.shape
    _check_lists(op, "slot_ids", slot_ids, (torch.int32,), counts)
    if weights is not None:
        _check_lists(op, "weights", weights, FLOATS, counts)
    if table is not None:
        _check_lists(op, "table", table, (torch.int64,), counts)
    elif origins is None:
        raise MissingArgumentError(op, "origins", "be given where there is no table", None)
    else:
        int64 = (torch.int64,)
        check_tensor(op, "origins", origins, dtypes=int64, shape=(world,), device=device)
    num_rows = groups.rows(capacity)
    source, copy, index = torch.empty((3, num_rows), dtype=torch.int64, device=device).unbind()
    found = torch.empty(num_rows, dtype=torch.int32, device=device)
    received = None
    if weights is not None:
        received = torch.empty(num_rows, dtype=weights.dtype, device=device)
    if num_rows:
        line = launch_config.line(device, num_rows)
        _arrivals_kernel[(line.num_programs,)](
            groups.group_starts,
            groups.slot_ids,
            groups.offsets,
            slot_ids,
            weights,
            origins,
            table,
            source,
            copy,
            found,
            index,
            received,
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
    numbering = RecvPermutation(
        source, copy, groups.recv_counts_cumsum, groups.offsets, groups.group_starts
    )
    return RecvRowIndex(numbering, found, index, received, totals)


def _check_lists(
    op: str,
    name: str,
    lists: torch.Tensor,
    dtypes: Collection[torch.dtype],
    counts: torch.Tensor,
) -> None:
    """One list for each source."""
    shape = (counts.shape[1], None)
    check_tensor(
        op, name, lists, dtypes=dtypes, shape=shape, device=counts.device, strided_columns=False
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
def _returns_kernel(
    begins_ptr,  # [W, L, W + 1] int32
    expert_ids_ptr,  # [T, K] int32 | int64
    expand_idx_ptr,  # [T * K] int32
    shared_ptr,  # [NS] int64, or None
    origins_ptr,  # [W] int64
    index_ptr,  # [T, K + NS] int64
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
    num_slots = top_k + num_shared
    slot = tl.arange(0, SLOTS)
    by_holder = (local * (world + 1)).to(tl.int64)
    for begin in range(tl.program_id(0) * TOKENS, num_tokens, tl.num_programs(0) * TOKENS):
        token = begin + tl.arange(0, TOKENS)
        inside = (token < num_tokens)[:, None] & (slot < top_k)[None, :]
        flat = (token * top_k)[:, None] + slot[None, :]
        place = tl.load(expand_idx_ptr + flat, mask=inside, other=_NOWHERE)
        sent = place != _NOWHERE
        expert = tl.load(expert_ids_ptr + flat, mask=sent, other=0).to(tl.int64)
        holder = num_shared_ranks + expert // local
        group = holder * by_holder + expert % local * (world + 1) + rank
        row = tl.load(begins_ptr + group, mask=sent, other=0) + place
        sent = sent & (row < capacity)
        index = tl.load(origins_ptr + holder, mask=sent, other=0)
        index += row.to(tl.int64) * row_step
        at = (token * num_slots)[:, None] + slot[None, :]
        tl.store(index_ptr + at, tl.where(sent, index, _NOWHERE), mask=inside)

        if shared_ptr is not None:
            # The tokens that take part, of those before these and of these.
            earlier = 0
            for other in range(0, begin, TOKENS):
                others = other + tl.arange(0, TOKENS)
                mask = (others < begin)[:, None] & (slot < top_k)[None, :]
                ids_at = (others * top_k)[:, None] + slot[None, :]
                ids = tl.load(expert_ids_ptr + ids_at, mask=mask, other=_NOWHERE)
                earlier += tl.sum(tl.max((ids != _NOWHERE).to(tl.int32), axis=1))
            ids = tl.load(expert_ids_ptr + flat, mask=inside, other=_NOWHERE)
            active = tl.max((ids != _NOWHERE).to(tl.int32), axis=1)
            place = earlier + tl.cumsum(active, axis=0) - active
            for shared in range(num_shared):
                owner = tl.load(shared_ptr + shared)
                first = tl.load(begins_ptr + owner * by_holder + rank)
                origin = tl.load(origins_ptr + owner)
                shared_row = first + place
                copied = origin + shared_row.to(tl.int64) * row_step
                kept = (active > 0) & (shared_row < shared_capacity)
                copied = tl.where(kept, copied, _NOWHERE)
                copied_at = token * num_slots + top_k + shared
                tl.store(index_ptr + copied_at, copied, mask=token < num_tokens)


def combine_row_index(
    group_starts: torch.Tensor,
    routing: RoutingPlan,
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
    """Where each token's rows are after the experts: row r of holder h at origins[h] + r * step.

    Args:
        group_starts: [W, L, W + 1] int32 every rank's ``RecvPermutation.group_starts``; a shared
            expert's is its holder's first.
        routing: the plan of ``expert_ids``.
        expert_ids: [T, K] int32 or int64 of this rank's tokens.
        rank: this rank, the source of the tokens.
        num_shared_ranks: S; the MoE ranks come after them.
        shared_ranks: the rank that has its tokens, for each shared expert.
        origins: [W] int64.
        step: from one row of a holder to its next.
        capacity: rows of a holder of routed experts, or None where all have room. Those that have
            none were left out.
        shared_capacity: as ``capacity``, of a holder of a shared expert.

    Returns:
        [T, K + NS] int64, ``NOWHERE`` for a slot without a row.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape.
    """
    op, device = "combine_row_index", group_starts.device
    check_tensor(
        op,
        "group_starts",
        group_starts,
        dtypes=(torch.int32,),
        shape=(None, None, None),
        device=device,
    )
    world, local, columns = group_starts.shape
    if columns != world + 1:
        raise ArgumentValueError(
            op, "group_starts", "have the shape (W, L, W + 1)", tuple(group_starts.shape)
        )
    check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=(None, None), device=device)
    check_tensor(op, "origins", origins, dtypes=(torch.int64,), shape=(world,), device=device)
    num_tokens, top_k = expert_ids.shape
    num_shared = len(shared_ranks)
    index = torch.empty((num_tokens, top_k + num_shared), dtype=torch.int64, device=device)
    if index.numel():
        slots = triton.next_power_of_2(top_k)
        line = launch_config.line(device, num_tokens * slots)
        _returns_kernel[(line.num_programs,)](
            group_starts.contiguous(),
            expert_ids.contiguous(),
            routing.position_in_expert,
            _table(tuple(shared_ranks), device) if num_shared else None,
            origins,
            index,
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
    return index


# Copied to the device once and never forgotten: graphs that replay it do not keep it alive.
@functools.cache
def _table(ranks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ranks, dtype=torch.int64, device=device)

"""Which copy goes where: plans, the rows that a rank receives, those that it gets back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import (
    NOWHERE,
    LocalPermutation,
    RecvPermutation,
    RecvRowIndex,
    RoutingCopies,
    RoutingPlan,
)
from ._common import exclusive_cumsum, fitted


def routing_plan(
    expert_ids: torch.Tensor, num_experts: int, kept: RoutingCopies | None = None
) -> RoutingPlan:
    """Count and rank the copies of [T, K] ``expert_ids``; ids beyond [0, E) are not sent.

    Args:
        expert_ids: [T, K] int32 or int64.
        num_experts: E.
        kept: what to copy on the way, or None.
    """
    if kept is not None:
        kept.expert_ids.copy_(expert_ids)
        if kept.weights is not None and kept.weights_copy is not None:
            kept.weights_copy.copy_(kept.weights)
    ids = expert_ids.reshape(-1).long()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    counts = torch.bincount(ids, minlength=num_experts + 1).int()
    order = torch.argsort(ids, stable=True)
    position = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    position_in_expert = torch.empty_like(position)
    position_in_expert[order] = position - exclusive_cumsum(counts)[ids[order]]
    position_in_expert.masked_fill_(ids == num_experts, NOWHERE)
    return RoutingPlan(counts[:num_experts], position_in_expert, order.int())


def recv_permutation(
    counts: torch.Tensor, alignment: int = 1, capacity: int | None = None
) -> RecvPermutation:
    """Number the rows that [L, W] int32 ``counts`` (local expert, source) announce.

    Args:
        counts: rows for each local expert from each source.
        alignment: the rows of each expert are padded to a multiple of this.
        capacity: rows to return numbers for; those after the n-th have the source ``NOWHERE`` and
            the copy 0, and no offset is beyond it. None for the n rows there are.
    """
    world = counts.shape[1]
    rows = counts.sum(1, dtype=torch.int32)
    padded = (rows + alignment - 1) // alignment * alignment
    groups = torch.cat([counts, (padded - rows)[:, None]], dim=1)
    group_starts = exclusive_cumsum(groups.reshape(-1))
    group = torch.repeat_interleave(
        torch.arange(groups.numel(), device=counts.device), groups.reshape(-1).long()
    )
    # Where the group's copies begin in its source's list, which runs over this rank's experts.
    first = torch.nn.functional.pad(exclusive_cumsum(counts, dim=0), (0, 1)).reshape(-1)
    within = torch.arange(group.numel(), device=counts.device) - group_starts[group]
    source = group % (world + 1)
    source = source.where(source < world, NOWHERE)
    copy = (first[group] + within).long()
    offsets = padded.cumsum(0, dtype=torch.int32)
    if capacity is not None:
        offsets = offsets.clamp(max=capacity)
        source = fitted(source, capacity, NOWHERE)
        copy = fitted(copy, capacity, 0)
    return RecvPermutation(
        source,
        copy,
        counts.reshape(-1).cumsum(0, dtype=torch.int32),
        offsets,
        group_starts.view(groups.shape).int(),
    )


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
    """
    numbering = recv_permutation(counts, alignment, capacity)
    if load is not None:
        load += counts.sum(1)
    real = numbering.source != NOWHERE
    source, copy = numbering.source.where(real, 0), numbering.copy.where(real, 0)
    found = slot_ids[source, copy] if slot_ids.numel() else copy.int()
    row = (found // slots_per_row).long().where(real, 0)
    if table is not None:
        index = table[source, row]
    else:
        assert origins is not None
        index = origins[source] + row * step
    received = None
    if weights is not None:
        received = weights[source, copy] if weights.numel() else weights.new_zeros(len(real))
        received = received.where(real, 0)
    return RecvRowIndex(
        numbering,
        found.where(real, NOWHERE).int(),
        index.where(real, NOWHERE),
        received,
        counts.sum(1, dtype=totals_dtype),
    )


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
        expert_ids: [T, K].
        weights: [T, K], or None.
        alignment: as in ``recv_permutation``.
        capacity: as in ``recv_permutation``.
        load: as in ``recv_row_index``.
        totals_dtype: as in ``recv_row_index``.
    """
    numbering = recv_permutation(routing.counts[:, None], alignment, capacity)
    if load is not None:
        load += routing.counts
    real = (numbering.source != NOWHERE).nonzero()[:, 0]
    flat = routing.sorted_slot_ids[numbering.copy[real]].long()
    slot_ids = routing.sorted_slot_ids.new_full((len(numbering.source),), NOWHERE)
    slot_ids[real] = flat.int()
    row_index = real.new_full(expert_ids.shape, NOWHERE)
    row_index.view(-1)[flat] = real
    received = None
    if weights is not None:
        received = weights.new_zeros(len(slot_ids))
        received[real] = weights.reshape(-1)[flat]
    return LocalPermutation(
        numbering, slot_ids, row_index, received, routing.counts.to(totals_dtype, copy=True)
    )


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
        expert_ids: [T, K] of this rank's tokens.
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
    """
    ids, local = expert_ids.long(), group_starts.shape[1]
    place = routing.position_in_expert.view(ids.shape)
    sent = place != NOWHERE
    expert = ids.where(sent, 0)
    holder = num_shared_ranks + expert // local
    row = group_starts[holder, expert % local, rank] + place
    if capacity is not None:
        sent = sent & (row < capacity)
    routed = (origins[holder] + row * step).where(sent, NOWHERE)
    # A token takes part if any of its slots does; shared experts get those in their order.
    active = (ids != NOWHERE).any(1, keepdim=True)
    token = active.cumsum(0) - 1
    shared = torch.tensor(shared_ranks, dtype=torch.long, device=ids.device)
    shared_row = group_starts[shared, 0, rank] + token
    if shared_capacity is not None:
        active = active & (shared_row < shared_capacity)
    shared_index = (origins[shared] + shared_row * step).where(active, NOWHERE)
    return torch.cat([routed, shared_index], dim=1)

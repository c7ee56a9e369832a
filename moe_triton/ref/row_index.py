"""Addresses of rows: those that a rank receives, and those that combine reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import NOWHERE, RecvRowIndex, RoutingPlan
from .recv_permutation import recv_permutation


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

    Args:
        counts: [L, W] int32 rows for each local expert from each source.
        slot_ids: [W, C] int32 ``DispatchHeader.slot_ids`` of each source.
        weights: [W, C] their weights, or None.
        slots_per_row: K + NS where the slots of a token share its row, or 1.
        origins: [W] int64, or None with a table.
        step: from one row of a source to the next.
        table: [W, R] int64, or None.
        alignment: as in ``recv_permutation``.
        capacity: as in ``recv_permutation``.
        load: [L] int64, the rows of each local expert without padding are added to it; or None.
        totals_dtype: int32 or int64, of ``totals``.
    """
    permutation = recv_permutation(counts, alignment, capacity)
    if load is not None:
        load += counts.sum(1)
    assert permutation.index_in_source is not None
    real = permutation.source != NOWHERE
    source = permutation.source.where(real, 0)
    index_in_source = permutation.index_in_source.where(real, 0)
    sent_ids = index_in_source.int()
    if slot_ids.numel():
        sent_ids = slot_ids[source, index_in_source]
    row = (sent_ids // slots_per_row).long().where(real, 0)
    if table is not None:
        row_index = table[source, row]
    else:
        assert origins is not None
        row_index = origins[source] + row * step
    row_weights = None
    if weights is not None:
        row_weights = weights.new_zeros(len(real))
        if weights.numel():
            row_weights = weights[source, index_in_source].where(real, 0)
    return RecvRowIndex(
        permutation,
        sent_ids.where(real, NOWHERE).int(),
        row_index.where(real, NOWHERE),
        row_weights,
        counts.sum(1, dtype=totals_dtype),
    )


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
    """Address of the expert's row of each slot: row r of rank h is at ``origins[h] + r * step``.

    Args:
        group_starts: [W, L, W + 1] int32 every rank's ``RecvPermutation.group_starts``; that of a
            shared expert is the first of its rank.
        plan: the plan of ``expert_ids``.
        expert_ids: [T, K] int32 or int64 of this rank's tokens.
        rank: this rank, the source of the tokens.
        num_shared_ranks: S; the MoE ranks come after them.
        shared_ranks: the rank that serves this rank's tokens, for each shared expert.
        origins: [W] int64.
        step: from one row of a rank to the next.
        capacity: rows of a MoE rank: dispatch dropped the slots past them. None for no limit.
        shared_capacity: as ``capacity``, of a rank with a shared expert.

    Returns:
        [T, K + NS] int64, ``NOWHERE`` for a slot without a row.
    """
    ids, local = expert_ids.long(), group_starts.shape[1]
    position = plan.position_in_expert.view(ids.shape)
    sent = position != NOWHERE
    expert = ids.where(sent, 0)
    moe_rank = num_shared_ranks + expert // local
    row = group_starts[moe_rank, expert % local, rank] + position
    if capacity is not None:
        sent = sent & (row < capacity)
    routed = (origins[moe_rank] + row * step).where(sent, NOWHERE)
    # A token is active if any of its slots is; shared experts get the active tokens in order.
    active = (ids != NOWHERE).any(1, keepdim=True)
    token = active.cumsum(0) - 1
    shared = torch.tensor(shared_ranks, dtype=torch.long, device=ids.device)
    shared_row = group_starts[shared, 0, rank] + token
    if shared_capacity is not None:
        active = active & (shared_row < shared_capacity)
    shared_index = (origins[shared] + shared_row * step).where(active, NOWHERE)
    return torch.cat([routed, shared_index], dim=1)

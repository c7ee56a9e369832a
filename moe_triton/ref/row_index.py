"""Indices of rows: those that a rank receives, and those that combine reads."""

from __future__ import annotations

import torch

from ..layout import NOWHERE, RecvRowIndex, RoutingPlan
from .recv_permutation import recv_permutation


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

    Args:
        counts: [L, W] int32 rows for each local expert from each source.
        slot_ids: [W, C] int32 slot ids of each source's rows for this rank: in (expert, slot id)
            order, or in token order for a shared expert.
        weights: [W, C] their weights, or None.
        table: [W, R] int64 index of each source's row.
        slots_per_row: K + NS where the slots of a token share its row, or 1.
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
    row_index = source
    if table.numel():
        row_index = table[source, row]
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
    capacity: int | None = None,
) -> torch.Tensor:
    """Index of the expert's row of each slot, on a rank that sends to itself alone.

    Args:
        group_starts: [E, 2] int32 ``RecvPermutation.group_starts``.
        plan: the plan of ``expert_ids``.
        expert_ids: [T, K] int32 or int64.
        capacity: rows of the rank: dispatch dropped the slots past them. None for no limit.

    Returns:
        [T, K] int64, ``NOWHERE`` for a slot without a row.
    """
    ids = expert_ids.long()
    position = plan.position_in_expert.view(ids.shape)
    sent = position != NOWHERE
    row = group_starts[ids.where(sent, 0), 0].long() + position
    if capacity is not None:
        sent = sent & (row < capacity)
    return row.where(sent, NOWHERE)

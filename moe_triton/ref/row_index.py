"""Indices of rows: those that a rank receives, and those that combine reads."""

from __future__ import annotations

import numpy as np
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
    totals = counts.sum(1)
    if load is not None:
        load += totals
    assert permutation.index_in_source is not None
    # numpy: its calls cost a tenth of torch's.
    source, at = permutation.source.numpy(), permutation.index_in_source.numpy()
    absent = source == NOWHERE
    source, at = np.where(absent, 0, source), np.where(absent, 0, at)
    sent_ids = slot_ids.numpy()[source, at] if slot_ids.numel() else at.astype(np.int32)
    row_index = source
    if table.numel():
        row_index = table.numpy()[source, np.where(absent, 0, sent_ids // slots_per_row)]
    row_weights = None
    if weights is not None:
        row_weights = weights.new_zeros(len(source))
        if weights.numel():
            row_weights = weights[torch.from_numpy(source), torch.from_numpy(at)]
            row_weights.masked_fill_(torch.from_numpy(absent), 0)
    return RecvRowIndex(
        permutation,
        torch.from_numpy(np.where(absent, np.int32(NOWHERE), sent_ids)),
        torch.from_numpy(np.where(absent, NOWHERE, row_index)),
        row_weights,
        totals.to(totals_dtype),
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

"""The permutation of a rank whose experts are its own."""

from __future__ import annotations

import torch

from ..layout import NOWHERE, LocalPermutation, RoutingPlan
from .recv_permutation import recv_permutation


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

    Args:
        plan: the plan of ``expert_ids``.
        expert_ids: [T, K] int32 or int64.
        weights: [T, K], or None.
        alignment: as in ``recv_permutation``.
        capacity: as in ``recv_permutation``.
        load: as in ``recv_row_index``.
        totals_dtype: as in ``recv_row_index``.
    """
    permutation = recv_permutation(plan.counts[:, None], alignment, capacity)
    if load is not None:
        load += plan.counts
    assert permutation.index_in_source is not None
    real = (permutation.source != NOWHERE).nonzero()[:, 0]
    sorted_ids = plan.sorted_slot_ids[permutation.index_in_source[real]].long()
    slot_ids = plan.sorted_slot_ids.new_full((len(permutation.source),), NOWHERE)
    slot_ids[real] = sorted_ids.int()
    row_index = real.new_full(expert_ids.shape, NOWHERE)
    row_index.view(-1)[sorted_ids] = real
    row_weights = None
    if weights is not None:
        row_weights = weights.new_zeros(len(slot_ids))
        row_weights[real] = weights.reshape(-1)[sorted_ids]
    totals = plan.counts.to(totals_dtype, copy=True)
    return LocalPermutation(permutation, slot_ids, row_index, row_weights, totals)

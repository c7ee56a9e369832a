"""The plan and the permutation of a rank whose experts are its own."""

from __future__ import annotations

import torch

from ..layout import NOWHERE, LocalPermutation, RoutingCopies
from .recv_permutation import recv_permutation
from .routing_plan import routing_plan


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

    Args:
        expert_ids: [T, K] int32 or int64.
        num_experts: E.
        weights: [T, K], or None.
        copies: as in ``routing_plan``, of these ids and weights.
        alignment: as in ``recv_permutation``.
        capacity: as in ``recv_permutation``.
        load: as in ``recv_row_index``.
        totals_dtype: as in ``recv_row_index``.
    """
    plan = routing_plan(expert_ids, num_experts, copies)
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
    return LocalPermutation(
        plan.counts,
        plan.position_in_expert,
        permutation._replace(index_in_source=None),
        slot_ids,
        row_index,
        row_weights,
        plan.counts.to(totals_dtype, copy=True),
    )

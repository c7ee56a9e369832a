"""Count and rank the slots of a rank's tokens by expert."""

from __future__ import annotations

import torch

from ..layout import NOWHERE, RoutingCopies, RoutingPlan
from ._common import exclusive_cumsum


def routing_plan(
    expert_ids: torch.Tensor, num_experts: int, copies: RoutingCopies | None = None
) -> RoutingPlan:
    """Count the slots of each expert and sort them by expert; ids outside [0, E) are not sent.

    Args:
        expert_ids: [T, K] int32 or int64.
        num_experts: E.
        copies: outputs for copies of the routing, or None.
    """
    if copies is not None:
        copies.expert_ids.copy_(expert_ids)
        if copies.weights is not None and copies.weights_copy is not None:
            copies.weights_copy.copy_(copies.weights)
    ids = expert_ids.reshape(-1).long()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    counts = torch.bincount(ids, minlength=num_experts + 1).int()
    order = torch.argsort(ids, stable=True)
    position = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    position_in_expert = torch.empty_like(position)
    position_in_expert[order] = position - exclusive_cumsum(counts)[ids[order]]
    position_in_expert.masked_fill_(ids == num_experts, NOWHERE)
    return RoutingPlan(counts[:num_experts], position_in_expert, order.int())

"""Count and rank the slots of a rank's tokens by expert."""

from __future__ import annotations

import numpy as np
import torch

from ..layout import NOWHERE, RoutingCopies, RoutingPlan

_UNSIGNED = {4: np.uint32, 8: np.uint64}


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
    # numpy: its calls cost a tenth of torch's, and it sorts short integers by radix.
    ids = expert_ids.reshape(-1).numpy()
    ids = np.minimum(
        ids.view(_UNSIGNED[ids.dtype.itemsize]), num_experts
    )  # negative ones are large
    ids = ids.astype(np.uint16 if num_experts < 2**16 else np.int64)
    counts = np.bincount(ids, minlength=num_experts + 1)
    order = ids.argsort(kind="stable")
    position = np.arange(len(ids), dtype=np.int32)
    position -= (counts.cumsum() - counts).repeat(counts)
    position[len(ids) - counts[num_experts] :] = NOWHERE
    position_in_expert = np.empty_like(position)
    position_in_expert[order] = position
    return RoutingPlan(
        torch.from_numpy(counts[:num_experts].astype(np.int32)),
        torch.from_numpy(position_in_expert),
        torch.from_numpy(order.astype(np.int32)),
    )

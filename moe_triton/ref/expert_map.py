"""Physical experts of a token's slots: replicas, and slots below a threshold."""

from __future__ import annotations

import torch

from ._common import row_sums


def eplb_map(
    expert_ids: torch.Tensor, table: torch.Tensor, *, rank: int | None, world_size: int
) -> torch.Tensor:
    """Replace each logical expert by the physical id of one of its replicas.

    Args:
        expert_ids: [T, K] int32 or int64, in [0, E).
        table: [E, F] int32: the number of replicas of an expert, then their physical ids.
        rank: this rank, which uses replica rank // ceil(world_size / replicas); None for replica
            token % replicas.
        world_size: number of ranks.

    Returns:
        [T, K] of the dtype of ``expert_ids``.
    """
    ids = expert_ids.long()
    count = table[:, 0].long()[ids]
    if rank is None:
        token = torch.arange(len(ids), device=ids.device)[:, None]
        number = token % count
    else:
        number = rank // ((world_size + count - 1) // count)
    return table[ids, 1 + number].to(expert_ids.dtype)


def keep_experts(
    weights: torch.Tensor, threshold: torch.Tensor, active: torch.Tensor | None
) -> torch.Tensor:
    """Mark the slots to keep: weight >= threshold * sum of the token's weights.

    Args:
        weights: [T, K] fp32.
        threshold: [K] fp32.
        active: [T] bool, or None for all tokens.

    Returns:
        [T, K] bool.
    """
    keep = weights >= threshold * row_sums(weights)
    return keep if active is None else keep & active[:, None]

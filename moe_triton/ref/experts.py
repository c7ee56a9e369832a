"""Which experts a token goes to: top-k gating, and which replica of each serves it."""

from __future__ import annotations

import torch


def top_k_gating(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_by_two: bool = False,
    scoring: str = "softmax",
    scaling: float = 1.0,
    epsilon: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the ``top_k`` experts with the largest score + bias; ties go to the lower id.

    Where experts come in groups, only those of the best groups can be chosen. Weights are the
    scores without bias; those of "sigmoid" are divided by their sum + ``epsilon``. With "chosen"
    the scores are the logits, and the weights a softmax over those that are chosen.

    Args:
        logits: [T, E] floating point.
        top_k: K.
        bias: [E], or None.
        given: [T, K] int32 the experts, where they are chosen already and only need weights.
        groups: equal groups of consecutive experts.
        top_groups: groups that a token may use.
        group_by_two: a group is as good as its two best experts together, not as its best one.
        scoring: "softmax", "sigmoid" or "chosen".
        scaling: factor of all weights.
        epsilon: keeps the division of "sigmoid" finite.

    Returns:
        weights: [T, K] fp32, largest score + bias first.
        ids: [T, K] int32.
        scores: [T, E] fp32.
    """
    x = logits.float()
    if scoring == "chosen":
        scores = x
    else:
        scores = torch.softmax(x, dim=1) if scoring == "softmax" else torch.sigmoid(x)
    choice = scores if bias is None else scores + bias.float()
    if groups > 1:
        grouped = choice.unflatten(1, (groups, -1))
        best = grouped.topk(2, dim=2).values.sum(2) if group_by_two else grouped.amax(2)
        chosen = best.argsort(dim=1, descending=True, stable=True)[:, :top_groups]
        usable = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
        choice = grouped.masked_fill(~usable[..., None], float("-inf")).flatten(1)
    if given is None:
        ids = choice.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    else:
        ids = given.long()
    weights = scores.gather(1, ids)
    if scoring == "sigmoid":
        weights = weights / (_row_sums(weights) + epsilon)
    elif scoring == "chosen":
        weights = torch.softmax(weights, dim=1)
    return weights * scaling, ids.int(), scores


def _row_sums(weights: torch.Tensor) -> torch.Tensor:
    """[T, K] -> [T, 1], added in ascending order; torch's own order depends on K."""
    total = torch.zeros_like(weights[:, :1])
    for column in weights.split(1, dim=1):
        total = total + column
    return total


def eplb_map(
    expert_ids: torch.Tensor, table: torch.Tensor, *, rank: int | None, world_size: int
) -> torch.Tensor:
    """Replace logical experts by the replica that serves this rank, or this token.

    Args:
        expert_ids: [T, K] int32 or int64, in [0, E).
        table: [E, F] int32: the number of replicas of an expert, then their physical ids.
        rank: this rank, whose replica is number rank // ceil(world_size / replicas); None for
            number token % replicas.
        world_size: ranks.

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
    """Which slots are worth their expert: weight >= threshold * sum of the token's weights.

    Args:
        weights: [T, K] fp32.
        threshold: [K] fp32.
        active: [T] bool, or None for all tokens.

    Returns:
        [T, K] bool.
    """
    keep = weights >= threshold * _row_sums(weights)
    return keep if active is None else keep & active[:, None]

"""Top-k gating: the experts and weights of each token."""

from __future__ import annotations

import torch

from ._common import row_sums


def top_k_gating(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    chosen_ids: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_by_two: bool = False,
    scoring: str = "softmax",
    scaling: float = 1.0,
    epsilon: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the ``top_k`` experts with the largest score + bias; ties go to the lower id.

    With groups, only the experts of the best groups can be chosen. Weights are the scores without
    bias; those of "sigmoid" are divided by their sum + ``epsilon``. With "chosen" the scores are
    the logits, and the weights are a softmax over the chosen ones.

    Args:
        logits: [T, E] fp16, bf16, fp32 or fp64; NaN is above all numbers.
        top_k: K, from 1 to E.
        bias: [E] of one of these dtypes, or None.
        chosen_ids: [T, K] int32 experts that are chosen already and only need weights, or None.
        groups: equal groups of consecutive experts.
        top_groups: groups that a token may use, from 1 to ``groups``.
        group_by_two: rank groups by the sum of their two best experts, not by their best one.
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
    if chosen_ids is None:
        ids = choice.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    else:
        ids = chosen_ids.long()
    weights = scores.gather(1, ids)
    if scoring == "sigmoid":
        weights = weights / (row_sums(weights) + epsilon)
    elif scoring == "chosen":
        weights = torch.softmax(weights, dim=1)
    return weights * scaling, ids.int(), scores

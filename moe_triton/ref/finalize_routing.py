"""End of a MoE layer on one device: weighted sum of expert rows, biases and skip connections."""

from __future__ import annotations

import torch

from ..layout import NOWHERE
from ._common import blocks
from .weighted_sum import accumulator


def finalize_routing(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    skips: tuple[torch.Tensor | None, torch.Tensor | None],
    out: torch.Tensor,
) -> None:
    """Sum the rows of each token, the biases of their experts, and the skip connections.

        out[t] = skips[0][t] + skips[1][t]
                 + sum_k weights[t, k] * (rows[index[t, k]] + bias[expert_ids[t, k]])

    in fp32 (fp64 for fp64), from left to right, every product and sum rounded, and once to the
    dtype of ``out``. The row of ``NOWHERE`` is zeros; without a bias its slot is left out, even if
    its weight is NaN.

    Args:
        rows: [N, H] fp16, bf16, fp32 or fp64; bias, skips and out have their dtype.
        index: [T, K] int64, or ``NOWHERE``.
        weights: [T, K] of any floating dtype, or None for all 1.
        bias: [E, H], or None.
        expert_ids: [T, K] int32, required with a bias.
        skips: two [T, H] tensors, each may be None.
        out: [T, H] output.
    """
    accumulated = accumulator(out.dtype)
    for tokens in blocks(*out.shape):
        total = torch.zeros_like(out[tokens], dtype=accumulated)
        for skip in skips:
            if skip is not None:
                total += skip[tokens].to(accumulated)
        for k, row in enumerate(index[tokens].unbind(1)):
            present = row != NOWHERE
            term = torch.zeros_like(total)
            term[present] = rows[row[present]].to(accumulated)
            if bias is not None:
                assert expert_ids is not None
                term += bias[expert_ids[tokens, k].long()].to(accumulated)
            if weights is not None:
                term *= weights[tokens, k, None].to(accumulated)
            if bias is None:
                term.masked_fill_(~present[:, None], 0.0)
            total += term
        out[tokens] = total

"""Stage a rank's tokens in its own window, with a header for every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import NOWHERE, DispatchHeader, RoutingPlan, RowFormat
from .quantize import encode


def stage_tokens(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    smooth_scales: torch.Tensor | None,
    fmt: RowFormat,
    plan: RoutingPlan,
    rows: torch.Tensor,
    headers: Sequence[DispatchHeader],
    *,
    experts_per_rank: int,
    shared_targets: Sequence[int],
    num_shared_ranks: int,
) -> None:
    """Write this rank's tokens into its own window, and its header into every rank's window.

    A token is written once, for all of its experts. With smooth factors for each expert the rows of
    its slots differ, so each slot is written.

    Args:
        x: [T, H] fp16, bf16, fp32 or fp64 tokens.
        expert_ids: [T, K] int32 or int64.
        weights: [T, K] routing weights to send, or None.
        smooth_scales: [1] or [H] fp32 factors of all slots, [NS + E, H] factors of each expert,
            shared experts first; or None.
        fmt: the format of the rows.
        plan: the plan of ``expert_ids``.
        rows: [R, stride] uint8 output; row t is token t, or with factors of each expert row
            t * (K + NS) + k its slot k.
        headers: this rank's header in every rank's window.
        experts_per_rank: L of the MoE ranks.
        shared_targets: the rank that gets all active tokens, for each shared expert.
        num_shared_ranks: S; the MoE ranks come after them.
    """
    num_tokens, top_k = expert_ids.shape
    num_shared = len(shared_targets)
    num_slots = top_k + num_shared
    if smooth_scales is None or smooth_scales.dim() == 1:
        encode(x, fmt, rows[:num_tokens], smooth_scales)
    else:
        slots = rows[: num_tokens * num_slots].unflatten(0, (num_tokens, num_slots))
        # Clamp: slots that are not sent get the factors of some expert.
        expert = expert_ids.long().clamp(0, len(plan.counts) - 1)
        for k in range(top_k):
            encode(x, fmt, slots[:, k], smooth_scales[num_shared + expert[:, k]])
        for shared in range(num_shared):
            encode(x, fmt, slots[:, top_k + shared], smooth_scales[shared])

    sorted_ids = plan.sorted_slot_ids
    slot_ids = sorted_ids + sorted_ids // top_k * num_shared  # t * K + k becomes t * (K + NS) + k
    sorted_weights = None if weights is None else weights.reshape(-1)[sorted_ids.long()]
    start = 0
    per_rank = plan.counts.view(-1, experts_per_rank).sum(1).tolist()
    for header, count in zip(headers[num_shared_ranks:], per_rank, strict=True):
        header.slot_ids[:count] = slot_ids[start : start + count]
        if sorted_weights is not None and header.weights is not None:
            header.weights[:count] = sorted_weights[start : start + count]
        start += count
    active = (expert_ids != NOWHERE).any(1).nonzero()[:, 0]
    for shared, rank in enumerate(shared_targets):
        header = headers[rank]
        header.slot_ids[: len(active)] = active * num_slots + top_k + shared
        if header.weights is not None:
            header.weights[: len(active)] = 1.0
    for header in headers:
        header.num_tokens[0] = len(active)
        header.counts.copy_(plan.counts)

"""Send a rank's tokens: rows into its own window, a record to every rank."""

from __future__ import annotations

import numpy as np
import torch

from ..layout import NOWHERE, ExchangeLayout, RoutingCopies, SlotPositions, Windows
from ..layout.windows import SENT
from ._windows import HostWindows, host
from .quantize import encode_apart


def dispatch_send(
    windows: Windows,
    layout: ExchangeLayout,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    smooth_scales: torch.Tensor | None,
    copies: RoutingCopies | None,
    *,
    digest: int,
) -> SlotPositions:
    """Write this rank's tokens into its window, and its record to every rank.

    A token is written once, for all of its experts. With smooth factors for each expert the rows of
    its slots differ, so each slot is written.

    Args:
        windows: of dispatch.
        layout: of the call.
        x: [T, H] fp16, bf16, fp32 or fp64 tokens.
        expert_ids: [T, K] int32 or int64; ids outside [0, E) are not sent.
        weights: [T, K] routing weights; required where the layout has weights.
        smooth_scales: [1] or [H] fp32 factors of all slots, [NS + E, H] factors of each expert,
            shared experts first; or None.
        copies: outputs for copies of the routing, or None.
        digest: of the arguments, int32.

    Returns:
        The positions of the slots; those of a broken group too, though nothing is sent then.
    """
    if copies is not None:
        copies.expert_ids.copy_(expert_ids)
        if copies.weights is not None and copies.weights_copy is not None:
            copies.weights_copy.copy_(copies.weights)
    num_experts, ids = layout.num_experts, expert_ids.numpy()
    counts, positions = count_slots(ids.reshape(-1), num_experts)
    active = active_positions(ids) if layout.num_shared_experts else None
    sent = SlotPositions(
        torch.from_numpy(counts[:num_experts]),
        torch.from_numpy(positions),
        None if active is None else torch.from_numpy(active),
    )
    memory = host(windows)
    if memory.broken:
        return sent
    epoch = memory.next_epoch(SENT)
    slot = memory.data_slot(epoch)
    words, start = memory.words, memory.own + memory.ring.data_start(slot)
    at = start // 4
    words[at : at + ids.size] = ids.reshape(-1)
    at += layout.positions_start // 4
    words[at : at + ids.size] = positions
    if active is not None:
        at += layout.positions_start // 4
        words[at : at + len(active)] = active
    if layout.weight_dtype is not None:
        assert weights is not None
        size = layout.weight_dtype.itemsize
        at = (start + layout.weights_start) // size
        memory.elements(size)[at : at + ids.size] = weights.detach().numpy().reshape(-1)
    _write_rows(memory, layout, slot, x, expert_ids, smooth_scales)
    # The last number is that of the active tokens.
    counts[num_experts] = 0 if active is None else (active != NOWHERE).sum()
    memory.send(epoch, counts, layout.dispatch_number_bytes, digest=digest, extra=x.shape[0])
    return sent


def count_slots(ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the slots of each expert, and the earlier ones of each slot's expert.

    Returns:
        [E + 1] int32 counts, the last one of ids outside [0, E); [N] int32 positions, ``NOWHERE``
        for these.
    """
    # Negative ids are large as unsigned integers.
    expert = np.minimum(ids.view(f"u{ids.itemsize}"), num_experts).astype(np.int32)
    counts = np.bincount(expert, minlength=num_experts + 1).astype(np.int32)
    order = expert.argsort(kind="stable")
    first = (counts.cumsum(dtype=np.int32) - counts).take(expert)
    positions = np.empty(len(ids), np.int32)
    positions[order] = np.arange(len(ids), dtype=np.int32)
    positions -= first
    if counts[num_experts]:
        positions[expert == num_experts] = NOWHERE
    return counts, positions


def active_positions(ids: np.ndarray) -> np.ndarray:
    """[T] int32 active tokens before each one of [T, K] ids, ``NOWHERE`` for inactive ones."""
    active = (ids != NOWHERE).any(1)
    return np.where(active, active.cumsum() - 1, NOWHERE).astype(np.int32)


def _write_rows(
    memory: HostWindows,
    layout: ExchangeLayout,
    slot: int,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    smooth_scales: torch.Tensor | None,
) -> None:
    """Write the rows of the tokens, or of their slots."""
    fmt, num_slots = layout.row_format, layout.rows_per_token
    count = x.shape[0] * num_slots
    payload, scales = memory.own_rows(fmt, slot, layout.rows_start)
    payload, scales = payload[:count], None if scales is None else scales[:count]
    if layout.per_expert:
        x = x.repeat_interleave(num_slots, 0)
        if smooth_scales is not None and smooth_scales.dim() == 2:
            smooth_scales = smooth_scales[_factors(layout, expert_ids)]
    encode_apart(x, fmt, payload, scales, smooth_scales)


def _factors(layout: ExchangeLayout, expert_ids: torch.Tensor) -> torch.Tensor:
    """[T * (K + NS)] index of each slot's factors among those of all experts."""
    num_shared = layout.num_shared_experts
    # Clamp: slots that are not sent get the factors of some expert.
    routed = num_shared + expert_ids.long().clamp(0, layout.num_experts - 1)
    shared = torch.arange(num_shared).expand(len(expert_ids), -1)
    return torch.cat([routed, shared], dim=1).flatten()

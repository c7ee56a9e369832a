"""The op behind ``npu_moe_update_expert``: choose replicas, prune light slots."""

from __future__ import annotations

import torch

from ...ops import checks
from ...ops.device_steps import steps_on
from ...profile import active_profile
from ..op_names import EPLB_UPDATE_EXPERT, UPDATE_EXPERT, family


def check_update_expert(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    *,
    expert_scales: torch.Tensor | None = None,
    pruning_threshold: torch.Tensor | None = None,
    active_mask: torch.Tensor | None = None,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int = 0,
    op: str = UPDATE_EXPERT,
) -> torch.Tensor | None:
    """Check all arguments; return the threshold as [K], or None without pruning.

    ``op`` is ``op_names.UPDATE_EXPERT`` or ``EPLB_UPDATE_EXPERT``, whose ids are int32 only.
    """
    checks.required(op, expert_ids=expert_ids, eplb_table=eplb_table)
    checks.integers(
        op, local_rank_id=local_rank_id, world_size=world_size, balance_mode=balance_mode
    )
    kinds = (torch.int32,) if op == EPLB_UPDATE_EXPERT else (torch.int32, torch.int64)
    checks.dtype(op, "expert_ids", expert_ids, kinds)
    checks.dtype(op, "eplb_table", eplb_table, (torch.int32,))
    checks.dtype(op, "expert_scales", expert_scales, (*checks.FLOATS, torch.float32))
    checks.dtype(op, "pruning_threshold", pruning_threshold, (torch.float32,))
    checks.dtype(op, "active_mask", active_mask, (torch.bool,))

    device = expert_ids.device
    checks.shape(op, "expert_ids", expert_ids, (None, None), "(BS, K)", device)
    checks.shape(op, "eplb_table", eplb_table, (None, None), "(E, F)", device)
    (num_tokens, top_k), (num_experts, columns) = expert_ids.shape, eplb_table.shape
    checks.value(op, "balance_mode", balance_mode in (0, 1), "be 0 or 1", balance_mode)
    by_rank = balance_mode == 0
    active_profile().check(
        family(op),
        op,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        world_size=world_size if by_rank else None,
        balance_mode=balance_mode,
    )
    contract = f"have 1 to E = {num_experts} columns"
    got = f"shape {tuple(expert_ids.shape)}"
    checks.value(op, "expert_ids", 1 <= top_k <= num_experts, contract, got)
    contract = "have more than one column" + (", and at most world_size + 1" if by_rank else "")
    fits = columns > 1 and (not by_rank or columns <= world_size + 1)
    if by_rank:
        checks.value(op, "world_size", world_size >= 1, "be positive", world_size)
        inside = 0 <= local_rank_id < world_size
        checks.value(op, "local_rank_id", inside, f"be in [0, {world_size})", local_rank_id)
    checks.value(op, "eplb_table", fits, contract, f"shape {tuple(eplb_table.shape)}")
    _check_values(op, expert_ids, eplb_table)
    threshold = _check_pruning(op, expert_ids, expert_scales, pruning_threshold)
    checks.shape(op, "active_mask", active_mask, (num_tokens,), "(BS,)", device)
    return threshold


def update_expert(
    expert_ids: torch.Tensor,
    eplb_table: torch.Tensor,
    *,
    expert_scales: torch.Tensor | None = None,
    pruning_threshold: torch.Tensor | None = None,
    active_mask: torch.Tensor | None = None,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int = 0,
    op: str = UPDATE_EXPERT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map logical experts to replicas; shapes and errors are in ``compat.torch_npu``."""
    threshold = check_update_expert(
        expert_ids,
        eplb_table,
        expert_scales=expert_scales,
        pruning_threshold=pruning_threshold,
        active_mask=active_mask,
        local_rank_id=local_rank_id,
        world_size=world_size,
        balance_mode=balance_mode,
        op=op,
    )
    device, top_k = expert_ids.device, expert_ids.shape[1]
    rank = int(local_rank_id) if balance_mode == 0 else None
    replicas = steps_on(device).eplb_map
    balanced = replicas(expert_ids, eplb_table, rank=rank, world_size=int(world_size))
    if threshold is not None:
        assert expert_scales is not None
        keep = steps_on(device).keep_experts(expert_scales.float(), threshold, active_mask)
    elif active_mask is not None:
        keep = active_mask[:, None].repeat(1, top_k)
    else:
        keep = torch.ones(expert_ids.shape, dtype=torch.bool, device=device)
    return balanced, keep


def _check_values(op: str, ids: torch.Tensor, table: torch.Tensor) -> None:
    """On the CPU: ids are in [0, E) and every table row has a valid count."""
    if ids.device.type != "cpu":
        return
    counts, most = table[:, 0], table.shape[1] - 1
    wrong = ((counts < 1) | (counts > most)).nonzero()
    if len(wrong):
        expert = int(wrong[0])
        contract = f"begin each row with a number of replicas in [1, {most}]"
        checks.value(op, "eplb_table", False, contract, f"{int(counts[expert])} for {expert}")
    outside = ((ids < 0) | (ids >= len(table))).nonzero()
    if len(outside):
        token, slot = outside[0].tolist()
        got = f"{int(ids[token, slot])} for token {token}, slot {slot}"
        checks.value(op, "expert_ids", False, f"be in [0, {len(table)})", got)


def _check_pruning(
    op: str, ids: torch.Tensor, weights: torch.Tensor | None, threshold: torch.Tensor | None
) -> torch.Tensor | None:
    """The threshold as [K], or None without pruning."""
    if (weights is None) != (threshold is None):
        names = ["expert_scales", "pruning_threshold"]
        missing, other = names if weights is None else names[::-1]
        checks.value(op, missing, False, f"be given when {other} is given", None)
    checks.shape(op, "expert_scales", weights, tuple(ids.shape), "(BS, K)", ids.device)
    if threshold is None:
        return None
    top_k = ids.shape[1]
    flat = threshold[0] if threshold.dim() == 2 and len(threshold) == 1 else threshold
    checks.shape(op, "pruning_threshold", flat, (top_k,), "(K,) or (1, K)", ids.device)
    return flat

"""Logical experts to the replicas that serve them; letters in the package."""

from __future__ import annotations

from torch import Tensor

from ...ascend.distributed import schemas


def npu_moe_update_expert(
    expert_ids: Tensor,
    eplb_table: Tensor,
    *,
    expert_scales: Tensor | None = None,
    pruning_threshold: Tensor | None = None,
    active_mask: Tensor | None = None,
    local_rank_id: int = -1,
    world_size: int = -1,
    balance_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    """Replace logical experts by the replicas that serve them; without communication.

    Of n replicas, balance_mode 0 takes number local_rank_id // ceil(world_size / n), and 1 takes
    number i % n for token i. Pass the ids and the mask to both dispatch and combine, with the
    number of replicas as moe_expert_num.

    Args:
        expert_ids: (BS, K) int32 or int64 in [0, E).
        eplb_table: (E, F) int32: for each expert the number of its replicas, at least one, then
            their ids; further elements are ignored. With balance_mode 0, F is at most
            world_size + 1.
        expert_scales: (BS, K) float16, bfloat16 or float32 weights, with pruning_threshold.
        pruning_threshold: (K,) or (1, K) float32. A slot stays active if its weight is at least
            this fraction of the sum of the token's weights. None for all slots.
        active_mask: (BS,) bool, the active tokens; None for all.
        local_rank_id: this rank; ignored with balance_mode 1.
        world_size: number of ranks; ignored with balance_mode 1.
        balance_mode: 0 by rank, 1 by token.

    Returns:
        balanced_expert_ids: (BS, K) of the dtype of expert_ids.
        balanced_active_mask: (BS, K) bool, the active slots.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentValueError: 561002, a shape or value; values in tensors are checked on the CPU.
    """
    return schemas.update_expert(**locals())

"""From logical experts to the replicas that serve them; letters in the package."""

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
    """Replace logical experts by the replicas that serve them; on this rank alone.

    Of n replicas, balance_mode 0 takes number local_rank_id // ceil(world_size / n), and 1, for
    token i, number i % n. The ids that come out are for dispatch and combine both, with as many
    experts as there are replicas, and so is the mask.

    Args:
        expert_ids: (BS, K) int32 or int64 in [0, E).
        eplb_table: (E, F) int32: for each expert the number of its replicas, at least one, then
            their ids; the rest of a row is not looked at. With balance_mode 0, F is at most
            world_size + 1.
        expert_scales: (BS, K) float32 weights, with pruning_threshold.
        pruning_threshold: (K,) or (1, K) float32. A slot stays when its weight is at least this
            part of the sum of the token's weights. None for all slots.
        active_mask: (BS,) bool, the tokens that take part; None for all.
        local_rank_id: this rank; not looked at with balance_mode 1.
        world_size: number of ranks, likewise.
        balance_mode: 0 by rank, 1 by token.

    Returns:
        balanced_expert_ids: (BS, K) of the dtype of expert_ids.
        balanced_active_mask: (BS, K) bool, which slots stay.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentValueError: 561002, a shape or value; contents are checked on the CPU.
    """
    return schemas.update_expert(**locals())

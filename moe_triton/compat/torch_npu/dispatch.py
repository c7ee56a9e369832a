"""Dispatch, versions 1 and 2: tokens to the ranks of their experts; letters in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascend.distributed import schemas


def npu_moe_distribute_dispatch(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send each token to the ranks of its experts; collective over the group.

    Args:
        x: (BS, H) float16 or bfloat16; with quant_mode 0 also quantised tokens, float8_e4m3fn or
            float8_e5m2. BS may be 0, and may differ between ranks with global_bs.
        expert_ids: (BS, K) int32 in [0, E), distinct within a row.
        group_ep: the group.
        ep_world_size: W.
        ep_rank_id: this rank.
        moe_expert_num: E, a multiple of W - S.
        scales: float32 smooth scales, by which tokens are multiplied before quantisation:
            (NS + E, H), a row for each expert, shared ones first, optional with quant_mode 2 and 3;
            quant_mode 1 needs this, or one row (H,) or one factor (1,) for all. With quantised
            tokens their scales, (BS,) or (BS, d) with d <= H, float32 or float8_e8m0fnu.
        x_active_mask: bool, (BS,) with the active tokens first, or (BS, K); None for all active.
            Inactive slots are not sent, and their expert ids are ignored. Not with unequal BS.
        expert_scales: (BS, K) float32 weights to send along with the rows.
        group_tp: the group of the T ranks with the same experts; ignored without tensor
            parallelism.
        tp_world_size: T, at most 2; 0 or 1 without tensor parallelism. 2 needs L = 1.
        tp_rank_id: this rank in group_tp.
        expert_shard_type: 0, shared experts on the first ranks.
        shared_expert_num: NS; no effect when S is 0.
        shared_expert_rank_num: S, a divisor of W and a multiple of NS.
        quant_mode: 0 none, 1 int8 with static scales, 2 int8 with a scale per row, 3
            float8_e4m3fn with a scale for every 128 elements, 4 float8_e4m3fn with a power of two
            for every 32 (MX).
        global_bs: 0 when BS is the same on all ranks, else W times the largest BS or more.
        expert_token_nums_type: 0 prefix sums, 1 counts.

    Returns:
        expand_x: (T * A, H) rows by (local expert, source rank, token), of the dtype of x or of
            quant_mode. With T = 2, the rows of the other rank of group_tp follow this rank's. Rows
            after the last received one are not written.
        dynamic_scales: such that expand_x * dynamic_scales approximates the (smoothed) tokens:
            quant_mode 2 (T * A,) float32, 3 (T * A, ceil(H / 128)) float32, 4 (T * A, C)
            float8_e8m0fnu with C = ceil(H / 32) rounded up to an even number, the padding being
            the byte 0. With quantised tokens their scales unchanged, (T * A,) or (T * A, d). Else
            (T * A,) float32 zeros.
        expand_idx: (BS * K,) int32, for each slot the number of earlier slots with the same expert;
            -1 for an inactive slot.
        expert_token_nums: (L,) int64 rows per local expert, of all T ranks.
        ep_recv_counts: (T * W * L,) int32 inclusive prefix sums of the rows by (local expert,
            source); with T = 2, those of the other rank of group_tp follow, starting from 0. With
            the profile "a2", 2 * maxBS * W * K * (W // 8) unwritten words follow.
        tp_recv_counts: (tp_world_size,) int32 rows that each rank of group_tp received; zeros, none
            or one, without tensor parallelism.
        expand_scales: (A,) float32 weights of this rank's rows; zeros without expert_scales.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError, ArgumentNameError: 161002.
        ArgumentValueError: 561002, a shape or value; values in tensors are checked on the CPU.
        ArgumentMismatchError: the ranks' arguments differ.
        PeerAbortError: a peer rejected its call; the group stays usable.
        PeerTimeoutError, BrokenGroupError: a peer timed out; see ``moe_triton.recover``.
    """
    return schemas.dispatch(**locals())


def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    elastic_info: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: int | torch.dtype | None = None,
    x_dtype: int | torch.dtype | None = None,
    scales_dtype: int | torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send each token to the ranks of its experts; collective over the group.

    Zero-computation experts (zero, copy, constant) have no network and no rank. Their ids follow
    those of the routed experts: zero experts from E on, then copy experts, then constant experts.
    Dispatch does not send their slots, and combine adds their contributions.

    Args:
        x: as in ``npu_moe_distribute_dispatch``.
        expert_ids: (BS, K) int32, ids of routed experts distinct within a row.
        group_ep: the group.
        ep_world_size: W.
        ep_rank_id: this rank.
        moe_expert_num: E, a multiple of W - S.
        scales: as in ``npu_moe_distribute_dispatch``.
        x_active_mask: as in ``npu_moe_distribute_dispatch``.
        expert_scales: as in ``npu_moe_distribute_dispatch``.
        elastic_info: (4 + 2 * W,) int32 for a group that has lost ranks: a flag (0 for a whole
            group), the numbers of remaining ranks, shared ranks and routed experts, the new rank
            of each old one or -1, and the old rank of each new one. Only with T = 1.
        performance_info: (W,) int64; the microseconds waited for each rank are added to it.
        group_tp: as in ``npu_moe_distribute_dispatch``.
        tp_world_size: as in ``npu_moe_distribute_dispatch``.
        tp_rank_id: as in ``npu_moe_distribute_dispatch``.
        expert_shard_type: 0, shared experts on the first ranks.
        shared_expert_num: NS, at most 4; without effect when S is 0.
        shared_expert_rank_num: S, a multiple of NS.
        quant_mode: as in ``npu_moe_distribute_dispatch``.
        global_bs: 0 when BS is the same on all ranks, else W times the largest BS or more.
        expert_token_nums_type: 0 prefix sums, 1 counts.
        comm_alg: "", "fullmesh", "fullmesh_v1", "fullmesh_v2" or "hierarchy"; the same results.
        zero_expert_num: number of zero experts, which add nothing.
        copy_expert_num: number of copy experts, which add the token itself.
        const_expert_num: number of constant experts, which add a mix of the token and a constant.
        y_dtype: of expand_x, a torch dtype or torch_npu's number of one. None for the dtype of
            quant_mode in ``npu_moe_distribute_dispatch``; 2, 3 and 4 also produce float8_e4m3fn
            and float8_e5m2. HiFloat8 and fp4 are refused.
        x_dtype: float8 dtype of x if its bytes come as uint8 or int8; else None.
        scales_dtype: float8_e8m0fnu if the bytes of scales come as uint8 or int8; else None.

    Returns:
        The outputs of ``npu_moe_distribute_dispatch``, with another third one:
        assist_info_for_combine: (128 * A,) int32. Words 3i, 3i + 1 and 3i + 2 are the
            source rank, token and slot of row i of this rank; slot K + j is shared expert j. The
            other words are not written. With elastic_info, ranks have their new numbers.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    return schemas.dispatch_v2(**locals())

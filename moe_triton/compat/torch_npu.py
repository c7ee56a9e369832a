"""The functions of torch_npu, with their names, argument order and defaults, on any device.

Letters: BS tokens of this rank, H hidden size, K experts per token, W ranks, E routed experts, L
experts of this rank, S shared-expert ranks with NS shared experts, T tensor-parallel ranks (1 or
2), A rows this rank can receive from its group:

    shared rank   A = maxBS * ceil(W / (S / NS))
    other rank    A = maxBS * W * min(L, K)

where maxBS = global_bs / W, or BS when global_bs is 0.

``group_ep`` and ``group_tp`` are names of communicators: of torch process groups, or registered
with ``moe_triton.comm.register_group``; a ``ProcessGroup`` itself is accepted too.

Each function calls the custom op of its name in ``torch.ops.moe_triton``, and so can be compiled.
The ops are for inference, and have no gradients; ``ExpertParallel`` has.
Source: the API documents of torch_npu and the operator documents of aclnnMoeDistribute*.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.formats import dtype_number
from . import operators

__all__ = [
    "npu_moe_distribute_combine",
    "npu_moe_distribute_combine_add_rms_norm",
    "npu_moe_distribute_combine_setup",
    "npu_moe_distribute_combine_teardown",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch",
    "npu_moe_distribute_dispatch_setup",
    "npu_moe_distribute_dispatch_teardown",
    "npu_moe_distribute_dispatch_v2",
    "npu_moe_update_expert",
]


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Send each token to the ranks of its experts; collective over the group.

    Args:
        x: (BS, H) float16 or bfloat16, or with quant_mode 0 tokens that are quantised already,
            float8_e4m3fn or float8_e5m2. BS may be 0, and may differ between ranks with global_bs.
        expert_ids: (BS, K) int32 in [0, E), distinct within a row.
        group_ep: the group.
        ep_world_size: W.
        ep_rank_id: this rank.
        moe_expert_num: E, a multiple of W - S.
        scales: float32 factors of the tokens before they are quantised: (NS + E, H), a row for
            each expert, shared ones first, as quant_mode 2 and 3 may have it; quant_mode 1 needs
            that, or one row (H,) or one factor (1,) for all. Of tokens that are quantised already
            their scales, (BS,) or (BS, d) with d <= H, float32 or float8_e8m0fnu.
        x_active_mask: bool, (BS,) with the active tokens first, or (BS, K); None for all. What is
            not active is not sent, and its expert id may be anything. Not with unequal BS.
        expert_scales: (BS, K) float32 weights to send along with the rows.
        group_tp: the group of the T ranks with the same experts; "" without.
        tp_world_size: T, at most 2, and 0 or 1 without tensor parallelism. 2 needs L = 1.
        tp_rank_id: this rank in group_tp.
        expert_shard_type: 0, shared experts on the first ranks.
        shared_expert_num: NS; without effect when S is 0.
        shared_expert_rank_num: S, a divisor of W and a multiple of NS.
        quant_mode: 0 none, 1 int8 with the given factors, 2 int8 with a scale per row, 3
            float8_e4m3fn with a scale for every 128 elements, 4 float8_e4m3fn with a power of two
            for every 32 (MX).
        global_bs: 0 when BS is the same on all ranks, else W times the largest BS or more.
        expert_token_nums_type: 0 prefix sums, 1 counts.

    Returns:
        expand_x: (T * A, H) rows by (local expert, source rank, token), dtype of x or of the
            quant_mode. With T = 2, the rows of the other rank of group_tp follow this rank's. Rows
            after the last received one are not written.
        dynamic_scales: such that expand_x * dynamic_scales approximates the (smoothed) tokens:
            quant_mode 2 (T * A,) float32, 3 (T * A, ceil(H / 128)) float32, 4 (T * A, C)
            float8_e8m0fnu with C = ceil(H / 32) rounded up to an even number, the one added for
            that being the byte 0. Of tokens that were quantised already their scales, (T * A,) or
            (T * A, d), as they were. Else None.
        expand_idx: (BS * K,) int32, earlier entries of expert_ids that name the same expert; -1
            for what is not active.
        expert_token_nums: (L,) int64 rows per local expert, of all T ranks.
        ep_recv_counts: (T * W * L,) int32 inclusive prefix sums of the rows by (local expert,
            source); with T = 2, those of the other rank of group_tp follow, and start from 0.
        tp_recv_counts: (T,) int32 rows that each rank of group_tp received; None without.
        expand_scales: (A,) float32 weights of this rank's rows; None without expert_scales.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError, ArgumentNameError: 161002.
        ArgumentValueError: 561002, a shape or value; also expert ids, which are checked on the CPU.
        ArgumentMismatchError: the ranks' arguments differ.
        PeerAbortError: a peer rejected its call; the group stays usable.
        PeerTimeoutError, BrokenGroupError: a peer did not come; see ``moe_triton.recover``.
    """
    return operators.dispatch(
        x=x,
        expert_ids=expert_ids,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        scales=scales,
        x_active_mask=x_active_mask,
        expert_scales=expert_scales,
        group_tp=_name(group_tp),
        tp_world_size=tp_world_size,
        tp_rank_id=tp_rank_id,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        quant_mode=quant_mode,
        global_bs=global_bs,
        expert_token_nums_type=expert_token_nums_type,
    )


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Send each token to the ranks of its experts; collective over the group.

    Beside the routed experts there may be special ones, which have no network and no rank. Their
    ids follow: zero experts from E on, then copy experts, then constant ones. Dispatch passes over
    them, and combine knows what they add.

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
            group), the numbers of ranks, shared ranks and routed experts left, the new rank of
            each old one or -1, and the old rank of each new one. Only with T = 1.
        performance_info: (W,) int64, to which the microseconds waited for each rank are added.
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
        zero_expert_num: special experts that add nothing.
        copy_expert_num: special experts that add the token itself.
        const_expert_num: special experts that add a mix of the token and a constant.
        y_dtype: of expand_x, a torch dtype or torch_npu's number of one. None for the one that
            quant_mode has in ``npu_moe_distribute_dispatch``; 2, 3 and 4 also make float8_e4m3fn
            and float8_e5m2. HiFloat8 and fp4 are refused.
        x_dtype: of x, likewise, where bytes (uint8 or int8) stand for float8; else None.
        scales_dtype: of scales, likewise, where bytes stand for float8_e8m0fnu.

    Returns:
        The outputs of ``npu_moe_distribute_dispatch``, but for the third one:
        assist_info_for_combine: (max(BS * K, 128 * A),) int32. Words 3i, 3i + 1 and 3i + 2 are the
            source rank, token and slot of row i of this rank; slot K + j is shared expert j. The
            other words are not written. With elastic_info, ranks have their new numbers.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    return operators.dispatch_v2(
        x=x,
        expert_ids=expert_ids,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        scales=scales,
        x_active_mask=x_active_mask,
        expert_scales=expert_scales,
        elastic_info=elastic_info,
        performance_info=performance_info,
        group_tp=_name(group_tp),
        tp_world_size=tp_world_size,
        tp_rank_id=tp_rank_id,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        quant_mode=quant_mode,
        global_bs=global_bs,
        expert_token_nums_type=expert_token_nums_type,
        comm_alg=comm_alg,
        zero_expert_num=zero_expert_num,
        copy_expert_num=copy_expert_num,
        const_expert_num=const_expert_num,
        y_dtype=dtype_number(y_dtype),
        x_dtype=dtype_number(x_dtype),
        scales_dtype=dtype_number(scales_dtype),
    )


def npu_moe_distribute_combine(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    activation_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    group_list: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
) -> Tensor:
    """Bring the experts' rows back to their tokens and sum them; collective over the group.

        out[t] = sum_k expert_scales[t, k] * row(t, k) + sum_j shared(t, j) + shared_expert_x[t]

    in float32, in this order, rounded once. With T = 2, the rows of the two ranks of group_tp are
    added before, in float32, and rounded.

    Args:
        expand_x: (T * A, H) float16 or bfloat16 expert outputs, rows as dispatch delivered them.
        expert_ids: (BS, K) int32, as given to dispatch.
        expand_idx: (BS * K,) int32 from dispatch.
        ep_send_counts: (T * W * L,) int32, dispatch's ep_recv_counts; the first W * L will do.
        expert_scales: (BS, K) float32 weights.
        group_ep: as in dispatch.
        ep_world_size: as in dispatch.
        ep_rank_id: as in dispatch.
        moe_expert_num: as in dispatch.
        tp_send_counts: (T,) int32, dispatch's tp_recv_counts; None without tensor parallelism.
        x_active_mask: as in dispatch.
        activation_scale: reserved, None.
        weight_scale: reserved, None.
        group_list: reserved, None.
        expand_scales: (A,) float32 from dispatch, or None; not needed here.
        shared_expert_x: (BS, H), or (a, b, H) with a * b = BS, of the dtype of expand_x: rows
            to add with weight 1.
        group_tp: as in dispatch.
        tp_world_size: as in dispatch.
        tp_rank_id: as in dispatch.
        expert_shard_type: as in dispatch.
        shared_expert_num: as in dispatch.
        shared_expert_rank_num: as in dispatch.
        global_bs: as in dispatch.
        out_dtype: reserved, 0.
        comm_quant_mode: 0 rows travel as they are, 2 as int8 with a scale for every 8 elements;
            2 needs T = 1 and H a multiple of 8.
        group_list_type: reserved, 0.

    Returns:
        (BS, H) of the dtype of expand_x; zeros for tokens that take no part.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    return operators.combine(
        expand_x=expand_x,
        expert_ids=expert_ids,
        expand_idx=expand_idx,
        ep_send_counts=ep_send_counts,
        expert_scales=expert_scales,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        tp_send_counts=tp_send_counts,
        x_active_mask=x_active_mask,
        activation_scale=activation_scale,
        weight_scale=weight_scale,
        group_list=group_list,
        expand_scales=expand_scales,
        shared_expert_x=shared_expert_x,
        group_tp=_name(group_tp),
        tp_world_size=tp_world_size,
        tp_rank_id=tp_rank_id,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        global_bs=global_bs,
        out_dtype=out_dtype,
        comm_quant_mode=comm_quant_mode,
        group_list_type=group_list_type,
    )


def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Tensor:
    """Bring the experts' rows back to their tokens and sum them; collective over the group.

    The sum is that of ``npu_moe_distribute_combine``, where for the c-th special expert of its kind

        zero      row(t, k) = 0
        copy      row(t, k) = ori_x[t]
        constant  row(t, k) = const_expert_alpha_1[c] * ori_x[t]
                              + const_expert_alpha_2[c] * const_expert_v[c]

    in float32, each product and sum rounded.

    Args:
        expand_x: as in ``npu_moe_distribute_combine``.
        expert_ids: (BS, K) int32, as given to dispatch.
        assist_info_for_combine: int32 from dispatch.
        ep_send_counts: as in ``npu_moe_distribute_combine``.
        expert_scales: (BS, K) float32 weights.
        group_ep: as in dispatch.
        ep_world_size: as in dispatch.
        ep_rank_id: as in dispatch.
        moe_expert_num: as in dispatch.
        tp_send_counts: as in ``npu_moe_distribute_combine``.
        x_active_mask: as in dispatch.
        expand_scales: (A,) float32 from dispatch, or None; not needed here.
        shared_expert_x: as in ``npu_moe_distribute_combine``.
        elastic_info: as in dispatch.
        ori_x: (BS, H) tokens before the layer, of the dtype of expand_x, as the next three; needed
            where there are copy or constant experts.
        const_expert_alpha_1: (const_expert_num,), or (const_expert_num, H) to go by element.
        const_expert_alpha_2: like const_expert_alpha_1.
        const_expert_v: (const_expert_num, H).
        performance_info: as in dispatch.
        group_tp: as in dispatch.
        tp_world_size: as in dispatch.
        tp_rank_id: as in dispatch.
        expert_shard_type: as in dispatch.
        shared_expert_num: as in dispatch.
        shared_expert_rank_num: as in dispatch.
        global_bs: as in dispatch.
        comm_quant_mode: as in ``npu_moe_distribute_combine``.
        comm_alg: as in dispatch.
        zero_expert_num: as in dispatch.
        copy_expert_num: as in dispatch.
        const_expert_num: as in dispatch.

    Returns:
        (BS, H) of the dtype of expand_x; zeros for tokens that take no part.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    return operators.combine_v2(
        expand_x=expand_x,
        expert_ids=expert_ids,
        assist_info_for_combine=assist_info_for_combine,
        ep_send_counts=ep_send_counts,
        expert_scales=expert_scales,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        tp_send_counts=tp_send_counts,
        x_active_mask=x_active_mask,
        expand_scales=expand_scales,
        shared_expert_x=shared_expert_x,
        elastic_info=elastic_info,
        ori_x=ori_x,
        const_expert_alpha_1=const_expert_alpha_1,
        const_expert_alpha_2=const_expert_alpha_2,
        const_expert_v=const_expert_v,
        performance_info=performance_info,
        group_tp=_name(group_tp),
        tp_world_size=tp_world_size,
        tp_rank_id=tp_rank_id,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        global_bs=global_bs,
        comm_quant_mode=comm_quant_mode,
        comm_alg=comm_alg,
        zero_expert_num=zero_expert_num,
        copy_expert_num=copy_expert_num,
        const_expert_num=const_expert_num,
    )


def npu_moe_distribute_combine_add_rms_norm(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    residual_x: Tensor,
    gamma: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    activation_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    group_list: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
    comm_alg: str = "",
    norm_eps: float = 1e-06,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine, add a residual and apply RMSNorm; collective over the group.

    With the sum of ``npu_moe_distribute_combine_v2`` before it is rounded:

        t = sum + residual_x;  x = t;  rstd = 1 / sqrt(mean(t * t) + norm_eps)
        y = (t * rstd) * gamma

    in float32; what is returned is rounded, and t * rstd too before gamma.

    Args:
        expand_x: as in ``npu_moe_distribute_combine``.
        expert_ids: (BS, K) int32, as given to dispatch.
        expand_idx: the third output of ``npu_moe_distribute_dispatch_v2``, or that of
            ``npu_moe_distribute_dispatch``.
        ep_send_counts: as in ``npu_moe_distribute_combine``.
        expert_scales: (BS, K) float32 weights.
        residual_x: (BS, 1, H) of the dtype of expand_x.
        gamma: (H,) of that dtype.
        group_ep: as in dispatch.
        ep_world_size: as in dispatch.
        ep_rank_id: as in dispatch.
        moe_expert_num: as in dispatch.
        tp_send_counts: as in ``npu_moe_distribute_combine``.
        x_active_mask: as in dispatch.
        activation_scale: reserved, None.
        weight_scale: reserved, None.
        group_list: reserved, None.
        expand_scales: (A,) float32 from dispatch, or None; not needed here.
        shared_expert_x: as in ``npu_moe_distribute_combine``.
        elastic_info: as in dispatch.
        ori_x: as in ``npu_moe_distribute_combine_v2``, as the next three.
        const_expert_alpha_1: see there.
        const_expert_alpha_2: see there.
        const_expert_v: see there.
        group_tp: as in dispatch.
        tp_world_size: as in dispatch.
        tp_rank_id: as in dispatch.
        expert_shard_type: as in dispatch.
        shared_expert_num: as in dispatch.
        shared_expert_rank_num: as in dispatch.
        global_bs: as in dispatch.
        out_dtype: reserved, 0.
        comm_quant_mode: as in ``npu_moe_distribute_combine``.
        group_list_type: reserved, 0.
        comm_alg: "".
        norm_eps: not negative.
        zero_expert_num: as in dispatch.
        copy_expert_num: as in dispatch.
        const_expert_num: as in dispatch.

    Returns:
        y: (BS, 1, H) of the dtype of expand_x; zeros for tokens that take no part, as the others.
        rstd_out: (BS, 1, 1) float32.
        x: (BS, 1, H) of the dtype of expand_x.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    return operators.combine_add_rms_norm(
        expand_x=expand_x,
        expert_ids=expert_ids,
        expand_idx=expand_idx,
        ep_send_counts=ep_send_counts,
        expert_scales=expert_scales,
        residual_x=residual_x,
        gamma=gamma,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        tp_send_counts=tp_send_counts,
        x_active_mask=x_active_mask,
        activation_scale=activation_scale,
        weight_scale=weight_scale,
        group_list=group_list,
        expand_scales=expand_scales,
        shared_expert_x=shared_expert_x,
        elastic_info=elastic_info,
        ori_x=ori_x,
        const_expert_alpha_1=const_expert_alpha_1,
        const_expert_alpha_2=const_expert_alpha_2,
        const_expert_v=const_expert_v,
        group_tp=_name(group_tp),
        tp_world_size=tp_world_size,
        tp_rank_id=tp_rank_id,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        global_bs=global_bs,
        out_dtype=out_dtype,
        comm_quant_mode=comm_quant_mode,
        group_list_type=group_list_type,
        comm_alg=comm_alg,
        norm_eps=norm_eps,
        zero_expert_num=zero_expert_num,
        copy_expert_num=copy_expert_num,
        const_expert_num=const_expert_num,
    )


def npu_moe_distribute_dispatch_setup(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
    y_dtype: int | torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Send each token to the ranks of its experts; the first half of a dispatch.

    Returns without waiting, except while arguments are new. Every rank follows it with
    ``npu_moe_distribute_dispatch_teardown`` before its next dispatch on the group, of any kind.

    Args:
        x: (BS, H) float16 or bfloat16.
        expert_ids: (BS, K) int32, as in ``npu_moe_distribute_dispatch``.
        group_ep: the group.
        ep_world_size: W.
        ep_rank_id: this rank.
        moe_expert_num: E, a multiple of W - S.
        scales: as in ``npu_moe_distribute_dispatch``; without shared ranks (E + 1, H) too, of which
            the last row is not looked at (product profiles refuse it).
        x_active_mask: as in ``npu_moe_distribute_dispatch``.
        expert_shard_type: 0, shared experts on the first ranks.
        shared_expert_num: NS, at most 4; without effect when S is 0.
        shared_expert_rank_num: S, a multiple of NS, at most W / 2.
        quant_mode: as in ``npu_moe_distribute_dispatch``.
        global_bs: 0 when BS is the same on all ranks, else W times the largest BS or more.
        comm_type: 0, 1 or 2; the same results.
        comm_alg: reserved, "".
        y_dtype: as in ``npu_moe_distribute_dispatch_v2``.

    Returns:
        y: (BS * (K + NS), M) of the dtype of the rows: row t * K + k the copy of token t for its
            slot k, row BS * K + j * BS + t that for shared expert j. A row is H elements, then
            scales at the next multiple of 32 bytes (quant_mode 2), 128 (3) or 256 (4), up to a
            multiple of 512 bytes; what lies between is not written. Rows of slots that take no part
            are there, and not sent.
        expand_idx: (BS * K,) int32, as in ``npu_moe_distribute_dispatch``.
        comm_cmd_info: ((BS * (K + NS) + W * L) * 16,) int32, for the teardown, L of the ranks with
            routed experts.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
        SequenceError: the last dispatch on this group has not been torn down.
    """
    return operators.dispatch_setup(
        x=x,
        expert_ids=expert_ids,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        scales=scales,
        x_active_mask=x_active_mask,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        quant_mode=quant_mode,
        global_bs=global_bs,
        comm_type=comm_type,
        comm_alg=comm_alg,
        y_dtype=dtype_number(y_dtype),
    )


def npu_moe_distribute_dispatch_teardown(
    x: Tensor,
    y: Tensor,
    expert_ids: Tensor,
    comm_cmd_info: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_type: int = 0,
    comm_alg: str = "",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Wait for the tokens of all ranks; the second half of a dispatch.

    After a wrong argument, or a ``PeerTimeoutError``, it may be called again.

    Args:
        x: as in the setup.
        y: from the setup.
        expert_ids: as in the setup.
        comm_cmd_info: from the setup.
        group_ep: as in ``npu_moe_distribute_dispatch_setup``.
        ep_world_size: see there.
        ep_rank_id: see there.
        moe_expert_num: see there.
        expert_shard_type: as in ``npu_moe_distribute_dispatch_setup``.
        shared_expert_num: see there.
        shared_expert_rank_num: see there.
        quant_mode: as in the setup.
        global_bs: as in the setup.
        expert_token_nums_type: 0 prefix sums, 1 counts.
        comm_type: as in the setup.
        comm_alg: reserved, "".

    Returns:
        expand_x: (A, H), as in ``npu_moe_distribute_dispatch``.
        dynamic_scales: as there.
        assist_info_for_combine: (max(A * 128, W * L),) int32, whose first W * L words are what
            ep_recv_counts is there; the others are not written.
        expert_token_nums: (L,) int64 rows per local expert.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
        ArgumentValueError: also an argument that is not that of the oldest setup.
        SequenceError: there is no setup to tear down.
    """
    return operators.dispatch_teardown(
        x=x,
        y=y,
        expert_ids=expert_ids,
        comm_cmd_info=comm_cmd_info,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        quant_mode=quant_mode,
        global_bs=global_bs,
        expert_token_nums_type=expert_token_nums_type,
        comm_type=comm_type,
        comm_alg=comm_alg,
    )


def npu_moe_distribute_combine_setup(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
) -> tuple[Tensor, Tensor]:
    """Send the experts' rows back to their tokens; the first half of a combine.

    Returns without waiting, except while arguments are new.

    Args:
        expand_x: (A, H) float16 or bfloat16 expert outputs, rows as dispatch delivered them; must
            not change before the teardown.
        expert_ids: (BS, K) int32, as given to dispatch.
        assist_info_for_combine: from ``npu_moe_distribute_dispatch_teardown``.
        group_ep: as in ``npu_moe_distribute_dispatch_setup``.
        ep_world_size: see there.
        ep_rank_id: see there.
        moe_expert_num: see there.
        expert_shard_type: as in ``npu_moe_distribute_dispatch_setup``.
        shared_expert_num: see there.
        shared_expert_rank_num: see there.
        global_bs: as in dispatch.
        comm_quant_mode: as in ``npu_moe_distribute_combine``.
        comm_type: 0, 1 or 2; the same results.
        comm_alg: reserved, "".

    Returns:
        quant_expand_x: (A, M) int8, the rows as comm_quant_mode 2 sends them: H codes, scales of
            the dtype of expand_x at the next multiple of 32 bytes, up to a multiple of 512 bytes.
            Not written with comm_quant_mode 0.
        comm_cmd_info: ((A + W) * 16,) int32, for the teardown.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
        SequenceError: the last combine on this group has not been torn down.
    """
    return operators.combine_setup(
        expand_x=expand_x,
        expert_ids=expert_ids,
        assist_info_for_combine=assist_info_for_combine,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        global_bs=global_bs,
        comm_quant_mode=comm_quant_mode,
        comm_type=comm_type,
        comm_alg=comm_alg,
    )


def npu_moe_distribute_combine_teardown(
    expand_x: Tensor,
    quant_expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    expert_scales: Tensor,
    comm_cmd_info: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
    comm_alg: str = "",
) -> Tensor:
    """Wait for the rows of all ranks and sum them; the second half of a combine.

    The sum is that of ``npu_moe_distribute_combine``. After a wrong argument, or a
    ``PeerTimeoutError``, it may be called again.

    Args:
        expand_x: as in the setup.
        quant_expand_x: from the setup.
        expert_ids: as in the setup.
        expand_idx: from ``npu_moe_distribute_dispatch_setup``.
        expert_scales: (BS, K) float32 weights.
        comm_cmd_info: from the setup.
        group_ep: as in ``npu_moe_distribute_dispatch_setup``.
        ep_world_size: see there.
        ep_rank_id: see there.
        moe_expert_num: see there.
        x_active_mask: as in dispatch.
        shared_expert_x: as in ``npu_moe_distribute_combine``.
        expert_shard_type: as in ``npu_moe_distribute_dispatch_setup``.
        shared_expert_num: see there.
        shared_expert_rank_num: see there.
        global_bs: as in the setup.
        comm_quant_mode: as in the setup.
        comm_type: as in the setup.
        comm_alg: reserved, "".

    Returns:
        (BS, H) of the dtype of expand_x; zeros for tokens that take no part.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
        ArgumentValueError: also an argument that is not that of the oldest setup.
        SequenceError: there is no setup to tear down.
    """
    return operators.combine_teardown(
        expand_x=expand_x,
        quant_expand_x=quant_expand_x,
        expert_ids=expert_ids,
        expand_idx=expand_idx,
        expert_scales=expert_scales,
        comm_cmd_info=comm_cmd_info,
        group_ep=_name(group_ep),
        ep_world_size=ep_world_size,
        ep_rank_id=ep_rank_id,
        moe_expert_num=moe_expert_num,
        x_active_mask=x_active_mask,
        shared_expert_x=shared_expert_x,
        expert_shard_type=expert_shard_type,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        global_bs=global_bs,
        comm_quant_mode=comm_quant_mode,
        comm_type=comm_type,
        comm_alg=comm_alg,
    )


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
    return operators.update_expert(
        expert_ids=expert_ids,
        eplb_table=eplb_table,
        expert_scales=expert_scales,
        pruning_threshold=pruning_threshold,
        active_mask=active_mask,
        local_rank_id=local_rank_id,
        world_size=world_size,
        balance_mode=balance_mode,
    )


def _name(group: dist.ProcessGroup | str) -> str:
    """The name that an op takes, of a group that may be given itself."""
    return group.group_name if isinstance(group, dist.ProcessGroup) else group

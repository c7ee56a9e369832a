"""Combine, versions 1 and 2, and with RMSNorm: rows to their tokens; letters in the package."""

from __future__ import annotations

from torch import Tensor

from ...ascend.distributed import schemas


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
    """Return the experts' rows to their tokens and sum them; collective over the group.

        out[t] = sum_k expert_scales[t, k] * row(t, k) + sum_j shared(t, j) + shared_expert_x[t]

    in float32, in this order, rounded once. With T = 2, the rows of the two ranks of group_tp are
    first added in float32, and rounded.

    Args:
        expand_x: (T * A, H) float16 or bfloat16 expert outputs, rows as dispatch delivered them.
        expert_ids: (BS, K) int32, as given to dispatch.
        expand_idx: (BS * K,) or another shape of as many elements, int32, from dispatch.
        ep_send_counts: (T * W * L,) int32, dispatch's ep_recv_counts; with T = 2 also its first
            W * L elements alone.
        expert_scales: (BS, K) float32 weights.
        group_ep: as in dispatch.
        ep_world_size: as in dispatch.
        ep_rank_id: as in dispatch.
        moe_expert_num: as in dispatch.
        tp_send_counts: (T,) int32, dispatch's tp_recv_counts; ignored without tensor parallelism.
        x_active_mask: as in dispatch.
        activation_scale: reserved, None.
        weight_scale: reserved, None.
        group_list: reserved, None.
        expand_scales: (A,) float32 from dispatch, or None; not used.
        shared_expert_x: (BS, H), or (a, b, H) with a * b = BS, of the dtype of expand_x; added
            with weight 1.
        group_tp: as in dispatch.
        tp_world_size: as in dispatch.
        tp_rank_id: as in dispatch.
        expert_shard_type: as in dispatch.
        shared_expert_num: as in dispatch.
        shared_expert_rank_num: as in dispatch.
        global_bs: as in dispatch.
        out_dtype: reserved, 0.
        comm_quant_mode: 0 sends rows unchanged, 2 as int8 with a scale for every 8 elements;
            2 needs T = 1 and H a multiple of 8.
        group_list_type: reserved, 0.

    Returns:
        (BS, H) of the dtype of expand_x; zeros for inactive tokens.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    return schemas.combine(**locals())


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
    """Return the experts' rows to their tokens and sum them; collective over the group.

    The sum is that of ``npu_moe_distribute_combine``, where for a zero-computation expert, the c-th
    of its kind,

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
        expand_scales: (A,) float32 from dispatch, or None; not used.
        shared_expert_x: as in ``npu_moe_distribute_combine``.
        elastic_info: as in dispatch.
        ori_x: (BS, H) tokens before the layer, of the dtype of expand_x; needed with copy or
            constant experts.
        const_expert_alpha_1: (const_expert_num,), or (const_expert_num, H) for a factor per
            element, of the dtype of expand_x; needed with constant experts.
        const_expert_alpha_2: like const_expert_alpha_1.
        const_expert_v: (const_expert_num, H) of the dtype of expand_x; needed with constant
            experts.
        performance_info: as in dispatch.
        group_tp: as in dispatch.
        tp_world_size: as in dispatch.
        tp_rank_id: as in dispatch.
        expert_shard_type: as in dispatch.
        shared_expert_num: as in dispatch.
        shared_expert_rank_num: as in dispatch.
        global_bs: as in dispatch.
        comm_quant_mode: as in ``npu_moe_distribute_combine``, and 3 and 4 as MX of float8_e5m2 and
            float8_e4m3fn, with a power of two for every 32 elements; these need T = 1.
        comm_alg: as in dispatch.
        zero_expert_num: as in dispatch.
        copy_expert_num: as in dispatch.
        const_expert_num: as in dispatch.

    Returns:
        (BS, H) of the dtype of expand_x; zeros for inactive tokens.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    return schemas.combine_v2(**locals())


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

    in float32; outputs are rounded, and so is t * rstd before the product with gamma.

    Args:
        expand_x: as in ``npu_moe_distribute_combine``.
        expert_ids: (BS, K) int32, as given to dispatch.
        expand_idx: the third output of ``npu_moe_distribute_dispatch_v2`` or of
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
        expand_scales: (A,) float32 from dispatch, or None; not used.
        shared_expert_x: as in ``npu_moe_distribute_combine``.
        elastic_info: as in dispatch.
        ori_x: as in ``npu_moe_distribute_combine_v2``.
        const_expert_alpha_1: as in ``npu_moe_distribute_combine_v2``.
        const_expert_alpha_2: as in ``npu_moe_distribute_combine_v2``.
        const_expert_v: as in ``npu_moe_distribute_combine_v2``.
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
        y: (BS, 1, H) of the dtype of expand_x; zeros for inactive tokens, in all outputs.
        rstd_out: (BS, 1, 1) float32.
        x: (BS, 1, H) of the dtype of expand_x.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    return schemas.combine_add_rms_norm(**locals())

"""The functions of torch_npu, with their names, argument order and defaults, on any device.

Letters: BS tokens of this rank, H hidden size, K experts per token, W ranks, E routed experts, L
experts of this rank, S shared-expert ranks with NS shared experts, A rows this rank can receive:

    shared rank   A = maxBS * ceil(W / (S / NS))
    other rank    A = maxBS * W * min(L, K)

where maxBS = global_bs / W, or BS when global_bs is 0.

``group_ep`` is a communicator's name: of a torch process group, or registered with
``moe_triton.comm.register_group``; a ``ProcessGroup`` itself is accepted too.
Source: the API documents of torch_npu and the operator documents of aclnnMoeDistribute*.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import GroupArguments, distribute_combine, distribute_dispatch
from ..ops.distribute import COMBINE, DISPATCH

__all__ = ["npu_moe_distribute_combine", "npu_moe_distribute_dispatch"]


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
        x: (BS, H) float16 or bfloat16. BS may be 0, and may differ between ranks with global_bs.
        expert_ids: (BS, K) int32 in [0, E), distinct within a row.
        group_ep: the group.
        ep_world_size: W.
        ep_rank_id: this rank.
        moe_expert_num: E, a multiple of W - S.
        scales: (NS + E, H) float32 smooth factors, one row per expert, only with quant_mode 2.
        x_active_mask: reserved, None.
        expert_scales: (BS, K) float32 weights to send along with the rows.
        group_tp: "", as there is no tensor parallelism.
        tp_world_size: 0 or 1.
        tp_rank_id: 0.
        expert_shard_type: 0, shared experts on the first ranks.
        shared_expert_num: NS; without effect when S is 0.
        shared_expert_rank_num: S, a divisor of W and a multiple of NS.
        quant_mode: 0 none, 2 int8 with a scale per row.
        global_bs: 0 when BS is the same on all ranks, else W times the largest BS or more.
        expert_token_nums_type: 0 prefix sums, 1 counts.

    Returns:
        expand_x: (A, H) rows by (local expert, source rank, token), dtype of x or int8. Rows
            after the last received one are not written.
        dynamic_scales: (A,) float32 such that expand_x * dynamic_scales approximates the (smoothed)
            tokens; None with quant_mode 0.
        expand_idx: (BS * K,) int32, earlier entries of expert_ids that name the same expert.
        expert_token_nums: (L,) int64 rows per local expert.
        ep_recv_counts: (W * L,) int32 inclusive prefix sums of the rows by (local expert, source).
        tp_recv_counts: None.
        expand_scales: (A,) float32 weights of the rows; None without expert_scales.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError, ArgumentNameError: 161002.
        ArgumentValueError: 561002, a shape or value; also expert ids, which are checked on the CPU.
        ArgumentMismatchError: the ranks' arguments differ.
        PeerAbortError: a peer rejected its call; the group stays usable.
        PeerTimeoutError, BrokenGroupError: a peer did not come; see ``moe_triton.recover``.
    """
    arguments = GroupArguments(
        group_ep,
        ep_world_size,
        ep_rank_id,
        moe_expert_num,
        group_tp,
        tp_world_size,
        tp_rank_id,
        expert_shard_type,
        shared_expert_num,
        shared_expert_rank_num,
        global_bs,
    )
    out = distribute_dispatch(
        DISPATCH,
        x,
        expert_ids,
        arguments,
        scales=scales,
        x_active_mask=x_active_mask,
        expert_scales=expert_scales,
        quant_mode=quant_mode,
        expert_token_nums_type=expert_token_nums_type,
    )
    return (
        out.expand_x,
        out.dynamic_scales,
        out.expand_idx,
        out.expert_token_nums,
        out.ep_recv_counts,
        out.tp_recv_counts,
        out.expand_scales,
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

    in float32, in this order, rounded once.

    Args:
        expand_x: (A, H) float16 or bfloat16 expert outputs, rows as dispatch delivered them.
        expert_ids: (BS, K) int32, as given to dispatch.
        expand_idx: (BS * K,) int32 from dispatch.
        ep_send_counts: (W * L,) int32, dispatch's ep_recv_counts.
        expert_scales: (BS, K) float32 weights.
        group_ep: as in dispatch.
        ep_world_size: as in dispatch.
        ep_rank_id: as in dispatch.
        moe_expert_num: as in dispatch.
        tp_send_counts: None, as there is no tensor parallelism.
        x_active_mask: reserved, None.
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
        comm_quant_mode: 0, rows travel as they are.
        group_list_type: reserved, 0.

    Returns:
        (BS, H) of the dtype of expand_x.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
    """
    arguments = GroupArguments(
        group_ep,
        ep_world_size,
        ep_rank_id,
        moe_expert_num,
        group_tp,
        tp_world_size,
        tp_rank_id,
        expert_shard_type,
        shared_expert_num,
        shared_expert_rank_num,
        global_bs,
    )
    return distribute_combine(
        COMBINE,
        expand_x,
        expert_ids,
        expand_idx,
        ep_send_counts,
        expert_scales,
        arguments,
        expand_scales=expand_scales,
        shared_expert_x=shared_expert_x,
        comm_quant_mode=comm_quant_mode,
        tp_send_counts=tp_send_counts,
        x_active_mask=x_active_mask,
        activation_scale=activation_scale,
        weight_scale=weight_scale,
        group_list=group_list,
        out_dtype=out_dtype,
        group_list_type=group_list_type,
    ).x

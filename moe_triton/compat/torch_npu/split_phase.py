"""Dispatch and combine in two phases, a setup and a teardown; letters in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascend.distributed import schemas


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
    """Send each token to the ranks of its experts; the first phase of a dispatch.

    Returns without waiting, except for a handshake about new arguments. Every rank calls
    ``npu_moe_distribute_dispatch_teardown`` before its next dispatch on the group, of any kind.

    Args:
        x: (BS, H) float16 or bfloat16.
        expert_ids: (BS, K) int32, as in ``npu_moe_distribute_dispatch``.
        group_ep: the group.
        ep_world_size: W.
        ep_rank_id: this rank.
        moe_expert_num: E, a multiple of W - S.
        scales: as in ``npu_moe_distribute_dispatch``; without shared ranks also (E + 1, H), whose
            last row is ignored (product profiles refuse it).
        x_active_mask: as in ``npu_moe_distribute_dispatch``.
        expert_shard_type: 0, shared experts on the first ranks.
        shared_expert_num: NS, at most 4; no effect when S is 0.
        shared_expert_rank_num: S, a multiple of NS, at most W / 2.
        quant_mode: as in ``npu_moe_distribute_dispatch``.
        global_bs: 0 when BS is the same on all ranks, else W times the largest BS or more.
        comm_type: 0, 1 or 2; the same results.
        comm_alg: reserved, "".
        y_dtype: as in ``npu_moe_distribute_dispatch_v2``.

    Returns:
        y: (BS * (K + NS), M) of the dtype of the rows: row t * K + k is token t for its slot k,
            row BS * K + j * BS + t token t for shared expert j. A row is H elements, then scales
            at the next multiple of 32 bytes (quant_mode 2), 128 (3) or 256 (4), up to a multiple
            of 512 bytes; padding is not written. Rows of inactive slots are written, but not sent.
        expand_idx: (BS * K,) int32, as in ``npu_moe_distribute_dispatch``.
        comm_cmd_info: ((BS * (K + NS) + W * L) * 16,) int32 for the teardown, with the L of ranks
            with routed experts.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
        SequenceError: the last dispatch on this group was not torn down.
    """
    return schemas.dispatch_setup(**locals())


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wait for the tokens of all ranks; the second phase of a dispatch.

    It may be called again after a wrong argument or a ``PeerTimeoutError``.

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
        dynamic_scales: as in ``npu_moe_distribute_dispatch``.
        assist_info_for_combine: (max(A * 128, W * L),) int32, whose first W * L words are the
            ep_recv_counts of ``npu_moe_distribute_dispatch``; the others are not written.
        expert_token_nums: (L,) int64 rows per local expert.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
        ArgumentValueError: also an argument that differs from the oldest setup's.
        SequenceError: no setup is in flight.
    """
    return schemas.dispatch_teardown(**locals())


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
    """Send the experts' rows back to their tokens; the first phase of a combine.

    Returns without waiting, except for a handshake about new arguments.

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
            With comm_quant_mode 0 not written.
        comm_cmd_info: ((A + W) * 16,) int32, for the teardown.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
        SequenceError: the last combine on this group was not torn down.
    """
    return schemas.combine_setup(**locals())


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
    """Wait for the rows of all ranks and sum them; the second phase of a combine.

    The sum is that of ``npu_moe_distribute_combine``. It may be called again after a wrong
    argument or a ``PeerTimeoutError``.

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
        (BS, H) of the dtype of expand_x; zeros for inactive tokens.

    Raises:
        The errors of ``npu_moe_distribute_dispatch``.
        ArgumentValueError: also an argument that differs from the oldest setup's.
        SequenceError: no setup is in flight.
    """
    return schemas.combine_teardown(**locals())

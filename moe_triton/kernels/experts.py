"""Which experts a token goes to: top-k gating, replicas, and slots worth their expert.

    gating: scores = softmax(logits) or sigmoid(logits); the K experts with the largest
            scores + bias within the best groups, ties to the lower id; weights = scores of these.
            Or scores = logits, and weights = softmax of the K that were chosen
    replicas: id -> table[id, 1 + number], number by rank or by token
    keep:   weights[t, k] >= threshold[k] * sum_k weights[t, k]

Letters: T tokens, K experts per token, E experts, F columns of the table of replicas.
Bytes:   gating reads and writes T * E numbers; the others a few for each of T * K.
Source:  Ascend's ``npu_moe_gating_top_k`` and ``aclnnMoeEPLBUpdateExpert``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ._checks import FLOATS, INDICES, check_tensor
from ._common import to_float32
from .launch_config import tiles

_SCORINGS = ("softmax", "sigmoid", "chosen")
_TAKEN = tl.constexpr(-(2**31))  # below the order of every number
_MINUS_INFINITY = tl.constexpr(-0x7F800001)  # its order
_NO_EXPERT = tl.constexpr(2**31 - 1)  # an id that no expert has


@triton.jit
def _order(x):
    """int32 that order as fp32 numbers do, with NaN above all others; x is never -0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _number(order):
    """The fp32 number of an order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _max(x):
    """The largest of each token's, [BLOCK_T, 1, 1]."""
    return tl.max(tl.max(x, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _sum(x):
    """The sum of each token's, [BLOCK_T, 1, 1]."""
    return tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _first_best(order, ids):
    """The lowest of the ids with the highest order, [BLOCK_T, 1, 1]."""
    candidates = tl.where(order == _max(order), ids, _NO_EXPERT)
    return tl.min(tl.min(candidates, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _in_best_groups(order, ids, group, num_groups, top_groups, BY_TWO: tl.constexpr):
    """[BLOCK_T, BLOCK_G, 1]: whether a group is one of each token's ``top_groups`` best."""
    best = tl.max(order, axis=2, keep_dims=True)
    if BY_TWO:
        first = tl.min(tl.where(order == best, ids, _NO_EXPERT), axis=2, keep_dims=True)
        second = tl.max(tl.where(ids == first, _TAKEN, order), axis=2, keep_dims=True)
        best = _order(_number(best) + _number(second))
    best = tl.where(group < num_groups, best, _TAKEN)
    for _ in range(top_groups):
        best = tl.where(group == _first_best(best, group), _TAKEN, best)
    return best == _TAKEN


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "num_groups", "top_groups", "top_k"])
def _top_k_gating_kernel(
    logits_ptr,  # [T, E] fp16 | bf16 | fp32 | fp64
    bias_ptr,  # [E] fp16 | bf16 | fp32 | fp64, or None
    given_ptr,  # [T, K] int32, or None
    weights_ptr,  # [T, K] fp32
    ids_ptr,  # [T, K] int32
    scores_ptr,  # [T, E] fp32
    num_tokens,
    num_experts,
    logits_stride,
    num_groups,
    top_groups,
    top_k,
    scaling,
    epsilon,
    SCORING: tl.constexpr,  # "softmax", "sigmoid", "chosen"
    GROUPED: tl.constexpr,
    BY_TWO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups
    BLOCK_M: tl.constexpr,  # members of a group
    BLOCK_K: tl.constexpr,
):
    group = tl.arange(0, BLOCK_G)[None, :, None]
    member = tl.arange(0, BLOCK_M)[None, None, :]
    slot = tl.arange(0, BLOCK_K)[None, None, :]
    num_members = num_experts // num_groups
    column = group * num_members + member
    real = (group < num_groups) & (member < num_members)
    ids = tl.where(real, column, _NO_EXPERT)

    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        token = (tile * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None].to(tl.int64)
        active = token < num_tokens
        logits = logits_ptr + token * logits_stride + column
        x = to_float32(tl.load(logits, mask=active & real, other=float("-inf")))
        if SCORING == "chosen":
            scores = x
        elif SCORING == "sigmoid":
            scores = 1.0 / (1.0 + tl.exp(-x))
        else:
            power = tl.exp(x - _max(x))
            scores = power / _sum(power)
        tl.store(scores_ptr + token * num_experts + column, scores, mask=active & real)

        choice = scores
        if bias_ptr is not None:
            choice = scores + to_float32(tl.load(bias_ptr + column, mask=real, other=0.0))
        if SCORING == "chosen":
            choice = tl.where(choice == 0.0, 0.0, choice)  # -0.0 ties with 0.0
        order = tl.where(real, _order(choice), _TAKEN)
        if GROUPED:
            usable = _in_best_groups(order, ids, group, num_groups, top_groups, BY_TWO)
            order = tl.where(usable | (order == _TAKEN), order, _MINUS_INFINITY)

        # The number of experts is small: the best of all, K times.
        weights = tl.zeros((BLOCK_T, 1, BLOCK_K), tl.float32)
        chosen = tl.zeros((BLOCK_T, 1, BLOCK_K), tl.int32)
        total = tl.zeros((BLOCK_T, 1, 1), tl.float32)
        for k in range(top_k):
            if given_ptr is None:
                best = _first_best(order, ids)
            else:
                best = tl.load(given_ptr + token * top_k + k, mask=active, other=0)
                tl.device_assert((best >= 0) & (best < num_experts), "given id out of range")
            order = tl.where(ids == best, _TAKEN, order)
            weight = _sum(tl.where(ids == best, scores, 0.0))
            total = total + weight
            weights = tl.where(slot == k, weight, weights)
            chosen = tl.where(slot == k, best, chosen)
        if SCORING == "chosen":
            used = slot < top_k
            power = tl.exp(weights - _max(tl.where(used, weights, float("-inf"))))
            power = tl.where(used, power, 0.0)
            weights = power / _sum(power)
        elif SCORING == "sigmoid":
            weights = tl.div_rn(weights, tl.broadcast_to(total + epsilon, weights.shape))
        here = token * top_k + slot
        inside = active & (slot < top_k)
        tl.store(weights_ptr + here, weights * scaling, mask=inside)
        tl.store(ids_ptr + here, chosen, mask=inside)


def top_k_gating(
    logits: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_by_two: bool = False,
    scoring: str = "softmax",
    scaling: float = 1.0,
    epsilon: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the ``top_k`` experts with the largest score + bias; see ``ref.top_k_gating``.

    NaN counts as larger than any number.

    Args:
        logits: [T, E] fp16, bf16, fp32 or fp64.
        top_k: K, from 1 to E.
        bias: [E] of such a dtype, or None.
        given: [T, K] int32 the experts, where they are chosen already and only need weights.
        groups: equal groups of consecutive experts.
        top_groups: groups that a token may use, from 1 to ``groups``.
        group_by_two: a group is as good as its two best experts together, not as its best one.
        scoring: "softmax", "sigmoid" or "chosen".
        scaling: factor of all weights.
        epsilon: keeps the division of "sigmoid" finite.

    Returns:
        weights: [T, K] fp32, largest score + bias first.
        ids: [T, K] int32.
        scores: [T, E] fp32, which may differ from those of ``ref`` in their last bits.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape, stride, device or number that does not fit.
    """
    op, device = "top_k_gating", logits.device
    check_tensor(
        op,
        "logits",
        logits,
        dtypes=FLOATS,
        shape=(None, None),
        device=device,
        strided_columns=False,
    )
    num_tokens, num_experts = logits.shape
    if bias is not None:
        check_tensor(op, "bias", bias, dtypes=FLOATS, shape=(num_experts,), device=device)
        bias = bias.contiguous()
    if given is not None:
        shape = (num_tokens, top_k)
        check_tensor(op, "given", given, dtypes=(torch.int32,), shape=shape, device=device)
        given = given.contiguous()
    if groups < 1 or num_experts % groups:
        raise ArgumentValueError(op, "groups", f"divide {num_experts} experts", groups)
    if not 1 <= top_groups <= groups:
        raise ArgumentValueError(op, "top_groups", f"be from 1 to {groups}", top_groups)
    if not 1 <= top_k <= num_experts:
        raise ArgumentValueError(op, "top_k", f"be from 1 to {num_experts}", top_k)
    if group_by_two and groups > 1 and num_experts < 2 * groups:
        contract = f"be False where groups have one expert, {num_experts} in {groups} groups"
        raise ArgumentValueError(op, "group_by_two", contract, group_by_two)
    if scoring not in _SCORINGS:
        raise ArgumentValueError(op, "scoring", f"be one of {[*_SCORINGS]}", repr(scoring))

    weights = logits.new_empty((num_tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((num_tokens, top_k), dtype=torch.int32)
    scores = torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return weights, ids, scores
    block_g = triton.next_power_of_2(groups)
    block_m = triton.next_power_of_2(num_experts // groups)
    launch = tiles(device, num_tokens, block_g * block_m)
    _top_k_gating_kernel[(launch.num_programs,)](
        logits,
        bias,
        given,
        weights,
        ids,
        scores,
        num_tokens,
        num_experts,
        logits.stride(0),
        groups,
        top_groups,
        top_k,
        scaling,
        epsilon,
        SCORING=scoring,
        GROUPED=groups > 1,
        BY_TWO=group_by_two,
        BLOCK_T=launch.rows,
        BLOCK_G=block_g,
        BLOCK_M=block_m,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    return weights, ids, scores


@triton.jit(do_not_specialize=["num_ids", "num_experts", "top_k", "rank", "world_size"])
def _eplb_map_kernel(
    ids_ptr,  # [T, K] int32 | int64
    table_ptr,  # [E, F] int32
    out_ptr,  # [T, K] of the dtype of ids
    num_ids,
    num_experts,
    top_k,
    num_columns,
    rank,
    world_size,
    BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(num_ids, BLOCK), tl.num_programs(0)):
        flat = tile * BLOCK + tl.arange(0, BLOCK)
        mask = flat < num_ids
        expert = tl.load(ids_ptr + flat, mask=mask, other=0).to(tl.int64)
        tl.device_assert((expert >= 0) & (expert < num_experts), "expert_ids out of range")
        row_ptr = table_ptr + expert * num_columns
        count = tl.load(row_ptr, mask=mask, other=1)
        tl.device_assert((count >= 1) & (count < num_columns), "number of replicas out of range")
        if BY_TOKEN:  # noqa: SIM108 - only one of them is compiled
            number = (flat // top_k) % count
        else:
            number = rank // ((world_size + count - 1) // count)
        physical = tl.load(row_ptr + 1 + number, mask=mask, other=0)
        tl.store(out_ptr + flat, physical.to(out_ptr.dtype.element_ty), mask=mask)


def eplb_map(
    expert_ids: torch.Tensor, table: torch.Tensor, *, rank: int | None, world_size: int
) -> torch.Tensor:
    """Replace logical experts by the replica that serves this rank, or this token.

    Example: table [[1, 5, 0], [2, 0, 4]], world size 8: id 1 becomes 0 on ranks 0 to 3, 4 on ranks
    4 to 7; with rank None, 0 and 4 for tokens in turn.

    Args:
        expert_ids: [T, K] int32 or int64, in [0, E).
        table: [E, F] int32: the number of replicas of an expert, then their physical ids.
        rank: this rank, whose replica is number rank // ceil(world_size / replicas); None for
            number token % replicas.
        world_size: ranks.

    Returns:
        [T, K] of the dtype of ``expert_ids``.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape or device that does not fit, or a rank outside the world.
    """
    op, device = "eplb_map", expert_ids.device
    check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=(None, None), device=device)
    check_tensor(op, "table", table, dtypes=(torch.int32,), shape=(None, None), device=device)
    if table.shape[1] < 2:
        raise ArgumentValueError(op, "table", "have at least 2 columns", tuple(table.shape))
    if rank is not None and not 0 <= rank < world_size:
        raise ArgumentValueError(op, "rank", f"be in [0, {world_size})", rank)
    ids = expert_ids.contiguous()
    out = torch.empty_like(ids)
    if ids.numel() == 0:
        return out
    launch = tiles(device, 1, ids.numel())
    _eplb_map_kernel[(launch.num_programs,)](
        ids,
        table.contiguous(),
        out,
        ids.numel(),
        len(table),
        ids.shape[1],
        table.shape[1],
        0 if rank is None else rank,
        world_size,
        BY_TOKEN=rank is None,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return out


@triton.jit(do_not_specialize=["num_tokens", "top_k"])
def _keep_experts_kernel(
    weights_ptr,  # [T, K] fp32
    threshold_ptr,  # [K] fp32
    active_ptr,  # [T] uint8, or None
    keep_ptr,  # [T, K] uint8
    num_tokens,
    top_k,
    BLOCK_T: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        token = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = token < num_tokens
        active = mask
        if active_ptr is not None:
            active = tl.load(active_ptr + token, mask=mask, other=0) != 0
        total = tl.zeros((BLOCK_T,), tl.float32)
        for k in range(top_k):
            total = total + tl.load(weights_ptr + token * top_k + k, mask=mask, other=0.0)
        for k in range(top_k):
            weight = tl.load(weights_ptr + token * top_k + k, mask=mask, other=0.0)
            keep = active & (weight >= tl.load(threshold_ptr + k) * total)
            tl.store(keep_ptr + token * top_k + k, keep.to(tl.uint8), mask=mask)


def keep_experts(
    weights: torch.Tensor, threshold: torch.Tensor, active: torch.Tensor | None
) -> torch.Tensor:
    """Which slots are worth their expert: weight >= threshold * sum of the token's weights.

    Args:
        weights: [T, K] fp32, summed in ascending order.
        threshold: [K] fp32.
        active: [T] bool, or None for all tokens.

    Returns:
        [T, K] bool.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape or device that does not fit.
    """
    op, device = "keep_experts", weights.device
    check_tensor(op, "weights", weights, dtypes=FLOATS[2:3], shape=(None, None), device=device)
    num_tokens, top_k = weights.shape
    check_tensor(op, "threshold", threshold, dtypes=FLOATS[2:3], shape=(top_k,), device=device)
    if active is not None:
        check_tensor(op, "active", active, dtypes=(torch.bool,), shape=(num_tokens,), device=device)
        active = active.contiguous().view(torch.uint8)
    keep = torch.empty((num_tokens, top_k), dtype=torch.uint8, device=device)
    if keep.numel() == 0:
        return keep.view(torch.bool)
    launch = tiles(device, 1, num_tokens)
    _keep_experts_kernel[(launch.num_programs,)](
        weights.contiguous(),
        threshold.contiguous(),
        active,
        keep,
        num_tokens,
        top_k,
        BLOCK_T=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    return keep.view(torch.bool)

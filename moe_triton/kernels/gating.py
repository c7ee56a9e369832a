"""Top-k gating: the experts and weights of each token.

    scores = softmax(logits) or sigmoid(logits); the K experts with the largest scores + bias within
    the best groups, ties to the lower id; weights = scores of these.
    Or scores = logits, and weights = softmax of the K chosen ones.

Letters: T tokens, K experts per token, E experts.
Bytes:   gating reads and writes T * E numbers.
Source:  Ascend's ``npu_moe_gating_top_k``; ``moe_triton.ref.gating``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ._checks import FLOATS, check_tensor
from ._common import to_float32
from .launch_config import tiles

_SCORINGS = ("softmax", "sigmoid", "chosen")
_TAKEN = tl.constexpr(-(2**31))  # below the order of every number
_MINUS_INFINITY = tl.constexpr(-0x7F800001)  # its order
_NO_EXPERT = tl.constexpr(2**31 - 1)  # id above those of all experts


@triton.jit
def _order(x):
    """int32 in the order of fp32 numbers, with NaN above all; x is never -0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _number(order):
    """Inverse of ``_order``: the fp32 number."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _max(x):
    """Maximum of each token, [BLOCK_T, 1, 1]."""
    return tl.max(tl.max(x, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _sum(x):
    """Sum of each token, [BLOCK_T, 1, 1]."""
    return tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _first_best(order, ids):
    """Lowest id with the highest order, [BLOCK_T, 1, 1]."""
    candidates = tl.where(order == _max(order), ids, _NO_EXPERT)
    return tl.min(tl.min(candidates, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _in_best_groups(order, ids, group, num_groups, top_groups, BY_TWO: tl.constexpr):
    """[BLOCK_T, BLOCK_G, 1] mask of the ``top_groups`` best groups of each token."""
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
    chosen_ids_ptr,  # [T, K] int32, or None
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
    """Choose experts and weigh them.

    Example: "softmax" of the logarithms of [[1, 2, 3, 4], [4, 4, 1, 1]], top_k 2:
        ids [[3, 2], [0, 1]], weights [[0.4, 0.3], [0.4, 0.4]].
    """
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

        # There are few experts: take the best one K times.
        weights = tl.zeros((BLOCK_T, 1, BLOCK_K), tl.float32)
        chosen = tl.zeros((BLOCK_T, 1, BLOCK_K), tl.int32)
        total = tl.zeros((BLOCK_T, 1, 1), tl.float32)
        for k in range(top_k):
            if chosen_ids_ptr is None:
                best = _first_best(order, ids)
            else:
                best = tl.load(chosen_ids_ptr + token * top_k + k, mask=active, other=0)
                tl.device_assert((best >= 0) & (best < num_experts), "chosen id out of range")
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
    chosen_ids: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_by_two: bool = False,
    scoring: str = "softmax",
    scaling: float = 1.0,
    epsilon: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the ``top_k`` experts with the largest score + bias; ties go to the lower id.

    Arguments and results as in ``ref.top_k_gating``; scores may differ in their last bits.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape, stride, device or number that does not fit.
    """
    op = "top_k_gating"
    check = functools.partial(check_tensor, op, device=logits.device)
    check("logits", logits, dtypes=FLOATS, shape=(None, None), strided_columns=False)
    num_tokens, num_experts = logits.shape
    if bias is not None:
        check("bias", bias, dtypes=FLOATS, shape=(num_experts,))
        bias = bias.contiguous()
    if chosen_ids is not None:
        check("chosen_ids", chosen_ids, dtypes=(torch.int32,), shape=(num_tokens, top_k))
        chosen_ids = chosen_ids.contiguous()
    if groups < 1 or num_experts % groups:
        raise ArgumentValueError(op, "groups", f"divide {num_experts} experts", groups)
    if not 1 <= top_groups <= groups:
        raise ArgumentValueError(op, "top_groups", f"be from 1 to {groups}", top_groups)
    if not 1 <= top_k <= num_experts:
        raise ArgumentValueError(op, "top_k", f"be from 1 to {num_experts}", top_k)
    if group_by_two and groups > 1 and num_experts < 2 * groups:
        contract = f"be False for groups of one expert, {num_experts} in {groups} groups"
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
    launch = tiles(logits.device, num_tokens, block_g * block_m)
    _top_k_gating_kernel[(launch.num_programs,)](
        logits,
        bias,
        chosen_ids,
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

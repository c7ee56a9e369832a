"""End of a MoE layer on one device: weighted sum of expert rows, biases and skip connections.

    out[t] = skip_1[t] + skip_2[t] + sum_k weights[t, k] * (rows[index[t, k]] + bias[expert[t, k]])

in fp32, from left to right, every product and sum rounded, and once at the end.

Letters: T tokens, K experts per token, H hidden size, N rows, E experts, b bytes of an element.
Bytes:   reads T * K * H * b, again for biases, and T * H * b for each skip; writes T * H * b.
Source:  ``npu_moe_finalize_routing``; ``moe_triton.ref.finalize_routing``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError, MissingArgumentError
from ._checks import FLOATS, check_tensor, with_adjacent_columns
from ._common import narrow, widen
from .launch_config import token_tiles


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_experts", "across"])
def _finalize_kernel(
    rows_ptr,  # [N, H] fp16 | bf16 | fp32 | fp64, the dtype of all others
    index_ptr,  # [T, SLOTS] int64, negative where the slot has no row
    weights_ptr,  # [T, SLOTS], or None
    bias_ptr,  # [E, H], or None
    expert_ids_ptr,  # [T, SLOTS] int32, or None
    skip_1_ptr,  # [T, H], or None
    skip_2_ptr,  # [T, H], or None
    out_ptr,  # [T, H]
    num_tokens,
    num_rows,
    num_experts,
    hidden,
    rows_stride,
    bias_stride,
    skip_1_stride,
    skip_2_stride,
    across,  # tiles beside each other
    SLOTS: tl.constexpr,
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sum skip connections and the rows and biases of each token.

    Example: rows [[1], [10], [100]], index [[0, 2], [1, -1]], weights [[2, 3], [5, 2]],
        bias [[0.5], [0.25]], expert_ids [[0, 1], [1, 0]], skip_1 [[1000], [2000]]:
        [[1303.75], [2052.25]].
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    num_tiles = tl.cdiv(num_tokens, BLOCK_T) * across
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        first = tile // across * BLOCK_T
        # One token is a scalar, and so is the address of its row: hardware that copies
        # whole rows needs that.
        number = first if BLOCK_T == 1 else (first + tl.arange(0, BLOCK_T))[:, None]
        active = number < num_tokens
        token = number.to(tl.int64)
        here = tile % across * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = active & (here < hidden)
        total = tl.zeros(inside.shape, ACC)
        if skip_1_ptr is not None:
            skip = tl.load(skip_1_ptr + token * skip_1_stride + here, mask=inside, other=0.0)
            total = total + widen(skip, ACC)
        if skip_2_ptr is not None:
            skip = tl.load(skip_2_ptr + token * skip_2_stride + here, mask=inside, other=0.0)
            total = total + widen(skip, ACC)
        # Unrolled, so that several rows of a token are in flight at a time.
        for k in tl.static_range(SLOTS):
            row = tl.load(index_ptr + token * SLOTS + k, mask=active, other=-1)
            tl.device_assert(row < num_rows, "index out of range")
            has_term = row >= 0
            mask = has_term & (here < hidden)
            term = tl.load(rows_ptr + row * rows_stride + here, mask=mask, other=0.0)
            term = widen(term, ACC)
            if bias_ptr is not None:
                expert = tl.load(expert_ids_ptr + token * SLOTS + k, mask=active, other=0)
                tl.device_assert((expert >= 0) & (expert < num_experts), "expert out of range")
                at = expert.to(tl.int64) * bias_stride + here
                bias = tl.load(bias_ptr + at, mask=inside, other=0.0)
                term = term + widen(bias, ACC)
                has_term = active
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + token * SLOTS + k, mask=has_term, other=0.0)
                term = term * widen(weight, ACC)
            total = total + term
        tl.store(out_ptr + token * hidden + here, narrow(total, DTYPE), mask=inside)


def finalize_routing(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    bias: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    skips: tuple[torch.Tensor | None, torch.Tensor | None],
    out: torch.Tensor,
) -> None:
    """Sum the rows of each token, the biases of their experts, and the skip connections.

    Arguments as in ``ref.finalize_routing``; ``out`` is contiguous.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape, stride or device that does not fit.
        MissingArgumentError: no ``expert_ids`` for a bias.
    """
    op, num_tokens, num_slots, hidden = "finalize_routing", len(out), index.shape[1], rows.shape[1]
    check = functools.partial(check_tensor, op, dtypes=(rows.dtype,), device=rows.device)
    check("rows", rows, dtypes=FLOATS, shape=(None, None))
    check("index", index, dtypes=(torch.int64,), shape=(num_tokens, num_slots))
    check("out", out, shape=(num_tokens, hidden))
    if not out.is_contiguous():
        raise ArgumentValueError(op, "out", "be contiguous", f"strides {out.stride()}")
    if weights is not None:
        check("weights", weights, dtypes=FLOATS, shape=(num_tokens, num_slots))
        weights = weights.contiguous()
    if bias is not None:
        if expert_ids is None:
            raise MissingArgumentError(op, "expert_ids", "be a tensor with a bias", None)
        check("bias", bias, shape=(None, hidden))
        check("expert_ids", expert_ids, dtypes=(torch.int32,), shape=(num_tokens, num_slots))
        bias, expert_ids = with_adjacent_columns(bias), expert_ids.contiguous()
    for skip in skips:
        if skip is not None:
            check("skips", skip, shape=(num_tokens, hidden))
    first, second = (None if skip is None else with_adjacent_columns(skip) for skip in skips)
    if out.numel() == 0:
        return
    rows = with_adjacent_columns(rows)
    launch = token_tiles(rows.device, num_tokens, hidden)
    _finalize_kernel[(launch.num_programs,)](
        rows,
        index.contiguous(),
        weights,
        bias,
        None if bias is None else expert_ids,
        first,
        second,
        out,
        num_tokens,
        len(rows),
        0 if bias is None else len(bias),
        hidden,
        rows.stride(0),
        0 if bias is None else bias.stride(0),
        0 if first is None else first.stride(0),
        0 if second is None else second.stride(0),
        triton.cdiv(hidden, launch.block),
        SLOTS=num_slots,
        ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
        BLOCK_T=launch.rows,
        BLOCK_H=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )

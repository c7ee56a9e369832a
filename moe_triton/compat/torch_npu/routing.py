"""Routing on one device: rows into the order of their experts, and back.

Letters: N tokens (of re-routing: ranks), H hidden size, K experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ascend.local import schemas
from ...ascend.quant_modes import dtype_number


def npu_moe_init_routing(
    x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token for each of its experts, in the order of their slots sorted by expert.

        expanded_x[i] = x[row_idx.flatten()[order[i]] % N]

    where order sorts expert_idx stably. Without gradients, as in torch_npu.

    Args:
        x: (N, H) float16, bfloat16, float32, or float64, an extension.
        row_idx: (N, K) int32 distinct numbers of the slots, such as those of
            ``npu_moe_gating_top_k_softmax``.
        expert_idx: (N, K) int32.
        active_num: the most tokens whose rows are kept.

    Returns:
        expanded_x: (min(N, active_num) * K, H) of the dtype of x.
        expanded_row_idx: (N * K,) int32: the row of each number of row_idx.
        expanded_expert_idx: (N * K,) int32, expert_idx sorted.

    Raises:
        The errors of ``npu_moe_re_routing``.
    """
    return schemas.init_routing(**locals())


def npu_moe_init_routing_quant(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = 1024,
    expert_capacity: int = 0,
    expert_num: int = 256,
    drop_pad_mode: int = 0,
    expert_tokens_num_mode: int = 0,
    expert_tokens_before_capacity_flag: bool = False,
    quant_mode: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Copy each token for each of its experts, in the order of (expert, token), as int8.

    The arithmetic is that of ``npu_moe_init_routing_v2``.

    Args:
        x: as in ``npu_moe_init_routing_v2``.
        expert_idx: as there.
        scale: quant_mode 0: (1,) float32. 1: (E, H) or (1, H) float32, or None.
        offset: (1,) float32 for quant_mode 0, else None.
        active_num: as there.
        expert_capacity: as there.
        expert_num: E.
        drop_pad_mode: as there.
        expert_tokens_num_mode: 0 no counts, 1 prefix sums, 2 counts.
        expert_tokens_before_capacity_flag: whether counts are returned with drop_pad_mode 1.
        quant_mode: 0 with scale and offset, 1 with a scale for each row.

    Returns:
        expanded_x: (rows, H) or (E, C, H) int8, as there.
        expanded_row_idx: (N * K,) int32, the row of each copy, -1 without one.
        expert_token_cumsum_or_count: (E,) int32; None with drop_pad_mode 1 or
            expert_tokens_num_mode 0.
        expert_tokens_before_capacity: (E,) int32 counts before any copy is dropped; None without
            the flag, or with drop_pad_mode 0.
        expanded_scale: float32, one for each row; None with quant_mode 0.

    Raises:
        The errors of ``npu_moe_re_routing``.
    """
    return schemas.init_routing_quant(**locals())


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = [],
    row_idx_type: int = 0,
    x_dtype: int | torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy each token for each of its experts, in the order of (expert, token), quantised or not.

    With drop_pad_mode every expert has expert_capacity rows: its first tokens, then zeros.

    Args:
        x: (N, H) float16, bfloat16, float32, or float64, an extension; with quant_mode -1 also
            int8, float8_e4m3fn or float8_e5m2. Without quantisation gradients go to it.
        expert_idx: (N, K) int32. Ids outside active_expert_range have no row.
        scale: float32. quant_mode -1: (N,), copied like the tokens; with float8 tokens also
            (N, ...) float8_e8m0fnu, or uint8 that stands for it. 0: (1,). 1: factors of the
            tokens, (end - start, H) by expert or (1, H) for all, or None. 2 and 3: None.
        offset: (1,) float32 for quant_mode 0, else None.
        active_num: the most rows of expanded_x; -1 or 0 for all.
        expert_capacity: C, from 1 to N, with drop_pad_mode 1.
        expert_num: E, at most 10240; 5120 with expert_tokens_num_type 2.
        drop_pad_mode: 0 or 1.
        expert_tokens_num_type: 0 prefix sums, 1 counts, 2 pairs of expert and count. They count
            copies before any is dropped.
        expert_tokens_num_flag: whether torch_npu computes these; here they always are.
        quant_mode: -1 none. 0: int8 of x * scale + offset, each step rounded to float16. 1: int8
            with a scale for each row, the largest magnitude / 127, by which the row is divided. 2
            and 3: float8_e5m2 and float8_e4m3fn with a power of two for every 32 elements, as
            quant_mode 4 of ``npu_moe_distribute_dispatch``; not with drop_pad_mode 1. The other
            modes of torch_npu, such as HiFloat8 and fp4, are refused.
        active_expert_range: [start, end), the experts that have rows; empty for all, and always
            empty with drop_pad_mode 1.
        row_idx_type: of expanded_row_idx, 0 gather, 1 scatter; always 0 with drop_pad_mode 1.
        x_dtype: None, or the dtype of x, as itself or as torch_npu's number of it.

    Returns:
        expanded_x: (rows, H), rows = N * K or active_num; (E, C, H) with drop_pad_mode 1. Of the
            dtype of x or of quant_mode. Rows after the last copy are zeros while gradients are
            enabled (``torch.is_grad_enabled()``), so that they cannot make the gradients of the
            experts NaN; otherwise they are not written.
        expanded_row_idx: (N * K,) int32. Gather: the row of each copy, -1 without one; with
            active_num also rows that are not there. Scatter: the copy of each row, then those
            without one, from experts after the range and before it, which torch_npu leaves open.
        expert_token_cumsum_or_count: int64, (end - start,), or (E, 2) pairs of the experts with
            copies, then zeros.
        expanded_scale: quant_mode -1 the given scales of the rows, of their dtype. 1 those by which
            rows were divided, (rows,) or (E * C,) float32, 0 for padding. 2 and 3 (rows,
            ceil(H / 32) rounded up to an even number) float8_e8m0fnu. Else (rows,) or (E * C,)
            float32 zeros, which torch_npu does not write.

    Raises:
        The errors of ``npu_moe_re_routing``.
    """
    return schemas.init_routing_v2(
        **locals() | {"x_dtype": dtype_number(x_dtype), "zero_unwritten": torch.is_grad_enabled()}
    )


def npu_moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring rows that came from several ranks into the order of (expert, rank).

        permute_tokens[i] = tokens[permute_token_idx[i]]

    Args:
        tokens: (A, H) float16, bfloat16, int8, float8_e4m3fn or float8_e5m2 rows in the order of
            (rank, expert), H below 16384.
        expert_token_num_per_rank: (N, E) int32 or int64 rows from each rank for each expert of this
            one, A in all. Zeros are allowed.
        per_token_scales: (A,) float32, brought into the same order. With float8 tokens also
            (A, ...) float8_e8m0fnu, or uint8 that stands for it.
        expert_token_num_type: 1, counts.
        idx_type: 0.
        tokens_dtype: None, or the dtype of tokens, as itself or as torch_npu's number of it.
            HiFloat8 and fp4 are refused.

    Returns:
        permute_tokens: (A, H) of the dtype of tokens.
        permute_per_token_scales: per_token_scales in the new order; without them (A,)
            float32 zeros, which torch_npu does not write.
        permute_token_idx: (A,) int32.
        expert_token_num: (E,) rows of each expert, of the dtype of expert_token_num_per_rank.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentValueError: 561002, a shape or value; values in tensors are checked on the CPU.
    """
    return schemas.re_routing(**locals() | {"tokens_dtype": dtype_number(tokens_dtype)})


def npu_moe_compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    """Prefix sums of the rows per expert, for rows that are sorted by expert.

    Args:
        sorted_expert_for_source_row: (rows,) int32, the expert of each row, in ascending order.
            Ids from num_expert on are not counted.
        num_expert: E, at most 2048.

    Returns:
        (E,) int32: for each expert the number of entries at most its id.

    Raises:
        The errors of ``npu_moe_re_routing``.
    """
    return schemas.compute_expert_tokens(**locals())


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """Sum the experts' rows and biases for each token; with gradients.

        out[i] = skip1[i] + skip2[i]
                 + sum_k scales[i, k] * (rows[p(i, k)] + bias[export_for_source_row[i, k]])

    in float32 (float64 for float64), from left to right, every product and sum rounded, and once at
    the end. A missing row, p = -1, is zeros, and adds nothing without a bias.

    Args:
        expanded_permuted_rows: (N * K, H), or (E, C, H) with drop_pad_mode 1 and 3; float16,
            bfloat16, float32, or float64, which torch_npu has not. skip1, skip2 and bias are of its
            dtype.
        skip1: (N, H), or None for zeros.
        skip2: (N, H), or None for zeros; None if skip1 is None.
        bias: (E, H) of each expert, or None.
        scales: (N, K) weights, float16, bfloat16, float32 or of the dtype of the rows; or None
            for 1.
        expanded_src_to_dst_row: (N * K,) int32, p: the row of each copy, or -1. Copy k of token i
            is at k * N + i with drop_pad_mode 0 and 1, at i * K + k with 2 and 3.
        export_for_source_row: (N, K) int32 the experts, needed with bias.
        drop_pad_mode: 0 to 3; None is 0.
        k: K if scales is None, else ignored; None is 1.

    Returns:
        (N, H) of the dtype of expanded_permuted_rows.

    Raises:
        The errors of ``npu_moe_re_routing``.
    """
    return schemas.finalize_routing(**locals())

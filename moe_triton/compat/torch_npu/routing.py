"""Rows of tokens in the order of their experts, and back; on one device.

Letters: N tokens (of re-routing: ranks), H hidden size, K experts of a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.formats import dtype_number
from .. import local_operators


def npu_moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Bring rows that came from several ranks into the order of (expert, rank).

        permute_tokens[i] = tokens[permute_token_idx[i]]

    Args:
        tokens: (A, H) float16, bfloat16 or int8 rows in the order of (rank, expert), H below 16384.
        expert_token_num_per_rank: (N, E) int32 or int64 rows from each rank for each expert of this
            one, A in all. Zeros are allowed.
        per_token_scales: (A,) float32, brought into the same order.
        expert_token_num_type: 1, counts.
        idx_type: 0.
        tokens_dtype: None, or the dtype of tokens, as itself or as torch_npu's number of it.
            HiFloat8 and fp4 are refused.

    Returns:
        permute_tokens: (A, H) of the dtype of tokens.
        permute_per_token_scales: (A,) float32; None without per_token_scales.
        permute_token_idx: (A,) int32.
        expert_token_num: (E,) rows of each expert, of the dtype of expert_token_num_per_rank.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentValueError: 561002, a shape or value; contents are checked on the CPU.
    """
    return local_operators.re_routing(
        tokens=tokens,
        expert_token_num_per_rank=expert_token_num_per_rank,
        per_token_scales=per_token_scales,
        expert_token_num_type=expert_token_num_type,
        idx_type=idx_type,
        tokens_dtype=dtype_number(tokens_dtype),
    )


def npu_moe_compute_expert_tokens(sorted_experts: Tensor, num_expert: int) -> Tensor:
    """Where the rows of each expert end in rows that are sorted by expert.

    Args:
        sorted_experts: (rows,) int32, the expert of each row, in ascending order. Those from
            num_expert on count for nobody.
        num_expert: E, at most 2048.

    Returns:
        (E,) int32: the number of entries that are not above each expert.

    Raises:
        The errors of ``npu_moe_re_routing``.
    """
    return local_operators.compute_expert_tokens(
        sorted_experts=sorted_experts, num_expert=num_expert
    )

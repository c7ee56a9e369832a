"""Permute and quantise in one step."""

from __future__ import annotations

import torch

from ..layout import NOWHERE, RowFormat
from .quantize import encode_apart


def gather_quant(
    x: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    smooth_scales: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Quantise each token and write it to the row of each of its slots.

    On one rank this replaces windows.

    Args:
        x: [T, H] fp16, bf16, fp32 or fp64 tokens.
        index: [T, K + NS] int32 or int64 row of ``out`` for each slot, or ``NOWHERE``; rows are
            distinct.
        fmt: scheme, dtypes and block of the rows; its stride is not used.
        smooth_scales: [1] or [H] fp32 factors of all slots, [NS + E, H] factors of each expert,
            shared experts first; or None.
        expert_ids: [T, K], required where ``smooth_scales`` has a row for each expert.
        out: [A, H] output, of the payload's dtype; other rows are untouched.
        scales: [A] or [A, C] output of the scales' dtype, or None for a scheme without scales.
    """
    num_tokens, num_slots = index.shape
    codes = x.new_empty((num_tokens, fmt.hidden), dtype=fmt.dtype)
    code_scales = None if scales is None else scales.new_empty((num_tokens, fmt.num_scales))
    for slot in range(num_slots):
        if smooth_scales is not None and smooth_scales.dim() == 2:
            assert expert_ids is not None
            top_k = expert_ids.shape[1]
            num_shared = num_slots - top_k
            if slot < top_k:
                # Clamp: slots that are not sent get the factors of some expert.
                expert = expert_ids[:, slot].long().clamp(0, len(smooth_scales) - num_shared - 1)
                factors = smooth_scales[num_shared + expert]
            else:
                factors = smooth_scales[slot - top_k]
            encode_apart(x, fmt, codes, code_scales, factors)
        elif slot == 0:
            encode_apart(x, fmt, codes, code_scales, smooth_scales)
        token = (index[:, slot] != NOWHERE).nonzero()[:, 0]
        row = index[token, slot].long()
        # torch cannot copy every float8 by index: use its bytes.
        out.view(torch.uint8)[row] = codes.view(torch.uint8)[token]
        if scales is not None and code_scales is not None:
            scales.view(len(scales), fmt.num_scales)[row] = code_scales[token]

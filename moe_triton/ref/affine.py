"""Quantise to int8 with one factor and one offset for all elements, in fp16."""

from __future__ import annotations

import torch

from ._common import blocks


def quantize_affine(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Quantise to int8 with one factor and one offset, in fp16.

        q = saturate(round(fp16(fp16(x) * fp16(scale)) + fp16(offset)))

    Args:
        x: [R, H] floating point.
        scale: [1] fp32.
        offset: [1] fp32.

    Returns:
        [R, H] int8; 0 where the sum is NaN.
    """
    q = torch.empty_like(x, dtype=torch.int8)
    factor, addend = scale.half().float(), offset.half().float()
    for rows in blocks(*x.shape):
        product = (x[rows].half().float() * factor).half().float()
        total = (product + addend).half().float()
        q[rows] = total.round_().nan_to_num_(0.0).clamp_(-128, 127)
    return q

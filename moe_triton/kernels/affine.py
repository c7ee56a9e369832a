"""Quantise to int8 with one factor and one offset for all elements, in fp16.

    q = int8(clamp(round(fp16(fp16(x) * fp16(scale)) + fp16(offset)), -128, 127))

Shapes: R rows, H hidden size.
Bytes:  reads R * H * x.itemsize, writes R * H.
Source: the static mode of ``npu_moe_init_routing_v2``; ``moe_triton.ref.quantize_affine``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, check_tensor, with_adjacent_columns
from ._common import int8_code, to_float32
from .launch_config import tiles


@triton.jit
def _through_half(x):
    """fp32 rounded to fp16; fp32 holds the product of two exactly, and enough of their sum."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "across"])
def _affine_kernel(
    x_ptr,  # [R, H] fp16 | bf16 | fp32 | fp64
    scale_ptr,  # [1] fp32
    offset_ptr,  # [1] fp32
    q_ptr,  # [R, H] int8
    num_rows,
    hidden,
    x_stride,
    across,  # tiles beside each other
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Quantise with one factor and one offset.

    Example: scale 1, offset 0: x [[0.5, 1.5, -2.5, 200, -200]] becomes [[0, 2, -2, 127, -128]].
    """
    scale, offset = tl.load(scale_ptr), tl.load(offset_ptr)
    num_tiles = tl.cdiv(num_rows, BLOCK_R) * across
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = (tile // across * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
        col = (tile % across * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
        mask = (row < num_rows) & (col < hidden)
        x = to_float32(tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0))
        # As vectors of the tile: ascendnpu-ir 1.2.0 leaves scalars unrounded.
        factor = _through_half(tl.where(mask, scale, 0.0))
        addend = _through_half(tl.where(mask, offset, 0.0))
        total = _through_half(_through_half(_through_half(x) * factor) + addend)
        codes = int8_code(total, -128.0).to(tl.int8)
        tl.store(q_ptr + row * hidden + col, codes, mask=mask)


def quantize_affine(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Quantise to int8 with one factor and one offset, in fp16.

    Arguments as in ``ref.quantize_affine``.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape or device that does not fit.
    """
    op, device = "quantize_affine", x.device
    check_tensor(op, "x", x, dtypes=FLOATS, shape=(None, None), device=device)
    for name, number in (("scale", scale), ("offset", offset)):
        check_tensor(op, name, number, dtypes=(torch.float32,), shape=(1,), device=device)
    num_rows, hidden = x.shape
    q = torch.empty((num_rows, hidden), dtype=torch.int8, device=device)
    if q.numel() == 0:
        return q
    x = with_adjacent_columns(x)
    launch = tiles(device, num_rows, hidden)
    _affine_kernel[(launch.num_programs,)](
        x,
        scale,
        offset,
        q,
        num_rows,
        hidden,
        x.stride(0),
        triton.cdiv(hidden, launch.block),
        BLOCK_R=launch.rows,
        BLOCK_H=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    return q

"""Quantisation of rows on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascend.local import schemas
from ...ascend.quant_modes import dtype_number


def npu_dynamic_quant(
    input: Tensor,  # noqa: A002 (torch_npu's name)
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | torch.dtype | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantise rows with scales that are computed from them, symmetrically.

        t = input * smooth_scales;  scale = max |t| / MAX;  y = round(t / scale)

    in float32, where MAX is 127 for int8, 448 for float8_e4m3fn and 57344 for float8_e5m2; the
    float8 are multiplied by MAX / max |t| instead. A row of zeros has scale 0.

    Args:
        input: (.., H) float16, bfloat16 or float32, with at least 2 dimensions; R rows of H.
        smooth_scales: (H,), or (n, H) with group_index; of the dtype of input or float32. With
            quant_mode "perchannel" the size is that of the second last dimension.
        group_index: (n,) int32 or int64 prefix sums of rows, the last one R: rows from
            group_index[i - 1] to group_index[i] take row i of smooth_scales.
        dst_type: int8, float8_e4m3fn or float8_e5m2, or torch_npu's number of it; None is int8.
            Packed int4 and HiFloat8 are refused.
        quant_mode: "pertoken" a scale for each row, "perchannel" for each column of the last two
            dimensions, "pertensor" one.
        dst_type_max: 0.

    Returns:
        y: of the shape of input and of dst_type.
        scale: float32; the shape of input without its last dimension, without its second last for
            "perchannel", (1,) for "pertensor".

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentValueError: 561002, a shape or value; values in tensors are checked on the CPU.
    """
    return schemas.dynamic_quant(
        x=input,
        smooth_scales=smooth_scales,
        group_index=group_index,
        dst_type=dtype_number(dst_type),
        quant_mode=quant_mode,
        dst_type_max=dst_type_max,
    )


def npu_dynamic_mx_quant(
    input: Tensor,  # noqa: A002 (torch_npu's name)
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int | torch.dtype = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantise every 32 elements along an axis with a power of two as their scale (OCP MX).

        scale = 2 ** (floor(log2(max |x|)) - EMAX);  y = x / scale

    saturated and rounded half to even; EMAX is 8 for float8_e4m3fn and 15 for float8_e5m2.

    Args:
        input: float16, bfloat16 or float32.
        axis: the dimension whose elements share scales.
        round_mode: "rint".
        dst_type: float8_e4m3fn or float8_e5m2, or torch_npu's number of it. fp4, also torch_npu's
            default, is refused.
        block_size: 32.
        scale_alg: 0.
        dst_type_max: 0.
        max_low_bound: 0.

    Returns:
        y: of the shape of input and of dst_type.
        mxscale: uint8, float8_e8m0fnu in bytes: the shape of input with ceil(size / 64) for the
            size of the axis, and a last dimension of 2. An odd number of scales ends with a 0.

    Raises:
        The errors of ``npu_dynamic_quant``.
    """
    return schemas.dynamic_mx_quant(
        x=input,
        axis=axis,
        round_mode=round_mode,
        dst_type=dtype_number(dst_type),
        block_size=block_size,
        scale_alg=scale_alg,
        dst_type_max=dst_type_max,
        max_low_bound=max_low_bound,
    )

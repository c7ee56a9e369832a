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


def npu_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: torch.dtype | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Swiglu, then quantise to int8, with factors for groups of rows.

        s = silu(gate) * other * smooth_scales
        out = round(s + offsets)                  quant_mode 0
        scale = 127 / max |s|;  out = round(s * scale)    quant_mode 1

    in float32.

    Args:
        x: (.., 2 N) float16, bfloat16 or float32, with at least 2 dimensions; R rows.
        smooth_scales: (G, N) or (G,) float32, or (N,) for one group; needed for quant_mode 0.
        offsets: the same, for quant_mode 0; otherwise ignored.
        group_index: (G,) int32 or int64; None for one group. Rows after the last group become
            zeros, which torch_npu does not write.
        activate_left: whether the first half is the gate, otherwise the second.
        quant_mode: 0 with the given factors, 1 with a factor of each row.
        group_list_type: 0 prefix sums, 1 counts.
        dst_type: int8 or None. Packed int4 is refused.

    Returns:
        out: (.., N) int8.
        scale: float32 of the shape of x without its last dimension: the factor of quant_mode 1,
            not the divisor, as the tests of torch_npu have it; zeros for 0.

    Raises:
        The errors of ``npu_dynamic_quant``.
    """
    return schemas.swiglu_quant(**locals() | {"dst_type": dtype_number(dst_type)})


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | torch.dtype | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Dequantise, then swiglu, then quantise to int8, with factors for groups of rows.

        t = x * weight_scale * activation_scale + bias;  s = swiglu(t)
        out = round(s / quant_scale + quant_offset)                           quant_mode 0
        u = s * quant_scale;  scale = max |u| / 127;  out = round(u * (127 / max |u|))   1

    in float32; an int32 bias is added before the scales.

    Args:
        x: (.., 2 H) int32, float16 or bfloat16, with at least 2 dimensions; R rows.
        weight_scale: (G, 2 H) float32, or (2 H,) for one group, or None for 1.
        activation_scale: (R, 1) or (R,) float32 with int32 x, or None for 1.
        bias: (G, 2 H) or (2 H,) int32, float16, bfloat16 or float32 with int32 x, or None.
        quant_scale: (G, H), (G,) or (H,) float32, float16 or bfloat16, or None for 1.
        quant_offset: the same, for quant_mode 0, or None for 0; otherwise ignored.
        group_index: (G,) int64 counts of rows; None for one group. Rows after the last group become
            zeros, which torch_npu does not write.
        activate_left: whether the first half is the gate, otherwise the second.
        quant_mode: 0 with the given factors, 1 with a scale of each row.
        dst_type: int8 or None; the float8 and fp4 of 950 are refused.
        round_mode: 0 or None, half to even.
        activate_dim: the last dimension, or None.
        swiglu_mode: 0 silu(gate) * other. 1 and 2 limit gate and other to clamp_limit (other also
            to -clamp_limit) and compute gate * sigmoid(glu_alpha * gate) * (other + glu_bias); 1
            takes even columns as gate and odd ones as other.
        clamp_limit: positive.
        glu_alpha: see swiglu_mode.
        glu_bias: see swiglu_mode.

    Returns:
        out: (.., H) int8.
        scale: float32 of the shape of x without its last dimension; zeros for quant_mode 0.

    Raises:
        The errors of ``npu_dynamic_quant``.
    """
    return schemas.dequant_swiglu_quant(**locals() | {"dst_type": dtype_number(dst_type)})

"""What experts and the layers around them compute on one device, by torch's own operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ascend.local import schemas
from ...ascend.quant_modes import dtype_number


def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    """silu(a) * b for the halves a and b of a dimension; with gradients.

    In float32 (float64 for float64), rounded once.

    Args:
        self: float16, bfloat16, float32, or float64, which torch_npu has not.
        dim: the dimension, of even size.

    Returns:
        Of the dtype of self, with half the size in that dimension.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentValueError: 561002, a shape or value.
    """
    return schemas.swiglu(x=self, dim=dim)


def npu_swiglu_backward(grad_output: Tensor, self: Tensor, dim: int = -1) -> Tensor:
    """The gradient of the input of ``npu_swiglu``.

    Args:
        grad_output: of the shape of the output and the dtype of self.
        self: as in ``npu_swiglu``.
        dim: as there.

    Returns:
        Of the shape and dtype of self.

    Raises:
        The errors of ``npu_swiglu``.
    """
    return schemas.swiglu_backward(grad_output=grad_output, x=self, dim=dim)


def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Divide by the root mean square and multiply by gamma; with gradients.

        rstd = 1 / sqrt(mean(self ** 2) + epsilon);  y = self * rstd * gamma

    in float32 (float64 for float64). With gamma of the dtype of self, self * rstd is rounded to it
    first, as in ``npu_moe_distribute_combine_add_rms_norm``.

    Args:
        self: float16, bfloat16, float32, or float64, which torch_npu has not.
        gamma: of the shape of the last dimensions of self, over which the mean goes; of its dtype
            or float32.
        epsilon: added to the mean.

    Returns:
        y: of the shape and dtype of self.
        rstd: float32 (float64 for float64), of the shape of self with 1 for the dimensions of
            gamma; without gradient.

    Raises:
        The errors of ``npu_swiglu``.
    """
    return schemas.rms_norm(x=self, gamma=gamma, epsilon=epsilon)


def npu_rms_norm_backward(
    dy: Tensor, self: Tensor, gamma: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``npu_rms_norm``.

    Args:
        dy: of the shape and dtype of self.
        self: as in ``npu_rms_norm``.
        gamma: as there.
        rstd: as returned there.

    Returns:
        dx: of the shape and dtype of self.
        dgamma: of the shape of gamma, float32 (float64 for float64).

    Raises:
        The errors of ``npu_swiglu``.
    """
    return schemas.rms_norm_backward(dy=dy, x=self, gamma=gamma, rstd=rstd)


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | Sequence[int] | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | torch.dtype | None = None,
    x_dtype: int | torch.dtype | None = None,
    weight_dtype: int | torch.dtype | None = None,
    scale_dtype: int | torch.dtype | None = None,
    per_token_scale_dtype: int | torch.dtype | None = None,
) -> list[Tensor]:
    """Multiply groups of rows, each with a matrix of its own.

        y_i = x_i @ weight_i + bias_i                                           floating point
        y_i = act((x_i @ weight_i) * scale_i * per_token_scale_i + bias_i)      quantised

    Products of int8 are exact, all others in float32; an int32 bias is added before the scales.
    Every result is rounded once. Without gradients, as in torch_npu.

    Args:
        x: one (M, K) tensor whose rows are grouped, or one tensor for each group; float16,
            bfloat16, float32, int8, float8_e4m3fn or float8_e5m2. With group_type -1 of 2 to 6
            dimensions.
        weight: one (E, K, N) tensor or E of (K, N), of the dtype of x; both float8 go together.
            Packed int4 is refused.
        bias: one (E, N) tensor or E of (N,).
        scale: for int8 and float8, one (E, N) or (E, 1) tensor, or E of (N,) or (1,), float32 or
            bfloat16. For float8 also float8_e8m0fnu of (E, ceil(K / 64), N, 2), as
            ``npu_dynamic_mx_quant`` along K makes it. The packed format of int64 is refused.
        offset: None.
        antiquant_scale: None: weights that the operator itself dequantises are refused.
        antiquant_offset: None.
        per_token_scale: for int8 and float8, for each x (M,) float32; for float8 also
            float8_e8m0fnu of (M, ceil(K / 64), 2).
        group_list: (E,) int64 or int32, or a list of prefix sums. Rows after the last group give
            zeros, which torch_npu does not write.
        activation_input: None.
        activation_quant_scale: None.
        activation_quant_offset: None.
        split_item: 0 and 1 an output for each group, 2 and 3 one for all.
        group_type: -1 no groups: one tensor of x for each matrix. 0 groups of rows. 2 groups of K:
            x (M, K) and weight (K, N), floating point, give (M, N) for each group. None with a
            list of integers.
        group_list_type: 0 prefix sums, 1 counts, 2 (n, 2) pairs of a group and its count.
        act_type: of quantised products, 0 none, 1 relu, 2 gelu with tanh, 4 x * sigmoid(1.702 x),
            5 silu.
        tuning_config: ignored.
        output_dtype: float16, bfloat16 or float32, for int8 also int32; None for the dtype of x,
            if that is floating.
        x_dtype: None, or the dtype of x, which may come as bytes.
        weight_dtype: the same of weight.
        scale_dtype: the same of scale.
        per_token_scale_dtype: the same of per_token_scale.

    Returns:
        A list of (rows, N) tensors, or of one (M, N); with group_type 2 and split_item 2 or 3 one
        (E, M, N).

    Raises:
        The errors of ``npu_swiglu``; values in tensors are checked on the CPU.
    """
    arguments = locals()
    if isinstance(group_list, Sequence):
        # The form without group_type: prefix sums on the host.
        arguments["group_list"] = (
            torch.tensor(group_list, dtype=torch.int64) if group_list else None
        )
    if group_type is None and not isinstance(group_list, Tensor):
        arguments["group_type"] = 0 if group_list or split_item in (2, 3) else -1
    for name in ("output", "x", "weight", "scale", "per_token_scale"):
        arguments[f"{name}_dtype"] = dtype_number(arguments[f"{name}_dtype"])
    return schemas.grouped_matmul(**arguments)


def npu_grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply groups of int8 rows with their matrices, then swiglu, then quantise.

        a, b = halves of (x @ weight_e) * weight_scale_e * x_scale;  s = silu(a) * b
        scale = max |s| / 127;  out = round(s / scale)

    Products are exact, the rest is in float32.

    Args:
        x: (M, K) int8.
        weight: (E, K, N) int8, N even.
        group_list: (E,) int64 prefix sums of rows. Rows after the last group become zeros, which
            torch_npu does not write.
        weight_scale: (E, N) float32, float16 or bfloat16.
        x_scale: (M,) float32.
        bias: None.
        offset: None.

    Returns:
        out: (M, N / 2) int8.
        scale: (M,) float32.
        out_offset: () float32, 0, which torch_npu does not write.

    Raises:
        The errors of ``npu_swiglu``; values in tensors are checked on the CPU.
    """
    return schemas.grouped_matmul_swiglu_quant(**locals())


def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: Sequence[Tensor] | None = None,
    bias: Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | torch.dtype | None = 0,
    quant_mode: int | None = 0,
    quant_dtype: int | torch.dtype | None = 1,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | torch.dtype | None = None,
    weight_dtype: int | torch.dtype | None = None,
    weight_scale_dtype: int | torch.dtype | None = None,
    x_scale_dtype: int | torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply groups of quantised rows with their matrices, then swiglu, then quantise.

    As ``npu_grouped_matmul_swiglu_quant``, also for float8 rows, and for rows with a power of two
    for every 32 elements (MX).

    Args:
        x: (M, K) int8, float8_e4m3fn or float8_e5m2; for MX a float8.
        weight: a list of one (E, K, N) tensor, int8 with int8 x, otherwise a float8; N even. int4
            and fp4 are refused.
        weight_scale: a list of one tensor: (E, N) float32, float16 or bfloat16; for MX
            (E, ceil(K / 64), N, 2) float8_e8m0fnu.
        x_scale: (M,) float32; for MX (M, ceil(K / 64), 2) float8_e8m0fnu.
        group_list: (E,) int64. Rows after the last group become zeros, which torch_npu does not
            write.
        smooth_scale: None, as it goes with int4.
        weight_assist_matrix: None, likewise.
        bias: None.
        dequant_mode: 0 scales of rows and columns, 2 MX.
        dequant_dtype: to which products are rounded before swiglu: float16, bfloat16, or float32,
            which the documents' defaults 0 and 1 are here too.
        quant_mode: 0 a scale of each row, 2 MX.
        quant_dtype: int8, also as 0, float8_e4m3fn or float8_e5m2; for MX a float8.
        group_list_type: 0 prefix sums, 1 counts.
        tuning_config: ignored.
        x_dtype: None, or the dtype of x, which may come as bytes.
        weight_dtype: the same of weight.
        weight_scale_dtype: None, or float8_e8m0fnu for bytes.
        x_scale_dtype: the same.

    Returns:
        output: (M, N / 2) of quant_dtype.
        output_scale: (M,) float32; for MX (M, ceil(N / 128), 2) float8_e8m0fnu.

    Raises:
        The errors of ``npu_swiglu``; values in tensors are checked on the CPU.
    """
    arguments = locals()
    for name in ("dequant", "quant", "x", "weight", "weight_scale", "x_scale"):
        arguments[f"{name}_dtype"] = dtype_number(arguments[f"{name}_dtype"])
    return schemas.grouped_matmul_swiglu_quant_v2(**arguments)


def npu_grouped_matmul_finalize_routing(
    x: Tensor,
    w: Tensor,
    group_list: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    shared_input: Tensor | None = None,
    logit: Tensor | None = None,
    row_index: Tensor | None = None,
    dtype: torch.dtype | int | None = None,
    shared_input_weight: float | None = 1.0,
    shared_input_offset: int | None = 0,
    output_bs: int | None = 0,
    group_list_type: int | None = 1,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | torch.dtype | None = None,
    w_dtype: int | torch.dtype | None = None,
    scale_dtype: int | torch.dtype | None = None,
    pertoken_scale_dtype: int | torch.dtype | None = None,
) -> Tensor:
    """Multiply groups of int8 rows with their matrices and sum the rows of each token.

        out[row_index[i]] += logit[i] * (x[i] @ w_e) * scale_e * pertoken_scale[i]
        out[shared_input_offset + j] += shared_input_weight * shared_input[j]

    Products are exact, the rest is in float32, in the order of the rows on the CPU.

    Args:
        x: (M, K) int8.
        w: (E, K, N) int8 in the plain format. Packed int4 is refused.
        group_list: (E,) int64 counts or prefix sums of rows; rows after the last group add nothing.
        scale: (E, N) float32 or bfloat16.
        bias: None, as it goes with int4.
        offset: None, likewise.
        pertoken_scale: (M,) float32, or None for 1.
        shared_input: (B, N) bfloat16 rows of the shared experts, or None.
        logit: (M,) float32 weights of the rows, or None for 1.
        row_index: (M,) int32 or int64, the token of each row.
        dtype: float32 or None.
        shared_input_weight: factor of shared_input.
        shared_input_offset: the token of its first row.
        output_bs: number of tokens; 0 for M.
        group_list_type: 1 counts, 0 prefix sums.
        tuning_config: ignored.
        x_dtype: None.
        w_dtype: None.
        scale_dtype: None.
        pertoken_scale_dtype: None.

    Returns:
        (output_bs, N) float32.

    Raises:
        The errors of ``npu_swiglu``; values in tensors are checked on the CPU.
    """
    arguments = locals()
    for name in ("dtype", "x_dtype", "w_dtype", "scale_dtype", "pertoken_scale_dtype"):
        arguments[name] = dtype_number(arguments[name])
    return schemas.grouped_matmul_finalize_routing(**arguments)

"""The ops behind ``npu_grouped_matmul_swiglu_quant`` and ``npu_grouped_matmul_finalize_routing``.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...layout import FLOAT8
from ...ops import checks
from ...ops.quantization import E8M0
from ..op_names import (
    GROUPED_MATMUL_FINALIZE,
    GROUPED_MATMUL_SWIGLU_QUANT,
    GROUPED_MATMUL_SWIGLU_QUANT_V2,
)
from ..quant_modes import fake_dtype, named_dtype, stored_as
from .dynamic_quant import quantize_mx_rows, quantize_rows
from .grouped_matmul import Scales, products
from .groups import COUNT, CUMSUM, group_ends
from .swiglu_quant import gated

_MX = 2  # dequant_mode and quant_mode
_DEQUANT = (*checks.FLOATS, torch.float32)
_DEFAULT = (None, 0, 1, 258)  # dequant_dtype: what the documents call the default, int8 included


def grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise swiglu of the scaled products of int8 groups."""
    op = GROUPED_MATMUL_SWIGLU_QUANT
    checks.reserved(op, bias=bias, offset=offset)
    ends = _check(op, x, weight, group_list, CUMSUM)
    checks.required(op, weight_scale=weight_scale, x_scale=x_scale)
    columns = weight.shape[2]
    checks.dtype(op, "weight_scale", weight_scale, (torch.float32, *checks.FLOATS))
    checks.dtype(op, "x_scale", x_scale, (torch.float32,))
    shape = (len(weight), columns)
    checks.shape(op, "weight_scale", weight_scale, shape, "(E, N)", x.device)
    checks.shape(op, "x_scale", x_scale, (len(x),), "(M,)", x.device)
    checks.value(op, "weight", columns % 2 == 0, "have an even N", tuple(weight.shape))
    scales = Scales(of_weights=weight_scale.unbind(0), of_rows=x_scale)
    y = products(x, weight, ends, scales, torch.float32)
    return *quantize_rows(gated(y, left=True), torch.int8), x_scale.new_zeros(())


def grouped_matmul_swiglu_quant_outputs(
    *, x: Tensor, weight_scale: Tensor, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake outputs of ``grouped_matmul_swiglu_quant``."""
    columns = weight_scale.shape[-1:].numel() // 2
    q = x.new_empty((*x.shape[:1], columns), dtype=torch.int8)
    scale = x.new_empty(x.shape[:1], dtype=torch.float32)
    return q, scale, scale.new_empty(())


def grouped_matmul_swiglu_quant_v2(
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
    dequant_dtype: int | None = 0,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise swiglu of the scaled products of int8 or float8 groups."""
    del tuning_config
    op, kind, mode = GROUPED_MATMUL_SWIGLU_QUANT_V2, group_list_type or 0, quant_mode or 0
    checks.required(op, x=x, weight=weight, weight_scale=weight_scale, x_scale=x_scale)
    assist = [*(weight_assist_matrix or ())]
    contract = "be None, as it goes with int4"
    checks.value(op, "weight_assist_matrix", not assist, contract, "a list")
    checks.reserved(op, smooth_scale=smooth_scale, bias=bias)
    checks.integers(op, dequant_mode=dequant_mode or 0, quant_mode=mode, group_list_type=kind)
    for name, tensors in (("weight", weight), ("weight_scale", weight_scale)):
        single = isinstance(tensors, (list, tuple)) and len(tensors) == 1
        got = f"{len(tensors)} of them" if isinstance(tensors, (list, tuple)) else "a tensor"
        checks.value(op, name, single, "be a list of one tensor", got)
    x = stored_as(op, "x", x, named_dtype(op, "x_dtype", x_dtype))
    matrices = stored_as(op, "weight", weight[0], named_dtype(op, "weight_dtype", weight_dtype))
    e8m0 = named_dtype(op, "weight_scale_dtype", weight_scale_dtype, (E8M0,))
    of_weights = stored_as(op, "weight_scale", weight_scale[0], e8m0)
    e8m0 = named_dtype(op, "x_scale_dtype", x_scale_dtype, (E8M0,))
    of_rows = stored_as(op, "x_scale", x_scale, e8m0)
    mx = dequant_mode == _MX
    checks.value(op, "dequant_mode", dequant_mode in (None, 0, _MX), "be 0 or 2", dequant_mode)
    checks.value(op, "quant_mode", mode in (0, _MX), "be 0 or 2", mode)
    checks.value(op, "group_list_type", kind in (0, 1), "be 0 or 1", kind)
    ends = _check(op, x, matrices, group_list, kind, kinds=FLOAT8 if mx else (torch.int8, *FLOAT8))
    intermediate = torch.float32
    if dequant_dtype not in _DEFAULT:
        kind_of = named_dtype(op, "dequant_dtype", dequant_dtype, _DEQUANT)
        assert kind_of is not None
        intermediate = kind_of
    allowed = FLOAT8 if mode == _MX else (torch.int8, *FLOAT8)
    dtype = named_dtype(op, "quant_dtype", quant_dtype or 1, allowed)
    assert dtype is not None
    (depth, columns), num_rows = matrices.shape[1:], len(x)
    checks.value(op, "weight", columns % 2 == 0, "have an even N", tuple(matrices.shape))
    blocks = -(-depth // 64)
    floats = (torch.float32, *checks.FLOATS)
    checks.dtype(op, "weight_scale", of_weights, (E8M0,) if mx else floats)
    checks.dtype(op, "x_scale", of_rows, (E8M0,) if mx else (torch.float32,))
    shape: tuple[int, ...] = (len(matrices), columns)
    if mx:
        shape = (len(matrices), blocks, columns, 2)
    meaning = "(E, C, N, 2)" if mx else "(E, N)"
    checks.shape(op, "weight_scale", of_weights, shape, meaning, x.device)
    shape = (num_rows, blocks, 2) if mx else (num_rows,)
    checks.shape(op, "x_scale", of_rows, shape, "(M, C, 2)" if mx else "(M,)", x.device)

    scales = Scales(of_weights=of_weights.unbind(0), of_rows=of_rows)
    y = products(x, matrices, ends, scales, torch.float32)
    out = gated(y.to(intermediate).float(), left=True)
    if mode != _MX:
        return quantize_rows(out, dtype)
    q, codes = quantize_mx_rows(out, dtype)
    return q, codes.view(num_rows, -1, 2).view(E8M0)


def grouped_matmul_swiglu_quant_v2_outputs(
    *,
    x: Tensor,
    weight: Sequence[Tensor],
    quant_mode: int | None,
    quant_dtype: int | None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Fake outputs of ``grouped_matmul_swiglu_quant_v2``."""
    columns = weight[0].shape[-1] // 2 if weight else 0
    q = x.new_empty((x.shape[0], columns), dtype=fake_dtype(quant_dtype or 1, torch.int8))
    if quant_mode != _MX:
        return q, x.new_empty(x.shape[:1], dtype=torch.float32)
    return q, x.new_empty((x.shape[0], -(-columns // 64), 2), dtype=E8M0)


def grouped_matmul_finalize_routing(
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
    dtype: int | None = None,
    shared_input_weight: float | None = 1.0,
    shared_input_offset: int | None = 0,
    output_bs: int | None = 0,
    group_list_type: int | None = 1,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | None = None,
    w_dtype: int | None = None,
    scale_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
) -> Tensor:
    """Add the weighted products of the groups to the tokens' rows."""
    del tuning_config
    op, device = GROUPED_MATMUL_FINALIZE, x.device
    kind = 1 if group_list_type is None else group_list_type
    start, batch = shared_input_offset or 0, output_bs or 0
    factor = 1.0 if shared_input_weight is None else shared_input_weight
    checks.integers(op, group_list_type=kind, shared_input_offset=start, output_bs=batch)
    checks.reals(op, shared_input_weight=factor)
    checks.reserved(op, bias=bias, offset=offset)
    for name, number in (
        ("x_dtype", x_dtype),
        ("w_dtype", w_dtype),
        ("scale_dtype", scale_dtype),
        ("pertoken_scale_dtype", pertoken_scale_dtype),
    ):
        kind_of = named_dtype(op, name, number)
        checks.value(op, name, kind_of is None, "be None for int8", kind_of)
    named_dtype(op, "dtype", dtype, (torch.float32,))
    checks.value(op, "group_list_type", kind in (0, 1), "be 0 or 1", kind)
    ends = _check(op, x, w, group_list, COUNT if kind else CUMSUM, name="w")
    num_rows, columns = len(x), w.shape[2]
    checks.required(op, scale=scale, row_index=row_index)
    assert scale is not None
    assert row_index is not None
    checks.dtype(op, "scale", scale, (torch.float32, torch.bfloat16))
    checks.dtype(op, "pertoken_scale", pertoken_scale, (torch.float32,))
    checks.dtype(op, "shared_input", shared_input, (torch.bfloat16,))
    checks.dtype(op, "logit", logit, (torch.float32,))
    checks.dtype(op, "row_index", row_index, (torch.int32, torch.int64))
    checks.shape(op, "scale", scale, (len(w), columns), "(E, N)", device)
    for name, tensor in (
        ("pertoken_scale", pertoken_scale),
        ("logit", logit),
        ("row_index", row_index),
    ):
        checks.shape(op, name, tensor, (num_rows,), "(M,)", device)
    checks.shape(op, "shared_input", shared_input, (None, columns), "(B, N)", device)
    batch = batch or num_rows
    checks.value(op, "output_bs", batch >= 0, "not be negative", batch)
    checks.indices(op, "row_index", row_index, batch)

    scales = Scales(of_weights=scale.unbind(0), of_rows=pertoken_scale)
    y = products(x, w, ends, scales, torch.float32)
    if logit is not None:
        y = y * logit[:, None]
        # A weight of a row after the last group is not used, and may be NaN.
        y = y.masked_fill(torch.arange(num_rows, device=device)[:, None] >= ends[-1], 0)
    out = y.new_zeros((batch, columns))
    if shared_input is not None:
        end = start + len(shared_input)
        fits = start >= 0 and end <= batch
        contract = f"leave room for shared_input, {len(shared_input)} of {batch} rows"
        checks.value(op, "shared_input_offset", fits, contract, start)
        out[start:end] = shared_input.float() * factor
    return out.index_add_(0, row_index.long(), y)


def grouped_matmul_finalize_routing_outputs(
    *, x: Tensor, w: Tensor, output_bs: int | None, **_: object
) -> Tensor:
    """Fake output of ``grouped_matmul_finalize_routing``."""
    shape = (output_bs or x.shape[0], w.shape[-1])
    return x.new_empty(shape, dtype=torch.float32)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    kind: int,
    *,
    name: str = "weight",
    kinds: Sequence[torch.dtype] = (torch.int8,),
) -> Tensor:
    """Check groups of one of ``kinds``; return the end of each."""
    checks.required(op, x=x, **{name: weight}, group_list=group_list)
    checks.dtype(op, "x", x, kinds)
    checks.dtype(op, name, weight, FLOAT8 if x.dtype in FLOAT8 else (x.dtype,))
    checks.dtype(op, "group_list", group_list, (torch.int64,))
    checks.shape(op, "x", x, (None, None), "(M, K)", x.device)
    checks.shape(op, name, weight, (None, x.shape[1], None), "(E, K, N)", x.device)
    checks.shape(op, "group_list", group_list, (len(weight),), "(E,)", x.device)
    return group_ends(op, "group_list", group_list, kind, len(x))

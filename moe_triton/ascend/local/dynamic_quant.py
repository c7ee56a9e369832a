"""The ops behind ``npu_dynamic_quant`` and ``npu_dynamic_mx_quant``: quantise rows.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import FLOAT8, NOWHERE, QUANTS, RowFormat
from ...ops import checks
from ...ops.device_steps import steps_on
from ..op_names import DYNAMIC_MX_QUANT, DYNAMIC_QUANT
from ..quant_modes import fake_dtype, named_dtype
from .groups import expert_of_row, group_ends

_MODES = ("pertoken", "pertensor", "perchannel")
_MX = {quant.dtype: name for name, quant in QUANTS.items() if quant.scheme == "mx"}
MX_BLOCK = 32


def quantize_rows(
    rows: Tensor,
    dtype: torch.dtype,
    smooth_scales: Tensor | None = None,
    expert_ids: Tensor | None = None,
    *,
    divide: bool = True,
) -> tuple[Tensor, Tensor]:
    """Quantise [R, H] rows, each with a scale of its own.

    Args:
        rows: floating point.
        dtype: int8 or a float8.
        smooth_scales: [H] fp32 factors, [n, H] those of each expert, or None.
        expert_ids: [R] the row of ``smooth_scales`` for each row, if it has rows; a row whose id
            is n becomes zeros, scale 0.
        divide: whether int8 is the row divided by its scale; otherwise, and for a float8, the row
            is multiplied by the reciprocal.

    Returns:
        [R, H] of ``dtype``, and [R] fp32 scales.
    """
    scheme = "per_row_div" if dtype == torch.int8 and divide else "per_row"
    fmt = RowFormat.tight(dtype, rows.shape[1], scheme)
    out = rows.new_zeros(rows.shape, dtype=torch.uint8).view(dtype)
    scales = rows.new_zeros(len(rows), dtype=torch.float32)
    if out.numel():
        index = torch.arange(len(rows), device=rows.device)
        if expert_ids is not None and smooth_scales is not None:
            index = index.where(expert_ids < len(smooth_scales), NOWHERE)
        ids = None if expert_ids is None else expert_ids[:, None]
        _encode(rows, fmt, out, scales, index, smooth_scales, ids)
    return out, scales


def quantize_mx_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise [R, H] rows with a power of two for every 32 elements.

    Returns:
        [R, H] of ``dtype``, and [R, C] uint8, the e8m0 scales; C as in ``RowFormat.num_scales``.
    """
    fmt = RowFormat.quantized(_MX[dtype], rows.dtype, rows.shape[1])
    out = rows.new_empty(rows.shape, dtype=dtype)
    scales = rows.new_empty(fmt.scale_shape(len(rows)), dtype=torch.uint8)
    if out.numel():
        _encode(rows, fmt, out, scales, torch.arange(len(rows), device=rows.device))
    return out, scales


def dynamic_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantise rows, columns or the whole tensor with scales of their own."""
    op = DYNAMIC_QUANT
    checks.required(op, input=x)
    checks.reals(op, dst_type_max=dst_type_max)
    checks.dtype(op, "input", x, (*checks.FLOATS, torch.float32))
    checks.dtype(op, "smooth_scales", smooth_scales, (x.dtype, torch.float32))
    checks.dtype(op, "group_index", group_index, (torch.int32, torch.int64))
    dtype = named_dtype(op, "dst_type", dst_type, (torch.int8, *FLOAT8)) or torch.int8
    known = quant_mode in _MODES
    checks.value(op, "quant_mode", known, f"be one of {[*_MODES]}", repr(quant_mode))
    contract = "be 0, as only HiFloat8 has a choice of it"
    checks.value(op, "dst_type_max", dst_type_max == 0, contract, dst_type_max)

    checks.shape(op, "input", x, (None,) * x.dim(), "any", x.device)
    contract = "have at least 2 dimensions"
    checks.value(op, "input", x.dim() > 1, contract, f"shape {tuple(x.shape)}")
    by_column = quant_mode == "perchannel"
    rows = (x.transpose(-1, -2) if by_column else x).reshape(-1, x.shape[-2 if by_column else -1])
    factors = None if smooth_scales is None else smooth_scales.float()
    ids = None
    hidden = rows.shape[1]
    if group_index is None:
        checks.shape(op, "smooth_scales", smooth_scales, (hidden,), "(H,)", x.device)
    else:
        contract = "be None unless quant_mode is 'pertoken'"
        checks.value(op, "group_index", quant_mode == "pertoken", contract, "a tensor")
        contract = "be given with group_index"
        checks.value(op, "smooth_scales", smooth_scales is not None, contract, None)
        checks.shape(op, "smooth_scales", smooth_scales, (None, hidden), "(n, H)", x.device)
        assert smooth_scales is not None
        shape = (len(smooth_scales),)
        checks.shape(op, "group_index", group_index, shape, "(n,)", x.device)
        ends = group_ends(op, "group_index", group_index, 0, len(rows), exact=True)
        ids = expert_of_row(ends, len(rows))
    if quant_mode == "pertensor":
        if factors is not None:
            factors = factors.repeat(len(rows))
        rows = rows.reshape(1, -1)
    q, scales = quantize_rows(rows, dtype, factors, ids)
    if by_column:
        # Bytes, as torch cannot copy every float8 between strided tensors.
        columns = q.view(torch.uint8).view(*x.shape[:-2], x.shape[-1], x.shape[-2])
        q = columns.transpose(-1, -2).contiguous().view(dtype)
    return q.view(x.shape), scales.view(_scale_shape(x, quant_mode))


def dynamic_quant_outputs(
    *, x: Tensor, dst_type: int | None, quant_mode: str, **_: object
) -> tuple[Tensor, Tensor]:
    """Fake outputs of ``dynamic_quant``."""
    dtype = fake_dtype(dst_type, torch.int8)
    scales = x.new_empty(_scale_shape(x, quant_mode), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scales


def dynamic_mx_quant(
    x: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantise every 32 elements along an axis with a power of two as their scale."""
    op = DYNAMIC_MX_QUANT
    checks.required(op, input=x)
    checks.integers(op, axis=axis, block_size=block_size, scale_alg=scale_alg or 0)
    checks.reals(op, dst_type_max=dst_type_max, max_low_bound=max_low_bound)
    checks.dtype(op, "input", x, (*checks.FLOATS, torch.float32))
    dtype = named_dtype(op, "dst_type", dst_type, FLOAT8)
    assert dtype is not None
    checks.shape(op, "input", x, (None,) * x.dim(), "any", x.device)
    most = x.dim()
    checks.value(op, "axis", -most <= axis < most, f"be in [{-most}, {most})", axis)
    rounds = round_mode == "rint"
    checks.value(op, "round_mode", rounds, 'be "rint" with a float8', repr(round_mode))
    checks.value(op, "block_size", block_size == MX_BLOCK, f"be {MX_BLOCK}", block_size)
    checks.value(op, "scale_alg", not scale_alg, "be 0, the scales of OCP MX", scale_alg)
    checks.value(op, "dst_type_max", dst_type_max == 0, "be 0", dst_type_max)
    checks.value(op, "max_low_bound", max_low_bound == 0, "be 0", max_low_bound)

    axis %= most
    moved = x.movedim(axis, -1)
    q, codes = quantize_mx_rows(moved.reshape(-1, moved.shape[-1]), dtype)
    # Bytes, as torch cannot copy every float8 between strided tensors.
    y = q.view(torch.uint8).view(moved.shape).movedim(-1, axis).contiguous().view(dtype)
    pairs = codes.view(*moved.shape[:-1], -1, 2)
    return y, pairs.movedim(-2, axis).contiguous()


def dynamic_mx_quant_outputs(
    *, x: Tensor, axis: int, dst_type: int, **_: object
) -> tuple[Tensor, Tensor]:
    """Fake outputs of ``dynamic_mx_quant``."""
    dtype = fake_dtype(dst_type, torch.float8_e4m3fn)
    shape = [*x.shape, 2]
    axis = axis % max(x.dim(), 1)
    shape[axis] = -(-shape[axis] // (2 * MX_BLOCK))
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(shape, dtype=torch.uint8)


def _encode(
    rows: Tensor,
    fmt: RowFormat,
    out: Tensor,
    scales: Tensor,
    index: Tensor,
    smooth_scales: Tensor | None = None,
    ids: Tensor | None = None,
) -> None:
    """Quantise rows to those that ``index`` names."""
    if rows.stride(1) != 1:
        rows = rows.clone(memory_format=torch.contiguous_format)
    gather_quant = steps_on(rows.device).gather_quant
    gather_quant(rows, index[:, None], fmt, smooth_scales, ids, out, scales)


def _scale_shape(x: Tensor, quant_mode: str) -> tuple[int, ...]:
    if quant_mode == "pertensor":
        return (1,)
    return (*x.shape[:-2], x.shape[-1]) if quant_mode == "perchannel" else tuple(x.shape[:-1])

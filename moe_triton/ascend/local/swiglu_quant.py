"""The ops behind ``npu_swiglu_quant`` and ``npu_dequant_swiglu_quant``.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...ops import checks
from ..op_names import DEQUANT_SWIGLU_QUANT, SWIGLU_QUANT
from ..quant_modes import named_dtype
from .dynamic_quant import quantize_rows
from .groups import COUNT, expert_of_row, group_ends

_STATIC, _DYNAMIC = 0, 1  # quant_mode
_HALVES, _INTERLEAVED, _CLAMPED_HALVES = 0, 1, 2  # swiglu_mode


class Clamp(NamedTuple):
    """The variant of swiglu with limits: g * sigmoid(alpha * g) * (u + bias)."""

    limit: float
    alpha: float
    bias: float


def gated(
    x: Tensor, left: bool, *, interleaved: bool = False, clamp: Clamp | None = None
) -> Tensor:
    """[R, H] fp32: swiglu of [R, 2 H] fp32 rows.

    Args:
        x: the rows.
        left: whether the first half is the gate.
        interleaved: whether even columns are the gate and odd ones the other half.
        clamp: of the variant, or None for silu(gate) * other.
    """
    if interleaved:
        gate, other = x[..., ::2], x[..., 1::2]
    else:
        gate, other = x.chunk(2, dim=-1)
        if not left:
            gate, other = other, gate
    if clamp is None:
        return silu(gate) * other
    gate = gate.clamp(max=clamp.limit)
    other = other.clamp(-clamp.limit, clamp.limit)
    return gate * torch.sigmoid(clamp.alpha * gate) * (other + clamp.bias)


def swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise swiglu of x to int8."""
    op = SWIGLU_QUANT
    checks.required(op, x=x)
    checks.flags(op, activate_left=activate_left)
    checks.integers(op, quant_mode=quant_mode, group_list_type=group_list_type)
    checks.dtype(op, "x", x, (*checks.FLOATS, torch.float32))
    checks.dtype(op, "smooth_scales", smooth_scales, (torch.float32,))
    checks.dtype(op, "offsets", offsets, (torch.float32,))
    checks.dtype(op, "group_index", group_index, (torch.int32, torch.int64))
    named_dtype(op, "dst_type", dst_type, (torch.int8,))
    _check_rows(op, x)
    checks.value(op, "quant_mode", quant_mode in (0, 1), "be 0 or 1", quant_mode)
    checks.value(op, "group_list_type", group_list_type in (0, 1), "be 0 or 1", group_list_type)
    if quant_mode == _STATIC:
        contract = "be given when quant_mode is 0"
        checks.value(op, "smooth_scales", smooth_scales is not None, contract, None)
        checks.value(op, "offsets", offsets is not None, contract, None)
    rows = x.reshape(-1, x.shape[-1]).float()
    ids, groups = _groups(op, group_index, group_list_type, len(rows))
    hidden = rows.shape[1] // 2
    factors = _of_groups(op, "smooth_scales", smooth_scales, groups, hidden)
    out = gated(rows, activate_left)
    if quant_mode == _STATIC:
        added = _of_groups(op, "offsets", offsets, groups, hidden)
        assert factors is not None
        assert added is not None
        q = _rounded(_rows(factors, ids) * out + _rows(added, ids), ids, groups)
        scales = rows.new_zeros(len(rows))
    else:
        q, divisors = quantize_rows(out, torch.int8, *_smooth(factors, ids), divide=False)
        # Not the divisor but the factor, as torch_npu's own test has it.
        scales = divisors.reciprocal()
    return q.view(*x.shape[:-1], hidden), scales.view(x.shape[:-1])


def swiglu_quant_outputs(*, x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    """Fake outputs of ``swiglu_quant`` and of ``dequant_swiglu_quant``."""
    shape = (*x.shape[:-1], *(size // 2 for size in x.shape[-1:]))
    return x.new_empty(shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def dequant_swiglu_quant(
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
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Quantise swiglu of dequantised x to int8."""
    op, floats = DEQUANT_SWIGLU_QUANT, (*checks.FLOATS, torch.float32)
    checks.required(op, x=x)
    checks.flags(op, activate_left=activate_left)
    checks.integers(op, quant_mode=quant_mode, swiglu_mode=swiglu_mode)
    checks.reals(op, clamp_limit=clamp_limit, glu_alpha=glu_alpha, glu_bias=glu_bias)
    checks.dtype(op, "x", x, (torch.int32, *checks.FLOATS))
    whole = x.dtype == torch.int32
    checks.dtype(op, "weight_scale", weight_scale, (torch.float32,))
    checks.dtype(op, "activation_scale", activation_scale, (torch.float32,))
    checks.dtype(op, "bias", bias, (torch.int32, *floats))
    checks.dtype(op, "quant_scale", quant_scale, floats)
    checks.dtype(op, "quant_offset", quant_offset, floats)
    checks.dtype(op, "group_index", group_index, (torch.int64,))
    named_dtype(op, "dst_type", dst_type, (torch.int8,))
    _check_rows(op, x)
    checks.value(op, "quant_mode", quant_mode in (0, 1), "be 0 or 1", quant_mode)
    checks.value(op, "swiglu_mode", 0 <= swiglu_mode <= 2, "be in [0, 2]", swiglu_mode)
    checks.value(op, "round_mode", not round_mode, "be 0, half to even", round_mode)
    last = activate_dim in (None, -1, x.dim() - 1)
    checks.value(op, "activate_dim", last, "be the last dimension", activate_dim)
    fits = math.isfinite(clamp_limit) and clamp_limit > 0
    checks.value(op, "clamp_limit", fits, "be positive and finite", clamp_limit)
    if not whole:
        contract = "be None unless x is int32"
        checks.value(op, "activation_scale", activation_scale is None, contract, "a tensor")
        checks.value(op, "bias", bias is None, contract, "a tensor")

    rows = x.reshape(-1, x.shape[-1])
    ids, groups = _groups(op, group_index, COUNT, len(rows))
    width, hidden = rows.shape[1], rows.shape[1] // 2
    of_weights = _of_groups(op, "weight_scale", weight_scale, groups, width)
    added = _of_groups(op, "bias", bias, groups, width)
    if activation_scale is not None:
        shape = (len(rows), 1)[: max(activation_scale.dim(), 1)]
        flat = activation_scale.reshape(-1, 1) if activation_scale.dim() > 2 else activation_scale
        checks.shape(op, "activation_scale", flat, shape, "(R, 1)", x.device)
    if added is not None and added.dtype == torch.int32:
        rows, added = rows + _rows(added, ids), None
    wide = rows.float()
    if of_weights is not None:
        wide = wide * _rows(of_weights, ids)
    if activation_scale is not None:
        wide = wide * activation_scale.reshape(-1, 1)
    if added is not None:
        wide = wide + _rows(added, ids).float()
    clamp = None if swiglu_mode == _HALVES else Clamp(clamp_limit, glu_alpha, glu_bias)
    out = gated(wide, activate_left, interleaved=swiglu_mode == _INTERLEAVED, clamp=clamp)

    factors = _of_groups(op, "quant_scale", quant_scale, groups, hidden)
    if quant_mode == _DYNAMIC:
        factors = None if factors is None else factors.float()
        q, scales = quantize_rows(out, torch.int8, *_smooth(factors, ids), divide=False)
        if ids is not None and factors is None:
            outside = ids >= groups
            q, scales = q.masked_fill(outside[:, None], 0), scales.masked_fill(outside, 0)
    else:
        offset = _of_groups(op, "quant_offset", quant_offset, groups, hidden)
        if factors is not None:
            out = out / _rows(factors, ids).float()
        if offset is not None:
            out = out + _rows(offset, ids).float()
        q, scales = _rounded(out, ids, groups), out.new_zeros(len(out))
    return q.view(*x.shape[:-1], hidden), scales.view(x.shape[:-1])


def _check_rows(op: str, x: Tensor) -> None:
    checks.shape(op, "x", x, (None,) * x.dim(), "any", x.device)
    fits = x.dim() > 1 and x.shape[-1] % 2 == 0 and x.shape[-1] > 0
    contract = "have at least 2 dimensions, the last one even"
    checks.value(op, "x", fits, contract, f"shape {tuple(x.shape)}")


def _groups(
    op: str, group_index: Tensor | None, kind: int, num_rows: int
) -> tuple[Tensor | None, int]:
    """[R] the group of each row, or None for a single one, and the number of groups."""
    if group_index is None:
        return None, 1
    checks.shape(op, "group_index", group_index, (None,), "(G,)", group_index.device)
    ends = group_ends(op, "group_index", group_index, kind, num_rows)
    return expert_of_row(ends, num_rows), len(ends)


def _of_groups(op: str, name: str, values: Tensor | None, groups: int, size: int) -> Tensor | None:
    """[G, size] of values with a row or a number for each group, or one row for all; or None."""
    if values is None:
        return None
    if values.dim() == 1 and len(values) != groups:
        values = values[None]
    if values.dim() == 1:
        values = values[:, None].expand(-1, size)
    shape = (1 if len(values) == 1 else groups, size)
    checks.shape(op, name, values, shape, "(G, size), (G,) or (size,)", values.device)
    return values.expand(groups, -1)


def _rows(values: Tensor, ids: Tensor | None) -> Tensor:
    """[R, size] the row of each row's group; rows outside the groups take any."""
    return values[0] if ids is None else values[ids.clamp(max=len(values) - 1)]


def _smooth(factors: Tensor | None, ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Factors as ``quantize_rows`` takes them."""
    if factors is None:
        return None, None
    return (factors[0].contiguous(), None) if ids is None else (factors.contiguous(), ids)


def _rounded(values: Tensor, ids: Tensor | None, groups: int) -> Tensor:
    """int8 of values, zeros in rows outside the groups and for NaN."""
    q = values.round().nan_to_num(0.0).clamp(-128, 127).to(torch.int8)
    return q if ids is None else q.masked_fill((ids >= groups)[:, None], 0)

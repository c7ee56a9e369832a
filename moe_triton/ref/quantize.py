"""Every quantisation that travels with tokens, and decoding of block8 rows.

All arithmetic is in fp32, rounded half to even. Divisions are of a tensor by a tensor: torch turns
a number over a tensor into the number times a reciprocal, which rounds twice.
"""

from __future__ import annotations

import torch

from ..layout import FLOAT8, RowFormat
from ._common import blocks

# Largest value of each payload.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# The exponent of the largest power of two below it, by which MX scales are chosen.
_LARGEST_EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
_NOT_A_NUMBER = 255  # the biased exponent of inf and NaN, and the e8m0 code of NaN


def quantize_static(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Quantise to int8 with the caller's factors: q = saturate(round(x * factor)).

    Args:
        x: [R, H] floating point.
        factors: [1], [H] or [R, H] fp32.

    Returns:
        [R, H] int8.
    """
    q = torch.empty_like(x, dtype=torch.int8)
    for rows in blocks(*x.shape):
        part = _factors_of(factors, rows)
        assert part is not None
        q[rows] = (x[rows].float() * part).round_().clamp_(-128, 127)
    return q


def quantize_rows(
    x: torch.Tensor, smooth_scales: torch.Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row with a scale of its own.

        t = x * smooth;  s = MAX / max |t|;  q = round(t * s);  scale = 1 / s

    Args:
        x: [R, H] floating point.
        smooth_scales: [R, H] or [H] fp32, or None for no factor.
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        q: [R, H] of ``dtype``, such that q * scale / smooth approximates x.
        scale: [R] fp32. A row whose factor s overflows (zeros, or nearly) becomes zeros, scale 0.
    """
    q, scale = quantize_groups(x, max(x.shape[1], 1), smooth_scales, dtype)
    return q, scale[:, 0]


def quantize_groups(
    x: torch.Tensor,
    group: int,
    smooth_scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each ``group`` consecutive elements of a row as ``quantize_rows`` does a row.

    The last group of a row may be shorter.

    Returns:
        q: [R, H] of ``dtype``.
        scale: [R, ceil(H / group)] fp32.
    """
    num_rows, hidden = x.shape
    num_groups = -(-hidden // group)
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty((num_rows, num_groups), dtype=torch.float32)
    for rows in blocks(num_rows, hidden):
        t = x[rows].float()
        if (factors := _factors_of(smooth_scales, rows)) is not None:
            t = t * factors
        grouped = _in_groups(t, group)
        amax = torch.maximum(grouped.amax(dim=2), -grouped.amin(dim=2)).abs()  # not -0.0
        factor = torch.full_like(amax, LARGEST[dtype]) / amax
        usable = factor.where(torch.isfinite(factor), 0.0)
        values = (grouped * usable[..., None]).flatten(1)[:, :hidden]
        q[rows] = values.round_() if dtype == torch.int8 else values
        scale[rows] = factor.reciprocal()
    return q, scale


def quantize_groups_pow2(
    x: torch.Tensor,
    group: int,
    smooth_scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_groups`` with scales rounded up to powers of two, as DeepEP's rounded scales are.

        t = x * smooth;  scale = 2 ** max(ceil(log2(max |t| / MAX)), -126);  q = round(t / scale)

    Returns:
        q: [R, H] of ``dtype``; NaN in a group with inf or NaN.
        scale: [R, ceil(H / group)] fp32; NaN for such a group.
    """
    num_rows, hidden = x.shape
    num_groups = -(-hidden // group)
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty((num_rows, num_groups), dtype=torch.float32)
    for rows in blocks(num_rows, hidden):
        t = x[rows].float()
        if (factors := _factors_of(smooth_scales, rows)) is not None:
            t = t * factors
        grouped = _in_groups(t, group)
        amax = grouped.abs().amax(dim=2)
        exact = amax / torch.full_like(amax, LARGEST[dtype])
        # Adding all mantissa bits but one carries into the exponent unless the mantissa is 0.
        exponent = ((exact.view(torch.int32) + 0x7FFFFF) >> 23).clamp_(min=1)
        bad = ~torch.isfinite(exact)
        scale[rows] = (exponent << 23).view(torch.float32).masked_fill_(bad, float("nan"))
        factor = ((254 - exponent) << 23).view(torch.float32).masked_fill_(bad, float("nan"))
        values = (grouped * factor[..., None]).flatten(1)[:, :hidden]
        q[rows] = values
    return q, scale


def _in_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    """[R, H] -> [R, ceil(H / group), group], zeros after the end."""
    missing = -x.shape[1] % group
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(1, (-1, group))


def quantize_by_division(
    x: torch.Tensor, smooth_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row to int8 by division, as ``npu_moe_init_routing_v2`` does.

        t = x * smooth;  scale = max |t| / 127;  q = round(t / scale)

    Args:
        x: [R, H] floating point.
        smooth_scales: [R, H] or [H] fp32, or None for no factor.

    Returns:
        q: [R, H] int8; 0 where the quotient is NaN, as in a row of zeros.
        scale: [R] fp32.
    """
    q = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_zeros(len(x), dtype=torch.float32)
    for rows in blocks(*x.shape):
        t = x[rows].float()
        if (factors := _factors_of(smooth_scales, rows)) is not None:
            t = t * factors
        largest = t.abs().amax(dim=1)
        scale[rows] = largest / torch.full_like(largest, LARGEST[torch.int8])
        quotient = (t / scale[rows, None]).round_().nan_to_num_(0.0)
        q[rows] = quotient.clamp_(-127, 127)
    return q, scale


def quantize_mx(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each 32 consecutive elements with a power of two as their scale (OCP MX).

        code = max(largest biased exponent - EMAX, 0);  q = saturate(x * 2 ** (127 - code))

    Args:
        x: [R, H] floating point.
        dtype: float8_e4m3fn (EMAX 8) or float8_e5m2 (EMAX 15).

    Returns:
        q: [R, H] of ``dtype``; NaN in a block with inf or NaN.
        codes: [R, C] uint8, the e8m0 scales 2 ** (code - 127); C is ceil(H / 32) rounded up to an
            even number, whose added code is 0. 255 in a block with inf or NaN.
    """
    num_rows, hidden = x.shape
    num_blocks = -(-hidden // 32)
    q = torch.empty_like(x, dtype=dtype)
    codes = x.new_zeros((num_rows, num_blocks + num_blocks % 2), dtype=torch.uint8)
    most = LARGEST[dtype]
    for rows in blocks(num_rows, hidden):
        grouped = _in_groups(x[rows].float(), 32)
        exponent = ((grouped.view(torch.int32) >> 23) & 0xFF).amax(dim=2)
        code = (exponent - _LARGEST_EXPONENT[dtype]).clamp_(min=0)
        bad = exponent == _NOT_A_NUMBER
        # 2 ** (127 - code) by its bits: torch.ldexp calls pow, which may be inexact on a GPU.
        factor = ((254 - code) << 23).view(torch.float32)
        values = (grouped * factor[..., None]).clamp_(-most, most)
        values.masked_fill_(bad[..., None], float("nan"))
        q[rows] = values.flatten(1)[:, :hidden]
        codes[rows, :num_blocks] = code.masked_fill_(bad, _NOT_A_NUMBER).to(torch.uint8)
    return q, codes


def quantize_blocks(
    x: torch.Tensor, block: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each ``block`` consecutive elements of a row to int8, for combine.

        s = max |x| * (1 / 127);  q = round(fp16(x / s));  scale = s in ``scale_dtype``

    The divisor is s itself, not the rounded scale.

    Args:
        x: [R, H] fp16 or bf16, H a multiple of ``block``.
        block: elements that share a scale.
        scale_dtype: of the scales.

    Returns:
        q: [R, H] int8; 0 in a block of zeros, and where the quotient is NaN.
        scale: [R, H / block] of ``scale_dtype``.
    """
    grouped = x.float().unflatten(1, (-1, block))
    s = grouped.abs().amax(dim=2) * (1.0 / LARGEST[torch.int8])
    quotient = (grouped / s[..., None]).half().float().round_()
    # A subnormal scale has lost bits: the quotient can pass 127.
    q = quotient.nan_to_num_(0.0).clamp_(-127, 127)
    return q.to(torch.int8).flatten(1), s.to(scale_dtype)


def encode(
    x: torch.Tensor,
    fmt: RowFormat,
    rows: torch.Tensor,
    smooth_scales: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Write [R, H] tokens into [R, stride] uint8 ``rows`` in their format; padding is untouched.

    Args:
        x: [R, H] fp16, bf16, fp32 or fp64.
        fmt: of the rows.
        rows: [R, stride] uint8 output.
        smooth_scales: [R, H] or [H] fp32 factors for the schemes that take them; for "static" also
            [1]. None for no factor.
        count: [1] int32: only this many rows are written; None for all R.
    """
    if count is not None:
        x, rows = x[: int(count)], rows[: int(count)]
        smooth_scales = _factors_of(smooth_scales, slice(len(x)))
    scales = None if fmt.scale_offset is None else fmt.scales(rows)
    encode_apart(x, fmt, fmt.payload(rows), scales, smooth_scales)


def encode_apart(
    x: torch.Tensor,
    fmt: RowFormat,
    payload: torch.Tensor,
    scales: torch.Tensor | None,
    smooth_scales: torch.Tensor | None = None,
) -> None:
    """Encode [R, H] tokens into [R, H] payload and [R, num_scales] scales, separate tensors."""
    if fmt.scheme == "none":
        payload.copy_(x)
        return
    for part in blocks(*x.shape):
        q, q_scales = _quantize(x[part], fmt, _factors_of(smooth_scales, part))
        # torch cannot copy every float8 between strided tensors: use its bytes.
        payload[part].view(torch.uint8).copy_(q.view(torch.uint8))
        if scales is not None and q_scales is not None:
            scales[part].copy_(q_scales)


def _factors_of(smooth_scales: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """The smooth factors of some rows: all of them, unless each row has its own."""
    if smooth_scales is None or smooth_scales.dim() == 1:
        return smooth_scales
    return smooth_scales[rows]


def _quantize(
    x: torch.Tensor, fmt: RowFormat, smooth_scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if fmt.scheme == "static":
        assert smooth_scales is not None
        return quantize_static(x, smooth_scales), None
    if fmt.scheme == "per_row":
        q, scale = quantize_rows(x, smooth_scales, fmt.dtype)
        return q, scale[:, None]
    if fmt.scheme == "per_row_div":
        q, scale = quantize_by_division(x, smooth_scales)
        return q, scale[:, None]
    if fmt.scheme == "group":
        return quantize_groups(x, fmt.block, smooth_scales, fmt.dtype)
    if fmt.scheme == "group_pow2":
        return quantize_groups_pow2(x, fmt.block, smooth_scales, fmt.dtype)
    if fmt.scheme == "mx":
        assert fmt.dtype in FLOAT8
        return quantize_mx(x, fmt.dtype)
    assert fmt.scheme == "block8"
    return quantize_blocks(x, fmt.block, fmt.scale_dtype)


def decode(rows: torch.Tensor, fmt: RowFormat, out: torch.Tensor) -> None:
    """Decode [R, stride] uint8 rows of the scheme "block8" into [R, H] ``out``.

    A value is q * scale in fp32, rounded to the dtype of ``out``.
    """
    q = fmt.payload(rows).float().unflatten(1, (-1, fmt.block))
    out.copy_((q * fmt.scales(rows).float()[..., None]).flatten(1))

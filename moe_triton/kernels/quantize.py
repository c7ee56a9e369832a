"""Rows to fewer bits and back: every quantisation that travels with tokens.

    static   code = int8(clamp(x * factor, -128, 127))
    token    factor = MAX / max |x|;  code = round(x * factor);  scale = 1 / factor
    divide   scale = max |x| / 127;  code = round(x / scale)
    group    token for every G elements of a row
    mx       scale = 2 ** (largest exponent - EMAX);  code = saturate(x / scale); 32 elements
    return   s = max |x| * (1 / 127);  code = int8(fp16(x / s));  scale = s in 16 bits

One kernel writes rows in any of these schemes, or as they are, to one place or to several. In its
eyes "per_row" and "per_row_div" have one group for a row. A token row is read once and quantised
once, unless each of its copies has smooth factors of its own, or it is longer than a tile: then it
comes from the cache.

Shapes: T tokens, H hidden size, S places of a token, A rows of the output, C scales of a row, G
        elements of a group.
Bytes:  reads T * H * x.itemsize, writes S * T * (H * b + C * scale bytes), b bytes a code.
Source: ``moe_triton.ref``, bit for bit: every operation is rounded by itself, halves to even.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..errors import ArgumentTypeError, ArgumentValueError, MissingArgumentError
from ..layout import FLOAT8, RowFormat
from . import launch_config
from ._checks import FLOATS, check_tensor
from ._common import (
    WORDS,
    float8_code,
    from_float32,
    int8_code,
    load_rows,
    magnitude_bits,
    to_float32,
)

# dtype -> (MAX, MANTISSA): the largest value of a payload, and the mantissa bits of a float8.
_PAYLOADS = {
    torch.int8: (127.0, 0),
    torch.float8_e4m3fn: (448.0, 3),
    torch.float8_e5m2: (57344.0, 2),
}
_MX_BLOCK = 32
_SMOOTH_SCHEMES = ("static", "per_row", "per_row_div", "group")
_INT8_SCHEMES = ("static", "per_row_div", "block8")


@triton.jit
def _quantize(t, factor, SCHEME: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr):
    """[R, G, L] fp32 to codes, with the [R, G, 1] factor that ``_factor_and_scale`` made."""
    if SCHEME == "block8":
        # Here the factor is a divisor. Where it has lost bits the quotient can pass 127.
        y = tl.div_rn(t, tl.broadcast_to(factor, t.shape))
        codes = int8_code(y.to(tl.float16).to(tl.float32), -127.0)
    elif SCHEME == "per_row_div":
        codes = int8_code(tl.div_rn(t, tl.broadcast_to(factor, t.shape)), -127.0)
    elif SCHEME == "mx":
        y = tl.minimum(tl.maximum(t * factor, -MAX), MAX)
        codes = tl.where(factor != factor, 0x7F, float8_code(y, MANTISSA).to(tl.int32)).to(tl.uint8)
    elif MANTISSA == 0:
        codes = int8_code(t * factor, -127.0)
    else:
        codes = float8_code(t * factor, MANTISSA)
    return codes


@triton.jit
def _factor_and_scale(largest, SCHEME: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr):
    """From the bits of each group's max |x|: what ``_quantize`` needs, and the scale to store."""
    amax = largest.to(tl.float32, bitcast=True)
    if SCHEME == "mx":
        EMAX: tl.constexpr = 8 if MANTISSA == 3 else 15
        exponent = largest >> 23
        code = tl.maximum(exponent - EMAX, 0)
        # 2 ** (127 - code), and NaN where inf or NaN is in the block.
        bits = tl.where(exponent == 255, 0x7FC00000, (254 - code) << 23)
        factor = bits.to(tl.float32, bitcast=True)
        scale = tl.where(exponent == 255, 255, code).to(tl.uint8)
    elif SCHEME == "block8":
        factor = amax * (1.0 / 127.0)
        scale = factor
    elif SCHEME == "per_row_div":
        factor = tl.div_rn(amax, tl.full(amax.shape, MAX, tl.float32))
        scale = factor
    else:
        inverse = tl.div_rn(tl.full(amax.shape, MAX, tl.float32), amax)
        # A row of zeros, or nearly, overflows: zeros, scale 0. NaN compares with nothing.
        factor = tl.where(inverse < float("inf"), inverse, 0.0)
        scale = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), inverse)
    return factor, scale


@triton.jit
def _smoothed(x, smooth_scales_ptr, smooth_at, mask, ONE_FACTOR: tl.constexpr):
    """Tokens times their factors, as fp32."""
    t = to_float32(x)
    if smooth_scales_ptr is not None:
        if ONE_FACTOR:
            t = t * tl.load(smooth_scales_ptr)
        else:
            t = t * tl.load(smooth_scales_ptr + smooth_at, mask=mask, other=0.0)
    return t


@triton.jit
def _largest(t, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, GROUPS] the bits of max |t| of each group."""
    return tl.max(tl.reshape(magnitude_bits(t), [ROWS, GROUPS, LANES]), axis=2)


@triton.jit
def _destination(index_ptr, first_token, slot, num_slots, num_rows, num_tokens, ROWS: tl.constexpr):
    """[ROWS] int64 row of the output for a slot of each token, negative for none."""
    if index_ptr is not None:
        row = load_rows(index_ptr + slot, first_token, num_slots, num_tokens, -1, ROWS)
    else:
        token = first_token.to(tl.int64) + tl.arange(0, ROWS)
        row = tl.where(token < num_tokens, token * num_slots + slot, -1)
    tl.device_assert(row < num_rows, "index out of range")
    return row


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_rows",
        "hidden_units",
        "group_units",
        "num_groups",
        "num_slots",
        "top_k",
        "num_experts",
        "x_units",
        "out_units",
        "scale_stride",
    ]
)
def _write_rows_kernel(
    x_ptr,  # [T, H] fp16 | bf16 | fp32 | fp64, for the scheme "none" integers as wide
    smooth_scales_ptr,  # [1], [H], [T, H] or [NS + E, H] fp32, or None
    expert_ids_ptr,  # [T, K] int32 | int64 where each slot has smooth factors of its own, or None
    index_ptr,  # [T, S] int32 | int64 rows of out, negative for none; None for row t * S + slot
    count_ptr,  # [1] int32 tokens that there are, or None for T
    out_ptr,  # [A, H] int8 | uint8 codes, or integers as wide as x
    scale_ptr,  # [A, C] fp32 | bf16 | fp16 | uint8, or None
    num_tokens,
    num_rows,
    # Sizes and strides of elements count UNITs: the compiler sees how wide an access may be.
    hidden_units,
    group_units,
    num_groups,
    num_slots,
    top_k,
    num_experts,
    x_units,
    out_units,
    scale_stride,
    SCHEME: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    FACTORS: tl.constexpr,  # "one", a "row" for all tokens, "rows"
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,  # of a tile
    LANES: tl.constexpr,  # elements of a group that a tile holds
    ADJACENT: tl.constexpr,  # the columns of a tile are consecutive
    WHOLE: tl.constexpr,  # a tile holds whole groups
):
    BLOCK: tl.constexpr = GROUPS * LANES
    SCALED: tl.constexpr = scale_ptr is not None
    PER_SLOT: tl.constexpr = expert_ids_ptr is not None
    hidden = hidden_units * UNIT
    group = group_units * UNIT
    across = tl.cdiv(num_groups, GROUPS)
    lanes = tl.arange(0, BLOCK)
    if count_ptr is not None:
        num_tokens = tl.minimum(num_tokens, tl.load(count_ptr))
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, ROWS) * across, tl.num_programs(0)):
        first_token = (tile // across) * ROWS
        token = first_token.to(tl.int64) + tl.arange(0, ROWS)
        active = token < num_tokens
        first = (tile % across) * GROUPS
        groups = first + tl.arange(0, GROUPS)
        if ADJACENT:
            cols = first * (LANES if WHOLE else group) + lanes
            mask = active[:, None] & (cols < hidden)[None, :]
        else:
            cols = (first + lanes // LANES) * group + lanes % LANES
            mask = active[:, None] & ((cols < hidden) & (lanes % LANES < group))[None, :]
        x_at = (token * x_units * UNIT)[:, None] + cols[None, :]
        if WHOLE:
            x = tl.load(x_ptr + x_at, mask=mask, other=0)

        # Copies with factors of their own are quantised one by one, others all at once.
        for own in range(num_slots if PER_SLOT else 1):
            smooth_row = token
            if PER_SLOT:
                # Slots that are not sent get some expert's factors. The last slots are those of
                # the shared experts, whose factors come first.
                routed = tl.minimum(own, top_k - 1)
                expert = load_rows(expert_ids_ptr + routed, first_token, top_k, num_tokens, 0, ROWS)
                expert = tl.minimum(tl.maximum(expert, 0), num_experts - 1)
                smooth_row = tl.where(own < top_k, expert + (num_slots - top_k), own - top_k)
            if FACTORS != "rows":
                smooth_row = tl.zeros_like(smooth_row)
            smooth_at = (smooth_row * hidden_units * UNIT)[:, None] + cols[None, :]

            if SCALED:
                if WHOLE:
                    t = _smoothed(x, smooth_scales_ptr, smooth_at, mask, FACTORS == "one")
                    largest = _largest(t, ROWS, GROUPS, LANES)
                else:
                    largest = tl.zeros([ROWS, GROUPS], tl.int32)
                    for start in range(0, group, LANES):
                        in_group = (start + lanes < group) & (start + cols < hidden)
                        part_mask = active[:, None] & in_group[None, :]
                        part = tl.load(x_ptr + x_at + start, mask=part_mask, other=0)
                        at = smooth_at + start
                        part = _smoothed(part, smooth_scales_ptr, at, part_mask, FACTORS == "one")
                        largest = tl.maximum(largest, _largest(part, ROWS, GROUPS, LANES))
                factor, scale = _factor_and_scale(largest, SCHEME, MAX, MANTISSA)
                if SCHEME != "mx":
                    scale = from_float32(scale, scale_ptr.dtype.element_ty)

            for start in range(0, LANES if WHOLE else group, LANES):
                if WHOLE:
                    part_mask = mask
                    part = x
                else:
                    in_group = (start + lanes < group) & (start + cols < hidden)
                    part_mask = active[:, None] & in_group[None, :]
                    part = tl.load(x_ptr + x_at + start, mask=part_mask, other=0)
                if SCHEME == "none":
                    codes = part
                else:
                    at = smooth_at + start
                    part = _smoothed(part, smooth_scales_ptr, at, part_mask, FACTORS == "one")
                    if SCHEME == "static":
                        codes = int8_code(part, -128.0)
                    else:
                        grouped = tl.reshape(part, [ROWS, GROUPS, LANES])
                        grouped = _quantize(grouped, factor[:, :, None], SCHEME, MAX, MANTISSA)
                        codes = tl.reshape(grouped, [ROWS, BLOCK])
                for slot in range(own, own + 1 if PER_SLOT else num_slots):
                    row = _destination(
                        index_ptr, first_token, slot, num_slots, num_rows, num_tokens, ROWS
                    )
                    is_row = (row >= 0)[:, None]
                    out_at = (row * out_units * UNIT)[:, None] + (start + cols)[None, :]
                    tl.store(out_ptr + out_at, codes, mask=part_mask & is_row)
                    if SCALED:
                        scale_at = (row * scale_stride)[:, None] + groups[None, :]
                        is_scale = (groups < num_groups)[None, :] & (start == 0)
                        tl.store(scale_ptr + scale_at, scale, mask=is_row & is_scale)


def quantize_static(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Quantise to int8 with given factors, as ``ref.quantize_static``.

    Args:
        x: [R, H] floating point.
        factors: [1], [H] or [R, H] fp32.

    Returns:
        [R, H] int8.
    """
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    fmt = RowFormat(torch.int8, x.shape[1], 0, "static")
    write_rows("quantize_static", x, fmt, q, None, factors)
    return q


def quantize_rows(
    x: torch.Tensor, smooth_scales: torch.Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row with a scale of its own, as ``ref.quantize_rows``.

    Args:
        x: [R, H] floating point.
        smooth_scales: [R, H] or [H] fp32, or None for no factor.
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        q: [R, H] of ``dtype``.
        scale: [R] fp32.
    """
    fmt = RowFormat(dtype, x.shape[1], 0, "per_row")
    q, scale = _quantized("quantize_rows", x, fmt, smooth_scales)
    return q, scale[:, 0]


def quantize_by_division(
    x: torch.Tensor, smooth_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row to int8, as ``ref.quantize_by_division``.

    Args:
        x: [R, H] floating point.
        smooth_scales: [R, H] or [H] fp32, or None for no factor.

    Returns:
        q: [R, H] int8.
        scale: [R] fp32.
    """
    fmt = RowFormat(torch.int8, x.shape[1], 0, "per_row_div")
    q, scale = _quantized("quantize_by_division", x, fmt, smooth_scales)
    return q, scale[:, 0]


def quantize_groups(
    x: torch.Tensor,
    group: int,
    smooth_scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each ``group`` consecutive elements of a row, as ``ref.quantize_groups``.

    Returns:
        q: [R, H] of ``dtype``.
        scale: [R, ceil(H / group)] fp32.
    """
    fmt = RowFormat(dtype, x.shape[1], 0, "group", block=group)
    return _quantized("quantize_groups", x, fmt, smooth_scales)


def quantize_mx(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each 32 consecutive elements with a power of two, as ``ref.quantize_mx``.

    Args:
        x: [R, H] floating point.
        dtype: float8_e4m3fn or float8_e5m2.

    Returns:
        q: [R, H] of ``dtype``.
        codes: [R, C] uint8; C is ceil(H / 32) rounded up to an even number.
    """
    fmt = RowFormat(dtype, x.shape[1], 0, "mx", scale_dtype=torch.uint8, block=_MX_BLOCK)
    return _quantized("quantize_mx", x, fmt)


def quantize_blocks(
    x: torch.Tensor, block: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each ``block`` consecutive elements to int8, as ``ref.quantize_blocks``.

    Args:
        x: [R, H] floating point, H a multiple of ``block``.
        block: elements that share a scale.
        scale_dtype: fp16, bf16 or fp32.

    Returns:
        q: [R, H] int8.
        scale: [R, H / block] of ``scale_dtype``.
    """
    fmt = RowFormat(torch.int8, x.shape[1], 0, "block8", scale_dtype=scale_dtype, block=block)
    return _quantized("quantize_blocks", x, fmt)


def _quantized(
    op: str, x: torch.Tensor, fmt: RowFormat, smooth_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(x.shape, dtype=fmt.dtype, device=x.device)
    scales = torch.empty((len(x), fmt.num_scales), dtype=fmt.scale_dtype, device=x.device)
    write_rows(op, x, fmt, q, scales, smooth_scales)
    return q, scales


def encode(
    x: torch.Tensor,
    fmt: RowFormat,
    rows: torch.Tensor,
    smooth_scales: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Write [R, H] tokens into [R, stride] uint8 ``rows`` as they travel; padding is left.

    Args:
        x: the tokens.
        fmt: of the rows.
        rows: output.
        smooth_scales: [R, H] or [H] fp32 factors of the schemes that take such; of "static" also
            [1].
        count: [1] int32 on the device: only so many rows are written; None for all R.
    """
    check_tensor(
        "encode", "rows", rows, dtypes=(torch.uint8,), shape=(len(x), None), device=x.device
    )
    payload, scales = split_rows(fmt, rows)
    write_rows("encode", x, fmt, payload, scales, smooth_scales, count=count)


def split_rows(fmt: RowFormat, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[.., stride] uint8 rows as their payload and their scales, views."""
    return fmt.payload(rows), None if fmt.scale_offset is None else fmt.scales(rows)


def write_rows(
    op: str,
    x: torch.Tensor,
    fmt: RowFormat,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    smooth_scales: torch.Tensor | None = None,
    *,
    index: torch.Tensor | None = None,
    expert_ids: torch.Tensor | None = None,
    num_slots: int = 1,
    count: torch.Tensor | None = None,
) -> None:
    """Write the codes and scales of each token to one row or to several.

    Args:
        op: for messages.
        x: [T, H] fp16, bf16, fp32 or fp64.
        fmt: the scheme, its dtypes and its block; not its stride.
        out: [A, H] of ``fmt.dtype``, written.
        scales: [A, C] of ``fmt.scale_dtype``, written; None for a scheme without scales.
        smooth_scales: [1], [H] or [T, H] fp32 factors, or with ``expert_ids`` [NS + E, H], or None.
        index: [T, S] rows of ``out``, negative for a slot without one; None for t * S + slot.
        expert_ids: [T, K] where slot k has the factors NS + expert_ids[t, k], and slot K + j
            those of shared expert j; or None.
        num_slots: S.
        count: [1] int32 on the device: only so many tokens are written; None for all T.
    """
    num_tokens, hidden = x.shape
    _check_rows(op, x, fmt, out, scales, smooth_scales, expert_ids is not None)
    if count is not None:
        check_tensor(op, "count", count, dtypes=(torch.int32,), shape=(1,), device=x.device)
    if num_tokens == 0 or num_slots == 0 or out.numel() == 0:
        return
    # The rows of a tensor may lie apart, its columns may not.
    x = x if x.stride(1) == 1 else x.contiguous()
    if smooth_scales is None or fmt.scheme not in _SMOOTH_SCHEMES:
        smooth_scales = expert_ids = None
        factors = "none"
    else:
        factors = (
            "rows" if smooth_scales.dim() == 2 else "row" if smooth_scales.numel() > 1 else "one"
        )
        smooth_scales = smooth_scales.contiguous()
    top_k = 0 if expert_ids is None else expert_ids.shape[1]
    num_experts = 0 if smooth_scales is None else len(smooth_scales) - (num_slots - top_k)
    maximum, mantissa = _PAYLOADS.get(fmt.dtype, (0.0, 0))
    if fmt.scheme == "none":
        words = WORDS[x.element_size()]
        x, out = x.view(words), out.view(words)
    elif mantissa:
        out = out.view(torch.uint8)

    group = min(fmt.block or hidden, hidden)
    num_groups = 1 if scales is None else scales.shape[1]
    lanes = min(triton.next_power_of_2(group), launch_config.widest(x.device))
    indexed = index is not None or expert_ids is not None
    tiles = launch_config.tiles(x.device, num_tokens, num_groups * lanes, indexed=indexed)
    groups = tiles.block // lanes
    whole = lanes >= group
    adjacent = num_groups == 1 or lanes <= group
    # Where groups fill their lanes the kernel needs no other size of them.
    step = 0 if whole and adjacent else group
    unit = math.gcd(16, hidden, step, x.stride(0), out.stride(0))
    _write_rows_kernel[(tiles.num_programs,)](
        x,
        smooth_scales,
        None if expert_ids is None else expert_ids.contiguous(),
        None if index is None else index.contiguous(),
        count,
        out,
        scales,
        num_tokens,
        len(out),
        hidden // unit,
        step // unit,
        num_groups,
        num_slots,
        top_k,
        num_experts,
        x.stride(0) // unit,
        out.stride(0) // unit,
        0 if scales is None else scales.stride(0),
        SCHEME=fmt.scheme,
        MAX=maximum,
        MANTISSA=mantissa,
        FACTORS=factors,
        UNIT=unit,
        ROWS=tiles.rows,
        GROUPS=groups,
        LANES=lanes,
        ADJACENT=adjacent,
        WHOLE=whole,
        # Making a float8 takes more registers than a lane of that many elements has.
        num_warps=tiles.num_warps * (2 if mantissa else 1),
        enable_fp_fusion=False,
    )


def _check_rows(
    op: str,
    x: torch.Tensor,
    fmt: RowFormat,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    smooth_scales: torch.Tensor | None,
    per_slot: bool,
) -> None:
    device, columns = x.device, x.shape[1]
    allowed = FLOATS if fmt.scheme != "none" else (fmt.dtype,)
    check_tensor(op, "x", x, dtypes=allowed, shape=(None, columns), device=device)
    if fmt.scheme == "mx" and fmt.dtype not in FLOAT8:
        raise ArgumentTypeError(op, "dtype", f"be one of {[*FLOAT8]} for MX", fmt.dtype)
    if fmt.scheme != "none" and fmt.dtype not in _PAYLOADS:
        raise ArgumentTypeError(op, "dtype", f"be one of {[*_PAYLOADS]}", fmt.dtype)
    if fmt.scheme in _INT8_SCHEMES and fmt.dtype != torch.int8:
        raise ArgumentTypeError(op, "dtype", f"be torch.int8 for {fmt.scheme}", fmt.dtype)
    if fmt.scheme == "static" and smooth_scales is None:
        raise MissingArgumentError(
            op, "smooth_scales", "hold the factors of the scheme static", None
        )
    if (scales is None) != (fmt.scheme in ("none", "static")):
        contract = f"be None just for the schemes without scales, this is {fmt.scheme!r}"
        raise ArgumentValueError(op, "scales", contract, scales if scales is None else "a tensor")
    if scales is not None and columns == 0:
        raise ArgumentValueError(op, "x", "have columns to make scales from", tuple(x.shape))
    shape = (None, columns)
    check_tensor(
        op, "out", out, dtypes=(fmt.dtype,), shape=shape, device=device, strided_columns=False
    )
    if scales is not None:
        check_tensor(
            op,
            "scales",
            scales,
            dtypes=(fmt.scale_dtype,),
            shape=(len(out), fmt.num_scales),
            device=device,
            strided_columns=False,
        )
    if smooth_scales is not None:
        _check_factors(op, smooth_scales, x, per_slot)


def _check_factors(op: str, smooth_scales: torch.Tensor, x: torch.Tensor, per_slot: bool) -> None:
    hidden = x.shape[1]
    if smooth_scales.dim() == 1 and smooth_scales.numel() == 1 and not per_slot:
        shape: tuple[int | None, ...] = (1,)
    elif smooth_scales.dim() == 1 and not per_slot:
        shape = (hidden,)
    else:
        shape = (None if per_slot else len(x), hidden)
    check_tensor(
        op, "smooth_scales", smooth_scales, dtypes=(torch.float32,), shape=shape, device=x.device
    )


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "hidden_units",
        "block_units",
        "num_blocks",
        "q_units",
        "scale_stride",
        "out_units",
    ]
)
def _decode_kernel(
    q_ptr,  # [R, H] int8
    scale_ptr,  # [R, H / block] fp32 | bf16 | fp16
    out_ptr,  # [R, H] fp16 | bf16 | fp32 | fp64
    num_rows,
    hidden_units,
    block_units,
    num_blocks,
    q_units,
    scale_stride,
    out_units,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    ADJACENT: tl.constexpr,
):
    hidden = hidden_units * UNIT
    block = block_units * UNIT
    across = tl.cdiv(num_blocks, GROUPS)
    lanes = tl.arange(0, GROUPS * LANES)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * across, tl.num_programs(0)):
        row = ((tile // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        active = (row < num_rows)[:, None]
        first = (tile % across) * GROUPS
        if ADJACENT:
            cols = first * LANES + lanes
            mask = active & (cols < hidden)[None, :]
        else:
            cols = (first + lanes // LANES) * block + lanes % LANES
            mask = active & ((cols < hidden) & (lanes % LANES < block))[None, :]
        groups = first + tl.arange(0, GROUPS)
        at = (row * scale_stride)[:, None] + groups[None, :]
        scale = tl.load(scale_ptr + at, mask=active & (groups < num_blocks)[None, :], other=0.0)
        scale = to_float32(scale)[:, :, None]
        q = tl.load(q_ptr + (row * q_units * UNIT)[:, None] + cols[None, :], mask=mask, other=0)
        y = tl.reshape(to_float32(q), [ROWS, GROUPS, LANES]) * scale
        y = from_float32(tl.reshape(y, [ROWS, GROUPS * LANES]), out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * out_units * UNIT)[:, None] + cols[None, :], y, mask=mask)


def decode(rows: torch.Tensor, fmt: RowFormat, out: torch.Tensor) -> None:
    """Write into [R, H] ``out`` what [R, stride] uint8 rows of the scheme "block8" stand for.

    That is q * scale in fp32, rounded to the dtype of ``out``.
    """
    op, device, (num_rows, hidden) = "decode", rows.device, out.shape
    check_tensor(op, "rows", rows, dtypes=(torch.uint8,), shape=(num_rows, None), device=device)
    check_tensor(
        op,
        "out",
        out,
        dtypes=FLOATS,
        shape=(num_rows, fmt.hidden),
        device=device,
        strided_columns=False,
    )
    if fmt.scheme != "block8":
        raise ArgumentValueError(op, "fmt", "have the scheme 'return'", repr(fmt.scheme))
    if out.numel() == 0:
        return
    q, scales = split_rows(fmt, rows)
    assert scales is not None
    num_blocks = hidden // fmt.block
    lanes = triton.next_power_of_2(fmt.block)
    tiles = launch_config.tiles(device, num_rows, num_blocks * lanes)
    groups = tiles.block // lanes
    adjacent = fmt.block == lanes
    step = 0 if adjacent else fmt.block
    unit = math.gcd(16, hidden, step, q.stride(0), out.stride(0))
    _decode_kernel[(tiles.num_programs,)](
        q,
        scales,
        out,
        num_rows,
        hidden // unit,
        step // unit,
        num_blocks,
        q.stride(0) // unit,
        scales.stride(0),
        out.stride(0) // unit,
        UNIT=unit,
        ROWS=tiles.rows,
        GROUPS=groups,
        LANES=lanes,
        ADJACENT=adjacent,
        num_warps=tiles.num_warps,
        enable_fp_fusion=False,
    )

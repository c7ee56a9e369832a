"""Quantise rows to int8, float8 or MX, as they are sent with tokens.

    none         codes = x
    static       code = int8(clamp(x * factor, -128, 127))
    per_row      factor = MAX / max |x|;  code = round(x * factor);  scale = 1 / factor
    per_row_div  scale = max |x| / 127;  code = round(x / scale)
    group        per_row for every G elements of a row
    group_pow2   scale = 2 ** max(ceil(log2(max |x| / MAX)), -126);  code = round(x / scale)
    mx           scale = 2 ** (largest exponent - EMAX);  code = saturate(x / scale); 32 elements
    block8       s = max |x| * (1 / 127);  code = int8(fp16(x / s));  scale = s in 16 bits

One kernel writes rows in any of these schemes, to one row of the output or to several. It
treats "per_row" and "per_row_div" as one group a row. A token is read once and quantised once,
unless each of its slots has smooth factors of its own, or it is longer than a tile: then the second
read comes from the cache.

Shapes: T tokens, H hidden size, S slots of a token, A rows of the output, C scales of a row, G
        elements of a group.
Bytes:  reads T * H * x.itemsize, writes S * T * (H * b + C * scale bytes), b bytes a code.
Source: ``moe_triton.ref.quantize``, bit for bit: every operation is rounded by itself, halves to
        even.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import ArgumentTypeError, ArgumentValueError, MissingArgumentError
from ..layout import FLOAT8, RowFormat
from . import launch_config
from ._checks import FLOATS, INDICES, check_tensor, with_adjacent_columns
from ._common import (
    WORDS,
    float8_code,
    from_float32,
    half_rounded_int8,
    int8_code,
    load_rows,
    magnitude_bits,
    quotient,
    rounded_int8,
    to_float32,
)

# dtype -> (MAX, MANTISSA): the largest value of a payload, and the mantissa bits of a float8.
_PAYLOADS = {
    torch.int8: (127.0, 0),
    torch.float8_e4m3fn: (448.0, 3),
    torch.float8_e5m2: (57344.0, 2),
}
# Inline PTX takes 4 elements of a lane, and a program has 256 lanes at most.
_PTX_TILE = 4 * 256
# scheme -> the payloads that it makes, and whether it has scales and takes smooth factors.
_SCHEMES: dict[str, tuple[tuple[torch.dtype, ...], bool, bool]] = {
    "none": ((), False, False),
    "static": ((torch.int8,), False, True),
    "per_row": (tuple(_PAYLOADS), True, True),
    "per_row_div": ((torch.int8,), True, True),
    "group": (tuple(_PAYLOADS), True, True),
    "group_pow2": (FLOAT8, True, True),
    "mx": (FLOAT8, True, False),
    "block8": ((torch.int8,), True, False),
}


@triton.jit
def _scaled_codes(t, factor, MANTISSA: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Codes of t * factor, as int8 or float8; the factor is MAX / max |t|, or 0."""
    if MANTISSA == 0:
        # Of a group with inf or NaN too, whose int8 are 0. |t * factor| is below 127.5.
        codes = rounded_int8(tl.where(factor == 0.0, 0.0, t) * factor)
    else:
        codes = float8_code(t * factor, MANTISSA, ARITHMETIC)
    return codes


@triton.jit
def _mx_codes(t, factor, MAX: tl.constexpr, MANTISSA: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Saturated float8 codes of t * factor; NaN where the factor is NaN."""
    if ARITHMETIC == "ptx":
        codes = float8_code(t * factor, MANTISSA, ARITHMETIC)
    else:
        y = tl.minimum(tl.maximum(t * factor, -MAX), MAX)
        codes = tl.where(factor != factor, 0x7F, float8_code(y, MANTISSA, ARITHMETIC))
    return codes


@triton.jit
def _rare_division(t, divisor):
    """``t`` and ``divisor`` with the same codes, the divisor neither tiny nor inf or NaN."""
    usable = divisor < float("inf")  # nor NaN
    lift = tl.where(divisor < 2.0**-64, 2.0**64, 1.0)
    # A divisor that was rounded to 0 makes 127 of the smallest number.
    divisor = tl.where(divisor == 0.0, 2.0**-92, divisor * lift)
    divisor = tl.where(usable, divisor, 1.0)
    # A divisor that lost bits makes quotients above 127.
    most = tl.where(usable, 127.0 * divisor, 0.0)
    t = tl.where(t == t, t, 0.0) * lift
    return tl.minimum(tl.maximum(t, -most), most), divisor


@triton.jit
def _divided_codes(t, divisor, HALF: tl.constexpr, ARITHMETIC: tl.constexpr):
    """int8 codes of t / divisor, with HALF rounded to fp16 first; 0 where that is NaN."""
    if ARITHMETIC == "plain":
        y = tl.div_rn(t, tl.broadcast_to(divisor, t.shape))
        if HALF:
            y = y.to(tl.float16).to(tl.float32)
        codes = int8_code(y, -127.0)
    else:
        usual = (divisor >= 2.0**-64) & (divisor < float("inf"))
        # Along one axis after the other, as a flat tensor would move through shared memory.
        if tl.min(tl.min(tl.min(usual.to(tl.int32), axis=2), axis=1), axis=0) == 0:
            t, divisor = _rare_division(t, divisor)
        y = quotient(t, divisor, HALF, ARITHMETIC)
        if HALF:  # noqa: SIM108 - only one of them is compiled
            codes = half_rounded_int8(y, ARITHMETIC)
        else:
            codes = rounded_int8(y)
    return codes


@triton.jit
def _quantize(
    t,
    factor,
    SCHEME: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """[R, G, L] fp32 to codes of 8 or 32 bits, with the [R, G, 1] of ``_factor_and_scale``."""
    if (SCHEME == "per_row" or SCHEME == "group") or SCHEME == "group_pow2":
        codes = _scaled_codes(t, factor, MANTISSA, ARITHMETIC)
    elif SCHEME == "per_row_div":
        codes = _divided_codes(t, factor, False, ARITHMETIC)
    elif SCHEME == "mx":
        codes = _mx_codes(t, factor, MAX, MANTISSA, ARITHMETIC)
    else:
        tl.static_assert(SCHEME == "block8", "unknown scheme of scaled rows")
        codes = _divided_codes(t, factor, True, ARITHMETIC)
    return codes


@triton.jit
def _inverse_scale(amax, MAX: tl.constexpr):
    """MAX / amax to multiply by, and its reciprocal as scale."""
    inverse = tl.div_rn(tl.full(amax.shape, MAX, tl.float32), amax)
    # A row of zeros, or nearly, overflows: zeros, scale 0. The comparison drops NaN too.
    factor = tl.where(inverse < float("inf"), inverse, 0.0)
    scale = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), inverse)
    return factor, scale


@triton.jit
def _pow2_scale(amax, MAX: tl.constexpr):
    """1 / scale to multiply by, and amax / MAX rounded up to a power of two; NaN for inf or NaN."""
    exact = tl.div_rn(amax, tl.full(amax.shape, MAX, tl.float32))
    # Adding all mantissa bits but one carries into the exponent unless the mantissa is 0.
    exponent = tl.maximum((exact.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23, 1)
    bad = (exact != exact) | (exact == float("inf"))
    factor = tl.where(bad, 0x7FC00000, (254 - exponent) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(bad, 0x7FC00000, exponent << 23).to(tl.float32, bitcast=True)
    return factor, scale


@triton.jit
def _mx_scale(largest, MANTISSA: tl.constexpr):
    """2 ** (127 - code) to multiply by, and the e8m0 code; NaN for a block with inf or NaN."""
    EMAX: tl.constexpr = 8 if MANTISSA == 3 else 15
    exponent = largest >> 23
    code = tl.maximum(exponent - EMAX, 0)
    bits = tl.where(exponent == 255, 0x7FC00000, (254 - code) << 23)
    factor = bits.to(tl.float32, bitcast=True)
    scale = tl.where(exponent == 255, 255, code).to(tl.uint8)
    return factor, scale


@triton.jit
def _factor_and_scale(largest, SCHEME: tl.constexpr, MAX: tl.constexpr, MANTISSA: tl.constexpr):
    """From the bits of each group's max |x|: the factor for ``_quantize``, and the scale to store.

    The factor of "per_row_div" and "block8" is a divisor.
    """
    amax = largest.to(tl.float32, bitcast=True)
    if SCHEME == "per_row" or SCHEME == "group":
        factor, scale = _inverse_scale(amax, MAX)
    elif SCHEME == "group_pow2":
        factor, scale = _pow2_scale(amax, MAX)
    elif SCHEME == "per_row_div":
        factor = tl.div_rn(amax, tl.full(amax.shape, MAX, tl.float32))
        scale = factor
    elif SCHEME == "mx":
        factor, scale = _mx_scale(largest, MANTISSA)
    else:
        tl.static_assert(SCHEME == "block8", "unknown scheme of scaled rows")
        factor = amax * (1.0 / 127.0)
        scale = factor
    return factor, scale


@triton.jit
def _smoothed(x, smooth_scales_ptr, row_start, cols, active, inside, FACTORS: tl.constexpr):
    """Tokens times their smooth factors, as fp32.

    Args:
        x: [R, L] of the tokens.
        smooth_scales_ptr: the factors.
        row_start: [R] elements before the factors of each token, used with "rows".
        cols: [L] columns.
        active: [R] mask of x.
        inside: [L] mask of x.
        FACTORS: as in ``_encode_kernel``.
    """
    t = to_float32(x)
    if FACTORS == "one":
        t = t * tl.load(smooth_scales_ptr)
    elif FACTORS == "row":
        # A pointer for each column, once: triton-ascend has no stride of 0 between rows.
        factors = tl.load(smooth_scales_ptr + cols, mask=inside, other=0.0)
        t = t * factors[None, :]
    elif FACTORS == "rows":
        at = row_start[:, None] + cols[None, :]
        mask = active[:, None] & inside[None, :]
        t = t * tl.load(smooth_scales_ptr + at, mask=mask, other=0.0)
    else:
        tl.static_assert(FACTORS == "none", "unknown shape of smooth factors")
    return t


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(
    t,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """[ROWS, GROUPS] the bits of max |t| of each group, NaN above all."""
    if ARITHMETIC == "ptx":
        # One instruction for each number; the interpreter would take a step for each.
        grouped = tl.reshape(tl.abs(t), [ROWS, GROUPS, LANES])
        largest = tl.reduce(grouped, 2, _larger).to(tl.int32, bitcast=True)
    else:
        largest = tl.max(tl.reshape(magnitude_bits(t), [ROWS, GROUPS, LANES]), axis=2)
    return largest


@triton.jit
def _in_step(start, lanes, cols, group, hidden):
    """Mask of the columns of the step from ``start`` through groups longer than a tile."""
    return (start + lanes < group) & (start + cols < hidden)


@triton.jit
def _smooth_row(
    expert_ids_ptr, first_token, slot, num_slots, top_k, num_experts, num_tokens, ROWS: tl.constexpr
):
    """[ROWS] row of the smooth factors of a slot: shared experts first, then routed ones."""
    # Clamp: a slot that is not sent gets the factors of some expert.
    routed = tl.minimum(slot, top_k - 1)
    expert = load_rows(expert_ids_ptr + routed, first_token, top_k, num_tokens, 0, ROWS)
    expert = tl.minimum(tl.maximum(expert, 0), num_experts - 1)
    return tl.where(slot < top_k, expert + (num_slots - top_k), slot - top_k)


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


@triton.jit
def encode_tiles(
    x_ptr,
    smooth_scales_ptr,
    expert_ids_ptr,
    index_ptr,
    count_ptr,
    out_ptr,
    scale_ptr,
    num_tokens,
    num_rows,
    hidden_units,
    group_units,
    num_groups,
    num_slots,
    top_k,
    num_experts,
    x_units,
    out_units,
    scale_stride,
    program,
    num_programs,
    SCHEME: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    FACTORS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    ADJACENT: tl.constexpr,
    WHOLE: tl.constexpr,
    SLOTS: tl.constexpr,
    ACROSS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
) -> None:
    """The tiles of one program, of ``num_programs`` that share the work of ``_encode_kernel``."""
    BLOCK: tl.constexpr = GROUPS * LANES
    SCALED: tl.constexpr = scale_ptr is not None
    PER_SLOT: tl.constexpr = expert_ids_ptr is not None
    hidden = hidden_units * UNIT
    group = group_units * UNIT
    lanes = tl.arange(0, BLOCK)
    if count_ptr is not None:
        num_tokens = tl.minimum(num_tokens, tl.load(count_ptr))
    for tile in range(program, tl.cdiv(num_tokens, ROWS) * ACROSS, num_programs):
        first_token = (tile // ACROSS) * ROWS
        token = first_token.to(tl.int64) + tl.arange(0, ROWS)
        active = token < num_tokens
        first = (tile % ACROSS) * GROUPS
        groups = first + tl.arange(0, GROUPS)
        if ADJACENT:
            cols = first * (LANES if WHOLE else group) + lanes
            inside = cols < hidden
        else:
            # LANES is a power of two. NPUs walk a remainder element by element.
            cols = (first + lanes // LANES) * group + (lanes & (LANES - 1))
            inside = (cols < hidden) & ((lanes & (LANES - 1)) < group)
            # They load elements one by one, also where the mask is false.
            cols, token = tl.where(inside, cols, 0), tl.where(active, token, 0)
        mask = active[:, None] & inside[None, :]
        x_at = (token * x_units * UNIT)[:, None] + cols[None, :]
        if WHOLE:
            x = tl.load(x_ptr + x_at, mask=mask, other=0)

        # Slots with factors of their own are quantised one by one, others all at once.
        for own in range(num_slots if PER_SLOT else 1):
            smooth_row = token
            if PER_SLOT:
                smooth_row = _smooth_row(
                    expert_ids_ptr, first_token, own, num_slots, top_k, num_experts, num_tokens,
                    ROWS,
                )  # fmt: skip
            row_start = smooth_row * hidden_units * UNIT

            if index_ptr is not None:
                # Ahead of the work that it would wait behind.
                first_row = _destination(
                    index_ptr, first_token, own, num_slots, num_rows, num_tokens, ROWS
                )
                next_row = first_row
            if SCALED:
                if WHOLE:
                    t = _smoothed(x, smooth_scales_ptr, row_start, cols, active, inside, FACTORS)
                    largest = _largest(t, ROWS, GROUPS, LANES, ARITHMETIC)
                else:
                    largest = tl.zeros([ROWS, GROUPS], tl.int32)
                    for start in range(0, group, LANES):
                        in_step = _in_step(start, lanes, cols, group, hidden)
                        part_mask = active[:, None] & in_step[None, :]
                        part = tl.load(x_ptr + x_at + start, mask=part_mask, other=0)
                        part = _smoothed(
                            part, smooth_scales_ptr, row_start, start + cols, active, in_step,
                            FACTORS,
                        )  # fmt: skip
                        of_part = _largest(part, ROWS, GROUPS, LANES, ARITHMETIC)
                        largest = tl.maximum(largest, of_part)
                factor, scale = _factor_and_scale(largest, SCHEME, MAX, MANTISSA)
                if SCHEME != "mx":
                    if ARITHMETIC == "ptx":
                        scale = scale.to(scale_ptr.dtype.element_ty)
                    else:
                        scale = from_float32(scale, scale_ptr.dtype.element_ty)

            for start in range(0, LANES if WHOLE else group, LANES):
                if WHOLE:
                    in_step, part_mask = inside, mask
                    part = x
                else:
                    in_step = _in_step(start, lanes, cols, group, hidden)
                    part_mask = active[:, None] & in_step[None, :]
                    part = tl.load(x_ptr + x_at + start, mask=part_mask, other=0)
                if SCHEME == "none":
                    codes = part
                else:
                    part = _smoothed(
                        part, smooth_scales_ptr, row_start, start + cols, active, in_step, FACTORS
                    )
                    if SCHEME == "static":
                        codes = int8_code(part, -128.0)
                    else:
                        grouped = tl.reshape(part, [ROWS, GROUPS, LANES])
                        grouped = _quantize(
                            grouped, factor[:, :, None], SCHEME, MAX, MANTISSA, ARITHMETIC
                        )
                        codes = tl.reshape(grouped, [ROWS, BLOCK])
                    codes = codes.to(out_ptr.dtype.element_ty)
                for k in tl.static_range(SLOTS):
                    if index_ptr is None:
                        row = _destination(
                            None, first_token, own + k, num_slots, num_rows, num_tokens, ROWS
                        )
                    else:
                        row = first_row
                        if k > 0:
                            row = next_row
                        if k + 1 < SLOTS:
                            # Before the stores, which would hold it back.
                            next_row = _destination(
                                index_ptr, first_token, own + k + 1, num_slots, num_rows,
                                num_tokens, ROWS,
                            )  # fmt: skip
                    is_row = (row >= 0)[:, None]
                    out_at = (row * out_units * UNIT)[:, None] + (start + cols)[None, :]
                    tl.store(out_ptr + out_at, codes, mask=part_mask & is_row)
                    if SCALED:
                        scale_at = (row * scale_stride)[:, None] + groups[None, :]
                        is_scale = (groups < num_groups)[None, :] & (start == 0)
                        tl.store(scale_ptr + scale_at, scale, mask=is_row & is_scale)


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
def _encode_kernel(
    x_ptr,  # [T, H] fp16 | bf16 | fp32 | fp64, for the scheme "none" integers as wide
    smooth_scales_ptr,  # [1], [H], [T, H] or [NS + E, H] fp32, or None
    expert_ids_ptr,  # [T, K] int32 | int64 where each slot has smooth factors of its own, or None
    index_ptr,  # [T, S] int32 | int64 rows of out, negative for none; None for row t * S + slot
    count_ptr,  # [1] int32 tokens to write, or None for T
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
    FACTORS: tl.constexpr,  # "none" | "one" | "row" for all tokens | "rows"
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,  # of a tile
    LANES: tl.constexpr,  # elements of a group that a tile holds
    ADJACENT: tl.constexpr,  # the columns of a tile are consecutive
    WHOLE: tl.constexpr,  # a tile holds whole groups
    SLOTS: tl.constexpr,  # slots that share codes: all, or 1 if each has smooth factors of its own
    ACROSS: tl.constexpr,  # tiles of a row
    ARITHMETIC: tl.constexpr,  # of ``launch_config.Policy``
):
    """Write the codes and scales of each token to the rows of its slots.

    Example: "per_row_div" to int8, x [[127, 1], [254, -2]], index [[3, -1], [0, 2]], num_rows 4:
        out [[127, -1], untouched, [127, -1], [127, 1]], scale [2, untouched, 2, 1].
    """
    encode_tiles(
        x_ptr,
        smooth_scales_ptr,
        expert_ids_ptr,
        index_ptr,
        count_ptr,
        out_ptr,
        scale_ptr,
        num_tokens,
        num_rows,
        hidden_units,
        group_units,
        num_groups,
        num_slots,
        top_k,
        num_experts,
        x_units,
        out_units,
        scale_stride,
        tl.program_id(0),
        tl.num_programs(0),
        SCHEME,
        MAX,
        MANTISSA,
        FACTORS,
        UNIT,
        ROWS,
        GROUPS,
        LANES,
        ADJACENT,
        WHOLE,
        SLOTS,
        ACROSS,
        ARITHMETIC,
    )


def encode(
    x: torch.Tensor,
    fmt: RowFormat,
    rows: torch.Tensor,
    smooth_scales: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Write [R, H] tokens into [R, stride] uint8 ``rows`` in their format; padding is untouched.

    Arguments as in ``ref.encode``; ``count`` stays on the device.

    Raises:
        ArgumentTypeError: a dtype that the scheme does not take.
        ArgumentValueError: a wrong scheme, shape, stride or device.
        MissingArgumentError: no factors for "static".
    """
    shape = (len(x), None)
    check_tensor("encode", "rows", rows, dtypes=(torch.uint8,), shape=shape, device=x.device)
    payload, scales = split_rows(fmt, rows)
    encode_slots("encode", x, fmt, payload, scales, smooth_scales, count=count)


def split_rows(fmt: RowFormat, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Payload and scales of [.., stride] uint8 rows, views."""
    return fmt.payload(rows), None if fmt.scale_offset is None else fmt.scales(rows)


def encode_slots(
    op: str,
    x: torch.Tensor,
    fmt: RowFormat,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    smooth_scales: torch.Tensor | None = None,
    *,
    index: torch.Tensor | None = None,
    expert_ids: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Write the codes and scales of each token to the row of each of its slots.

    Args:
        op: for messages.
        x: [T, H] fp16, bf16, fp32 or fp64.
        fmt: the scheme, its dtypes and its block; its stride is not used.
        out: [A, H] of ``fmt.dtype``, written.
        scales: [A, C] of ``fmt.scale_dtype``, or [A] where a row has one, written; None for a
            scheme without scales.
        smooth_scales: [1], [H] or [T, H] fp32 factors, or with ``expert_ids`` [NS + E, H], or None.
        index: [T, S] rows of ``out``, negative for a slot without one; None for row t of token t.
        expert_ids: [T, K] where slot k has the factors NS + expert_ids[t, k], and slot K + j
            those of shared expert j; or None.
        count: [1] int32 on the device: only this many tokens are written; None for all T.
    """
    launch = _plan_encode(x, op, fmt, out, scales, smooth_scales, index, expert_ids, count)
    if launch is None:
        return
    x, smooth_scales, expert_ids = encode_tensors(x, fmt, smooth_scales, expert_ids)
    _encode_kernel[(launch.num_programs,)](
        x,
        smooth_scales,
        expert_ids,
        None if index is None else index.contiguous(),
        count,
        out.view(launch.out_dtype),
        scales,
        x.shape[0],
        out.shape[0],
        *launch.sizes,
        **launch.constants,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


@launch_config.planned
def _plan_encode(
    x: torch.Tensor,
    op: str,
    fmt: RowFormat,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    smooth_scales: torch.Tensor | None,
    index: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    count: torch.Tensor | None,
) -> EncodeLaunch | None:
    """Check the arguments of ``encode_slots`` and plan its launch; None with nothing to write."""
    check = functools.partial(check_tensor, op, device=x.device)
    check_encode(op, x, fmt, smooth_scales, expert_ids is not None)
    if index is not None:
        check("index", index, dtypes=INDICES, shape=(len(x), None))
    if expert_ids is not None:
        check("expert_ids", expert_ids, dtypes=INDICES, shape=(len(x), None))
    _check_outputs(op, x, fmt, out, scales)
    if count is not None:
        check("count", count, dtypes=(torch.int32,), shape=(1,))
    num_slots = 1 if index is None else index.shape[1]
    if len(x) == 0 or num_slots == 0 or out.numel() == 0:
        return None
    return encode_launch(
        x, fmt, smooth_scales, expert_ids, num_slots, out.stride(0),
        0 if scales is None else scales.stride(0), indexed=index is not None,
    )  # fmt: skip


class EncodeLaunch(NamedTuple):
    """Arguments of ``encode_tiles`` beside tensors, and its launch.

    Attributes:
        out_dtype: of the codes as the kernel writes them.
        sizes: the integers after ``num_rows``.
        constants: the constexprs.
        num_programs: size of the grid.
        num_warps: of a program.
    """

    out_dtype: torch.dtype
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    num_programs: int
    num_warps: int


def encode_launch(
    x: torch.Tensor,
    fmt: RowFormat,
    smooth_scales: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    num_slots: int,
    out_stride: int,
    scale_stride: int,
    *,
    indexed: bool = False,
) -> EncodeLaunch:
    """The launch that encodes [T, H] tokens, from the signature of its arguments alone.

    Arguments as in ``encode_slots``, which go to the kernel as ``encode_tensors`` returns them;
    ``out_stride`` counts elements of the payload, ``scale_stride`` scales.
    """
    num_tokens, hidden = x.shape
    row_stride = x.stride(0) if hidden <= 1 or x.stride(1) == 1 else hidden
    _, scaled, takes_factors = _SCHEMES[fmt.scheme]
    factors = "none"
    if smooth_scales is None or not takes_factors:
        smooth_scales = expert_ids = None
    else:
        one_row = "row" if smooth_scales.numel() > 1 else "one"
        factors = "rows" if smooth_scales.dim() == 2 else one_row
    top_k = 0 if expert_ids is None else expert_ids.shape[1]
    num_experts = 0 if smooth_scales is None else len(smooth_scales) - (num_slots - top_k)
    maximum, mantissa = _PAYLOADS.get(fmt.dtype, (0.0, 0))
    out_dtype = torch.uint8 if mantissa else fmt.dtype
    if fmt.scheme == "none":
        out_dtype = WORDS[x.element_size()]

    group = min(fmt.block or hidden, hidden)
    num_groups = fmt.num_scales if scaled else 1
    lanes = min(launch_config.next_power_of_2(group), launch_config.widest(x.device))
    padded = num_groups > 1 and lanes > group
    lanes = min(lanes, launch_config.widest(x.device, padded=padded))
    indexed = indexed or expert_ids is not None
    tiles = launch_config.tiles(
        x.device, num_tokens, num_groups * lanes, indexed=indexed, padded=padded
    )
    arithmetic = launch_config.policy(x.device).arithmetic
    if arithmetic == "ptx" and tiles.rows * tiles.block < _PTX_TILE:
        arithmetic = "fma"
    whole = lanes >= group
    adjacent = num_groups == 1 or lanes <= group
    # Where groups fill their lanes the kernel needs no other size of them.
    step = 0 if whole and adjacent else group
    unit = math.gcd(16, hidden, step, row_stride, out_stride)
    sizes = (
        hidden // unit, step // unit, num_groups, num_slots, top_k, num_experts,
        row_stride // unit, out_stride // unit, scale_stride,
    )  # fmt: skip
    constants = {
        "SCHEME": fmt.scheme,
        "MAX": maximum,
        "MANTISSA": mantissa,
        "FACTORS": factors,
        "UNIT": unit,
        "ROWS": tiles.rows,
        "GROUPS": tiles.block // lanes,
        "LANES": lanes,
        "ADJACENT": adjacent,
        "WHOLE": whole,
        "SLOTS": num_slots if expert_ids is None else 1,
        "ACROSS": launch_config.cdiv(num_groups, tiles.block // lanes),
        "ARITHMETIC": arithmetic,
    }
    num_warps = tiles.num_warps
    if arithmetic != "ptx":
        # Making a float8 in integers takes more registers than a lane of that many elements has.
        num_warps *= 2 if mantissa else 1
    elif scaled and factors == "none" and fmt.scheme != "block8":
        # What a warp does once for a tile weighs more than what it does for each element.
        num_warps = max(num_warps // 2, 1)
    return EncodeLaunch(out_dtype, sizes, constants, tiles.num_programs, num_warps)


def encode_tensors(
    x: torch.Tensor,
    fmt: RowFormat,
    smooth_scales: torch.Tensor | None = None,
    expert_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Tokens, factors and ids as ``encode_tiles`` takes them; arguments as in ``encode_slots``."""
    x = with_adjacent_columns(x)
    if fmt.scheme == "none":
        x = x.view(WORDS[x.element_size()])
    if smooth_scales is None or not _SCHEMES[fmt.scheme][2]:
        return x, None, None
    return x, smooth_scales.contiguous(), None if expert_ids is None else expert_ids.contiguous()


def check_encode(
    op: str, x: torch.Tensor, fmt: RowFormat, smooth_scales: torch.Tensor | None, per_slot: bool
) -> None:
    """Check tokens and smooth factors; with ``per_slot`` these are [NS + E, H]."""
    if fmt.scheme not in _SCHEMES:
        raise ArgumentValueError(op, "fmt", f"have a scheme of {[*_SCHEMES]}", repr(fmt.scheme))
    payloads, scaled, _ = _SCHEMES[fmt.scheme]
    columns = x.shape[1]
    check = functools.partial(check_tensor, op, device=x.device)
    allowed = FLOATS if fmt.scheme != "none" else (fmt.dtype,)
    check("x", x, dtypes=allowed, shape=(None, columns))
    if fmt.scheme != "none" and fmt.dtype not in payloads:
        contract = f"be one of {[*payloads]} for the scheme {fmt.scheme!r}"
        raise ArgumentTypeError(op, "fmt.dtype", contract, fmt.dtype)
    if fmt.scheme == "static" and smooth_scales is None:
        contract = "hold the factors of the scheme 'static'"
        raise MissingArgumentError(op, "smooth_scales", contract, None)
    if scaled and columns == 0:
        raise ArgumentValueError(op, "x", "have columns to make scales from", tuple(x.shape))
    if smooth_scales is not None:
        shape: tuple[int | None, ...]
        if smooth_scales.dim() != 1 or per_slot:
            shape = (None if per_slot else len(x), columns)
        else:
            shape = (1,) if smooth_scales.numel() == 1 else (columns,)
        check("smooth_scales", smooth_scales, dtypes=(torch.float32,), shape=shape)


def _check_outputs(
    op: str, x: torch.Tensor, fmt: RowFormat, out: torch.Tensor, scales: torch.Tensor | None
) -> None:
    check = functools.partial(check_tensor, op, device=x.device)
    scaled = _SCHEMES[fmt.scheme][1]
    if (scales is not None) != scaled:
        contract = f"be {'a tensor' if scaled else 'None'} for the scheme {fmt.scheme!r}"
        raise ArgumentValueError(op, "scales", contract, scales if scales is None else "a tensor")
    check("out", out, dtypes=(fmt.dtype,), shape=(None, x.shape[1]), strided_columns=False)
    if scales is not None:
        flat = scales.dim() == 1 and fmt.num_scales == 1
        shape = (len(out),) if flat else (len(out), fmt.num_scales)
        dtypes = (fmt.scale_dtype,)
        check("scales", scales, dtypes=dtypes, shape=shape, strided_columns=flat)

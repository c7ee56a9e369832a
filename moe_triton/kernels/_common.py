"""Device helpers of several kernels: conversions with the same bits on every target.

Triton's interpreter truncates bf16 where hardware rounds, and garbles float8; chips differ in the
formats they convert. Here conversions are integer arithmetic on the bits, and float8 is stored as
bytes, which a chip without float8 can make too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Integers to move in place of elements of as many bytes, so that no conversion changes them.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TRITON_DTYPES = {
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# The bits of a NaN are above those of infinity.
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def to_float32(x):
    """Widen fp16, bf16, fp32 or int8; narrow fp64."""
    if x.dtype == tl.bfloat16:
        # bf16 is the upper half of an fp32.
        y = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def from_float32(y, DTYPE: tl.constexpr):
    """Round fp32 half to even to bf16 or fp16; fp32 and fp64 are exact."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300 - DTYPE is the parameter
        bits = y.to(tl.int32, bitcast=True)
        # Rounding up a NaN would carry into its sign.
        is_nan = (bits & 0x7FFFFFFF) > INFINITY_BITS
        upper = tl.where(is_nan, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = y.to(DTYPE)
    return rounded


@triton.jit
def widen(x, ACC: tl.constexpr):
    """``x`` in fp32 or fp64, exactly."""
    if ACC == tl.float64:  # noqa: SIM300, SIM108 - the parameter; only one of them is compiled
        y = x.to(ACC)
    else:
        y = to_float32(x)
    return y


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """``x`` rounded half to even to DTYPE."""
    if DTYPE == tl.float64:  # noqa: SIM300, SIM108 - the parameter; only one of them is compiled
        y = x.to(DTYPE)
    else:
        y = from_float32(x, DTYPE)
    return y


@triton.jit
def magnitude_bits(x):
    """|x| of fp32 as int32 in the order of the numbers, with NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def int8_code(y, LOWEST: tl.constexpr):
    """Clamp fp32 to [LOWEST, 127] and round half to even; NaN becomes 0."""
    y = tl.where(y == y, y, 0.0)
    return rounded_int8(tl.minimum(tl.maximum(y, LOWEST), 127.0))


@triton.jit
def rounded_int8(y):
    """Round fp32 half to even, where that is an int8.

    The code is the lowest byte of an int32: NPUs narrow a tile of two dimensions in less memory
    than one of three.
    """
    # Adding 1.5 * 2**23 leaves the rounded integer in the lowest bits of the sum.
    return (y + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def half_rounded_int8(y, ARITHMETIC: tl.constexpr):
    """Round fp32 to fp16 and then to an int8, each half to even; in an int32 or int8."""
    # Adding 1.5 * 2**10 to fp16 leaves the rounded integer in the lowest bits of the sum.
    if ARITHMETIC == "ptx":
        code = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 low, high, magic;
                mov.b32 magic, 0x66006600;
                cvt.rn.f16x2.f32 low, $2, $1;
                cvt.rn.f16x2.f32 high, $4, $3;
                add.rn.f16x2 low, low, magic;
                add.rn.f16x2 high, high, magic;
                prmt.b32 $0, low, high, 0x6420;
            }
            """,
            "=r,f,f,f,f",
            [y],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        code = rounded_int8(y.to(tl.float16).to(tl.float32))
    return code


@triton.jit
def float8_code(y, MANTISSA: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Round fp32 half to even to e4m3fn (MANTISSA 3) or e5m2 (2), in an int32 or uint8.

    |y| must be NaN, or above the largest value by a rounding error at most; in PTX a larger one
    becomes the largest.
    """
    if ARITHMETIC == "ptx":
        FORMAT: tl.constexpr = "e4m3x2" if MANTISSA == 3 else "e5m2x2"
        code = tl.inline_asm_elementwise(
            """
            {
                .reg .b16 low, high;
                cvt.rn.satfinite."""
            + FORMAT
            + """.f32 low, $2, $1;
                cvt.rn.satfinite."""
            + FORMAT
            + """.f32 high, $4, $3;
                mov.b32 $0, {low, high};
            }
            """,
            "=r,f,f,f,f",
            [y],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        code = _float8_bits(y, MANTISSA)
    return code


@triton.jit
def _float8_bits(y, MANTISSA: tl.constexpr):
    """``float8_code`` in integers."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    MIN_EXPONENT: tl.constexpr = -6 if MANTISSA == 3 else -14  # of normal numbers
    bits = y.to(tl.int32, bitcast=True)
    most = bits & 0x7FFFFFFF
    # Subtract the difference of the exponent biases.
    offset: tl.constexpr = (127 + MIN_EXPONENT - 1) << MANTISSA
    normal = ((most + ((1 << (SHIFT - 1)) - 1) + ((most >> SHIFT) & 1)) >> SHIFT) - offset
    # Subnormal numbers have equal steps: the lowest bits of a sum count them.
    magic: tl.constexpr = 2.0 ** (MIN_EXPONENT - MANTISSA + 23)
    magic_bits: tl.constexpr = (127 + MIN_EXPONENT - MANTISSA + 23) << 23
    small = (tl.abs(y) + magic).to(tl.int32, bitcast=True) - magic_bits
    code = tl.where(most < ((127 + MIN_EXPONENT) << 23), small, normal)
    code = tl.where(most > INFINITY_BITS, 0x7F, code)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def divide(x, divisor):
    """``x // divisor`` of int32 vectors that are not negative, exactly.

    A 910B divides vectors in fp32, which rounds numbers from 2**24 on: the first quotient may be a
    little off, and what remains is small.
    """
    quotient = x // divisor
    quotient += (x - quotient * divisor) // divisor
    return quotient - (x - quotient * divisor < 0).to(tl.int32)


@triton.jit
def quotient(t, divisor, HALF: tl.constexpr, ARITHMETIC: tl.constexpr):
    """Divide fp32 with the bits of a division, but without one for each ``t``, where fma is exact.

    ``divisor`` is broadcast along the last axis of ``t``, at least 2**-92 and at most 2**122, and
    |t| at most 2**8 of them. A quotient below 2**-20 may be off, and stays below. With HALF only
    the quotient rounded to fp16 has the bits of a division.

    Proof. Let r be 1 / divisor rounded, and q be t * r rounded, off by less than 1.5 units in its
    last place. The remainder t - q * divisor is a multiple of the product of the last places of q
    and divisor, so that at most its last bit is rounded away, and remainder * r is off by less
    than 2**-22 of those units. Their sum is rounded right, unless t / divisor lies as near to the
    middle of two numbers. Few t do, for each of the 2**23 mantissas of a divisor: a test goes
    through all of them. With HALF, r is another number for few divisors; a test goes through these.
    """
    if HALF and ARITHMETIC == "ptx":
        # Off by 2**-23 at most, of which a step of Newton's leaves the square.
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
        reciprocal = tl.fma(tl.fma(near, 0.0 - divisor, 1.0), near, near)
    else:
        reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    q = t * reciprocal
    return tl.fma(tl.fma(q, 0.0 - divisor, t), reciprocal, q)


@triton.jit
def load_rows(ptr, first, stride, end, other, ROWS: tl.constexpr):
    """[ROWS] int64 from ptr[row * stride] for rows from ``first``, ``other`` from ``end`` on.

    One row is loaded as a scalar: used as an index, it shows NPUs consecutive columns.
    """
    if ROWS == 1:
        values = tl.load(ptr + first.to(tl.int64) * stride).to(tl.int64)
        values += tl.zeros([1], tl.int64)
    else:
        row = first.to(tl.int64) + tl.arange(0, ROWS)
        values = tl.load(ptr + row * stride, mask=row < end, other=other).to(tl.int64)
    return values

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
    """Clamp fp32 to [LOWEST, 127] and round half to even; NaN becomes 0.

    The code is the lowest byte of an int32: NPUs narrow a tile of two dimensions in less memory
    than one of three.
    """
    y = tl.where(y == y, y, 0.0)
    y = tl.minimum(tl.maximum(y, LOWEST), 127.0)
    # Adding 1.5 * 2**23 leaves the rounded integer in the lowest bits of the sum.
    return (y + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def float8_code(y, MANTISSA: tl.constexpr):
    """Round fp32 half to even to e4m3fn (MANTISSA 3) or e5m2 (2), as the byte in an int32.

    |y| must be NaN, or above the largest value by a rounding error at most.
    """
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

"""Kernels that show what Ascend's compilers make of a single operation."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_triton.kernels._common import divide


@triton.jit
def divide_kernel(x_ptr, plain_ptr, exact_ptr, divisor, BLOCK: tl.constexpr):
    """Quotients of int32 numbers, by the compiler and by ``divide``."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(plain_ptr + at, x // divisor)
    tl.store(exact_ptr + at, divide(x, divisor))


@triton.jit
def gather_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    """Elements by index, 0 where the index is negative: a lane with a mask, of an address."""
    at = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at)
    tl.store(out_ptr + at, tl.load(x_ptr + index, mask=index >= 0, other=0))

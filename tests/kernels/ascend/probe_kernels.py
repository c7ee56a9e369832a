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


@triton.jit
def addresses_kernel(bases_ptr, out_ptr, BLOCK: tl.constexpr):
    """A number from each of several addresses, as records lie in the windows of all ranks."""
    at = tl.arange(0, BLOCK)
    words = tl.load(bases_ptr + at).to(tl.pointer_type(tl.int32))
    tl.store(out_ptr + at, tl.load(words))


@triton.jit
def word_kernel(bases_ptr, out_ptr, BLOCK: tl.constexpr):
    """The second word of records that lie one after the other from an address on."""
    at = tl.arange(0, BLOCK)
    records = tl.load(bases_ptr).to(tl.pointer_type(tl.int32)) + at * 4
    tl.store(out_ptr + at, tl.load(records + 1))


@triton.jit
def gather_numbers_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    """Numbers of a tile by their index in it."""
    at = tl.arange(0, BLOCK)
    x, index = tl.load(x_ptr + at), tl.load(index_ptr + at)
    tl.store(out_ptr + at, tl.gather(x, index, axis=0))


@triton.jit
def exchange_kernel(out_ptr):
    """Write a number for other devices, after all earlier writes."""
    tl.atomic_xchg(out_ptr, 1, sem="release", scope="sys")


@triton.jit
def masked_kernel(out_ptr, BLOCK: tl.constexpr):
    """Store a tile of two dimensions with a mask over both at once."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at, at, mask=at < BLOCK * BLOCK - 3)

"""The arithmetic of GPUs in numpy, for Triton's interpreter: fma and inline PTX.

The interpreter rounds an fma twice, cuts bf16 off, and knows no inline assembly.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

NAN = np.int32(0x7FFFFFFF).view(np.float32)  # of all sums and products
FLOAT8 = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of fp32, rounded once."""
    with np.errstate(all="ignore"):
        product, addend = a.astype(np.float64) * b, c.astype(np.float64)  # exact
        total = product + addend
        added = total - product
        lost = (product - (total - added)) + (addend - added)
        # Round to odd first: the second rounding then sees which side of a tie the sum is on.
        bits = total.view(np.int64)
        even = np.isfinite(total) & (lost != 0) & (bits % 2 == 0)
        away = np.where((lost > 0) == (total > 0), 1, -1)
        return (bits + np.where(even, away, 0)).view(np.float64).astype(np.float32)


def reciprocals(divisor: np.ndarray) -> list[np.ndarray]:
    """Every result of PTX's rcp.approx for divisors in [1, 2): 2**-23 off at most."""
    nearest = np.float64(1.0) / divisor
    spread = np.arange(-8, 9) * 2.0**-26
    values = [(nearest + step).astype(np.float32) for step in spread]
    return [value for value in values if (np.abs(value - nearest) <= 2.0**-23).all()]


def refined(near: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """The reciprocal that ``_common.quotient`` makes from an approximate one."""
    return fma(fma(near, -divisor, np.float32(1.0)), near, near)


def quotient(t: np.ndarray, divisor: np.ndarray, reciprocal: np.ndarray) -> np.ndarray:
    """What ``_common.quotient`` makes of them."""
    q = t * reciprocal
    return fma(fma(q, -divisor, t), reciprocal, q)


def install(monkeypatch) -> None:
    """Let the interpreter compute as a GPU does."""
    builder = interpreter.interpreter_builder

    def create_fma(x, y, z):
        assert z.dtype.scalar == tl.float32
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), tl.float32)

    truncate = builder.create_fp_trunc

    def create_fp_trunc(x, dtype):
        if dtype.scalar != tl.bfloat16:
            return truncate(x, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    def with_one_nan(method):
        def compute(*operands):
            result = method(*operands)
            if result.dtype.scalar == tl.float32:
                result.data = np.where(np.isnan(result.data), NAN, result.data)
            return result

        return compute

    monkeypatch.setattr(builder, "create_fp_trunc", create_fp_trunc)
    monkeypatch.setattr(builder, "create_fma", with_one_nan(create_fma))
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv"):
        monkeypatch.setattr(builder, name, with_one_nan(getattr(builder, name)))
    monkeypatch.setattr(builder, "create_inline_asm", _InlineAsm)


class _InlineAsm:
    """The inline PTX of the kernels, by its instructions."""

    def __init__(self, text, constraints, values, types, is_pure, pack):
        (value,) = values
        self.text, self.x = text, torch.from_numpy(np.ascontiguousarray(value.data))
        outputs, inputs = constraints.split(",")[:1], constraints.split(",")[1:]
        assert outputs[0].startswith("=")
        assert len(inputs) == pack
        assert is_pure

    def get_result(self, index):
        assert index == 0
        if "rcp.approx" in self.text:
            # An error of one in the last place, as no program may rely on more.
            bits = (1.0 / self.x).view(torch.int32) + 1
            return interpreter.TensorHandle(bits.view(torch.float32).numpy(), tl.float32)
        if "cvt.rn.f16x2.f32" in self.text:
            codes = (self.x.half() + torch.tensor(1536.0).half()).view(torch.int16).to(torch.int8)
            return interpreter.TensorHandle(codes.numpy(), tl.int8)
        (dtype,) = (dtype for name, dtype in FLOAT8.items() if f"satfinite.{name}.f32" in self.text)
        most = torch.finfo(dtype).max
        codes = self.x.clamp(-most, most).to(dtype).view(torch.uint8)
        codes = codes.masked_fill(self.x.isnan(), 0x7F)
        return interpreter.TensorHandle(codes.numpy(), tl.uint8)

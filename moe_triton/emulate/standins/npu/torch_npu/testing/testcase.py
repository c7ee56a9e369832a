"""``torch_npu.testing.testcase``: comparisons of tensors, in unittest's form."""

from __future__ import annotations

import os
import random
import sys
import unittest
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch

from moe_triton.emulate import missing


def run_tests() -> None:
    """Run the tests of the main module; exits the process."""
    unittest.main(argv=sys.argv)


class TestCase(unittest.TestCase):
    """Seeds random numbers before each test, by ``SEED``, and compares tensors."""

    precision = 1e-5

    def setUp(self) -> None:
        """Seed."""
        seed = int(os.environ.get("SEED", "666"))
        torch.manual_seed(seed)
        random.seed(seed)

    def assertEqual(
        self,
        x: Any,
        y: Any,
        prec: float | str | None = None,
        message: str | None = None,
        allow_inf: bool = False,  # noqa: ARG002 - equal infinities always pass
        exact_dtype: bool | None = None,
    ) -> None:
        """Fail unless numbers and tensors, also in lists and dicts, differ by ``prec`` at most.

        Args:
            x: a tensor, array or number, or a list or dict of them.
            y: likewise; tensors of equal shapes.
            prec: largest difference, by default ``precision``; a string here is the message.
            message: beginning of the failure message.
            allow_inf: ignored.
            exact_dtype: whether dtypes must be equal.
        """
        if isinstance(prec, str):
            prec, message = None, prec
        if not _holds_numbers(x) or not _holds_numbers(y):
            super().assertEqual(x, y, message)  # noqa: PT009 - this is unittest
            return
        torch.testing.assert_close(
            x,
            y,
            rtol=0,
            atol=self.precision if prec is None else prec,
            equal_nan=True,
            check_dtype=bool(exact_dtype),
            msg=(lambda text: f"{message}\n{text}") if message else None,
        )

    def assertRtolEqual(
        self,
        x: Any,
        y: Any,
        prec: float = 1e-4,
        prec16: float = 1e-3,
        auto_trans_dtype: bool = False,
        message: str | None = None,
    ) -> None:
        """Fail unless almost all elements agree, relatively or absolutely.

        The share of elements whose relative difference exceeds the precision, or the share whose
        absolute difference does, must be at most the precision.

        Args:
            x: a tensor, array or number, or a sequence of these.
            y: likewise, of the same shapes.
            prec: the precision.
            prec16: the precision for float16 and bfloat16.
            auto_trans_dtype: whether to convert x to the dtype of y.
            message: beginning of the failure message.
        """
        prefix = f"{message}\n" if message else ""
        if isinstance(x, Sequence) and isinstance(y, Sequence):
            if len(x) != len(y):
                self.fail(f"{prefix}lengths differ, {len(x)} and {len(y)}")
            for left, right in zip(x, y, strict=True):
                self.assertRtolEqual(left, right, prec, prec16, auto_trans_dtype, message)
            return
        x, y = (torch.as_tensor(value).detach().cpu() for value in (x, y))
        if x.shape != y.shape:
            self.fail(f"{prefix}shapes differ, {x.shape} and {y.shape}")
        if auto_trans_dtype:
            x = x.to(y.dtype)
        if x.dtype != y.dtype:
            self.fail(f"{prefix}dtypes differ, {x.dtype} and {y.dtype}")
        limit = prec16 if x.dtype in (torch.float16, torch.bfloat16) else prec
        left, right = (np.asarray(value.double()) for value in (x, y))
        difference = np.abs(left - right)
        # Not "<=": a NaN counts as wrong.
        wrong = ~(difference <= limit)
        scale = np.maximum(np.abs(left), np.abs(right)) + 1e-9
        wrong_relatively = ~(difference / scale <= limit)
        if min(wrong.sum(), wrong_relatively.sum()) > x.numel() * limit:
            self.fail(
                f"{prefix}of {x.numel()} elements, {wrong.sum()} differ by more than {limit} and "
                f"{wrong_relatively.sum()} by more than this relatively, at most {difference.max()}"
            )


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_holds_numbers, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(map(_holds_numbers, value))
    return isinstance(value, torch.Tensor | np.ndarray | Number)


__getattr__ = missing.module_getattr("torch_npu.testing.testcase")

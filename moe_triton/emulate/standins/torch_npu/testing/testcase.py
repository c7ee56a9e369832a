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
        self, x: Any, y: Any, prec: float | str | None = None, message: str | None = None
    ) -> None:
        """Fail unless numbers and tensors, also in lists and dicts, differ by ``prec`` at most.

        Args:
            x: the one.
            y: the other. Tensors have equal shapes; dtypes may differ.
            prec: largest difference, by default ``precision``; a text here is the message.
            message: says what is compared.
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
            check_dtype=False,
            msg=(lambda found: f"{message}\n{found}") if message else None,
        )

    def assertRtolEqual(self, x: Any, y: Any, prec: float = 1e-4, prec16: float = 1e-3) -> None:
        """Fail unless almost all elements agree, relatively or absolutely.

        The share of elements whose relative difference is above the precision, or that of those
        whose absolute difference is, must be at most the precision.

        Args:
            x: a tensor, array or number, or a sequence of these.
            y: the like, of the same shapes and dtypes.
            prec: the precision.
            prec16: the precision for float16 and bfloat16.
        """
        if isinstance(x, Sequence) and isinstance(y, Sequence):
            if len(x) != len(y):
                self.fail(f"lengths differ, {len(x)} and {len(y)}")
            for one, other in zip(x, y, strict=True):
                self.assertRtolEqual(one, other, prec, prec16)
            return
        x, y = (torch.as_tensor(value).detach().cpu() for value in (x, y))
        for what in ("shape", "dtype"):
            if getattr(x, what) != getattr(y, what):
                self.fail(f"{what}s differ, {getattr(x, what)} and {getattr(y, what)}")
        limit = prec16 if x.dtype in (torch.float16, torch.bfloat16) else prec
        one, other = (np.asarray(value.double()) for value in (x, y))
        difference = np.abs(one - other)
        # Not "<=": a NaN counts as wrong.
        wrong = ~(difference <= limit)
        scale = np.maximum(np.abs(one), np.abs(other)) + 1e-9
        wrong_relatively = ~(difference / scale <= limit)
        if min(wrong.sum(), wrong_relatively.sum()) > x.numel() * limit:
            self.fail(
                f"of {x.numel()} elements, {wrong.sum()} differ by more than {limit} and "
                f"{wrong_relatively.sum()} by more than this relatively, at most {difference.max()}"
            )


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_holds_numbers, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(map(_holds_numbers, value))
    return isinstance(value, torch.Tensor | np.ndarray | Number)

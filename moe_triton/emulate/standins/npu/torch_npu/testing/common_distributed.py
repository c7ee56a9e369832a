"""``torch_npu.testing.common_distributed``: tests that need several NPUs."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import TypeVar

import torch_npu
from moe_triton.emulate import missing

Test = TypeVar("Test", bound=Callable[..., None])


def skipIfUnsupportMultiNPU(npu_number_needed: int) -> Callable[[Test], Test]:
    """Skip a test if npu-run emulates fewer NPUs than it needs."""
    return unittest.skipIf(
        torch_npu.npu.device_count() < npu_number_needed,
        f"needs {npu_number_needed} NPUs, see npu-run --devices",
    )


__getattr__ = missing.module_getattr("torch_npu.testing.common_distributed")

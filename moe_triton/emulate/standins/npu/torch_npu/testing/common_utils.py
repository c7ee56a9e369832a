"""``torch_npu.testing.common_utils``: test inputs on the host and on an NPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from moe_triton.emulate import missing
from moe_triton.emulate.formats import Format, npu_format_cast_

Test = TypeVar("Test")


def get_npu_device() -> str:
    """The device of the tests, ``SET_NPU_DEVICE`` or the first."""
    return f"npu:{os.environ.get('SET_NPU_DEVICE', '0')}"


def create_common_tensor(
    item: Sequence[Any],
    minValue: float,
    maxValue: float,
    device: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same uniform random tensor on the host and on a device.

    Args:
        item: numpy dtype, storage format (-1 for ND), shape.
        minValue: smallest.
        maxValue: largest.
        device: of the second tensor, by default that of the tests.

    Returns:
        The tensor on the host, and on the device.
    """
    dtype, storage_format, shape = item
    host = torch.from_numpy(np.random.uniform(minValue, maxValue, shape).astype(dtype))
    copy = host.to(device or get_npu_device())
    return host, npu_format_cast_(copy, Format.ND if storage_format == -1 else storage_format)


def SupportedDevices(names: Sequence[str]) -> Callable[[Test], Test]:
    """Run a test on some products only; the emulated NPU counts as each of them."""
    del names
    return lambda test: test


__getattr__ = missing.module_getattr("torch_npu.testing.common_utils")

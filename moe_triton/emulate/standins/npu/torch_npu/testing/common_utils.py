"""``torch_npu.testing.common_utils``: test inputs on the host and on an NPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from moe_triton.emulate import torch_npu_ops

Test = TypeVar("Test")

# NPU storage formats: -1 keeps the tensor's, 2 is ND.
_PLAIN = (-1, 2)


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
        item: numpy dtype, layout (-1 or 2), shape.
        minValue: smallest.
        maxValue: largest.
        device: of the second tensor, by default that of the tests.

    Returns:
        The tensor on the host, and on the device.

    Raises:
        NotEmulatedError: another layout.
    """
    dtype, layout, shape = item
    if layout not in _PLAIN:
        torch_npu_ops.not_emulated("torch_npu", "npu_format_cast")
    host = torch.from_numpy(np.random.uniform(minValue, maxValue, shape).astype(dtype))
    return host, host.to(device or get_npu_device())


def SupportedDevices(names: Sequence[str]) -> Callable[[Test], Test]:
    """Run a test on some products only; the emulated NPU counts as each of them."""
    del names
    return lambda test: test

"""Devices of ``torch.npu``: their number, names, properties and options."""

from __future__ import annotations

import contextlib
import os
import threading
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from moe_triton import profile
from moe_triton.emulate import host_memory, missing, settings
from moe_triton.emulate.device import HOST, on_host
from moe_triton.errors import ArgumentValueError

_ON_CUDA = HOST.type == "cuda"
_COUNT = int(os.environ[settings.DEVICES])
_thread = threading.local()
# By the product whose profile is active: the name that scripts look for, and the number of it.
_PRODUCTS = {"a2": ("Ascend910B1", 220), "a3": ("Ascend910_9391", 250), "950": ("Ascend950", 260)}
_CUBE_CORES = 24  # of an a2 or a3 die; each has two vector cores


def is_available() -> bool:
    """True: npu-run emulates as many NPUs as it was asked for."""
    return True


def device_count() -> int:
    """Number of NPUs, ``--devices`` of npu-run."""
    return _COUNT


def index_of(device: Any) -> int:
    """The index of a device, from an index, name, or ``torch.device``."""
    if device is None:
        return current_device()
    index = device if isinstance(device, int) else torch.device(device).index
    index = current_device() if index is None else index
    if not 0 <= index < _COUNT:
        contract = f"be in [0, {_COUNT}), see npu-run --devices"
        raise ArgumentValueError("torch.npu.set_device", "device", contract, index)
    return index


def current_device() -> int:
    """The device of this thread, initially 0."""
    return getattr(_thread, "device", 0)


def set_device(device: Any) -> None:
    """Set the device of this thread.

    Raises:
        ArgumentValueError: the index is out of range.
    """
    _thread.device = index_of(device)
    if _ON_CUDA:
        torch.cuda.set_device(on_host(f"npu:{_thread.device}"))


@contextlib.contextmanager
def device(device: Any) -> Iterator[None]:
    """Set the device of this thread within the context; None and negative indices do nothing."""
    before = current_device()
    if not isinstance(device, int) or device >= 0:
        set_device(device)
    try:
        yield
    finally:
        set_device(before)


def _product() -> tuple[str, int] | None:
    return _PRODUCTS.get(profile.get_profile())


def get_device_name(device_name: Any = None) -> str:
    """The device's name, which says that it is emulated.

    With the profile of a product it begins with the product's name, as scripts that choose code by
    it expect.
    """
    name = f"npu:{index_of(device_name)}, emulated by moe_triton on {HOST.type}"
    product = _product()
    return name if product is None else f"{product[0]} ({name})"


def get_soc_version() -> int:
    """torch_npu's number of the product whose profile is active; that of a3 with ``portable``."""
    return (_product() or _PRODUCTS["a3"])[1]


class DeviceProperties(NamedTuple):
    """What ``get_device_properties`` returns."""

    name: str
    total_memory: int
    cube_core_num: int
    vector_core_num: int
    L2_cache_size: int


def get_device_properties(device: Any = None) -> DeviceProperties:
    """Name and bytes of memory, those of the host device, and sizes of an Ascend die."""
    return DeviceProperties(
        get_device_name(device),
        total_memory=host_memory.free_and_total()[1],
        cube_core_num=_CUBE_CORES,
        vector_core_num=2 * _CUBE_CORES,
        L2_cache_size=192 << 20,
    )


def is_bf16_supported() -> bool:
    """True."""
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    """The dtypes of autocast."""
    return [torch.float16, torch.bfloat16, torch.float32]


def init() -> None:
    """Do nothing: the devices need no initialisation."""


_lazy_init = init


def _lazy_call(function: Any) -> None:
    """Call ``function``, which torch_npu does once the device is initialised."""
    function()


def is_initialized() -> bool:
    """True."""
    return True


def _is_in_bad_fork() -> bool:
    return False


# Options that choose how an NPU computes. They can be set and read, and change nothing.
config: Any = types.SimpleNamespace(allow_internal_format=False)
matmul: Any = types.SimpleNamespace(allow_hf32=False)
conv: Any = types.SimpleNamespace(allow_hf32=True)


def set_compile_mode(jit_compile: bool = False) -> None:
    """Do nothing: no code is compiled for an NPU."""


def set_option(option: dict[str, Any]) -> None:
    """Do nothing: the options configure NPUs."""


__getattr__ = missing.module_getattr("torch.npu.devices")

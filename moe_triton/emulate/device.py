"""The device name npu as an alias of the host device, the CPU or CUDA.

``.npu()``, ``.to("npu:0")`` and ``device="npu"`` return tensors on the host device, so
``tensor.device`` is cpu or cuda, and ``is_npu`` is True of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import settings

HOST = torch.device(os.environ.get(settings.HOST, "cpu"))
NAMES = {"npu"}  # of devices that are NPUs; transfer_to_npu adds cuda
_COPIES = HOST.type == "cpu"  # a move between the CPU and an NPU copies
# Functions of torch.accelerator, by the name that they have in torch.npu. torch's own ask for a
# device of its C++ runtime.
_ACCELERATOR = {
    "current_device_idx": "current_device",
    "current_device_index": "current_device",
    "set_device_idx": "set_device",
    "set_device_index": "set_device",
    "get_memory_info": "mem_get_info",
    **{
        name: name
        for name in (
            *("device_count", "current_stream", "set_stream", "synchronize", "empty_cache"),
            *("memory_stats", "memory_allocated", "memory_reserved", "reset_peak_memory_stats"),
            *("max_memory_allocated", "max_memory_reserved"),
        )
    },
}
_kernels = torch.library.Library("aten", "IMPL")  # its kernels go when it does


def on_host(value: Any) -> Any:
    """The host device for an NPU device or its name; any other value as it is."""
    if isinstance(value, str):
        name, _, index = value.partition(":")
        if name not in NAMES or (index and not index.isdigit()):
            return value
        value = torch.device(value)
    if not isinstance(value, torch.device) or value.type not in NAMES:
        return value
    if _COPIES or value.index is None:
        return HOST
    return torch.device("cuda", value.index % torch.cuda.device_count())


def _device_argument(value: Any) -> Any:
    """``on_host`` for device arguments, where a bare number means an accelerator, the NPU."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = torch.device("npu", value)
    return on_host(value)


class NpuIsHost(TorchFunctionMode):
    """Replaces NPUs among the arguments of all torch functions, in compiled code too.

    On the CPU, a move to a device copies the tensor, as between a CPU and an NPU: otherwise
    ``x.npu()`` and ``x.cpu()`` would alias ``x`` and see later writes to it.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))  # keep the name until a function uses it
        arguments = [on_host(value) for value in args]
        named = {name: on_host(value) for name, value in (kwargs or {}).items()}
        if "device" in named:
            named["device"] = _device_argument(named["device"])
        if func is Tensor.to:
            _complete_move(arguments, named)
        if _COPIES:
            if func is Tensor.cpu:
                return arguments[0].to("cpu", copy=True, **named)
            if func is Tensor.pin_memory:
                return arguments[0].clone()  # pinning has no use without a device
            named.pop("pin_memory", None)
            if func in (torch.histc, Tensor.histc):
                return _histc(func, arguments, named)
        return func(*arguments, **named)


class _GeneratorType(type(torch._C.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class _Generator(torch._C.Generator, metaclass=_GeneratorType):
    """``torch.Generator``, which is no torch function, with the host for NPUs."""

    def __new__(cls, device: Any = "cpu") -> Any:
        host = _device_argument(device)
        return torch._C.Generator.__new__(torch._C.Generator, device=host)  # type: ignore[call-arg]


def _histc(func: Any, arguments: list[Any], named: dict[str, Any]) -> Tensor:
    """``torch.histc``, also of integers, which an NPU takes and the CPU does not."""
    tensor = arguments[0] if arguments else named.pop("input")
    if tensor.is_floating_point():
        return func(tensor, *arguments[1:], **named)
    out = named.pop("out", None)
    counts = func(tensor.double(), *arguments[1:], **named).to(tensor.dtype)
    return counts if out is None else out.copy_(counts)


def _complete_move(arguments: list[Any], named: dict[str, Any]) -> None:
    """Complete the arguments (tensor, device, ...) of ``Tensor.to`` in place."""
    if arguments[1:]:
        arguments[1] = _device_argument(arguments[1])
    device = named.get("device", arguments[1] if arguments[1:] else None)
    # to(tensor, device, dtype, non_blocking, copy): five arguments include copy.
    if _COPIES and isinstance(device, torch.device | str) and len(arguments) < 5:
        named.setdefault("copy", True)


def _tensor_npu(
    self: Tensor, device: Any = None, non_blocking: bool = False, **options: Any
) -> Tensor:
    """Copy this tensor to an NPU."""
    # torch.compile infers the result outside the mode, so replace the device here too.
    host = HOST if device is None else _device_argument(device)
    return self.to(host, non_blocking=non_blocking, **options)


def _record_stream(self: Tensor, s: Any) -> None:
    """Do nothing: no stream of a CPU uses the memory after the call that uses it."""


def _start_with_mode(start: Any) -> Any:
    """``Thread.start`` that enters the mode in the new thread; modes are per thread."""

    def start_thread(thread: threading.Thread) -> None:
        run = thread.run

        def run_with_mode() -> None:
            with NpuIsHost():
                run()

        thread.run = run_with_mode  # type: ignore[method-assign]
        start(thread)

    return start_thread


def _autocast_on_host(start: Any) -> Any:
    """``torch.autocast.__init__`` with the host for NPUs."""

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(self, HOST.type if device_type in NAMES else device_type, *args, **kwargs)

    return init


def _host() -> torch.device:
    return HOST


def _empty(*size: Any, device: Any, **options: Any) -> Tensor:
    """``aten::empty`` for C++ callers, which no mode reaches; barriers allocate a tensor."""
    return torch.ops.aten.empty.memory_format(*size, device=on_host(device), **options)


def _load(storage: Any, location: str) -> Any:
    """Load a storage saved on an NPU, or sent to one by ``map_location``."""
    if not location.startswith("npu"):
        return None
    return storage if _COPIES else storage.to(device=on_host(location))


def install(runtime: ModuleType) -> None:
    """Make npu a device of torch, for the rest of this process.

    Args:
        runtime: the module to become ``torch.npu``.
    """
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", runtime)
    _kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    Tensor.npu = _tensor_npu  # type: ignore[attr-defined]
    if _COPIES:
        Tensor.record_stream = _record_stream  # type: ignore[assignment,method-assign]
    Tensor.is_npu = property(  # type: ignore[attr-defined]
        lambda tensor: tensor.device.type == HOST.type
    )
    # Priority 20 is the loader for back ends with their own memory.
    torch.serialization.register_package(15, lambda _: None, _load)
    # torch takes a renamed back end for an accelerator, and would ask it for streams and devices.
    torch.accelerator.is_available = lambda: False
    for name, its_name in _ACCELERATOR.items():
        setattr(torch.accelerator, name, getattr(runtime, its_name))
    torch._C._get_accelerator = _host  # type: ignore[assignment]
    threading.Thread.start = _start_with_mode(threading.Thread.start)  # type: ignore[method-assign]
    torch.Generator = _Generator  # type: ignore[misc]
    torch.autocast.__init__ = _autocast_on_host(torch.autocast.__init__)  # type: ignore[method-assign]
    NpuIsHost().__enter__()

"""The device name npu, as another name of the device that the tensors are really on.

No tensor is ever on an NPU: ``.npu()``, ``.to("npu:0")`` and ``device="npu"`` give tensors of the
host, the CPU or CUDA. So ``tensor.device`` says cpu or cuda, and ``is_npu`` is true of all of them.
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
_COPIES = HOST.type == "cpu"  # a move between the CPU and an NPU stays on the CPU
_kernels = torch.library.Library("aten", "IMPL")  # its kernels go when it does


def on_host(value: Any) -> Any:
    """The device that stands for ``value`` if that is an NPU, else ``value`` itself."""
    if isinstance(value, str):
        name, _, index = value.partition(":")
        if name != "npu" or (index and not index.isdigit()):
            return value
        value = torch.device(value)
    if not isinstance(value, torch.device) or value.type != "npu":
        return value
    if _COPIES or value.index is None:
        return HOST
    return torch.device("cuda", value.index % torch.cuda.device_count())


def _device_argument(value: Any) -> Any:
    """``on_host`` where a bare number, too, means a device: that of the accelerator, the NPU."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = torch.device("npu", value)
    return on_host(value)


class NpuIsHost(TorchFunctionMode):
    """Replaces NPUs among the arguments of all functions of torch, in compiled code too.

    On the CPU, a move to a device copies the tensor, as it does between a CPU and an NPU: otherwise
    ``x.npu()`` and ``x.cpu()`` would be ``x`` itself, and see what is written to it later.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))  # an NPU's name stays one until it is used
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
                return arguments[0].clone()  # there is no device that could read it faster
            named.pop("pin_memory", None)
        return func(*arguments, **named)


def _complete_move(arguments: list[Any], named: dict[str, Any]) -> None:
    """Change the arguments of ``Tensor.to`` where they name a device: tensor, then device."""
    if arguments[1:]:
        arguments[1] = _device_argument(arguments[1])
    device = named.get("device", arguments[1] if arguments[1:] else None)
    # to(device, dtype, non_blocking, copy): with all of these, whether to copy is said.
    if _COPIES and isinstance(device, torch.device | str) and len(arguments) < 5:
        named.setdefault("copy", True)


def _tensor_npu(
    self: Tensor, device: Any = None, non_blocking: bool = False, **options: Any
) -> Tensor:
    """This tensor on an NPU."""
    # torch.compile takes this for an operator, and finds its result without the mode.
    host = HOST if device is None else _device_argument(device)
    return self.to(host, non_blocking=non_blocking, **options)


def _start_with_mode(start: Any) -> Any:
    """``Thread.start`` for threads to which npu is the host, too: a mode is one thread's own."""

    def start_thread(thread: threading.Thread) -> None:
        run = thread.run

        def run_with_mode() -> None:
            with NpuIsHost():
                run()

        thread.run = run_with_mode  # type: ignore[method-assign]
        start(thread)

    return start_thread


def _host() -> torch.device:
    return HOST


def _empty(*size: Any, device: Any, **options: Any) -> Tensor:
    """``aten::empty`` for code below Python, where no mode is: barriers make a tensor first."""
    return torch.ops.aten.empty.memory_format(*size, device=on_host(device), **options)


def _load(storage: Any, location: str) -> Any:
    """Deserialise a storage that was saved on an NPU, or that ``map_location`` sends to one."""
    if not location.startswith("npu"):
        return None
    return storage if _COPIES else storage.to(device=on_host(location))


def install(runtime: ModuleType) -> None:
    """Make npu a device of torch, for the rest of this process.

    Args:
        runtime: what becomes ``torch.npu``.
    """
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", runtime)
    _kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    Tensor.npu = _tensor_npu  # type: ignore[attr-defined]
    Tensor.is_npu = property(  # type: ignore[attr-defined]
        lambda tensor: tensor.device.type == HOST.type
    )
    # Below 20, so that it comes before the one for back ends with memory of their own.
    torch.serialization.register_package(15, lambda _: None, _load)
    # A renamed back end counts as an accelerator: torch.compile would ask it for streams, and
    # torch.distributed for its device.
    torch.accelerator.is_available = lambda: False
    torch._C._get_accelerator = _host  # type: ignore[assignment]
    threading.Thread.start = _start_with_mode(threading.Thread.start)  # type: ignore[method-assign]
    NpuIsHost().__enter__()

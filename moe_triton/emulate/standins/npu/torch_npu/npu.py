"""``torch_npu.npu`` and ``torch.npu``: devices, streams, events and seeds.

Work on the CPU is complete when a call returns, so streams order nothing there and events are
points in time. On CUDA these are the ones of ``torch.cuda``.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_triton.emulate import settings, torch_npu_ops
from moe_triton.emulate.device import HOST, on_host
from moe_triton.errors import ArgumentValueError

_ON_CUDA = HOST.type == "cuda"
_COUNT = int(os.environ[settings.DEVICES])
_thread = threading.local()


def __getattr__(name: str) -> Any:
    if _ON_CUDA and hasattr(torch.cuda, name):
        return getattr(torch.cuda, name)
    return torch_npu_ops.not_emulated("torch.npu", name)


# Devices.


def is_available() -> bool:
    """True: npu-run emulates as many NPUs as it was asked for."""
    return True


def device_count() -> int:
    """Number of NPUs, ``--devices`` of npu-run."""
    return _COUNT


def _index(device: Any) -> int:
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
    _thread.device = _index(device)
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


def get_device_name(device_name: Any = None) -> str:
    """The device's name, which says that it is emulated."""
    return f"npu:{_index(device_name)}, emulated by moe_triton on {HOST.type}"


def init() -> None:
    """Do nothing: the devices need no initialisation."""


_lazy_init = init


def is_initialized() -> bool:
    """True."""
    return True


def _is_in_bad_fork() -> bool:
    return False


def empty_cache() -> None:
    """Free cached memory."""
    if _ON_CUDA:
        torch.cuda.empty_cache()


def set_compile_mode(jit_compile: bool = False) -> None:
    """Do nothing: no code is compiled for an NPU."""


def set_option(option: dict[str, Any]) -> None:
    """Do nothing: the options configure NPUs."""


# Streams and events.


def synchronize(device: Any = None) -> None:
    """Wait for all work on a device."""
    _index(device)
    if _ON_CUDA:
        torch.cuda.synchronize(None if device is None else on_host(f"npu:{_index(device)}"))


class _Stream:
    """A stream whose work is always complete."""

    def __init__(self, device: Any = None, priority: int = 0, **options: Any) -> None:  # noqa: ARG002 - the signature of torch_npu
        self.device_index = _index(device)

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """True: all work is complete."""
        return True

    def wait_stream(self, stream: _Stream) -> None:
        """Do nothing."""

    def wait_event(self, event: _Event) -> None:
        """Do nothing."""

    def record_event(self, event: _Event | None = None) -> _Event:
        """Record ``event``, by default a new one."""
        event = _Event() if event is None else event
        event.record(self)
        return event


class _Event:
    """A point in time."""

    def __init__(
        self,
        enable_timing: bool = False,  # noqa: ARG002 - the signature of torch_npu
        blocking: bool = False,  # noqa: ARG002 - likewise
        interprocess: bool = False,  # noqa: ARG002 - likewise
    ) -> None:
        self._seconds: float | None = None

    def record(self, stream: _Stream | None = None) -> None:  # noqa: ARG002 - all streams are empty
        """Read the clock."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: _Event) -> float:
        """Milliseconds until ``end_event``.

        Raises:
            RuntimeError: an event was not recorded.
        """
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("both events must be recorded before elapsed_time")
        return (end_event._seconds - self._seconds) * 1e3

    def synchronize(self) -> None:
        """Do nothing."""

    def wait(self, stream: _Stream | None = None) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """True: earlier work is complete."""
        return True


Stream: Any = torch.cuda.Stream if _ON_CUDA else _Stream
Event: Any = torch.cuda.Event if _ON_CUDA else _Event


def default_stream(device: Any = None) -> Any:
    """The default stream of a device."""
    return torch.cuda.default_stream(on_host(device)) if _ON_CUDA else _Stream(device)


def current_stream(device: Any = None) -> Any:
    """The stream of this thread."""
    if _ON_CUDA:
        return torch.cuda.current_stream(on_host(device))
    return getattr(_thread, "stream", None) or default_stream(device)


def set_stream(stream: Any) -> None:
    """Set the stream of this thread."""
    if _ON_CUDA:
        torch.cuda.set_stream(stream)
    else:
        _thread.stream = stream


@contextlib.contextmanager
def stream(stream: Any) -> Iterator[None]:
    """Set the stream of this thread within the context; None does nothing."""
    before = current_stream()
    if stream is not None:
        set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


# Random numbers.


def manual_seed(seed: int) -> None:
    """Seed the generator of the host device."""
    if _ON_CUDA:
        torch.cuda.manual_seed(seed)
    else:
        # Not torch.manual_seed, which calls this function for every kind of device.
        torch.default_generator.manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed the generators of all devices."""
    if _ON_CUDA:
        torch.cuda.manual_seed_all(seed)
    else:
        manual_seed(seed)


def get_rng_state(device: Any = "npu") -> Tensor:
    """State of the generator, uint8."""
    return torch.cuda.get_rng_state(on_host(device)) if _ON_CUDA else torch.get_rng_state()


def set_rng_state(new_state: Tensor, device: Any = "npu") -> None:
    """Set the state of the generator."""
    if _ON_CUDA:
        torch.cuda.set_rng_state(new_state, on_host(device))
    else:
        torch.set_rng_state(new_state)

"""Streams and events of ``torch.npu``.

Work on the CPU is complete when a call returns, so streams order nothing there and events are
points in time. On CUDA these are the ones of ``torch.cuda``.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from moe_triton.emulate import missing
from moe_triton.emulate.device import HOST, on_host

from .devices import device_count, index_of

_ON_CUDA = HOST.type == "cuda"
_thread = threading.local()
_stream_ids = itertools.count()


def synchronize(device: Any = None) -> None:
    """Wait for all work on a device."""
    index_of(device)
    if _ON_CUDA:
        torch.cuda.synchronize(None if device is None else on_host(f"npu:{index_of(device)}"))


class _Stream:
    """A stream whose work is always complete."""

    def __init__(self, device: Any = None, priority: int = 0, **options: Any) -> None:  # noqa: ARG002 - the signature of torch_npu
        self.device_index = index_of(device)
        self.priority = priority
        self.stream_id = next(_stream_ids)

    @property
    def device(self) -> torch.device:
        """The NPU."""
        return torch.device("npu", self.device_index)

    @property
    def npu_stream(self) -> int:
        """No handle of a runtime: only a number that tells streams apart, as ``stream_id``."""
        return self.stream_id

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


_default_streams: tuple[Any, ...] = (
    () if _ON_CUDA else tuple(_Stream(index) for index in range(device_count()))
)


def default_stream(device: Any = None) -> Any:
    """The default stream of a device."""
    if _ON_CUDA:
        return torch.cuda.default_stream(on_host(device))
    return _default_streams[index_of(device)]


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


__getattr__ = missing.module_getattr("torch.npu.streams")

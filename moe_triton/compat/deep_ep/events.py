"""``EventHandle`` and ``EventOverlap``: when the results of a call are there.

All work of this library runs on the caller's stream, so that an event marks a point of that stream.
On the CPU a call has finished when it returns, and events are empty.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from typing_extensions import Self  # a dependency of torch; part of typing from Python 3.11

from ...errors import ArgumentTypeError, SequenceError


class EventHandle:
    """An event recorded on the accelerator's current stream; empty without an accelerator."""

    def __init__(self) -> None:
        self._event: torch.Event | None = None
        if torch.accelerator.is_available():
            self._event = torch.Event(torch.accelerator.current_accelerator())
            self._event.record(torch.accelerator.current_stream())

    def current_stream_wait(self) -> None:
        """Let the current stream wait for the event; the host does not wait."""
        if self._event is not None:
            torch.accelerator.current_stream().wait_event(self._event)


class EventOverlap:
    """An event, and what is to run once it has been waited for.

    Args:
        event: the event, or None.
        extra_tensors: tensors to keep alive as long as this object.

    Attributes:
        event: as given; None once released.
        extra_tensors: as given.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._release_on_exit = False
        self._hook: Callable[[], Any] | None = None

    def current_stream_wait(self, release_handle: bool = False) -> Any:
        """Let the current stream wait for the event, then run the hook once.

        Args:
            release_handle: drop the event.

        Returns:
            What the hook returns: with ``defer_epilogue`` the results of the call, else None.

        Raises:
            SequenceError: there is no event, or it was released.
        """
        if self.event is None:
            raise SequenceError(
                "deep_ep.EventOverlap.current_stream_wait",
                "event must have been recorded and not released, got none",
            )
        self.event.current_stream_wait()
        hook, self._hook = self._hook, None
        result = None if hook is None else hook()
        if release_handle:
            self.event = None
        return result

    def register_hook_after_wait(self, hook_after_wait: Callable[[], Any]) -> None:
        """Run ``hook_after_wait`` after the next ``current_stream_wait``.

        Raises:
            SequenceError: a hook is registered already.
        """
        if self._hook is not None:
            raise SequenceError(
                "deep_ep.EventOverlap.register_hook_after_wait",
                "at most one hook may be registered, got a second one",
            )
        self._hook = hook_after_wait

    def __call__(self, release_handle: bool = False) -> Self:
        """Choose whether the ``with`` statement that follows releases the event."""
        self._release_on_exit = release_handle
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The current stream waits for the event at the end of the ``with`` statement."""
        if self.event is not None:
            self.current_stream_wait(self._release_on_exit)
        self._release_on_exit = False


def wait_for(op: str, name: str, event: EventOverlap | EventHandle | None) -> None:
    """Let the current stream wait for an event that a caller gave, if any.

    Raises:
        ArgumentTypeError: it is no event.
    """
    handle = event.event if isinstance(event, EventOverlap) else event
    if handle is None:
        return
    if not isinstance(handle, EventHandle):
        raise ArgumentTypeError(op, name, "be an event of this module", type(event).__name__)
    handle.current_stream_wait()

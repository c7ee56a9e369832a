"""Waiting on the host: bounded in time, and cheap for ranks that share the cores."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from . import futex

_YIELDS = 20  # polls that only give up the core
_FIRST_SLEEP, _LONGEST_SLEEP = 20e-6, 200e-6  # seconds
_SLICE = 5e-3  # longest sleep on one word: the waiter also looks for aborts and dead peers
_SPIN = 50e-6  # seconds

T = TypeVar("T")


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in an error text: rank 1, or ranks [1, 2]."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


class Backoff:
    """The pauses of one wait.

    Args:
        timeout: seconds until ``expired``.
        spin: poll for 50 us before the first sleep on a word; pays where every rank has a core of
            its own.
    """

    def __init__(self, timeout: float, *, spin: bool = False) -> None:
        self.deadline = time.monotonic() + timeout
        self.polls = 0
        self._sleep = _FIRST_SLEEP
        self._spin_until = time.monotonic() + _SPIN if spin else 0.0

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(self.deadline - time.monotonic(), 0.0)

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def pause(self, longest: float = _LONGEST_SLEEP) -> None:
        """Yield at first, then sleep, 1.5 times longer each time."""
        self.polls += 1
        if self.polls <= _YIELDS:
            time.sleep(0)
            return
        time.sleep(self._sleep)
        self._sleep = min(self._sleep * 1.5, longest)

    def pause_on(self, address: int, seen: int) -> None:
        """Wait for a change of the 32-bit word at ``address``, for some milliseconds at most.

        Args:
            address: of the word; its writer calls ``futex.wake`` after the change.
            seen: its value before the caller looked.
        """
        word = ctypes.c_int32.from_address(address)
        while time.monotonic() < self._spin_until:
            if word.value != seen:
                return
        # Never yield: where others want the core, that may give it up for milliseconds.
        if not futex.wait(address, seen, min(self.remaining, _SLICE)):
            self.pause()


class Background(Generic[T]):
    """A call in a thread of its own, which its caller can leave behind.

    Args:
        call: may block for ever.
        name: of the thread.
    """

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self._call = call
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"moe_triton {name}")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            self._error = error

    def done(self, seconds: float = 0.0) -> bool:
        """Whether the call has ended, or ends within ``seconds``."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """The result of a call that is done; raises its exception."""
        if self._error is not None:
            raise self._error
        return self._result[0]


def bounded(call: Callable[[], T], seconds: float) -> T:
    """The result of ``call()``, or a ``TimeoutError`` if it does not return in time."""
    background = Background(call, "rendezvous")
    if not background.done(seconds):
        raise TimeoutError(f"no answer after {seconds:g} s")
    return background.result()

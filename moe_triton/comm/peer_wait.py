"""Waits of one rank for its peers: bounded in time, ended early by losses and by deadlocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

from ..errors import BrokenGroupError, PeerTimeoutError
from . import atomics
from .control_blocks import ControlBlocks
from .groups import Group
from .polling import Backoff, ranks_text
from .wait_board import Deadlock, Issuer, WaitBoard

_LIVENESS_INTERVAL = 10e-3  # seconds between checks for dead peers
_BOARD_INTERVAL = 0.1  # seconds between checks for peers in other calls


class PeerWait:
    """How one rank waits, and whether its group is broken.

    Args:
        group: the group.
        name: of the object that issues the calls, equal on all ranks, of no other of the group.
        owner: that object.
        control: the control blocks.
        timeout: of a wait, in seconds.

    Attributes:
        broken: why no call works any more, or None.
        retry: kind and epoch of the wait that may be repeated and repairs the group, or None.
    """

    def __init__(
        self, group: Group, name: str, owner: Issuer, control: ControlBlocks, timeout: float
    ) -> None:
        self.broken: str | None = None
        self.retry: tuple[str, int] | None = None
        self.timeout = timeout
        self._group, self._control = group, control
        # Threads of one process hold each other's interpreter lock while they spin.
        self._spin = not group.in_process and len(os.sched_getaffinity(0)) >= group.size
        self.board = WaitBoard(group, name, owner)

    def raise_if_broken(self, op: str) -> None:
        """Raise ``BrokenGroupError`` when an earlier call broke the group."""
        if self.broken is not None:
            raise BrokenGroupError(
                op,
                f"group {self._group.name!r} is broken since a call failed ({self.broken}); "
                "call recover() on all ranks",
            )

    def repaired(self, kind: str, epoch: int) -> None:
        """A wait has ended well: the group works again if it was the one that failed."""
        if self.retry == (kind, epoch):
            self.broken = self.retry = None
            self._control.blame(None)

    def pause_on(self, address: int, seen: int) -> None:
        """One pause, for some milliseconds at most, before any polls; as ``Backoff.pause_on``."""
        Backoff(self.timeout, spin=self._spin).pause_on(address, seen)

    def polls(
        self,
        op: str,
        kind: str,
        epoch: int,
        missing: Mapping[int, int],
        retry: tuple[str, int] | None = None,
    ) -> Iterator[None]:
        """Yield once per poll, until the caller has emptied ``missing``.

        Args:
            op: for error messages.
            kind: of the operation in which this rank waits.
            epoch: of that operation.
            missing: addresses of the words that will change, by rank.
            retry: kind and epoch of a wait that may be repeated after a time-out, or None.

        Raises:
            PeerTimeoutError: the time is up, or a missing peer has left or died, or waits for this
                rank in another call.
        """
        what = f"{kind} {epoch}"
        backoff = Backoff(self.timeout, spin=self._spin)
        gone: list[int] = []
        deadlock: Deadlock | None = None
        late = posted = False
        next_check = time.monotonic() + _LIVENESS_INTERVAL
        next_board = time.monotonic() + _BOARD_INTERVAL
        try:
            while missing:
                # Read before the poll: a change after the poll then ends the pause at once.
                address = next(iter(missing.values()))
                seen = atomics.load_relaxed(address)
                yield
                if not missing:
                    return
                # Decided before this poll, so that a flag set before the deadline counts.
                if deadlock is not None and deadlock.rank in missing:
                    posted = False  # stays, for the peers
                    self.give_up(op, (deadlock.rank,), deadlock.problem)
                if lost := tuple(rank for rank in gone if rank in missing):
                    self.give_up_lost(op, lost, what, retry)
                if late and missing:
                    self.give_up_late(op, tuple(sorted(missing)), what, retry)
                now = time.monotonic()
                if now >= next_check:
                    gone = [rank for rank in missing if self._control.is_gone(rank)]
                    # A peer that found out first has left, and its post stays.
                    if gone or now >= next_board:
                        if not posted:
                            self.board.post(kind, epoch)
                            posted = True
                        deadlock = self.board.find_deadlock(kind, epoch, missing)
                        next_board = now + _BOARD_INTERVAL
                    next_check = now + _LIVENESS_INTERVAL
                late = now >= backoff.deadline
                if address in missing.values():
                    backoff.pause_on(address, seen)
        finally:
            if posted:
                self.board.clear()

    def give_up_lost(
        self, op: str, ranks: tuple[int, ...], what: str, retry: tuple[str, int] | None = None
    ) -> NoReturn:
        """``give_up`` for ranks that are gone."""
        ranks = self._control.culprits(ranks)
        self.give_up(op, ranks, f"{ranks_text(ranks)} left the group or died ({what})", retry)

    def give_up_late(
        self, op: str, ranks: tuple[int, ...], what: str, retry: tuple[str, int] | None = None
    ) -> NoReturn:
        """``give_up`` for ranks that did not come in time."""
        ranks = self._control.culprits(ranks)
        problem = f"{ranks_text(ranks)} did not come within {self.timeout:g} s ({what})"
        self.give_up(op, ranks, problem, retry)

    def give_up(
        self, op: str, ranks: tuple[int, ...], problem: str, retry: tuple[str, int] | None = None
    ) -> NoReturn:
        """Break the group and raise ``PeerTimeoutError``.

        Args:
            op: for error messages.
            ranks: the culprits.
            problem: in words.
            retry: kind and epoch of the wait, if it may be repeated.
        """
        # Only the first failed wait can be repeated: a failed setup is lost for good, whatever the
        # waits after it return.
        if self.broken is None:
            self.retry = retry
        self.broken = problem
        self._control.blame(ranks[0])
        raise PeerTimeoutError(op, ranks, f"{problem}, in group {self._group.name!r}")

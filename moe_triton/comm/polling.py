"""Waiting on the host: bounded in time, polite to the other ranks that share the cores."""

from __future__ import annotations

import time
from collections.abc import Sequence

_YIELDS = 20  # polls that only give up the core
_FIRST_SLEEP, _LONGEST_SLEEP = 20e-6, 200e-6  # seconds


def ranks_text(ranks: Sequence[int]) -> str:
    """Some ranks in words: rank 1, or ranks [1, 2]."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


class Backoff:
    """The pauses of one wait.

    Args:
        timeout: seconds until ``expired``.
    """

    def __init__(self, timeout: float) -> None:
        self.deadline = time.monotonic() + timeout
        self.polls = 0
        self._sleep = _FIRST_SLEEP

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(self.deadline - time.monotonic(), 0.0)

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def pause(self, longest: float = _LONGEST_SLEEP) -> None:
        """Let others run: first by a yield, then for longer and longer."""
        self.polls += 1
        if self.polls <= _YIELDS:
            time.sleep(0)
            return
        time.sleep(self._sleep)
        self._sleep = min(self._sleep * 1.5, longest)

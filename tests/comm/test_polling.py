"""Waits that yield, then sleep, until their deadline."""

from __future__ import annotations

import time

import pytest

from moe_triton.comm import polling
from moe_triton.comm.polling import Backoff, ranks_text


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self, monkeypatch):
        self.now, self.naps = 100.0, []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds


def test_time_is_up_at_the_deadline(monkeypatch):
    clock = Clock(monkeypatch)
    backoff = Backoff(2.0)
    assert (backoff.remaining, backoff.expired) == (2.0, False)
    clock.now += 1.5
    assert (backoff.remaining, backoff.expired) == (0.5, False)
    clock.now += 0.5
    assert (backoff.remaining, backoff.expired) == (0.0, True)
    clock.now += 5
    assert (backoff.remaining, backoff.expired) == (0.0, True)


@pytest.mark.parametrize("longest", [None, 10e-3])
def test_pauses_grow_from_a_yield(monkeypatch, longest):
    """A short wait ends soon, a long one costs little."""
    clock = Clock(monkeypatch)
    backoff = Backoff(30.0)
    options = {} if longest is None else {"longest": longest}
    for polls in range(1, 100):
        backoff.pause(**options)
        assert backoff.polls == polls
    yields = clock.naps.count(0)
    assert clock.naps[:yields] == [0] * yields
    assert 1 <= yields < 99
    naps = clock.naps[yields:]
    assert naps == sorted(naps)
    assert 0 < naps[0] < 1e-4
    assert naps[-1] == (longest or polling._LONGEST_SLEEP)


@pytest.mark.parametrize("ranks, text", [((1,), "rank 1"), ((0, 2), "ranks [0, 2]")])
def test_ranks_in_words(ranks, text):
    assert ranks_text(ranks) == text

"""Find the lost rank after a collective failed or timed out: reports in the store of the group.

A collective that fails says little about the cause: a connection may be closed by the rank that
died, or by one that gave up because of it and has left already. So each rank that gives up writes a
report under its rank, with what it waited in, before it does anything else, and then reads those of
the others. A rank without a report whose connections are closed is dead. Where no connection is
closed, as with a process that hangs, the ranks without a report after ``GRACE`` seconds are named.

The reports stay in the store, so a rank that leaves at once after its error is not taken for the
dead one. The store's server may itself be gone; every access is bounded in time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from .polling import bounded, ranks_text

GRACE = 0.5  # seconds to wait for the reports of others
_STORE_LIMIT = 0.5  # seconds for one access to the store
_POLL = 5e-3  # seconds
_SAME_CALLS = "all ranks must issue the same calls"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Who is to blame for a failed collective.

    Attributes:
        ranks: the culprits; empty where none is known.
        problem: the cause in words.
    """

    ranks: tuple[int, ...]
    problem: str


class FailureDetection:
    """One rank's access to the reports of a connected group.

    Args:
        store: with keys that only the ranks of this connection use.
        rank: this rank.
        size: number of ranks.
        timeout: seconds that a collective may take, for messages.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self._store = store
        self._rank, self._size, self._timeout = rank, size, timeout

    def reported(self) -> bool:
        """Whether any rank gave up; False also where the store does not answer."""
        with contextlib.suppress(TimeoutError, RuntimeError):
            return bounded(lambda: self._store.check(["failed"]), _STORE_LIMIT)
        return False

    def give_up(
        self, place: str, waited: float, late: bool, closed: Callable[[], set[int]]
    ) -> Verdict:
        """Report that this rank gives up, and find the culprits.

        Args:
            place: the operation that failed, equal on ranks that are in the same one.
            waited: seconds that this rank waited in it.
            late: the time-out passed, and no error came before.
            closed: returns the ranks whose connections are closed.
        """
        report = {"place": place, "waited": waited, "late": late}
        try:
            bounded(lambda: self._report(report), _STORE_LIMIT)
            reports, missing_closed = self._gather(report, closed)
        except (TimeoutError, RuntimeError) as error:
            return self._without_store(closed(), error)
        verdict = self._judge(reports, missing_closed)
        if verdict.ranks:
            self.conclude(place, waited, late, verdict)
        return verdict

    def conclude(self, place: str, waited: float, late: bool, verdict: Verdict) -> None:
        """Report the culprits, for ranks that come later and find a report of every other rank."""
        report = {
            "place": place,
            "waited": waited,
            "late": late,
            "culprits": verdict.ranks,
            "problem": verdict.problem,
            "same_calls": _SAME_CALLS in verdict.problem,
        }
        with contextlib.suppress(TimeoutError, RuntimeError):
            bounded(lambda: self._report(report), _STORE_LIMIT)

    def _report(self, report: Mapping[str, Any]) -> None:
        self._store.set(f"report/{self._rank}", json.dumps(report))
        self._store.set("failed", "")

    def _read(self, reports: dict[int, dict[str, Any]]) -> None:
        for rank in range(self._size):
            key = f"report/{rank}"
            known = rank == self._rank or "culprits" in reports.get(rank, ())
            if not known and self._store.check([key]):
                reports[rank] = json.loads(self._store.get(key))

    def _gather(
        self, report: dict[str, Any], closed: Callable[[], set[int]]
    ) -> tuple[dict[int, dict[str, Any]], set[int]]:
        """All reports that come within ``GRACE``, and the ranks that are dead for certain."""
        reports = {self._rank: report}
        end = time.monotonic() + GRACE
        while True:
            # Connections first: a rank that gave up reported before it closed any.
            gone = closed()
            bounded(lambda: self._read(reports), _STORE_LIMIT)
            dead = gone - set(reports)
            verdicts = any("culprits" in found for found in reports.values())
            complete = len(reports) == self._size and (report["late"] or verdicts)
            if dead or complete or time.monotonic() >= end:
                return reports, dead
            time.sleep(_POLL)

    def _judge(self, reports: dict[int, dict[str, Any]], dead: set[int]) -> Verdict:
        if dead:
            ranks = tuple(sorted(dead))
            return Verdict(ranks, f"the connection to {ranks_text(ranks)} is gone")
        own = reports[self._rank]
        in_time = f"within {self._timeout:g} s"
        missing = tuple(rank for rank in range(self._size) if rank not in reports)
        if missing:
            return Verdict(missing, f"{ranks_text(missing)} did not come {in_time}")
        concluded = next((report for report in reports.values() if "culprits" in report), None)
        # A rank that came late has not waited long for the others, wherever it is by now.
        elsewhere = [
            rank
            for rank, report in reports.items()
            if report["place"] != own["place"] and report["waited"] > self._timeout / 2
        ]
        if elsewhere and (own["late"] or (concluded and concluded["same_calls"])):
            rank = min(elsewhere)
            problem = f"rank {rank} waits in {reports[rank]['place']}, this rank in {own['place']}"
            return Verdict((rank,), f"{problem}: {_SAME_CALLS}")
        if concluded:
            rank = next(rank for rank, report in reports.items() if report is concluded)
            return Verdict(
                tuple(concluded["culprits"]), f"rank {rank} gave up: {concluded['problem']}"
            )
        if own["late"]:
            last = min(reports, key=lambda rank: reports[rank]["waited"])
            return Verdict((last,), f"rank {last} did not come {in_time}")
        return Verdict((), "a connection failed, though all ranks are alive")

    def _without_store(self, closed: set[int], cause: Exception) -> Verdict:
        """Rank 0 serves the store, unless the launcher does: then its end explains both."""
        ranks = (0,) if 0 in closed else tuple(sorted(closed))
        problem = f"the store of the group is gone ({cause})"
        if ranks:
            problem = f"the connection to {ranks_text(ranks)} is gone, and {problem}"
        return Verdict(ranks, problem)

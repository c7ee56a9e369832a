"""How the ranks of a group find each other, through a store, before they share any memory.

Until a meeting has succeeded, each call posts a record under its number: either the facts that
decide how to connect, or the reason why this rank rejects the call. A rank that rejects need not
wait for anybody, and its peers learn the reason as soon as they look.

A group is met again after ``recover()`` or by a rank that was restarted. Each meeting has a
generation, the largest number of times that any rank has joined, so that all of them end up in the
same one.

The store may be served by one of the ranks. When that one stops, an access to the store never
returns, so accesses are made by a thread of their own, which can be left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import PeerAbortError, PeerTimeoutError
from .groups import Group
from .polling import Backoff, ranks_text

T = TypeVar("T")

_SLOWEST_POLL = 10e-3  # seconds; a store may be a file or a server
_STORE_GRACE = 0.5  # seconds that a store may take to answer


@dataclasses.dataclass(frozen=True)
class _Place:
    """The call that records belong to; generation 0 stands for the next one."""

    generation: int = 0
    call: int = 0


class _LaterGenerationError(Exception):
    """A peer has joined more often: start again with its count."""

    def __init__(self, generation: int) -> None:
        self.generation = generation


class Rendezvous:
    """One rank's side of the meetings of a group.

    Args:
        group: must have a store.
        tag: sets apart the users of one group.
        timeout: seconds to wait for all ranks.
    """

    def __init__(self, group: Group, tag: str, timeout: float) -> None:
        assert group.store is not None
        self._store = group.store
        self._group = group
        self._tag = tag
        self._timeout = timeout
        self._place = _Place()

    @property
    def name(self) -> str:
        """Of the last meeting: equal on its ranks, and that of no other meeting of the group."""
        return f"{self._tag}/{self._place.generation}/{self._place.call}"

    def private_store(self) -> dist.Store:
        """Keys that only the ranks of the last meeting use."""
        return dist.PrefixStore(f"{self.name}/private", self._store)

    def leave(self) -> None:
        """Make the next call join a new generation."""
        self._place = _Place()

    def abort_peers(self, reason: str) -> None:
        """Tell the peers that this rank rejects the call that they may be making now."""
        silent = threading.Event()

        def access() -> _Place:
            place = self._next_call()
            if not silent.is_set():  # else this rank may be making another call by now
                self._post(place, "peer_info", {"rejected": reason})
            return place

        # Without the store, silent or gone, nobody can be told, and the peers do not meet either.
        try:
            self._place = _bounded(access, _STORE_GRACE)
        except (TimeoutError, RuntimeError):
            silent.set()

    def meet(self, op: str, peer_info: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange ``peer_info``, which must survive JSON, with all ranks; within ``following()``.

        Raises:
            PeerAbortError: a peer rejected its call.
            PeerTimeoutError: peers did not come in time.
        """
        self._place, records = self._gather(op, "peer_info", peer_info, self._next_call)
        for rank, record in sorted(records.items()):
            if "rejected" in record:
                raise PeerAbortError(op, rank, record["rejected"])
        return [records[rank] for rank in range(self._group.size)]

    def confirm(self, op: str) -> None:
        """Make sure that facts which agree are those of ranks that are still there.

        A dead incarnation of a peer may have left its record: the count of joins tells. Facts that
        do not agree decide their call however far some rank has come since.
        """
        ranks = range(self._group.size)
        try:
            later = _bounded(lambda: max(map(self._joins, ranks)), self._timeout + _STORE_GRACE)
        except (TimeoutError, RuntimeError) as error:
            problem = f"the store of group {self._group.name!r} is gone: {error}"
            raise PeerTimeoutError(op, (), problem) from error
        if later > self._place.generation:
            raise _LaterGenerationError(later)

    def exchange(self, op: str, step: str, record: dict[str, Any]) -> list[dict[str, Any]]:
        """A further round among ranks that have just met."""
        _, records = self._gather(op, step, record, lambda: self._place)
        return [records[rank] for rank in range(self._group.size)]

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Leave a block of rounds where a peer turns out to have joined more often than this rank.

        It was restarted, or recovers once more; the block must be run again, in its generation.
        """
        try:
            yield
        except _LaterGenerationError as later:
            self._place = _Place(later.generation)

    def _joins(self, rank: int, more: int = 0) -> int:
        return self._store.add(f"{self._tag}/joins/{rank}", more)

    def _next_call(self) -> _Place:
        """The place after the last one, in a generation that this rank has joined."""
        joins = self._joins(self._group.rank)
        generation = self._place.generation or joins + 1
        if joins < generation:
            self._joins(self._group.rank, generation - joins)
        return _Place(generation, self._place.call + 1)

    def _key(self, place: _Place, step: str, rank: int) -> str:
        return f"{self._tag}/{place.generation}/{place.call}/{step}/{rank}"

    def _post(self, place: _Place, step: str, record: dict[str, Any]) -> None:
        self._store.set(self._key(place, step, self._group.rank), json.dumps(record))

    def _gather(
        self, op: str, step: str, record: dict[str, Any], find_place: Callable[[], _Place]
    ) -> tuple[_Place, dict[int, dict[str, Any]]]:
        """Post a record, and collect those of all ranks, or of some if one is a rejection."""
        records = {self._group.rank: record}

        def access() -> _Place:
            place = find_place()
            self._post(place, step, record)
            self._collect(place, step, records)
            return place

        problem = ""
        cause: Exception | None = None
        try:
            place = _bounded(access, self._timeout + _STORE_GRACE)
        except TimeoutError as error:
            problem, cause = "the store does not answer: ", error
        except RuntimeError as error:
            problem, cause = f"the store failed, {error}: ", error
        found = dict(records)  # a thread that was left behind may go on adding
        missing = tuple(rank for rank in range(self._group.size) if rank not in found)
        rejected = any("rejected" in record for record in found.values())
        if cause is None and (rejected or not missing):
            return place, found
        problem += f"{ranks_text(missing)} did not come to the first call"
        problem += f" within {self._timeout:g} s, in group {self._group.name!r}"
        raise PeerTimeoutError(op, missing, problem) from cause

    def _collect(self, place: _Place, step: str, records: dict[int, dict[str, Any]]) -> None:
        """Add the peers' records until all are there, one is a rejection, or the time is up."""
        backoff = Backoff(self._timeout)
        while True:
            late = backoff.expired
            for rank in range(self._group.size):
                if rank in records:
                    continue
                key = self._key(place, step, rank)
                if self._store.check([key]):
                    records[rank] = json.loads(self._store.get(key))
                elif (joins := self._joins(rank)) > place.generation:
                    raise _LaterGenerationError(joins)
            rejected = any("rejected" in record for record in records.values())
            if late or rejected or len(records) == self._group.size:
                break
            backoff.pause(_SLOWEST_POLL)


def _bounded(access: Callable[[], T], seconds: float) -> T:
    """The result of ``access()``, or a ``TimeoutError`` if it does not return in time."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(access())
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="moe_triton meeting")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer after {seconds:g} s")
    if failure:
        raise failure[0]
    return result[0]

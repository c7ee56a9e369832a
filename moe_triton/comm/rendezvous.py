"""How the ranks of a group find each other, through a store, before they share any memory.

Until a rendezvous has succeeded, each call posts a record under its number: the facts that decide
how to connect, or the reason of an abort. A rank that aborts does not wait, and its peers read the
reason on their next poll.

Ranks meet again after ``recover()``, and when one of them is restarted. Each rendezvous has a
generation, the largest number of times that any rank has joined, so that all ranks end up in the
same one.

One of the ranks may serve the store. When that rank stops, an access to the store never returns;
accesses therefore run in a thread of their own, which the caller can leave behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from ..errors import PeerAbortError, PeerTimeoutError
from .groups import Group
from .polling import Backoff, bounded, ranks_text

_SLOWEST_POLL = 10e-3  # seconds; a store may be a file or a server
_STORE_GRACE = 0.5  # seconds that a store may take to answer


@dataclasses.dataclass(frozen=True)
class _CallId:
    """The call that a record belongs to; generation 0 stands for the next generation."""

    generation: int = 0
    call: int = 0


class _LaterGenerationError(Exception):
    """A peer has joined more often: start again in its generation."""

    def __init__(self, generation: int) -> None:
        self.generation = generation


class Rendezvous:
    """One rank's side of a group's rendezvous.

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
        self._call_id = _CallId()

    @property
    def name(self) -> str:
        """Of the last rendezvous: equal on all ranks, unique among those of the group."""
        return f"{self._tag}/{self._call_id.generation}/{self._call_id.call}"

    def private_store(self) -> dist.Store:
        """A store whose keys only the ranks of the last rendezvous use."""
        return dist.PrefixStore(f"{self.name}/private", self._store)

    def new_generation(self) -> None:
        """Make the next call join a new generation."""
        self._call_id = _CallId()

    def abort_peers(self, reason: str) -> None:
        """Post the reason why this rank rejects the call that its peers may be making."""
        timed_out = threading.Event()

        def access() -> _CallId:
            call_id = self._next_call()
            if not timed_out.is_set():  # else this rank may be making another call by now
                self._post(call_id, "peer_info", {"rejected": reason})
            return call_id

        # Without the store the peers cannot connect either.
        try:
            self._call_id = bounded(access, _STORE_GRACE)
        except (TimeoutError, RuntimeError):
            timed_out.set()

    def gather_peer_info(self, op: str, peer_info: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange ``peer_info``, serialisable as JSON, with all ranks; within ``catching_up()``.

        Raises:
            PeerAbortError: a peer rejected its call.
            PeerTimeoutError: peers did not come in time.
        """
        self._call_id, records = self._gather(op, "peer_info", peer_info, self._next_call)
        for rank, record in sorted(records.items()):
            if "rejected" in record:
                raise PeerAbortError(op, rank, record["rejected"])
        return [records[rank] for rank in range(self._group.size)]

    def check_generation(self, op: str) -> None:
        """Check that no peer has joined again since it posted its record.

        The record may be that of a process that has died and been restarted. Called after the
        facts agree: facts that differ decide their call in any case.
        """
        ranks = range(self._group.size)
        try:
            later = bounded(lambda: max(map(self._joins, ranks)), self._timeout + _STORE_GRACE)
        except (TimeoutError, RuntimeError) as error:
            problem = f"the store of group {self._group.name!r} is gone: {error}"
            raise PeerTimeoutError(op, (), problem) from error
        if later > self._call_id.generation:
            raise _LaterGenerationError(later)

    def exchange(self, op: str, step: str, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange another record among the ranks of the last rendezvous."""
        _, records = self._gather(op, step, record, lambda: self._call_id)
        return [records[rank] for rank in range(self._group.size)]

    @contextlib.contextmanager
    def catching_up(self) -> Iterator[None]:
        """Leave a block of exchanges when a peer has joined more often than this rank.

        The peer was restarted or recovers again; the caller repeats the block in its generation.
        """
        try:
            yield
        except _LaterGenerationError as later:
            self._call_id = _CallId(later.generation)

    def _joins(self, rank: int, more: int = 0) -> int:
        return self._store.add(f"{self._tag}/joins/{rank}", more)

    def _next_call(self) -> _CallId:
        """The next call, in a generation that this rank has joined."""
        joins = self._joins(self._group.rank)
        generation = self._call_id.generation or joins + 1
        if joins < generation:
            self._joins(self._group.rank, generation - joins)
        return _CallId(generation, self._call_id.call + 1)

    def _key(self, call_id: _CallId, step: str, rank: int) -> str:
        return f"{self._tag}/{call_id.generation}/{call_id.call}/{step}/{rank}"

    def _post(self, call_id: _CallId, step: str, record: dict[str, Any]) -> None:
        self._store.set(self._key(call_id, step, self._group.rank), json.dumps(record))

    def _gather(
        self, op: str, step: str, record: dict[str, Any], find_call: Callable[[], _CallId]
    ) -> tuple[_CallId, dict[int, dict[str, Any]]]:
        """Post a record and collect those of all ranks, or some when one of them is an abort."""
        records = {self._group.rank: record}

        def access() -> _CallId:
            call_id = find_call()
            self._post(call_id, step, record)
            self._collect(call_id, step, records)
            return call_id

        problem = ""
        cause: Exception | None = None
        try:
            call_id = bounded(access, self._timeout + _STORE_GRACE)
        except TimeoutError as error:
            problem, cause = "the store does not answer: ", error
        except RuntimeError as error:
            problem, cause = f"the store failed, {error}: ", error
        posted = dict(records)  # a thread that was left behind may go on adding
        missing = tuple(rank for rank in range(self._group.size) if rank not in posted)
        rejected = any("rejected" in record for record in posted.values())
        if cause is None and (rejected or not missing):
            return call_id, posted
        problem += f"{ranks_text(missing)} did not come to the first call"
        problem += f" within {self._timeout:g} s, in group {self._group.name!r}"
        raise PeerTimeoutError(op, missing, problem) from cause

    def _collect(self, call_id: _CallId, step: str, records: dict[int, dict[str, Any]]) -> None:
        """Add the peers' records until all have come, one is an abort, or the time is up."""
        backoff = Backoff(self._timeout)
        while True:
            late = backoff.expired
            for rank in range(self._group.size):
                if rank in records:
                    continue
                key = self._key(call_id, step, rank)
                if self._store.check([key]):
                    records[rank] = json.loads(self._store.get(key))
                elif (joins := self._joins(rank)) > call_id.generation:
                    raise _LaterGenerationError(joins)
            rejected = any("rejected" in record for record in records.values())
            if late or rejected or len(records) == self._group.size:
                break
            backoff.pause(_SLOWEST_POLL)

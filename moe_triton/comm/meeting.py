"""How the ranks of a group find each other, through a store, before they share any memory.

Until a meeting has succeeded, each call posts a record under its number: either the facts that
decide how to connect, or the reason why this rank rejects the call. A rank that rejects need not
wait for anybody, and its peers learn the reason as soon as they look.

A group is met again after ``recover()`` or by a rank that was restarted. Each meeting has a
generation, the largest number of times that any rank has joined, so that all of them end up in the
same one.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import PeerAbortError, PeerTimeoutError
from .groups import Group
from .waiting import Waiter

_SLOWEST_POLL = 10e-3  # seconds; a store may be a file or a server


class _LaterGenerationError(Exception):
    """A peer has joined more often: start again with its count."""

    def __init__(self, generation: int) -> None:
        self.generation = generation


class Meeting:
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
        self.timeout = timeout
        self.generation = 0
        self._call = 0

    def leave(self) -> None:
        """Make the next call join a new generation."""
        self.generation = 0
        self._call = 0

    def reject(self, reason: str) -> None:
        """Tell the peers that this rank rejects the call that they may be making now."""
        self._next_call()
        self._post("facts", {"rejected": reason})

    def meet(self, op: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange ``facts``, which must survive JSON, with all ranks.

        Raises:
            PeerAbortError: a peer rejected its call.
            PeerTimeoutError: peers did not come in time.
        """
        self._next_call()
        while True:
            try:
                records = self._gather(op, "facts", facts)
                break
            except _LaterGenerationError as later:
                self._join(later.generation)
                self._call = 1
        for rank, record in enumerate(records):
            if "rejected" in record:
                raise PeerAbortError(op, rank, record["rejected"])
        return records

    def exchange(self, op: str, step: str, record: dict[str, Any]) -> list[dict[str, Any]]:
        """A further round among ranks that have just met."""
        try:
            return self._gather(op, step, record)
        except _LaterGenerationError as later:
            # A peer was lost and restarted between the rounds.
            raise PeerTimeoutError(
                op, (), f"a rank of group {self._group.name!r} was restarted while it connected"
            ) from later

    def _next_call(self) -> None:
        if self.generation == 0:
            self._join(self._joins(self._group.rank) + 1)
        self._call += 1

    def _joins(self, rank: int) -> int:
        return self._store.add(f"{self._tag}/joins/{rank}", 0)

    def _join(self, generation: int) -> None:
        own = self._group.rank
        self._store.add(f"{self._tag}/joins/{own}", generation - self._joins(own))
        self.generation = generation

    def _key(self, step: str, rank: int) -> str:
        return f"{self._tag}/{self.generation}/{self._call}/{step}/{rank}"

    def _post(self, step: str, record: dict[str, Any]) -> None:
        self._store.set(self._key(step, self._group.rank), json.dumps(record))

    def _gather(self, op: str, step: str, record: dict[str, Any]) -> list[dict[str, Any]]:
        self._post(step, record)
        records: dict[int, dict[str, Any]] = {self._group.rank: record}
        waiter = Waiter(self.timeout)
        while len(records) < self._group.size:
            missing = [rank for rank in range(self._group.size) if rank not in records]
            for rank in missing:
                if self._store.check([self._key(step, rank)]):
                    records[rank] = json.loads(self._store.get(self._key(step, rank)))
                elif (joins := self._joins(rank)) > self.generation:
                    raise _LaterGenerationError(joins)
            if any("rejected" in record for record in records.values()):
                break
            if len(records) < self._group.size:
                if waiter.expired:
                    raise PeerTimeoutError(
                        op,
                        tuple(missing),
                        f"ranks {missing} of group {self._group.name!r} did not come to the first "
                        f"call within {self.timeout:g} s",
                    )
                waiter.pause(_SLOWEST_POLL)
        # A dead incarnation of a peer may have left its record: the count of joins tells.
        later = max(self._joins(rank) for rank in range(self._group.size))
        if later > self.generation:
            raise _LaterGenerationError(later)
        return [records.get(rank, {}) for rank in range(self._group.size)]

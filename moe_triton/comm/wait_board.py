"""Ranks that wait for each other in different calls, of one object or of several.

A rank whose wait has become long posts its call in the store of the group, with the number of calls
of each kind that it has issued on every object of the group. Ranks a and b will wait for ever if a
waits in a call that b has not issued, b waits in one that a has not issued, and neither can issue
the other's because its only caller is the waiting thread. Objects that another thread of a rank
called last prove nothing, so two threads that use two objects in turn are never accused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from .atomics import wrap
from .groups import Group
from .polling import bounded

SAME = "all ranks must issue the same calls in the same order"
_STORE_LIMIT = 0.5  # seconds for one access to the store

_lock = threading.Lock()  # ranks may be threads


class _Rank:
    """The objects of one rank of a group, and whether its last post outlived its wait."""

    def __init__(self) -> None:
        self.boards: weakref.WeakSet[WaitBoard] = weakref.WeakSet()
        self.stale = False


_ranks: defaultdict[tuple[str, int, tuple[int, ...] | None], _Rank] = defaultdict(_Rank)


@dataclasses.dataclass(frozen=True)
class Deadlock:
    """A peer that waits for this rank in another call.

    Attributes:
        rank: the peer.
        problem: both calls in words.
    """

    rank: int
    problem: str


class Issuer(Protocol):
    """What issues the calls of an object."""

    def last_epochs(self) -> Mapping[str, int]:
        """The epoch of the last call of each kind that this rank has issued."""


class WaitBoard:
    """What one rank has issued on one object, and in which call it waits.

    Args:
        group: with a store.
        name: of the object, equal on all ranks, of no other object or generation of the group.
        owner: the object, which may end before its board.
    """

    def __init__(self, group: Group, name: str, owner: Issuer) -> None:
        assert group.store is not None
        self._store, self._number = group.store, group.rank
        self._name, self._owner = name, weakref.ref(owner)
        self._thread = threading.get_ident()
        self._post: dict[str, Any] = {}
        with _lock:
            self._rank = _ranks[group.name, group.rank, group.members]
            self._rank.boards.add(self)

    def begin(self) -> None:
        """Note who issues the next call."""
        self._thread = threading.get_ident()
        if self._rank.stale:
            self.clear()

    def _issued(self) -> Mapping[str, int]:
        owner = self._owner()
        return {} if owner is None else owner.last_epochs()

    def _siblings(self) -> dict[str, WaitBoard]:
        """The boards of this rank that nothing but the calling thread can change."""
        thread = threading.get_ident()
        with _lock:
            return {b._name: b for b in self._rank.boards if b._thread == thread}

    def post(self, kind: str, epoch: int) -> None:
        """Tell the peers that this rank waits in a call of this object."""
        issued = {name: board._issued() for name, board in self._siblings().items()}
        self._post = {"call": [self._name, kind, epoch], "issued": issued}
        self._write(self._post)

    def clear(self) -> None:
        """Tell the peers that the wait is over."""
        self._rank.stale = False
        self._write(None)

    def _write(self, record: Any) -> None:
        key, text = f"waits/{self._number}", json.dumps(record)
        with contextlib.suppress(TimeoutError, RuntimeError):
            bounded(lambda: self._store.set(key, text), _STORE_LIMIT)

    def find_deadlock(self, kind: str, epoch: int, peers: Iterable[int]) -> Deadlock | None:
        """A peer that can never come to this call, because it waits for this rank in another.

        The post of this rank then stays until its next call, for peers that are in the same call
        as that one.
        """
        try:
            records = bounded(lambda: self._read(peers), _STORE_LIMIT)
        except (TimeoutError, RuntimeError):
            return None
        siblings, here = self._siblings(), [self._name, kind, epoch]
        for rank, record in records.items():
            name, other_kind, other_epoch = record["call"]
            board, theirs = siblings.get(name), record["issued"].get(self._name)
            if board is None or theirs is None:
                continue
            if record.get("failed", here) != here:
                continue
            if _behind(board._issued(), other_kind, other_epoch) and _behind(theirs, kind, epoch):
                self._rank.stale = True
                self._write({**self._post, "failed": record["call"]})
                calls = [(name, other_kind, other_epoch), (self._name, kind, epoch)]
                there, own = (_words(*call, of_object=name != self._name) for call in calls)
                return Deadlock(rank, f"rank {rank} waits in {there}, this rank in {own}: {SAME}")
        return None

    def _read(self, peers: Iterable[int]) -> dict[int, dict[str, Any]]:
        records = {}
        for rank in peers:
            key = f"waits/{rank}"
            if rank != self._number and self._store.check([key]):
                record = json.loads(self._store.get(key))
                if record is not None:
                    records[rank] = record
        return records


def _behind(issued: Mapping[str, int], kind: str, epoch: int) -> bool:
    return wrap(issued.get(kind, 0) - epoch) < 0


def _words(name: str, kind: str, epoch: int, *, of_object: bool) -> str:
    """A call in an error text: dispatch 3, or dispatch 3 of object 2."""
    tag, *_ = name.split("/")
    number = tag.removeprefix("communicator")
    owner = f" of object {number}" if number != tag else " of the functional ops"
    return f"{kind} {epoch}{owner if of_object else ''}"

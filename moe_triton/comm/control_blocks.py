"""Control blocks: host memory of every rank in which its peers read how far it has come.

    head        whether the rank has left; the rank, plus one, that it waited for in vain
    bells       [kinds, slots] flags of an epoch so far; int32, and only in the block of rank 0
    flags       [kinds, slots] epoch, status, digest of the arguments, microseconds; int32
    handshakes  [kinds, slots] epoch, status, bytes of the text, bytes of the reason; text; reason

A rank alone writes its block, bells apart, and releases each message by the word that its peers
poll. The epoch of a flag or handshake says which operation it belongs to; slots are those of the
ring. A flag stands for a handshake, too, whose text is still that of the slot. Ranks sleep on the
bell, so that they wake once, for the last flag, and not for each of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import select
import struct
import time
from collections.abc import Sequence

import numpy as np

from ..layout import align
from ..layout.windows import ABORT, DATA
from . import atomics, futex
from .memory import Block
from .window import host_span, num_slots

KINDS = ("dispatch", "combine", "gather", "exchange")
OPENED = 2  # only in handshakes, where a later status keeps this bit

_HEAD_BYTES = 16
_BLAMED = 4  # byte of the second word of the head
_FLAG_WORDS = 4
_FLAG_BYTES = 4 * _FLAG_WORDS
_EXPECTED = struct.Struct("=3i")  # of a flag, all but the time
_ENTRY_BYTES, _TEXT, _REASON = 4096, 16, 3072


@dataclasses.dataclass(frozen=True)
class Handshake:
    """A rank's message about a call; ``text`` is empty where it rejected its own arguments."""

    status: int
    text: str
    reason: str


def control_bytes(in_flight: int) -> int:
    """Size of a control block."""
    places = len(KINDS) * num_slots(in_flight)
    return _flags_start(places) + places * (_FLAG_BYTES + _ENTRY_BYTES)


def _flags_start(places: int) -> int:
    return _HEAD_BYTES + align(4 * places)


class ControlBlocks:
    """The control blocks of all ranks, as one rank reads them and writes its own.

    Args:
        blocks: of all ranks, ``control_bytes(in_flight)`` long.
        rank: this rank.
        slots: of the rings.
        pids: every rank's process id, or None where the ranks are threads or in different PID
            namespaces.
    """

    def __init__(self, blocks: list[Block], rank: int, slots: int, pids: list[int] | None) -> None:
        self.blocks, self.rank, self._size = blocks, rank, len(blocks)
        self._slots, places = slots, len(KINDS) * slots
        self._first = {kind: index * slots for index, kind in enumerate(KINDS)}
        self._pid, self._pidfds = os.getpid(), _open_pidfds(pids, rank)
        self._heads = [block.data.data_ptr() for block in blocks]
        # One tensor over all blocks: their words, and where the flags of each rank begin.
        self._span = host_span([block.data for block in blocks])
        words: np.ndarray = self._span.numpy()
        self._words = words[: len(words) // 4 * 4].view(np.int32)
        starts = [head - self._span.data_ptr() for head in self._heads]
        self._flags_start = _flags_start(places)
        first = (np.array(starts) + self._flags_start) // 4
        flags = first[:, None] + np.arange(_FLAG_WORDS)
        self._flags = [flags + place * _FLAG_WORDS for place in range(places)]
        self._expected = [flags[:, :3] for flags in self._flags]
        self._posted = [flags[:, 3] for flags in self._flags]
        # In each place the address and the words of this rank's flag, and the address of the bell.
        own = [self._heads[rank] + self._flags_start + at * _FLAG_BYTES for at in range(places)]
        bells = [self._heads[0] + _HEAD_BYTES + 4 * place for place in range(places)]
        self._own_flags = list(zip(own, map(_words, own), bells, strict=True))
        # The text of this rank's handshake in each place, None after an abort: a loop repeats it.
        self._texts: list[str | None] = [None] * places

    # Who is there.

    def leave(self) -> None:
        """Mark this rank as gone for its peers, and close the descriptors. Idempotent."""
        # A forked child drops copies of all objects without being a rank.
        if os.getpid() == self._pid:
            atomics.store_release(self._heads[self.rank], 1)
        with contextlib.ExitStack() as stack:
            while self._pidfds:
                stack.callback(os.close, self._pidfds.popitem()[1])

    def is_gone(self, rank: int) -> bool:
        """Whether a peer has left, or its process has ended."""
        if atomics.load_acquire(self._heads[rank]):
            return True
        if rank not in self._pidfds:
            return False
        ended = select.poll()  # select() takes no descriptor above 1023
        ended.register(self._pidfds[rank], select.POLLIN)
        return bool(ended.poll(0))

    def blame(self, rank: int | None) -> None:
        """Let the peers know for whom this rank waited in vain; None when it came after all."""
        atomics.store_release(self._heads[self.rank] + _BLAMED, 0 if rank is None else rank + 1)

    def culprits(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Those of ``ranks`` that failed first: a survivor stands for the rank that it blames."""
        blamed = {}
        for rank in ranks:
            other = atomics.load_acquire(self._heads[rank] + _BLAMED) - 1
            blamed[rank] = rank if other in (-1, self.rank) else other
        return tuple(sorted(set(blamed.values())))

    def _place(self, kind: str, epoch: int) -> int:
        return self._first[kind] + epoch % self._slots

    # Flags.

    def flag_address(self, rank: int, kind: str, epoch: int) -> int:
        """Of the flag's epoch, which peers poll."""
        start = self._flags_start + self._place(kind, epoch) * _FLAG_BYTES
        return self._heads[rank] + start

    def bell(self, kind: str, epoch: int) -> int:
        """Address of the number of flags of ``epoch``, which is 0 again once all are posted."""
        return self._own_flags[self._place(kind, epoch)][2]

    def all_posted(self, kind: str, epoch: int, digest: int) -> bool:
        """Whether the flags of all ranks say that they have sent data for equal arguments."""
        if not atomics.LOADS_ACQUIRE:
            self._acquire(kind, epoch)
        found = self._words.take(self._expected[self._place(kind, epoch)])
        return found.tobytes() == _EXPECTED.pack(epoch, DATA, digest) * self._size

    def flags(self, kind: str, epoch: int) -> list[list[int]]:
        """The four words of each rank's flag for ``epoch``; acquires what they release."""
        if not atomics.LOADS_ACQUIRE:
            self._acquire(kind, epoch)
        found: list[list[int]] = self._words.take(self._flags[self._place(kind, epoch)]).tolist()
        return found

    def seconds_until_posted(self, kind: str, epoch: int, start: int) -> list[float]:
        """Seconds from a time of ``clock`` to that of each rank's flag, at least 0."""
        posted = self._words.take(self._posted[self._place(kind, epoch)])
        microseconds = np.maximum(posted - np.int32(start), 0)  # wraps as the clock does
        seconds: list[float] = (microseconds * 1e-6).tolist()
        return seconds

    def _acquire(self, kind: str, epoch: int) -> None:
        for rank in range(self._size):
            atomics.load_acquire(self.flag_address(rank, kind, epoch))

    def post_flag(self, kind: str, epoch: int, status: int, digest: int) -> None:
        """Write this rank's flag; releases what it wrote before."""
        address, words, bell = self._own_flags[self._place(kind, epoch)]
        words[1], words[2], words[3] = status, digest, clock()
        atomics.fetch_add(address, atomics.wrap(epoch - words[0]))
        posted = atomics.fetch_add(bell, 1) + 1
        if posted == self._size:
            atomics.fetch_add(bell, -posted)
        if posted == self._size or status == ABORT:
            futex.wake(bell)

    # Handshakes.

    def handshake_address(self, rank: int, kind: str, epoch: int) -> int:
        """Of the handshake's epoch, before its status; peers poll both."""
        entries = self._flags_start + len(KINDS) * self._slots * _FLAG_BYTES
        return self._heads[rank] + entries + self._place(kind, epoch) * _ENTRY_BYTES

    def post_text(self, kind: str, epoch: int, text: str) -> None:
        """Make ``text`` that of the slot, for the flag that follows and that peers wait for."""
        if self._texts[self._place(kind, epoch)] != text:
            self.post_handshake(kind, epoch, DATA, text, "")

    def post_handshake(self, kind: str, epoch: int, status: int, text: str, reason: str) -> None:
        """Write this rank's message about ``epoch``; an earlier text for the epoch stays."""
        address, place = self.handshake_address(self.rank, kind, epoch), self._place(kind, epoch)
        words = _words(address)
        if words[0] == epoch:
            status |= words[1] & OPENED
        elif self._texts[place] != text:
            words[2] = _write(address + _TEXT, text, _REASON - _TEXT)
            self._texts[place] = text
        if status & ABORT:
            self._texts[place] = None
        words[3] = _write(address + _REASON, reason, _ENTRY_BYTES - _REASON)
        for word, value in ((address + 4, status), (address, epoch)):
            atomics.store_release(word, value)
            futex.wake(word)

    def handshake(self, rank: int, kind: str, epoch: int) -> Handshake | None:
        """The message of ``rank`` about ``epoch``, or None before it is posted."""
        address = self.handshake_address(rank, kind, epoch)
        # Look at the flag first: a handshake of its own precedes it.
        flagged = atomics.load_acquire(self.flag_address(rank, kind, epoch)) == epoch
        words = _words(address)
        if atomics.load_acquire(address) != epoch:
            if not flagged:
                return None
            text = ctypes.string_at(address + _TEXT, words[2]).decode()
            return Handshake(DATA, text, "")
        status = atomics.load_acquire(address + 4)
        text = ctypes.string_at(address + _TEXT, words[2]).decode()
        reason = ctypes.string_at(address + _REASON, words[3]).decode(errors="replace")
        return Handshake(status, text, reason)

    def last_abort(self, rank: int, kind: str) -> Handshake | None:
        """The abort of ``rank`` in one of its last operations of a kind.

        A device knows its epochs by the calls and replays of graphs, the host by the calls.
        """
        for slot in range(self._slots):
            epoch = atomics.load_acquire(self.handshake_address(rank, kind, slot))
            message = self.handshake(rank, kind, epoch) if epoch else None
            if message is not None and message.status & ABORT:
                return message
        return None


def clock() -> int:
    """The time of flags, in microseconds modulo 2**32; threads and processes of a host share it."""
    return atomics.wrap(time.monotonic_ns() // 1000)


def _words(address: int) -> ctypes.Array[ctypes.c_int32]:
    """The four words of a flag or of the head of a handshake."""
    return (ctypes.c_int32 * 4).from_address(address)


def _write(address: int, text: str, limit: int) -> int:
    raw = text.encode()[:limit]
    ctypes.memmove(address, raw, len(raw))
    return len(raw)


def _open_pidfds(pids: list[int] | None, own: int) -> dict[int, int]:
    """Descriptors that become readable when a peer's process ends."""
    pidfds: dict[int, int] = {}
    if pids is not None and hasattr(os, "pidfd_open"):
        for rank, pid in enumerate(pids):
            # The peer may have just died, or the system forbids it: then the time-out finds out.
            with contextlib.suppress(OSError):
                if rank != own:
                    pidfds[rank] = os.pidfd_open(pid)
    return pidfds

"""Control blocks: host memory of every rank in which its peers read how far it has come.

    head        whether the rank has left; the rank, plus one, that it waited for in vain
    flags       [kinds, slots] epoch, status, digest of the arguments, nothing; int32
    handshakes  [kinds, slots] epoch, status, bytes of the text, bytes of the reason; text; reason

A rank alone writes its block, and releases each message by the word that its peers poll. The epoch
of a flag or handshake says which operation it belongs to; slots are those of the ring.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import select
from collections.abc import Sequence

import numpy as np

from ..layout.windows import ABORT
from . import atomics, futex
from .memory import Block
from .window import host_span, num_slots

KINDS = ("dispatch", "combine", "gather", "exchange")
OPENED = 2  # only in handshakes, where a later status keeps this bit

_HEAD_BYTES = 16
_BLAMED = 4  # byte of the second word of the head
_FLAG_WORDS = 4
_FLAG_BYTES = 4 * _FLAG_WORDS
_ENTRY_BYTES, _TEXT, _REASON = 4096, 16, 3072


@dataclasses.dataclass(frozen=True)
class Handshake:
    """A rank's message about a call; ``text`` is empty where it rejected its own arguments."""

    status: int
    text: str
    reason: str


def control_bytes(in_flight: int) -> int:
    """Size of a control block."""
    return _HEAD_BYTES + len(KINDS) * num_slots(in_flight) * (_FLAG_BYTES + _ENTRY_BYTES)


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
        self.blocks, self.rank = blocks, rank
        self._slots = slots
        self._pid, self._pidfds = os.getpid(), _open_pidfds(pids, rank)
        # One tensor over all blocks: their words, and where the flags of each rank begin.
        self._span = host_span([block.data for block in blocks])
        words: np.ndarray = self._span.numpy()
        self._words = words[: len(words) // 4 * 4].view(np.int32)
        starts = [block.data.data_ptr() - self._span.data_ptr() for block in blocks]
        first = (np.array(starts) + _HEAD_BYTES) // 4
        flags = first[:, None] + np.arange(3)
        self._flags = [flags + index * _FLAG_WORDS for index in range(len(KINDS) * slots)]
        # The text of this rank's handshake in each place: a loop repeats the same.
        self._texts: dict[int, str] = {}

    # Who is there.

    def leave(self) -> None:
        """Mark this rank as gone for its peers, and close the descriptors. Idempotent."""
        # A forked child drops copies of all objects without being a rank.
        if os.getpid() == self._pid:
            atomics.store_release(self._head(self.rank), 1)
        with contextlib.ExitStack() as stack:
            while self._pidfds:
                stack.callback(os.close, self._pidfds.popitem()[1])

    def is_gone(self, rank: int) -> bool:
        """Whether a peer has left, or its process has ended."""
        if atomics.load_acquire(self._head(rank)):
            return True
        if rank not in self._pidfds:
            return False
        ended = select.poll()  # select() takes no descriptor above 1023
        ended.register(self._pidfds[rank], select.POLLIN)
        return bool(ended.poll(0))

    def blame(self, rank: int | None) -> None:
        """Let the peers know for whom this rank waited in vain; None when it came after all."""
        atomics.store_release(self._head(self.rank) + _BLAMED, 0 if rank is None else rank + 1)

    def culprits(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Those of ``ranks`` that failed first: a survivor stands for the rank that it blames."""
        blamed = {}
        for rank in ranks:
            other = atomics.load_acquire(self._head(rank) + _BLAMED) - 1
            blamed[rank] = rank if other in (-1, self.rank) else other
        return tuple(sorted(set(blamed.values())))

    def _head(self, rank: int) -> int:
        return self.blocks[rank].data.data_ptr()

    # Flags.

    def flag_address(self, rank: int, kind: str, epoch: int) -> int:
        """Of the flag's epoch, which peers poll."""
        index = KINDS.index(kind) * self._slots + epoch % self._slots
        return self._head(rank) + _HEAD_BYTES + index * _FLAG_BYTES

    def flags(self, kind: str, epoch: int) -> np.ndarray:
        """[W, 3] epoch, status and digest of all ranks in the slot of ``epoch``."""
        index = KINDS.index(kind) * self._slots + epoch % self._slots
        found: np.ndarray = self._words[self._flags[index]]
        return found

    def flag(self, rank: int, kind: str, epoch: int) -> tuple[int, ...]:
        """Epoch, status and digest in the slot of ``epoch``."""
        return tuple(_words(self.flag_address(rank, kind, epoch))[:3])

    def post_flag(self, kind: str, epoch: int, status: int, digest: int) -> None:
        """Write this rank's flag; releases what it wrote before."""
        address = self.flag_address(self.rank, kind, epoch)
        words = _words(address)
        words[1], words[2] = status, digest
        atomics.store_release(address, epoch)
        futex.wake(address)

    # Handshakes.

    def handshake_address(self, rank: int, kind: str, epoch: int) -> int:
        """Of the handshake's epoch, before its status; peers poll both."""
        index = KINDS.index(kind) * self._slots + epoch % self._slots
        entries = _HEAD_BYTES + len(KINDS) * self._slots * _FLAG_BYTES
        return self._head(rank) + entries + index * _ENTRY_BYTES

    def post_handshake(self, kind: str, epoch: int, status: int, text: str, reason: str) -> None:
        """Write this rank's message about ``epoch``; an earlier text for the epoch stays."""
        address = self.handshake_address(self.rank, kind, epoch)
        words = _words(address)
        if words[0] == epoch:
            status |= words[1] & OPENED
        elif self._texts.get(address) != text:
            words[2] = _write(address + _TEXT, text, _REASON - _TEXT)
            self._texts[address] = text
        words[3] = _write(address + _REASON, reason, _ENTRY_BYTES - _REASON)
        for word, value in ((address + 4, status), (address, epoch)):
            atomics.store_release(word, value)
            futex.wake(word)

    def handshake(self, rank: int, kind: str, epoch: int) -> Handshake | None:
        """The message of ``rank`` about ``epoch``, or None before it is posted."""
        address = self.handshake_address(rank, kind, epoch)
        if atomics.load_acquire(address) != epoch:
            return None
        status = atomics.load_acquire(address + 4)
        words = _words(address)
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

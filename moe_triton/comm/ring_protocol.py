"""One rank's end of a group that shares memory: rings of slots, flags, announcements, failures.

Every rank issues the same sequence of operations. Operation number i of a kind, its *epoch*, uses
slot i % slots of that kind's windows, and each rank writes exactly one flag record per epoch to
every peer: after its data, or as an *abort* when it cannot take part. A wait that ends early,
because of an abort, leaves a debt: the flags of that epoch are waited for before the slot can come
round again.

Beside the flags, each rank *announces* every call in a control block that its peers can read: the
arguments that must agree, or why it rejects the call. Announcements are read only when a
configuration is new or something went wrong. New windows take a second round of them, so that all
ranks use these windows, or none. The block begins with a word that says whether the rank has left,
so that nobody waits in vain for one that closes or recovers.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..errors import (
    ArgumentMismatchError,
    BrokenGroupError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    SequenceError,
    UnavailableError,
)
from . import atomics, futex
from .groups import Group
from .memory import HOST, Block, Memory
from .polling import Backoff, ranks_text
from .window import PeerWindows, clear_flags, flag_bytes, num_slots, ring_bytes

KINDS = ("dispatch", "combine", "gather", "exchange")
_DATA, _ABORT = 0, 1
_OPENED = 2  # only in announcements, where it stays whatever comes after it

# An announcement: epoch, status, bytes of text, bytes of reason; then the text; then the reason.
_ENTRY_BYTES, _TEXT, _REASON = 4096, 16, 3072
_HEAD_BYTES = 16  # before the first announcement
_LIVENESS_INTERVAL = 10e-3  # seconds between looks for dead peers


@dataclasses.dataclass(frozen=True)
class InFlightOp:
    """An operation between setup and teardown.

    Attributes:
        digest: 32 bits that stand for its arguments; they travel with every flag.
        windows: the windows it uses, None until the arguments are agreed.
    """

    digest: int = 0
    windows: PeerWindows | None = None


@dataclasses.dataclass
class Ring:
    """The windows and counters of one kind of operation.

    Attributes:
        last: the epoch of the last setup. Teardowns follow in order, from the oldest in flight.
        windows: all ranks' windows, None until the first call that needs them.
        in_flight: epochs set up and not yet torn down, oldest first.
        undrained: epochs whose flags have not all been seen, with the windows they are in; None
            where there was no window yet and announcements stand for flags.
    """

    last: int = 0
    windows: PeerWindows | None = None
    in_flight: dict[int, InFlightOp] = dataclasses.field(default_factory=dict)
    undrained: dict[int, PeerWindows | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Handshake:
    """What a peer said about a call; a rank that rejected it from the start has no text."""

    status: int
    text: str
    reason: str


class RingProtocol:
    """A connected rank.

    Args:
        group: the group.
        memory: where blocks come from.
        blocks: every rank's control block, ``control_bytes(in_flight)`` long.
        pids: every rank's process, or None where these numbers mean nothing to this one.
        in_flight: f, setups that may run ahead of teardowns.
        timeout: seconds a wait may take.
    """

    def __init__(
        self,
        group: Group,
        memory: Memory,
        blocks: list[Block],
        pids: list[int] | None,
        *,
        in_flight: int,
        timeout: float,
    ) -> None:
        self.group = group
        self.rank, self.size = group.rank, group.size
        self.in_flight = in_flight
        self.timeout = timeout
        self.slots = num_slots(in_flight)
        # Threads of one process hold each other's interpreter lock while they spin.
        self._spin = not group.in_process and len(os.sched_getaffinity(0)) >= self.size
        self.broken: str | None = None
        self._retry: tuple[str, int] | None = None  # the wait that would heal the group
        self._memory = memory
        self._control = blocks
        self._pidfds = _open_pids(pids, self.rank)
        self._rings = {kind: Ring() for kind in KINDS}
        self._agreed: set[tuple[str, str]] = set()
        # Also when nobody calls close(): the descriptors are this rank's own, and peers may wait.
        own = blocks[self.rank]
        self._leave = weakref.finalize(self, _leave, own, self._pidfds, os.getpid())
        self._leave.atexit = False  # the end of the process tells as much

    def close(self) -> None:
        """Leave the group and give up the memory; peers that hold it keep their mappings."""
        # Of the memory only mappings are left, which go with the last view.
        self._rings = {}
        self._leave()

    # The life of an operation: begin, agree, signal, wait, finish. The caller writes its data
    # before signal, and reads that of the peers before finish.

    def begin(self, kind: str, op: str) -> int:
        """Take the next epoch of ``kind``."""
        self.raise_if_broken(op)
        ring = self._rings[kind]
        if self._is_full(ring):
            raise SequenceError.too_many(op, kind, self.in_flight)
        epoch = atomics.wrap(ring.last + 1)
        undrained_epoch = atomics.wrap(epoch - self.in_flight)
        if undrained_epoch in ring.undrained:
            self._drain(kind, undrained_epoch, op)
            del ring.undrained[undrained_epoch]
        ring.last = epoch
        ring.in_flight[epoch] = InFlightOp()
        return epoch

    def agree(
        self,
        kind: str,
        epoch: int,
        op: str,
        arguments: Mapping[str, Any],
        slot_bytes: int,
        device: torch.device = HOST,
    ) -> PeerWindows:
        """Announce the call; for new arguments, wait until all ranks announced the same.

        Args:
            kind: of operation.
            epoch: of this call.
            op: for error messages.
            arguments: what must be equal on all ranks, as names and printable values.
            slot_bytes: what a slot must hold; the windows grow when they are too small.
            device: in whose memory the windows must be.

        Returns:
            The windows of all ranks.

        Raises:
            ArgumentMismatchError: the ranks' arguments differ.
            PeerAbortError: a peer rejected its call.
            PeerTimeoutError: peers did not call.
            UnavailableError: there is no memory for the windows, or no way to a peer's.
        """
        ring = self._rings[kind]
        if device.type != "cpu":
            arguments = {**arguments, "device": device.type}
        known = (kind, json.dumps(arguments))
        text = f'{{"arguments": {known[1]}}}'
        own: Block | None = None
        if ring.windows is None or not ring.windows.serves(slot_bytes, device):
            own = self._allocate(kind, epoch, op, slot_bytes, device)
            text = json.dumps({"arguments": arguments, "window": own.handle})
        self._post_handshake(kind, epoch, _DATA, text, "")
        if own is not None:
            blocks = self._share(kind, epoch, op, arguments, own)
            ring.windows = PeerWindows(blocks, self.slots)
            # All ranks have opened all of them. Whoever comes first takes all names away, so that
            # none is left if a rank dies.
            _release(blocks)
        elif known not in self._agreed:
            self._compare(kind, epoch, op, arguments)
        self._agreed.add(known)
        assert ring.windows is not None
        digest = atomics.wrap(zlib.crc32(known[1].encode()))
        ring.in_flight[epoch] = InFlightOp(digest, ring.windows)
        return ring.windows

    def signal(self, kind: str, epoch: int, status: int = _DATA) -> None:
        """Write this rank's flag of ``epoch`` to every rank, after whatever it wrote before."""
        ring = self._rings[kind]
        operation = ring.in_flight[epoch]
        # A call that failed before it agreed aborts in the windows that its peers know.
        windows = operation.windows or ring.windows
        if windows is None:
            return
        # Each rank starts with its neighbour, so that not all of them serve rank 0 first.
        for step in range(self.size):
            owner = (self.rank + 1 + step) % self.size
            address = windows.flag_address(owner, self.slot(epoch), self.rank)
            words = _words(address)
            words[1], words[2], words[3] = status, operation.digest, windows.stream()
            atomics.store_release(address, epoch)
            if owner != self.rank:
                futex.wake(address)

    def wait(self, kind: str, epoch: int, op: str) -> list[float]:
        """Wait for all ranks' flags of ``epoch``, the oldest operation in flight.

        Returns:
            Seconds until each rank's flag was seen.

        Raises:
            PeerAbortError, ArgumentMismatchError: a peer could not take part; the epoch is over.
            PeerTimeoutError: peers did not come; the group is broken, but one may wait again.
            SequenceError: not the oldest operation; or ranks that share a device used different
                streams, and the epoch is over.
        """
        ring = self._rings[kind]
        if next(iter(ring.in_flight), None) != epoch:
            oldest = next(iter(ring.in_flight), None)
            raise SequenceError.out_of_order(op, kind, epoch, oldest)
        windows = ring.in_flight[epoch].windows
        assert windows is not None
        waited, aborted = self._see_flags(kind, epoch, op, windows)
        if self._retry == (kind, epoch):
            self.broken = self._retry = None
        if aborted:
            # The culprit's own abort names the cause; these ranks only followed it.
            self.finish(kind, epoch)
            raise PeerAbortError(op, aborted[0], "its call failed for a reason of another rank")
        return waited

    def finish(self, kind: str, epoch: int) -> None:
        """The operation is consumed: its slot may be written again."""
        del self._rings[kind].in_flight[epoch]

    def abort(self, kind: str, epoch: int, error: BaseException) -> None:
        """Take part in ``epoch`` without data, because of ``error``."""
        if isinstance(error, PeerTimeoutError):
            return  # broken: nobody can be told
        if not isinstance(error, (PeerAbortError, ArgumentMismatchError)):
            reason = error.problem if isinstance(error, MoeError) else repr(error)
            self._post_handshake(kind, epoch, _ABORT, "", reason)
        self.signal(kind, epoch, _ABORT)
        self._end_early(kind, epoch)

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Take the next epoch only to tell the peers that this rank rejects the call."""
        if self.broken is None and not self._is_full(self._rings[kind]):
            self.abort(kind, self.begin(kind, op), error)

    def next_slot(self, kind: str) -> tuple[PeerWindows, int] | None:
        """The windows and the slot of the next operation, if it is free to be written already."""
        ring = self._rings[kind]
        epoch = atomics.wrap(ring.last + 1)
        indebted = atomics.wrap(epoch - self.in_flight) in ring.undrained
        if ring.windows is None or indebted or self._is_full(ring):
            return None
        return ring.windows, self.slot(epoch)

    def window_bytes(self, kind: str) -> int:
        """Bytes of this rank's windows of ``kind``, all slots and flags included."""
        windows = self._rings[kind].windows
        return 0 if windows is None else windows.blocks[self.rank].data.numel()

    def slot(self, epoch: int) -> int:
        """The ring slot of an epoch."""
        return epoch % self.slots

    def raise_if_broken(self, op: str) -> None:
        """Raise ``BrokenGroupError`` when an earlier wait timed out."""
        if self.broken is not None:
            raise BrokenGroupError(
                op,
                f"group {self.group.name!r} is broken since a call failed ({self.broken}); "
                "call recover() on all ranks",
            )

    def _is_full(self, ring: Ring) -> bool:
        """Whether the next setup would come before the teardown it has to follow."""
        # By epochs, not by their number: those that ended early must not let others run ahead.
        oldest = next(iter(ring.in_flight), None)
        return oldest is not None and atomics.wrap(ring.last + 1 - oldest) >= self.in_flight

    # Flags.

    def _end_early(self, kind: str, epoch: int) -> None:
        ring = self._rings[kind]
        ring.undrained[epoch] = ring.in_flight[epoch].windows or ring.windows
        self.finish(kind, epoch)

    def _drain(self, kind: str, epoch: int, op: str) -> None:
        """Wait until all ranks have taken part in an epoch that ended early here."""
        windows, slot = self._rings[kind].undrained[epoch], self.slot(epoch)
        addresses = {
            source: self._entry(source, kind, epoch)
            if windows is None
            else windows.flag_address(self.rank, slot, source)
            for source in range(self.size)
        }
        for _ in self._arrivals(op, epoch, addresses):
            pass

    def _see_flags(
        self, kind: str, epoch: int, op: str, windows: PeerWindows
    ) -> tuple[list[float], list[int]]:
        """Wait for all flags of ``epoch``; raise as soon as an abort has a cause.

        Returns:
            Seconds until each flag was seen, and the ranks whose flag is an abort.
        """
        slot, digest = self.slot(epoch), self._rings[kind].in_flight[epoch].digest
        addresses = {
            source: windows.flag_address(self.rank, slot, source) for source in range(self.size)
        }
        aborted: list[int] = []
        waited = [0.0] * self.size
        stream = windows.stream()
        start = time.monotonic()
        for source in self._arrivals(op, epoch, addresses, retry=(kind, epoch)):
            waited[source] = time.monotonic() - start
            words = _words(addresses[source])
            if words[1] == _ABORT:
                aborted.append(source)
            if words[1] == _ABORT or words[2] != digest:
                self._raise_cause(kind, epoch, op, source)
            elif words[3] != stream:
                self._end_early(kind, epoch)
                raise SequenceError(
                    op,
                    "ranks that share a device must issue their operations on one stream, but "
                    f"rank {source} used another than rank {self.rank}",
                )
        return waited, aborted

    def _arrivals(
        self,
        op: str,
        epoch: int,
        addresses: dict[int, int],
        retry: tuple[str, int] | None = None,
    ) -> Iterator[int]:
        """The ranks in the order in which ``epoch`` appears at their addresses."""
        missing = dict(addresses)
        for _ in self._looks(op, f"epoch {epoch}", missing, retry):
            for source, address in list(missing.items()):
                if atomics.wrap(atomics.load_relaxed(address) - epoch) < 0:
                    continue
                seen = atomics.load_acquire(address)
                if atomics.wrap(seen - epoch) > 0:
                    # The ranks no longer count alike, so that another wait cannot heal this.
                    self.broken = f"rank {source} is at operation {seen}, this rank at {epoch}"
                    self._retry = None
                    self.raise_if_broken(op)
                del missing[source]
                yield source

    def _raise_cause(self, kind: str, epoch: int, op: str, source: int) -> None:
        """Raise what made ``source`` abort, if the cause is its own."""
        said = self._heard(source, kind, epoch)
        if said is None:
            return
        error: MoeError | None = None
        if said.status & _ABORT:
            error = PeerAbortError(op, source, said.reason)
        else:
            mine = self._heard(self.rank, kind, epoch)
            assert mine is not None
            error = _mismatch(op, mine.text, said.text, source)
        if error is not None:
            self._end_early(kind, epoch)
            raise error

    def _looks(
        self,
        op: str,
        what: str,
        missing: Mapping[int, int],
        retry: tuple[str, int] | None = None,
    ) -> Iterator[None]:
        """One step per look at what is ``missing``, until the caller has emptied it.

        Args:
            op: for error messages.
            what: is missing, for error messages.
            missing: addresses of the words that will change, by rank.
            retry: what may be tried again after a timeout, kind and epoch, if anything.

        Raises:
            PeerTimeoutError: the time is up, or a missing peer is gone.
        """
        backoff = Backoff(self.timeout, spin=self._spin)
        gone: list[int] = []
        late = False
        look_for_dead = time.monotonic() + _LIVENESS_INTERVAL
        while missing:
            # Read before the look: a word that changes after it ends the pause at once.
            rank, address = next(iter(missing.items()))
            seen = atomics.load_relaxed(address)
            yield
            if not missing:
                return
            # Judged before this look: what came in the meantime has come.
            if lost := tuple(rank for rank in gone if rank in missing):
                problem = f"{ranks_text(lost)} left the group or died ({what})"
                self._break(op, lost, problem, retry)
            if late and missing:
                absent = tuple(sorted(missing))
                problem = f"{ranks_text(absent)} did not come within {self.timeout:g} s ({what})"
                self._break(op, absent, problem, retry)
            now = time.monotonic()
            if now >= look_for_dead:
                gone = [rank for rank in missing if self._is_gone(rank)]
                look_for_dead = now + _LIVENESS_INTERVAL
            late = now >= backoff.deadline
            if rank in missing:
                backoff.pause_on(address, seen)

    def _is_gone(self, rank: int) -> bool:
        """Whether a peer has left, or its process has ended."""
        if atomics.load_acquire(self._control[rank].data.data_ptr()):
            return True
        if rank not in self._pidfds:
            return False
        return bool(select.select([self._pidfds[rank]], [], [], 0)[0])

    def _break(
        self, op: str, ranks: tuple[int, ...], problem: str, retry: tuple[str, int] | None
    ) -> None:
        # Only the first wait that failed can heal the group: a setup that failed is lost for good,
        # whatever becomes of the waits that are tried after it.
        if self.broken is None:
            self._retry = retry
        self.broken = problem
        raise PeerTimeoutError(op, ranks, f"{problem}, in group {self.group.name!r}")

    def _allocate(
        self, kind: str, epoch: int, op: str, slot_bytes: int, device: torch.device
    ) -> Block:
        """This rank's own windows, with flags that no operation from ``epoch`` on waits for."""
        num_bytes = ring_bytes(self.size, slot_bytes, self.in_flight)
        try:
            flags = self.slots * flag_bytes(self.size)
            own = self._memory.allocate(num_bytes, device, flags)
        except (OSError, OverflowError, RuntimeError) as error:
            raise UnavailableError(
                op,
                f"the {kind} windows of rank {self.rank}, {self.slots} slots of {slot_bytes} bytes "
                f"and {self.size} flags, take {num_bytes} bytes, which cannot be had: {error}",
            ) from error
        # Zero is in the future of the epochs that have wrapped to negative numbers.
        clear_flags(own, self.size, self.slots, atomics.wrap(epoch - 1))
        return own

    # Announcements.

    def _entry(self, rank: int, kind: str, epoch: int) -> int:
        index = KINDS.index(kind) * self.slots + self.slot(epoch)
        return self._control[rank].data.data_ptr() + _HEAD_BYTES + index * _ENTRY_BYTES

    def _post_handshake(self, kind: str, epoch: int, status: int, text: str, reason: str) -> None:
        """Publish this rank's words about ``epoch``; what it has said before stays."""
        address = self._entry(self.rank, kind, epoch)
        words = _words(address)
        if words[0] == epoch:
            status |= words[1] & _OPENED
        else:
            words[2] = _write(address + _TEXT, text, _REASON - _TEXT)
        words[3] = _write(address + _REASON, reason, _ENTRY_BYTES - _REASON)
        for word, value in ((address + 4, status), (address, epoch)):
            atomics.store_release(word, value)
            futex.wake(word)

    def _heard(self, rank: int, kind: str, epoch: int) -> Handshake | None:
        """What ``rank`` announced about ``epoch``, or None if it has not yet."""
        address = self._entry(rank, kind, epoch)
        if atomics.load_acquire(address) != epoch:
            return None
        status = atomics.load_acquire(address + 4)
        words = _words(address)
        text = ctypes.string_at(address + _TEXT, words[2]).decode()
        reason = ctypes.string_at(address + _REASON, words[3]).decode(errors="replace")
        return Handshake(status, text, reason)

    def _compare(
        self, kind: str, epoch: int, op: str, arguments: Mapping[str, Any]
    ) -> dict[int, str]:
        """Wait for all announcements of ``epoch`` and compare; returns their texts by rank."""
        mine = json.dumps({"arguments": arguments})
        missing = {rank: self._entry(rank, kind, epoch) for rank in range(self.size)}
        texts: dict[int, str] = {}
        for _ in self._looks(op, f"{kind} {epoch}", missing):
            for rank in list(missing):
                said = self._heard(rank, kind, epoch)
                if said is None:
                    continue
                del missing[rank]
                # Whoever announced arguments has agreed to them, even if it failed afterwards: all
                # ranks must come to the same end here, and its flag will tell of the failure.
                if not said.text:
                    raise PeerAbortError(op, rank, said.reason)
                error = _mismatch(op, mine, said.text, rank)
                if error is not None:
                    raise error
                texts[rank] = said.text
        return texts

    def _share(
        self, kind: str, epoch: int, op: str, arguments: Mapping[str, Any], own: Block
    ) -> list[Block]:
        """All ranks' new windows, once the arguments agree and every rank has opened them all."""
        blocks = {self.rank: own}
        failure: UnavailableError | None = None
        try:
            texts = self._compare(kind, epoch, op, arguments)
            # Only now that all ranks agree: a rank that does not agree takes its window back.
            try:
                for rank in range(self.size):
                    if rank != self.rank:
                        handle = json.loads(texts[rank])["window"]
                        blocks[rank] = self._open(kind, op, rank, handle)
                self._post_handshake(kind, epoch, _OPENED, "", "")
            except UnavailableError as error:
                self._post_handshake(kind, epoch, _ABORT, "", error.problem)
                failure = error
            self._await_opened(kind, epoch, op, failure)
        except BaseException as error:
            # Whoever is lost cannot clean up. All others do it themselves, when nobody is about to
            # open their windows any more.
            lost = error.ranks if isinstance(error, PeerTimeoutError) else ()
            _release([own, *(blocks[rank] for rank in lost if rank in blocks)])
            raise
        return [blocks[rank] for rank in range(self.size)]

    def _open(self, kind: str, op: str, rank: int, handle: dict[str, int | str]) -> Block:
        try:
            return self._memory.open(handle)
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(
                op,
                f"the {kind} windows of rank {rank}, {handle.get('bytes', 'some')} bytes, cannot "
                f"be opened by rank {self.rank}: {error}",
            ) from error

    def _await_opened(
        self, kind: str, epoch: int, op: str, failure: UnavailableError | None
    ) -> None:
        """Wait until all ranks have tried to open the windows of ``epoch``.

        Raises:
            UnavailableError: ``failure``, if this rank could not.
            PeerAbortError: another one could not.
        """
        failed: dict[int, str] = {}
        missing = {rank: self._entry(rank, kind, epoch) + 4 for rank in range(self.size)}
        for _ in self._looks(op, f"{kind} {epoch}", missing):
            for rank in list(missing):
                said = self._heard(rank, kind, epoch)
                assert said is not None
                if said.status == _DATA:
                    continue
                del missing[rank]
                # As above: a rank that has opened them may fail afterwards, for its flag to tell.
                if not said.status & _OPENED:
                    failed[rank] = said.reason
        if failure is not None:
            raise failure
        if failed:
            raise PeerAbortError(op, *min(failed.items()))


def _leave(own: Block, pidfds: dict[int, int], pid: int) -> None:
    """Tell the peers that this rank has left, and close the descriptors."""
    # A forked child drops its copies of everything, and is no rank.
    if os.getpid() == pid:
        atomics.store_release(own.data.data_ptr(), 1)
    with contextlib.ExitStack() as stack:
        while pidfds:
            stack.callback(os.close, pidfds.popitem()[1])


def control_bytes(in_flight: int) -> int:
    """Size of a control block."""
    return _HEAD_BYTES + len(KINDS) * num_slots(in_flight) * _ENTRY_BYTES


def _mismatch(op: str, mine: str, theirs: str, rank: int) -> ArgumentMismatchError | None:
    own, other = json.loads(mine)["arguments"], json.loads(theirs)["arguments"]
    for name in [*own, *(name for name in other if name not in own)]:
        if own.get(name) != other.get(name):
            return ArgumentMismatchError(op, name, own.get(name), other.get(name), rank=rank)
    return None


def _release(blocks: Iterable[Block]) -> None:
    """Release all of them, also when one cannot be."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.release)


def _words(address: int) -> ctypes.Array[ctypes.c_int32]:
    """The four words of a flag record or of the head of an announcement."""
    return (ctypes.c_int32 * 4).from_address(address)


def _write(address: int, text: str, limit: int) -> int:
    raw = text.encode()[:limit]
    ctypes.memmove(address, raw, len(raw))
    return len(raw)


def _open_pids(pids: list[int] | None, own: int) -> dict[int, int]:
    """Descriptors that become readable when a peer's process ends."""
    found: dict[int, int] = {}
    if pids is not None and hasattr(os, "pidfd_open"):
        for rank, pid in enumerate(pids):
            # Without a descriptor, because it has just died or the system forbids it, a peer is
            # missed when the time is up.
            with contextlib.suppress(OSError):
                if rank != own:
                    found[rank] = os.pidfd_open(pid)
    return found

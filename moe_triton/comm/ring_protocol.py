"""One rank's side of the window protocol: rings of slots, flags, handshakes and failures.

Every rank issues the same sequence of operations. Operation number i of a kind, its *epoch*, uses
slot i % slots of that kind's windows, and each rank writes exactly one flag record per epoch to
every peer: after its data, or as an *abort*. A wait that an abort ends early leaves the epoch
*undrained*: all of its flags have to arrive before the slot is used again.

Each rank also posts a *handshake* message for every call in a control block that its peers read:
the arguments that must agree, or the reason for its abort. Peers read these messages for a new
configuration and after an abort. New windows take a second handshake, so that either all ranks use
them or none. The control block begins with a word that says whether the rank has left the group.
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
from .memory import HOST, Block, CollectiveMemory, Handle, Memory
from .polling import Background, Backoff, ranks_text
from .wait_board import Deadlock, WaitBoard
from .window import PeerWindows, clear_flags, flag_bytes, num_slots, ring_bytes

KINDS = ("dispatch", "combine", "gather", "exchange")
_DATA, _ABORT = 0, 1
_OPENED = 2  # only in handshakes, where a later status keeps this bit

# A handshake: epoch, status, bytes of text, bytes of reason; then the text; then the reason.
_ENTRY_BYTES, _TEXT, _REASON = 4096, 16, 3072
# Before the first handshake: whether the rank has left; the kind's number, from 1, and the epoch
# of the operation in which it waits, or 0.
_HEAD_BYTES = 16
_LIVENESS_INTERVAL = 10e-3  # seconds between checks for dead peers
_BOARD_INTERVAL = 0.1  # seconds between checks for peers in other calls


@dataclasses.dataclass(frozen=True)
class EpochState:
    """An epoch between setup and teardown.

    Attributes:
        digest: CRC-32 of the arguments, which travels with every flag.
        windows: of all ranks, None until the handshake.
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
        undrained: epochs that ended before all of their flags arrived, with their windows; None
            where windows did not exist yet, so that handshakes stand for flags.
    """

    last: int = 0
    windows: PeerWindows | None = None
    in_flight: dict[int, EpochState] = dataclasses.field(default_factory=dict)
    undrained: dict[int, PeerWindows | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Handshake:
    """A peer's message about a call; ``text`` is empty where it rejected its own arguments."""

    status: int
    text: str
    reason: str


class RingProtocol:
    """One rank of a group that shares windows.

    Args:
        group: the group.
        name: of this object, equal on all ranks, of no other of the group.
        memory: of the host; allocates and opens blocks.
        blocks: every rank's control block, ``control_bytes(in_flight)`` long.
        pids: every rank's process id, or None where the ranks are threads or in different PID
            namespaces.
        in_flight: f, setups that may run ahead of teardowns.
        timeout: of a wait, in seconds.
        device_memory: provides the windows on devices that it serves, or None.
    """

    def __init__(
        self,
        group: Group,
        name: str,
        memory: Memory,
        blocks: list[Block],
        pids: list[int] | None,
        *,
        in_flight: int,
        timeout: float,
        device_memory: CollectiveMemory | None = None,
    ) -> None:
        self.group = group
        self.rank, self.size = group.rank, group.size
        self.in_flight = in_flight
        self.timeout = timeout
        self.slots = num_slots(in_flight)
        # Threads of one process hold each other's interpreter lock while they spin.
        self._spin = not group.in_process and len(os.sched_getaffinity(0)) >= self.size
        self.broken: str | None = None
        self._retry: tuple[str, int] | None = None  # the wait that may be repeated
        self._memory = memory
        self._device_memory = device_memory
        self._control = blocks
        self._pidfds = _open_pidfds(pids, self.rank)
        self._rings = {kind: Ring() for kind in KINDS}
        self._board = WaitBoard(group, name, self)
        self._agreed: set[tuple[str, str]] = set()
        # A dropped object leaves too: it holds descriptors, and peers may wait for it.
        own = blocks[self.rank]
        self._leave = weakref.finalize(self, _leave, own, self._pidfds, os.getpid())
        self._leave.atexit = False  # peers notice the end of the process

    def last_epochs(self) -> Mapping[str, int]:
        """The epoch of the last operation of each kind that this rank has begun."""
        return {kind: ring.last for kind, ring in self._rings.items()}

    def close(self) -> None:
        """Leave the group and release the memory; peers keep their mappings."""
        # The mappings go with the last view of them.
        self._rings = {}
        self._leave()

    # The life of an operation: acquire, handshake, signal, wait, release. The caller writes its
    # data before signal, and reads that of the peers before release.

    def acquire(self, kind: str, op: str) -> int:
        """Take the next epoch of ``kind`` and with it a slot of the ring."""
        self.raise_if_broken(op)
        ring = self._rings[kind]
        if self._is_full(ring):
            raise SequenceError.too_many(op, kind, self.in_flight)
        epoch = atomics.wrap(ring.last + 1)
        undrained_epoch = atomics.wrap(epoch - self.in_flight)
        if undrained_epoch in ring.undrained:
            self._drain(kind, undrained_epoch, op)
            del ring.undrained[undrained_epoch]
        self._board.begin()
        ring.last = epoch
        ring.in_flight[epoch] = EpochState()
        return epoch

    def handshake(
        self,
        kind: str,
        epoch: int,
        op: str,
        arguments: Mapping[str, Any],
        slot_bytes: int,
        device: torch.device = HOST,
    ) -> PeerWindows:
        """Post this call's arguments; where they are new, compare those of all ranks.

        Args:
            kind: of operation.
            epoch: of this call.
            op: for error messages.
            arguments: names and printable values that must be equal on all ranks.
            slot_bytes: size of a slot; windows that are smaller are replaced.
            device: of the windows' memory.

        Returns:
            The windows of all ranks.

        Raises:
            ArgumentMismatchError: the ranks' arguments differ.
            PeerAbortError: a peer rejected its call.
            PeerTimeoutError: peers did not call.
            UnavailableError: a rank cannot allocate its windows, or open those of a peer.
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
            blocks = self._exchange_windows(kind, epoch, op, arguments, own)
            ring.windows = PeerWindows(blocks, self.slots)
            # All ranks have opened all of them. Each rank removes all names, so that none is left
            # if a rank dies.
            _release_blocks(blocks)
        elif known not in self._agreed:
            self._compare_arguments(kind, epoch, op, arguments)
        self._agreed.add(known)
        assert ring.windows is not None
        digest = atomics.wrap(zlib.crc32(known[1].encode()))
        ring.in_flight[epoch] = EpochState(digest, ring.windows)
        return ring.windows

    def signal(self, kind: str, epoch: int, status: int = _DATA) -> None:
        """Write this rank's flag of ``epoch`` to every rank; releases what it wrote before."""
        ring = self._rings[kind]
        operation = ring.in_flight[epoch]
        # A call that failed before its handshake aborts in the windows that its peers use.
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
            Seconds until each rank's flag arrived.

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
        waited, aborted = self._wait_flags(kind, epoch, op, windows)
        if self._retry == (kind, epoch):
            self.broken = self._retry = None
        if aborted:
            # The culprit's own abort names the cause; these ranks aborted because of it.
            self.release(kind, epoch)
            raise PeerAbortError(op, aborted[0], "its call failed for a reason of another rank")
        return waited

    def release(self, kind: str, epoch: int) -> None:
        """Release the slot of a consumed operation."""
        del self._rings[kind].in_flight[epoch]

    def abort(self, kind: str, epoch: int, error: BaseException) -> None:
        """Take part in ``epoch`` without data, because of ``error``."""
        if isinstance(error, PeerTimeoutError):
            return  # the group is broken
        if not isinstance(error, (PeerAbortError, ArgumentMismatchError)):
            reason = error.problem if isinstance(error, MoeError) else repr(error)
            self._post_handshake(kind, epoch, _ABORT, "", reason)
        self.signal(kind, epoch, _ABORT)
        self._end_undrained(kind, epoch)

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Take the next epoch and abort it, because this rank rejects the call."""
        if self.broken is None and not self._is_full(self._rings[kind]):
            self.abort(kind, self.acquire(kind, op), error)

    def next_slot(self, kind: str) -> tuple[PeerWindows, int] | None:
        """The windows and the slot of the next operation, if the slot may be written already."""
        ring = self._rings[kind]
        epoch = atomics.wrap(ring.last + 1)
        undrained = atomics.wrap(epoch - self.in_flight) in ring.undrained
        if ring.windows is None or undrained or self._is_full(ring):
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
        """Whether the next setup has to wait for a teardown."""
        # Compare epochs, not their number: an epoch that ended early still holds its slot.
        oldest = next(iter(ring.in_flight), None)
        return oldest is not None and atomics.wrap(ring.last + 1 - oldest) >= self.in_flight

    # Flags.

    def _end_undrained(self, kind: str, epoch: int) -> None:
        ring = self._rings[kind]
        ring.undrained[epoch] = ring.in_flight[epoch].windows or ring.windows
        self.release(kind, epoch)

    def _drain(self, kind: str, epoch: int, op: str) -> None:
        """Wait for the remaining flags of an epoch that ended early on this rank."""
        windows, slot = self._rings[kind].undrained[epoch], self.slot(epoch)
        addresses = {
            source: self._handshake_address(source, kind, epoch)
            if windows is None
            else windows.flag_address(self.rank, slot, source)
            for source in range(self.size)
        }
        for _ in self._poll_flags(kind, op, epoch, addresses):
            pass

    def _wait_flags(
        self, kind: str, epoch: int, op: str, windows: PeerWindows
    ) -> tuple[list[float], list[int]]:
        """Wait for all flags of ``epoch``; raise on an abort whose cause is known.

        Returns:
            Seconds until each flag arrived, and the ranks whose flag is an abort.
        """
        slot, digest = self.slot(epoch), self._rings[kind].in_flight[epoch].digest
        addresses = {
            source: windows.flag_address(self.rank, slot, source) for source in range(self.size)
        }
        aborted: list[int] = []
        waited = [0.0] * self.size
        stream = windows.stream()
        start = time.monotonic()
        for source in self._poll_flags(kind, op, epoch, addresses, retry=(kind, epoch)):
            waited[source] = time.monotonic() - start
            words = _words(addresses[source])
            if words[1] == _ABORT:
                aborted.append(source)
            if words[1] == _ABORT or words[2] != digest:
                self._raise_abort_cause(kind, epoch, op, source)
            elif words[3] != stream:
                self._end_undrained(kind, epoch)
                raise SequenceError(
                    op,
                    "ranks that share a device must issue their operations on one stream, but "
                    f"rank {source} used another than rank {self.rank}",
                )
        return waited, aborted

    def _poll_flags(
        self,
        kind: str,
        op: str,
        epoch: int,
        addresses: dict[int, int],
        retry: tuple[str, int] | None = None,
    ) -> Iterator[int]:
        """Yield each rank when ``epoch`` appears at its address."""
        missing = dict(addresses)
        for _ in self._polls(op, kind, epoch, missing, retry):
            for source, address in list(missing.items()):
                if atomics.wrap(atomics.load_relaxed(address) - epoch) < 0:
                    continue
                seen = atomics.load_acquire(address)
                if atomics.wrap(seen - epoch) > 0:
                    # The ranks' epochs differ for good: another wait cannot repair this.
                    self.broken = f"rank {source} is at operation {seen}, this rank at {epoch}"
                    self._retry = None
                    self.raise_if_broken(op)
                del missing[source]
                yield source

    def _raise_abort_cause(self, kind: str, epoch: int, op: str, source: int) -> None:
        """Raise the reason of the abort of ``source``, if ``source`` caused it."""
        message = self._read_handshake(source, kind, epoch)
        if message is None:
            return
        error: MoeError | None = None
        if message.status & _ABORT:
            error = PeerAbortError(op, source, message.reason)
        else:
            own = self._read_handshake(self.rank, kind, epoch)
            assert own is not None
            error = _mismatch(op, own.text, message.text, source)
        if error is not None:
            self._end_undrained(kind, epoch)
            raise error

    def _polls(
        self,
        op: str,
        kind: str,
        epoch: int,
        missing: Mapping[int, int],
        retry: tuple[str, int] | None = None,
    ) -> Iterator[None]:
        """Yield once per poll, until the caller has emptied ``missing``.

        Args:
            op: for error messages.
            kind: of the operation in which this rank waits.
            epoch: of that operation.
            missing: addresses of the words that will change, by rank.
            retry: kind and epoch of a wait that may be repeated after a time-out, or None.

        Raises:
            PeerTimeoutError: the time is up, or a missing peer has left or died, or waits for this
                rank in another call.
        """
        what = f"{kind} {epoch}"
        backoff = Backoff(self.timeout, spin=self._spin)
        gone: list[int] = []
        deadlock: Deadlock | None = None
        late = posted = False
        next_check = time.monotonic() + _LIVENESS_INTERVAL
        next_board = time.monotonic() + _BOARD_INTERVAL
        try:
            while missing:
                # Read before the poll: a change after the poll then ends the pause at once.
                rank, address = next(iter(missing.items()))
                seen = atomics.load_relaxed(address)
                yield
                if not missing:
                    return
                # Decided before this poll, so that a flag set before the deadline counts.
                if deadlock is not None and deadlock.rank in missing:
                    posted = False  # stays, for the peers
                    self._raise_timeout(op, (deadlock.rank,), deadlock.problem, None)
                if lost := tuple(rank for rank in gone if rank in missing):
                    problem = f"{ranks_text(lost)} left the group or died ({what})"
                    self._raise_timeout(op, lost, problem, retry)
                if late and missing:
                    absent = tuple(sorted(missing))
                    problem = (
                        f"{ranks_text(absent)} did not come within {self.timeout:g} s ({what})"
                    )
                    self._raise_timeout(op, absent, problem, retry)
                now = time.monotonic()
                if now >= next_check:
                    gone = [rank for rank in missing if self._is_gone(rank)]
                    # A peer that found out first has left, and its post stays.
                    if gone or now >= next_board:
                        if not posted:
                            self._board.post(kind, epoch)
                            posted = True
                        deadlock = self._board.find_deadlock(kind, epoch, missing)
                        next_board = now + _BOARD_INTERVAL
                    next_check = now + _LIVENESS_INTERVAL
                late = now >= backoff.deadline
                if rank in missing:
                    backoff.pause_on(address, seen)
        finally:
            if posted:
                self._board.clear()

    def _is_gone(self, rank: int) -> bool:
        """Whether a peer has left, or its process has ended."""
        if atomics.load_acquire(self._control[rank].data.data_ptr()):
            return True
        if rank not in self._pidfds:
            return False
        return bool(select.select([self._pidfds[rank]], [], [], 0)[0])

    def _raise_timeout(
        self, op: str, ranks: tuple[int, ...], problem: str, retry: tuple[str, int] | None
    ) -> None:
        # Only the first failed wait can be repeated: a failed setup is lost for good, whatever the
        # waits after it return.
        if self.broken is None:
            self._retry = retry
        self.broken = problem
        raise PeerTimeoutError(op, ranks, f"{problem}, in group {self.group.name!r}")

    def _allocate(
        self, kind: str, epoch: int, op: str, slot_bytes: int, device: torch.device
    ) -> Block:
        """Allocate this rank's windows; their flags hold the epoch before ``epoch``."""
        num_bytes = ring_bytes(self.size, slot_bytes, self.in_flight)
        try:
            if collective := self._collective_memory(device):
                own = collective.allocate(num_bytes, device)
            else:
                flags = self.slots * flag_bytes(self.size)
                own = self._memory.allocate(num_bytes, device, flags)
        except (OSError, OverflowError, RuntimeError) as error:
            raise UnavailableError(
                op,
                f"the {kind} windows of rank {self.rank}, {self.slots} slots of {slot_bytes} bytes "
                f"and {self.size} flags, {num_bytes} bytes in all, cannot be allocated: {error}",
            ) from error
        # Zero would be ahead of epochs that have wrapped to negative numbers.
        clear_flags(own, self.size, self.slots, atomics.wrap(epoch - 1))
        return own

    def _collective_memory(self, device: torch.device) -> CollectiveMemory | None:
        """The provider that opens all ranks' windows on ``device`` at once, if there is one."""
        memory = self._device_memory
        return memory if memory is not None and memory.serves(device) else None

    # Handshakes.

    def _handshake_address(self, rank: int, kind: str, epoch: int) -> int:
        index = KINDS.index(kind) * self.slots + self.slot(epoch)
        return self._control[rank].data.data_ptr() + _HEAD_BYTES + index * _ENTRY_BYTES

    def _post_handshake(self, kind: str, epoch: int, status: int, text: str, reason: str) -> None:
        """Write this rank's message about ``epoch``; an earlier text for the epoch stays."""
        address = self._handshake_address(self.rank, kind, epoch)
        words = _words(address)
        if words[0] == epoch:
            status |= words[1] & _OPENED
        else:
            words[2] = _write(address + _TEXT, text, _REASON - _TEXT)
        words[3] = _write(address + _REASON, reason, _ENTRY_BYTES - _REASON)
        for word, value in ((address + 4, status), (address, epoch)):
            atomics.store_release(word, value)
            futex.wake(word)

    def _read_handshake(self, rank: int, kind: str, epoch: int) -> Handshake | None:
        """The message of ``rank`` about ``epoch``, or None before it is posted."""
        address = self._handshake_address(rank, kind, epoch)
        if atomics.load_acquire(address) != epoch:
            return None
        status = atomics.load_acquire(address + 4)
        words = _words(address)
        text = ctypes.string_at(address + _TEXT, words[2]).decode()
        reason = ctypes.string_at(address + _REASON, words[3]).decode(errors="replace")
        return Handshake(status, text, reason)

    def _compare_arguments(
        self, kind: str, epoch: int, op: str, arguments: Mapping[str, Any]
    ) -> dict[int, str]:
        """Wait for all handshakes of ``epoch`` and compare; returns their texts by rank."""
        own = json.dumps({"arguments": arguments})
        missing = {rank: self._handshake_address(rank, kind, epoch) for rank in range(self.size)}
        texts: dict[int, str] = {}
        for _ in self._polls(op, kind, epoch, missing):
            for rank in list(missing):
                message = self._read_handshake(rank, kind, epoch)
                if message is None:
                    continue
                del missing[rank]
                # A rank that posted arguments counts even if it failed afterwards: all ranks must
                # decide alike here, and its flag reports the failure.
                if not message.text:
                    raise PeerAbortError(op, rank, message.reason)
                error = _mismatch(op, own, message.text, rank)
                if error is not None:
                    raise error
                texts[rank] = message.text
        return texts

    def _exchange_windows(
        self, kind: str, epoch: int, op: str, arguments: Mapping[str, Any], own: Block
    ) -> list[Block]:
        """Open all ranks' new windows; return once every rank has opened them all."""
        blocks = {self.rank: own}
        failure: UnavailableError | None = None
        try:
            texts = self._compare_arguments(kind, epoch, op, arguments)
            # After the comparison: a rank whose arguments differ has released its window.
            handles = [json.loads(texts[rank])["window"] for rank in range(self.size)]
            try:
                if collective := self._collective_memory(own.data.device):
                    opened = self._open_together(collective, kind, epoch, op, own, handles)
                    blocks |= enumerate(opened)
                else:
                    for rank, handle in enumerate(handles):
                        if rank != self.rank:
                            blocks[rank] = self._open(kind, op, rank, handle)
                self._post_handshake(kind, epoch, _OPENED, "", "")
            except UnavailableError as error:
                self._post_handshake(kind, epoch, _ABORT, "", error.problem)
                failure = error
            self._await_opened(kind, epoch, op, failure)
        except BaseException as error:
            # Release for the lost ranks too. The others release their own windows, once no peer
            # is about to open them.
            lost = error.ranks if isinstance(error, PeerTimeoutError) else ()
            _release_blocks([own, *(blocks[rank] for rank in lost if rank in blocks)])
            raise
        return [blocks[rank] for rank in range(self.size)]

    def _open_together(
        self,
        memory: CollectiveMemory,
        kind: str,
        epoch: int,
        op: str,
        own: Block,
        handles: list[Handle],
    ) -> list[Block]:
        """``memory.open_all`` until it ends, a peer fails in it, or the time is up."""
        opening = Background(lambda: memory.open_all(own, handles), f"{kind} windows")
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        missing = {rank: self._handshake_address(rank, kind, epoch) + 4 for rank in ranks}  # status
        for _ in self._polls(op, kind, epoch, missing):
            if opening.done():
                break
            for rank in list(missing):
                message = self._read_handshake(rank, kind, epoch)
                assert message is not None
                if message.status & _OPENED:
                    del missing[rank]
                elif message.status & _ABORT:
                    raise UnavailableError(op, f"rank {rank} failed: {message.reason}")
        problem = f"the {kind} windows of all ranks cannot be opened by rank {self.rank}: "
        if not opening.done(self.timeout):
            raise UnavailableError(op, f"{problem}not within {self.timeout:g} s")
        try:
            return opening.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise UnavailableError(op, f"{problem}{error}") from error

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
        ranks = range(self.size)
        missing = {rank: self._handshake_address(rank, kind, epoch) + 4 for rank in ranks}  # status
        for _ in self._polls(op, kind, epoch, missing):
            for rank in list(missing):
                message = self._read_handshake(rank, kind, epoch)
                assert message is not None
                if message.status == _DATA:
                    continue
                del missing[rank]
                # A rank that has opened them may fail afterwards; its flag reports that.
                if not message.status & _OPENED:
                    failed[rank] = message.reason
        if failure is not None:
            raise failure
        if failed:
            raise PeerAbortError(op, *min(failed.items()))


def _leave(own: Block, pidfds: dict[int, int], pid: int) -> None:
    """Mark this rank as gone for its peers, and close the descriptors."""
    # A forked child drops copies of all objects without being a rank.
    if os.getpid() == pid:
        atomics.store_release(own.data.data_ptr(), 1)
    with contextlib.ExitStack() as stack:
        while pidfds:
            stack.callback(os.close, pidfds.popitem()[1])


def control_bytes(in_flight: int) -> int:
    """Size of a control block."""
    return _HEAD_BYTES + len(KINDS) * num_slots(in_flight) * _ENTRY_BYTES


def _mismatch(op: str, own_text: str, peer_text: str, rank: int) -> ArgumentMismatchError | None:
    own, peers = json.loads(own_text)["arguments"], json.loads(peer_text)["arguments"]
    for name in own | peers:
        if own.get(name) != peers.get(name):
            return ArgumentMismatchError(op, name, own.get(name), peers.get(name), rank=rank)
    return None


def _release_blocks(blocks: Iterable[Block]) -> None:
    """Release all blocks, also when one of them fails."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.release)


def _words(address: int) -> ctypes.Array[ctypes.c_int32]:
    """The four words of a flag record or of the head of a handshake."""
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

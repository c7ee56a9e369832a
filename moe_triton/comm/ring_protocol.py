"""One rank's side of the window protocol: rings of slots, flags, handshakes and failures.

Every rank issues the same sequence of operations. Operation number i of a kind, its *epoch*, uses
slot i % slots of that kind's windows. The device steps write a record per epoch to every peer, and
the kernels on a device wait for these. Where the host can wait, for ranks on the CPU and for those
of one process, it does, before the launch: each rank also has a *flag* per epoch in its control
block, which its peers read, and which says that the send has been issued.

A rank that cannot take part sends an *abort* in place of data. Every epoch has both halves on every
rank: one that ended early, by an abort or by the error of a peer, is *owed* its receive step, which
follows before the next epoch of the kind is received or its slot is used again.

Each rank also posts a *handshake* message for every call in its control block: the arguments that
must agree, or the reason for its abort. Peers read these messages for a new configuration and after
an abort. New windows take a second handshake, so that either all ranks use them or none. The
control block begins with a word that says whether the rank has left the group.
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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import (
    ArgumentMismatchError,
    BrokenGroupError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    SequenceError,
    UnavailableError,
)
from ..layout import Ring
from ..layout.windows import (
    ABORT,
    DATA,
    KIND,
    LATE,
    PROBLEM_EPOCH,
    PROBLEM_RANK,
    PROBLEM_WORDS,
    WHAT,
)
from . import atomics, futex
from .groups import Group
from .memory import HOST, Block, CollectiveMemory, Handle, Memory
from .polling import Background, Backoff, ranks_text
from .transport import WindowSteps
from .wait_board import Deadlock, WaitBoard
from .window import PeerWindows, host_span, num_slots, union

KINDS = ("dispatch", "combine", "gather", "exchange")
_OPENED = 2  # only in handshakes, where a later status keeps this bit

# A flag: epoch, status, digest of the arguments, stream of the device.
_FLAG_WORDS = 4
_FLAG_BYTES = 4 * _FLAG_WORDS
# A handshake: epoch, status, bytes of text, bytes of reason; then the text; then the reason.
_ENTRY_BYTES, _TEXT, _REASON = 4096, 16, 3072
_HEAD_BYTES = 16  # before the flags: whether the rank has left
_LIVENESS_INTERVAL = 10e-3  # seconds between checks for dead peers
_BOARD_INTERVAL = 0.1  # seconds between checks for peers in other calls


class Agreement(NamedTuple):
    """The arguments of a call, equal on all ranks.

    Attributes:
        text: JSON of the names and values.
        digest: CRC-32 of the text, which travels with every flag and record.
    """

    text: str
    digest: int


@dataclasses.dataclass
class EpochState:
    """An epoch between setup and teardown.

    Attributes:
        digest: of the arguments.
        windows: of all ranks, None until the handshake or where there are none yet.
        steps: of its call.
        after_combine: the last combine, if it was over before this epoch began; else None.
        slot_was_free: whether the data slot that this epoch claimed was free; None for no claim.
    """

    digest: int = 0
    windows: PeerWindows | None = None
    steps: WindowSteps | None = None
    after_combine: int | None = None
    slot_was_free: bool | None = None


@dataclasses.dataclass
class KindState:
    """The windows and counters of one kind of operation.

    Attributes:
        last: the epoch of the last setup. Teardowns follow in order, from the oldest in flight.
        windows: all ranks' windows, None until the first call that needs them.
        steps: of the last call that used the windows.
        in_flight: epochs set up and not yet torn down, oldest first.
        owed: epochs that ended early and are owed their receive step, oldest first.
    """

    last: int = 0
    windows: PeerWindows | None = None
    steps: WindowSteps | None = None
    in_flight: dict[int, EpochState] = dataclasses.field(default_factory=dict)
    owed: dict[int, EpochState] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Handshake:
    """A peer's message about a call; ``text`` is empty where it rejected its own arguments."""

    status: int
    text: str
    reason: str


class _MemoryOf:
    """The memory of a tensor, which others may free."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._range = range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)

    @property
    def is_freed(self) -> bool:
        """Whether no tensor has it any more."""
        return self._storage.expired()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in it; it must not be freed."""
        return tensor.data_ptr() in self._range


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
        self._kinds = {kind: KindState() for kind in KINDS}
        self._agreements: dict[tuple[object, ...], Agreement] = {}
        # Control blocks of all ranks: their words, and where the flags of each rank begin.
        self._span = host_span([block.data for block in blocks])
        words: np.ndarray = self._span.numpy()
        self._words = words[: len(words) // 4 * 4].view(np.int32)
        starts = [block.data.data_ptr() - self._span.data_ptr() for block in blocks]
        first = (np.array(starts) + _HEAD_BYTES) // 4
        self._flags = first[:, None] + np.arange(_FLAG_WORDS)
        self._problems: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        # Whether no peer reads slot 0 of the combine windows any more.
        self._combine_slot_free = True
        self._retired: list[_MemoryOf] = []  # combine windows that callers may hold rows of
        self._board = WaitBoard(group, name, self)
        self._agreed: set[tuple[str, str]] = set()
        # A dropped object leaves too: it holds descriptors, and peers may wait for it.
        own = blocks[self.rank]
        self._leave = weakref.finalize(self, _leave, own, self._pidfds, os.getpid())
        self._leave.atexit = False  # peers notice the end of the process

    def last_epochs(self) -> Mapping[str, int]:
        """The epoch of the last operation of each kind that this rank has begun."""
        return {kind: state.last for kind, state in self._kinds.items()}

    def close(self) -> None:
        """Leave the group and release the memory; peers keep their mappings."""
        # The mappings go with the last view of them.
        self._kinds = {kind: KindState() for kind in KINDS}
        self._leave()

    # The life of an operation: acquire, handshake, signal, wait, release. The caller launches its
    # send step before signal, and its receive step before release.

    def acquire(self, kind: str, op: str) -> int:
        """Take the next epoch of ``kind`` and with it a slot of the ring."""
        self.raise_if_broken(op)
        state = self._kinds[kind]
        if self._is_full(state):
            raise SequenceError.too_many(op, kind, self.in_flight)
        epoch = atomics.wrap(state.last + 1)
        if atomics.wrap(epoch - self.in_flight) in state.owed:
            self._drain(kind, op, atomics.wrap(epoch - self.in_flight))
        self._board.begin()
        state.last = epoch
        combine = self._kinds["combine"]
        state.in_flight[epoch] = EpochState(
            after_combine=None if combine.in_flight else combine.last
        )
        return epoch

    def handshake(
        self,
        kind: str,
        epoch: int,
        op: str,
        arguments: Mapping[str, Any],
        ring: Ring,
        steps: WindowSteps | None,
        device: torch.device = HOST,
    ) -> tuple[PeerWindows, int]:
        """Post this call's arguments; where they are new, compare those of all ranks.

        Args:
            kind: of operation.
            epoch: of this call.
            op: for error messages.
            arguments: names and printable values that must be equal on all ranks.
            ring: what the call needs; windows that are smaller are replaced.
            steps: of the call; None for a kind without records, for which hosts wait.
            device: of the windows' memory.

        Returns:
            The windows of all ranks, and the digest of the arguments.

        Raises:
            ArgumentMismatchError: the ranks' arguments differ.
            PeerAbortError: a peer rejected its call.
            PeerTimeoutError: peers did not call.
            UnavailableError: a rank cannot allocate its windows, or open those of a peer.
        """
        state = self._kinds[kind]
        agreement = self._agreement(arguments, device)
        known = (kind, agreement.text)
        windows, own = state.windows, None
        text = agreement.text
        if windows is None or not windows.serves(ring, device):
            if windows is not None:
                ring = union(ring, windows.ring)
            own = self._allocate(kind, epoch, op, ring, device)
            text = json.dumps({**json.loads(text), "window": own.handle})
        self._post_handshake(kind, epoch, DATA, text, "")
        if own is not None:
            blocks = self._exchange_windows(kind, epoch, op, agreement.text, own)
            if kind == "combine" and state.windows is not None:
                self._retired.append(_MemoryOf(state.windows.blocks[self.rank].data))
            problem, notice = self._problem(own.data.device)
            windows = state.windows = PeerWindows(
                blocks,
                ring,
                self.rank,
                kind=KINDS.index(kind),
                epoch=atomics.wrap(epoch - 1),
                problem=problem,
                notice=notice,
                hard=not self.host_waits(device),
            )
            # All ranks have opened all of them. Each rank removes all names, so that none is left
            # if a rank dies.
            _release_blocks(blocks)
        elif known not in self._agreed:
            self._compare_arguments(kind, epoch, op, agreement.text)
        self._agreed.add(known)
        assert windows is not None
        operation = state.in_flight[epoch]
        operation.digest, operation.windows = agreement.digest, windows
        operation.steps = state.steps = steps
        return windows, agreement.digest

    def _agreement(self, arguments: Mapping[str, Any], device: torch.device) -> Agreement:
        key = (*arguments.items(), device.type)
        if key not in self._agreements:
            if device.type != "cpu":
                arguments = {**arguments, "device": device.type}
            text = json.dumps({"arguments": arguments})
            digest = atomics.wrap(zlib.crc32(text.encode()))
            self._agreements[key] = Agreement(text, digest)
        return self._agreements[key]

    def signal(self, kind: str, epoch: int, status: int = DATA) -> None:
        """Write this rank's flag of ``epoch``; releases what it wrote before."""
        operation = self._kinds[kind].in_flight[epoch]
        address = self._flag_address(self.rank, kind, epoch)
        words = _words(address)
        words[1], words[2], words[3] = status, operation.digest, _stream(operation.windows)
        atomics.store_release(address, epoch)
        futex.wake(address)

    def host_waits(self, device: torch.device) -> bool:
        """Whether the host waits for the peers before it launches a receive step on ``device``."""
        return self.group.in_process or device.type == "cpu"

    def wait(self, kind: str, epoch: int, op: str) -> list[float]:
        """Wait for all ranks' flags of ``epoch``, the oldest operation in flight.

        Where the host does not wait, this only checks the order, and kernels wait.

        Returns:
            Seconds until each rank's flag arrived; empty where the host does not wait.

        Raises:
            PeerAbortError, ArgumentMismatchError: a peer could not take part; the epoch is over.
            PeerTimeoutError: peers did not come; the group is broken, but one may wait again.
            SequenceError: not the oldest operation; or ranks that share a device used different
                streams, and the epoch is over.
        """
        state = self._kinds[kind]
        oldest = next(iter(state.in_flight), None)
        if oldest != epoch:
            raise SequenceError.out_of_order(op, kind, epoch, oldest)
        operation = state.in_flight[epoch]
        assert operation.windows is not None
        if state.owed:
            self._drain(kind, op, atomics.wrap(epoch - 1))
        waited: list[float] = []
        if self.host_waits(operation.windows.device):
            waited, aborted = self._wait_flags(kind, epoch, op, operation)
            if self._retry == (kind, epoch):
                self.broken = self._retry = None
            if aborted:
                # The culprit's own abort names the cause; these ranks aborted because of it.
                self.owe(kind, epoch, read=False)
                raise PeerAbortError(op, aborted[0], "its call failed for a reason of another rank")
        # A whole dispatch since the last combine: its records followed the peers' teardowns.
        if kind == "dispatch" and operation.after_combine == self._kinds["combine"].last:
            self._combine_slot_free = True
        return waited

    def kernel_timeout(self, device: torch.device) -> float:
        """Seconds that a receive step may wait on ``device``."""
        return 0.0 if self.host_waits(device) else self.timeout

    def release(self, kind: str, epoch: int) -> None:
        """End an operation whose receive step has been launched."""
        del self._kinds[kind].in_flight[epoch]

    def owe(self, kind: str, epoch: int, *, read: bool = True) -> None:
        """End an operation whose receive step has not been launched.

        Args:
            kind: of operation.
            epoch: of the operation.
            read: whether peers may read this rank's rows of it.
        """
        state = self._kinds[kind]
        operation = state.owed[epoch] = state.in_flight.pop(epoch)
        if operation.windows is None:
            operation.windows, operation.steps = state.windows, state.steps
        if not read and operation.slot_was_free is not None:
            self._combine_slot_free = operation.slot_was_free
        windows = operation.windows
        if windows is not None and not self.host_waits(windows.device):
            self._receive_nothing(operation)
            del state.owed[epoch]

    def abort(self, kind: str, epoch: int, error: BaseException) -> None:
        """Take part in ``epoch`` without data, because of ``error``."""
        if isinstance(error, PeerTimeoutError):
            return  # the group is broken
        if not isinstance(error, (PeerAbortError, ArgumentMismatchError)):
            reason = error.problem if isinstance(error, MoeError) else repr(error)
            self._post_handshake(kind, epoch, ABORT, "", reason)
        state = self._kinds[kind]
        operation = state.in_flight[epoch]
        # A call that failed before its handshake aborts in the windows that its peers use.
        windows, steps = operation.windows or state.windows, operation.steps or state.steps
        if windows is not None and steps is not None:
            steps.send_record(windows.steps, digest=operation.digest, status=ABORT)
        self.signal(kind, epoch, ABORT)
        self.owe(kind, epoch, read=False)

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Take the next epoch and abort it, because this rank rejects the call."""
        if self.broken is None and not self._is_full(self._kinds[kind]):
            self.abort(kind, self.acquire(kind, op), error)

    @property
    def combine_slot_free(self) -> bool:
        """Whether the next combine may write to slot 0.

        A whole dispatch lies between the last combine and now, on every rank: ranks issue the same
        halves in the same order.
        """
        return self._combine_slot_free

    def claim_combine_slot(self, epoch: int) -> None:
        """Note that a combine sends rows."""
        self._kinds["combine"].in_flight[epoch].slot_was_free = self._combine_slot_free
        self._combine_slot_free = False

    def borrowable_windows(self) -> PeerWindows | None:
        """The combine windows, if rows for the next combine may be written to slot 0 already."""
        state = self._kinds["combine"]
        free = self._combine_slot_free and not state.in_flight
        return state.windows if free else None

    def in_combine_window(self, rows: torch.Tensor) -> bool:
        """Whether rows lie in this rank's combine window, or in one that was replaced by it."""
        windows = self._kinds["combine"].windows
        self._retired = [memory for memory in self._retired if not memory.is_freed]
        return (windows is not None and windows.holds(self.rank, rows)) or any(
            memory.holds(rows) for memory in self._retired
        )

    def window_bytes(self, kind: str) -> int:
        """Bytes of this rank's windows of ``kind``, all slots and records included."""
        windows = self._kinds[kind].windows
        return 0 if windows is None else windows.blocks[self.rank].data.numel()

    def slot(self, epoch: int) -> int:
        """The ring slot of an epoch."""
        return epoch % self.slots

    def raise_if_broken(self, op: str) -> None:
        """Raise ``BrokenGroupError`` when an earlier wait timed out, on the host or a device."""
        for problem, notice in self._problems.values():
            if self.broken is None and int(notice):
                self._raise_problem(op, problem.tolist())
        if self.broken is not None:
            raise BrokenGroupError(
                op,
                f"group {self.group.name!r} is broken since a call failed ({self.broken}); "
                "call recover() on all ranks",
            )

    def _raise_problem(self, op: str, words: list[int]) -> None:
        """Raise what a kernel that waited has reported."""
        kind, epoch, rank = KINDS[words[KIND]], words[PROBLEM_EPOCH], words[PROBLEM_RANK]
        if words[WHAT] == LATE:
            problem = f"rank {rank} did not come within {self.timeout:g} s ({kind} {epoch})"
            self._raise_timeout(op, (rank,), problem, None)
        self.broken = f"rank {rank} sent no data ({kind} {epoch})"
        message = self._read_handshake(rank, kind, epoch)
        if message is not None and message.status & ABORT:
            raise PeerAbortError(op, rank, message.reason)
        own = self._read_handshake(self.rank, kind, epoch)
        if message is not None and own is not None:
            error = _mismatch(op, own.text, message.text, rank)
            if error is not None:
                raise error

    def _problem(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[PROBLEM_WORDS] int32 on a device and [1] in host memory, for all kinds."""
        if device not in self._problems:
            pinned = device.type == "cuda"
            self._problems[device] = (
                torch.zeros(PROBLEM_WORDS, dtype=torch.int32, device=device),
                torch.zeros(1, dtype=torch.int32, pin_memory=pinned),
            )
        return self._problems[device]

    def _is_full(self, state: KindState) -> bool:
        """Whether the next setup has to wait for a teardown."""
        # Compare epochs, not their number: an epoch that ended early still holds its slot.
        oldest = next(iter(state.in_flight), None)
        return oldest is not None and atomics.wrap(state.last + 1 - oldest) >= self.in_flight

    def _drain(self, kind: str, op: str, last: int) -> None:
        """Launch the receive steps owed to epochs up to ``last``, once all flags are there."""
        state = self._kinds[kind]
        while (epoch := next(iter(state.owed), None)) is not None:
            if atomics.wrap(epoch - last) > 0:
                break
            for _ in self._poll_flags(kind, op, epoch):
                pass
            self._receive_nothing(state.owed[epoch])
            del state.owed[epoch]

    def _receive_nothing(self, operation: EpochState) -> None:
        windows, steps = operation.windows, operation.steps
        if windows is None or steps is None:
            return  # handshakes stood for records
        timeout = self.kernel_timeout(windows.device)
        steps.recv_records(windows.steps, digest=operation.digest, timeout=timeout)
        if not windows.steps.hard:
            # The host knows about aborts, and has raised.
            windows.steps.problem.zero_()
            windows.steps.notice.zero_()

    # Flags.

    def _flag_address(self, rank: int, kind: str, epoch: int) -> int:
        index = KINDS.index(kind) * self.slots + self.slot(epoch)
        return self._control[rank].data.data_ptr() + _HEAD_BYTES + index * _FLAG_BYTES

    def _read_flags(self, kind: str, epoch: int) -> np.ndarray:
        """[W, 4] the flags of all ranks in the slot of ``epoch``."""
        index = KINDS.index(kind) * self.slots + self.slot(epoch)
        return self._words[self._flags + index * _FLAG_WORDS]

    def _wait_flags(
        self, kind: str, epoch: int, op: str, operation: EpochState
    ) -> tuple[list[float], list[int]]:
        """Wait for all flags of ``epoch``; raise on an abort whose cause is known.

        Returns:
            Seconds until each flag arrived, and the ranks whose flag is an abort.
        """
        aborted: list[int] = []
        waited = [0.0] * self.size
        start = time.monotonic()
        expected = (epoch, DATA, operation.digest, _stream(operation.windows))

        def check(source: int) -> None:
            flag = tuple(_words(self._flag_address(source, kind, epoch)))
            if flag != expected and source not in aborted:
                aborted.extend(self._check_flag(kind, epoch, op, source, flag, expected))

        present = self._read_flags(kind, epoch)[:, 0] == epoch
        if not present.all():
            for source in present.nonzero()[0].tolist():
                atomics.load_acquire(self._flag_address(source, kind, epoch))
                check(source)
        for source in self._poll_flags(kind, op, epoch, retry=(kind, epoch)):
            waited[source] = time.monotonic() - start
            check(source)
        if not (self._read_flags(kind, epoch) == expected).all():
            for source in range(self.size):
                check(source)
        return waited, aborted

    def _check_flag(
        self,
        kind: str,
        epoch: int,
        op: str,
        source: int,
        flag: tuple[int, ...],
        expected: tuple[int, ...],
    ) -> list[int]:
        """Raise the cause of an unexpected flag, or return its rank if it is an abort."""
        if flag[1] == ABORT or flag[2] != expected[2]:
            self._raise_abort_cause(kind, epoch, op, source)
        elif flag[3] != expected[3]:
            self.owe(kind, epoch)
            raise SequenceError(
                op,
                "ranks that share a device must issue their operations on one stream, but "
                f"rank {source} used another than rank {self.rank}",
            )
        return [source] if flag[1] == ABORT else []

    def _poll_flags(
        self, kind: str, op: str, epoch: int, retry: tuple[str, int] | None = None
    ) -> Iterator[int]:
        """Yield each rank that was missing at first, when its flag of ``epoch`` appears.

        With none missing nothing is yielded, and peers' earlier writes are visible all the same.
        """
        ahead = self._read_flags(kind, epoch)[:, 0] - np.int32(epoch)
        arrived = ahead >= 0
        if not atomics.LOADS_ACQUIRE:
            for source in arrived.nonzero()[0].tolist():
                atomics.load_acquire(self._flag_address(source, kind, epoch))
        if ahead.any():
            for source in (ahead > 0).nonzero()[0].tolist():
                self._raise_overrun(op, source, atomics.wrap(epoch + int(ahead[source])), epoch)
            late = (~arrived).nonzero()[0].tolist()
            yield from self._poll_missing(kind, op, epoch, late, retry)

    def _poll_missing(
        self, kind: str, op: str, epoch: int, late: list[int], retry: tuple[str, int] | None
    ) -> Iterator[int]:
        missing = {source: self._flag_address(source, kind, epoch) for source in late}
        for _ in self._polls(op, kind, epoch, missing, retry):
            for source, address in list(missing.items()):
                if atomics.wrap(atomics.load_relaxed(address) - epoch) < 0:
                    continue
                seen = atomics.load_acquire(address)
                if atomics.wrap(seen - epoch) > 0:
                    self._raise_overrun(op, source, seen, epoch)
                del missing[source]
                yield source

    def _raise_overrun(self, op: str, source: int, seen: int, epoch: int) -> None:
        """The ranks' epochs differ for good: another wait cannot repair this."""
        self.broken = f"rank {source} is at operation {seen}, this rank at {epoch}"
        self._retry = None
        self.raise_if_broken(op)

    def _raise_abort_cause(self, kind: str, epoch: int, op: str, source: int) -> None:
        """Raise the reason of the abort of ``source``, if ``source`` caused it."""
        message = self._read_handshake(source, kind, epoch)
        if message is None:
            return
        error: MoeError | None = None
        if message.status & ABORT:
            error = PeerAbortError(op, source, message.reason)
        else:
            own = self._read_handshake(self.rank, kind, epoch)
            assert own is not None
            error = _mismatch(op, own.text, message.text, source)
        if error is not None:
            self.owe(kind, epoch, read=False)
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
        ended = select.poll()  # select() takes no descriptor above 1023
        ended.register(self._pidfds[rank], select.POLLIN)
        return bool(ended.poll(0))

    def _raise_timeout(
        self, op: str, ranks: tuple[int, ...], problem: str, retry: tuple[str, int] | None
    ) -> None:
        # Only the first failed wait can be repeated: a failed setup is lost for good, whatever the
        # waits after it return.
        if self.broken is None:
            self._retry = retry
        self.broken = problem
        raise PeerTimeoutError(op, ranks, f"{problem}, in group {self.group.name!r}")

    def _allocate(self, kind: str, epoch: int, op: str, ring: Ring, device: torch.device) -> Block:
        """Allocate this rank's windows; their records hold the epoch before ``epoch``."""
        try:
            if collective := self._collective_memory(device):
                own = collective.allocate(ring.num_bytes, device)
            else:
                own = self._memory.allocate(ring.num_bytes, device)
        except (OSError, OverflowError, RuntimeError) as error:
            raise UnavailableError(
                op,
                f"the {kind} windows of rank {self.rank}, {ring.data_slots} slots of "
                f"{ring.data_bytes} bytes and {ring.slots} of {ring.control_bytes} bytes, "
                f"{ring.num_bytes} bytes in all, cannot be allocated: {error}",
            ) from error
        # Zero would be ahead of epochs that have wrapped to negative numbers.
        ring.clear(own.data, self.size, atomics.wrap(epoch - 1))
        if device.type != "cpu":
            # Peers may write as soon as they hear of the memory.
            torch.get_device_module(device).current_stream(device).synchronize()
        return own

    def _collective_memory(self, device: torch.device) -> CollectiveMemory | None:
        """The provider that opens all ranks' windows on ``device`` at once, if there is one."""
        memory = self._device_memory
        return memory if memory is not None and memory.serves(device) else None

    # Handshakes.

    def _handshake_address(self, rank: int, kind: str, epoch: int) -> int:
        index = KINDS.index(kind) * self.slots + self.slot(epoch)
        entries = _HEAD_BYTES + len(KINDS) * self.slots * _FLAG_BYTES
        return self._control[rank].data.data_ptr() + entries + index * _ENTRY_BYTES

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

    def _compare_arguments(self, kind: str, epoch: int, op: str, own: str) -> dict[int, str]:
        """Wait for all handshakes of ``epoch`` and compare; returns their texts by rank."""
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
        self, kind: str, epoch: int, op: str, agreed: str, own: Block
    ) -> list[Block]:
        """Open all ranks' new windows; return once every rank has opened them all."""
        blocks = {self.rank: own}
        failure: UnavailableError | None = None
        try:
            texts = self._compare_arguments(kind, epoch, op, agreed)
            # After the comparison: a rank whose arguments differ has released its window.
            handles = [json.loads(texts[rank]).get("window") for rank in range(self.size)]
            if None in handles:
                self._raise_other_order(op, kind, handles.index(None))
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
                self._post_handshake(kind, epoch, ABORT, "", error.problem)
                failure = error
            self._await_opened(kind, epoch, op, failure)
        except BaseException as error:
            # Release for the lost ranks too. The others release their own windows, once no peer
            # is about to open them.
            lost = error.ranks if isinstance(error, PeerTimeoutError) else ()
            _release_blocks([own, *(blocks[rank] for rank in lost if rank in blocks)])
            raise
        return [blocks[rank] for rank in range(self.size)]

    def _raise_other_order(self, op: str, kind: str, rank: int) -> None:
        raise SequenceError(
            op,
            "all ranks must issue the same halves of operations in the same order, but rank "
            f"{rank} needs no larger {kind} windows where rank {self.rank} does",
        )

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
                elif message.status & ABORT:
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
                if message.status == DATA:
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
    return _HEAD_BYTES + len(KINDS) * num_slots(in_flight) * (_FLAG_BYTES + _ENTRY_BYTES)


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


def _stream(windows: PeerWindows | None) -> int:
    """32 bits of the stream on which this thread uses the windows; 0 for host memory.

    A stream runs work in the order of issue, so a flag may stand for issued work.
    """
    if windows is None or windows.device.type != "cuda":
        return 0
    return atomics.wrap(torch.cuda.current_stream(windows.device).cuda_stream)


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

"""One rank's side of the window protocol: rings of slots, epochs, aborts and failures.

Every rank issues the same sequence of operations. Operation number i of a kind, its *epoch*, uses
slot i % slots of that kind's windows. The device steps write a record per epoch to every peer, and
the kernels on a device wait for these. Where the host can wait, for ranks on the CPU and for those
of one process, it does, before the launch: each rank also has a *flag* per epoch in its control
block, which its peers read, and which says that the send has been issued.

A rank that cannot take part sends an *abort* in place of data. Every epoch has both halves on every
rank: one that ended early, by an abort or by the error of a peer, is *owed* its receive step, which
follows before the next epoch of the kind is received or its slot is used again.

Where the host does not wait, ranks learn of an abort, a time-out or arguments that differ in a
later call, each rank in another one. All of them then break the group, at the same epoch of every
rank, and ``recover()`` is the way on.

A call with new arguments, and an abort, also take a *handshake* in the control block: the arguments
that must agree, or the reason of the abort. Flags repeat the arguments of the last handshake in
their slot. New windows take a second handshake, so that either all ranks use them or none.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import (
    ArgumentMismatchError,
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
    OVERRUN,
    PROBLEM_EPOCH,
    PROBLEM_RANK,
    PROBLEM_WORDS,
    SEEN,
    WANTED,
    WHAT,
)
from . import atomics
from .control_blocks import KINDS, ControlBlocks, clock
from .groups import Group
from .memory import Block, CollectiveMemory, Memory
from .peer_wait import PeerWait
from .transport import WindowSteps, capturing
from .window import PeerWindows, num_slots, union
from .window_opener import WindowOpener, mismatch, release_blocks


class Terms(NamedTuple):
    """What the ranks of an operation have to agree on, and what it needs.

    Attributes:
        text: JSON of the arguments' names and values.
        digest: CRC-32 of the text, which travels with every flag and record.
        ring: of the windows, at least.
        device: of the windows' memory.
    """

    text: str
    digest: int
    ring: Ring
    device: torch.device

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(cls, ring: Ring, device: torch.device, *arguments: tuple[str, object]) -> Terms:
        """Those of ``arguments``, pairs of names and printable values."""
        named = dict(arguments)
        if device.type != "cpu":
            named["device"] = device.type
        text = json.dumps({"arguments": named})
        return cls(text, atomics.wrap(zlib.crc32(text.encode())), ring, device)


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
        agreed: terms that these windows serve and that all ranks have agreed on.
        steps: of the last call that used the windows.
        in_flight: epochs set up and not yet torn down, oldest first.
        owed: epochs that ended early and are owed their receive step, oldest first.
    """

    last: int = 0
    windows: PeerWindows | None = None
    agreed: set[Terms] = dataclasses.field(default_factory=set)
    steps: WindowSteps | None = None
    in_flight: dict[int, EpochState] = dataclasses.field(default_factory=dict)
    owed: dict[int, EpochState] = dataclasses.field(default_factory=dict)


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
        self._control = ControlBlocks(blocks, self.rank, self.slots, pids)
        self._waits = PeerWait(group, name, self, self._control, timeout)
        self._opener = WindowOpener(group, self._control, self._waits, memory, device_memory)
        self._kinds = {kind: KindState() for kind in KINDS}
        self._agreed: set[tuple[str, str]] = set()
        self._problems: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._notices: list[tuple[np.ndarray, torch.Tensor]] = []  # their memory, and the problems
        # Whether no peer reads slot 0 of the combine windows any more.
        self._combine_slot_free = True
        self._retired: list[_MemoryOf] = []  # combine windows that callers may hold rows of
        # A dropped object leaves too: it holds descriptors, and peers may wait for it.
        self._leave = weakref.finalize(self, self._control.leave)
        self._leave.atexit = False  # peers notice the end of the process

    def last_epochs(self) -> Mapping[str, int]:
        """The epoch of the last operation of each kind that this rank has begun."""
        return {kind: state.last for kind, state in self._kinds.items()}

    @property
    def memory_name(self) -> str:
        """Where the windows are: "local", "shm", or "symm_mem" once some are on a device."""
        if self.group.in_process:
            return "local"
        devices = [state.windows.device for state in self._kinds.values() if state.windows]
        found = filter(None, map(self._opener.collective_memory, devices))
        return next((memory.name for memory in found), "shm")

    def close(self) -> None:
        """Leave the group and release the memory; peers keep their mappings."""
        for device in self._problems:
            if device.type != "cpu":  # kernels may still wait, and write to the notice
                torch.get_device_module(device).synchronize(device)
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
        self._waits.board.begin()
        state.last = epoch
        combine = self._kinds["combine"]
        state.in_flight[epoch] = EpochState(
            after_combine=None if combine.in_flight else combine.last
        )
        return epoch

    def handshake(
        self, kind: str, epoch: int, op: str, terms: Terms, steps: WindowSteps | None
    ) -> PeerWindows:
        """The windows of all ranks for a call; where its terms are new, compare all ranks'.

        Args:
            kind: of operation.
            epoch: of this call.
            op: for error messages.
            terms: of this call; windows that do not serve it are replaced.
            steps: of the call; None for a kind without records, for which hosts wait.

        Raises:
            ArgumentMismatchError: the ranks' arguments differ.
            PeerAbortError: a peer rejected its call.
            PeerTimeoutError: peers did not call.
            UnavailableError: a rank cannot allocate its windows, or open those of a peer; or a
                graph is being captured.
        """
        state = self._kinds[kind]
        if terms in state.agreed:
            self._control.post_text(kind, epoch, terms.text)
        else:
            self._agree(kind, epoch, op, terms)
            state.agreed.add(terms)
        windows = state.windows
        assert windows is not None
        operation = state.in_flight[epoch]
        operation.digest, operation.windows = terms.digest, windows
        operation.steps = state.steps = steps
        return windows

    def _agree(self, kind: str, epoch: int, op: str, terms: Terms) -> None:
        """Compare arguments that are new, and replace windows that do not serve the call."""
        state, ring, device = self._kinds[kind], terms.ring, terms.device
        known = (kind, terms.text)
        windows, own = state.windows, None
        text = terms.text
        fits = windows is not None and windows.serves(ring, device)
        if not (fits and known in self._agreed) and capturing(device):
            reason = "a graph cannot capture the first call with new arguments or larger windows"
            raise UnavailableError(op, f"{reason}; make the call once before the capture")
        if not fits:
            if windows is not None:
                ring = union(ring, windows.ring)
            own = self._opener.allocate(kind, epoch, op, ring, device)
            text = json.dumps({**json.loads(text), "window": own.handle})
        self._control.post_handshake(kind, epoch, DATA, text, "")
        if own is not None:
            blocks = self._opener.open_all(kind, epoch, op, terms.text, own)
            if kind == "combine" and windows is not None:
                self._retired.append(_MemoryOf(windows.blocks[self.rank].data))
            problem, notice = self._problem(own.data.device)
            state.windows = PeerWindows(
                blocks,
                ring,
                self.rank,
                kind=KINDS.index(kind),
                epoch=atomics.wrap(epoch - 1),
                problem=problem,
                notice=notice,
                hard=not self.host_waits(device),
            )
            state.agreed.clear()
            # All ranks have opened all of them. Each rank removes all names, so that none is left
            # if a rank dies.
            release_blocks(blocks)
        elif known not in self._agreed:
            self._opener.compare_arguments(kind, epoch, op, terms.text)
        self._agreed.add(known)

    def signal(self, kind: str, epoch: int, status: int = DATA) -> None:
        """Write this rank's flag of ``epoch``; releases what it wrote before."""
        digest = self._kinds[kind].in_flight[epoch].digest
        self._control.post_flag(kind, epoch, status, digest)

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
            SequenceError: not the oldest operation.
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
            self._waits.repaired(kind, epoch)
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
        # On a device peers that have issued their send may run it on another stream.
        return 0.0 if self.host_waits(device) and device.type == "cpu" else self.timeout

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
            self._control.post_handshake(kind, epoch, ABORT, "", reason)
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
        if self._waits.broken is None and not self._is_full(self._kinds[kind]):
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
        if self._retired:
            self._retired = [memory for memory in self._retired if not memory.is_freed]
        return (windows is not None and windows.holds(rows)) or any(
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
        """Raise when the group is broken, by a wait of the host or on a device.

        Raises:
            PeerTimeoutError, PeerAbortError, ArgumentMismatchError: for the first time, after an
                earlier call on a device.
            BrokenGroupError: the group is broken.
        """
        for notice, problem in self._notices:
            if self._waits.broken is None and notice[0]:
                self._raise_problem(op, problem.tolist())
        self._waits.raise_if_broken(op)

    def synchronize(self, op: str, device: torch.device) -> None:
        """Wait for this rank's work on a device, then ``raise_if_broken``."""
        if device.type != "cpu":
            torch.get_device_module(device).current_stream(device).synchronize()
        self.raise_if_broken(op)

    def _raise_problem(self, op: str, words: list[int]) -> None:
        """Raise what a kernel that waited has reported."""
        kind, rank, what = KINDS[words[KIND]], words[PROBLEM_RANK], words[WHAT]
        where = f"{kind} {words[PROBLEM_EPOCH]}"
        if what == LATE:
            ranks = [peer for peer in range(self.size) if peer != self.rank]
            if lost := tuple(peer for peer in ranks if self._control.is_gone(peer)):
                self._waits.give_up_lost(op, lost, where)
            self._waits.give_up_late(op, (rank,), where)
        if what == OVERRUN:
            self._raise_overrun(op, rank, words[SEEN], words[WANTED])
        self._waits.broken = f"rank {rank} sent no data ({where})"
        if rank == self.rank:
            return
        # A rank that aborts because of another one posts no reason.
        for peer in (rank, *range(self.size)):
            message = self._control.last_abort(peer, kind)
            if message is not None and peer != self.rank:
                raise PeerAbortError(op, peer, message.reason)
        epoch = words[PROBLEM_EPOCH]
        own, theirs = (self._control.handshake(r, kind, epoch) for r in (self.rank, rank))
        if own is not None and theirs is not None:
            error = mismatch(op, own.text, theirs.text, rank)
            if error is not None:
                raise error

    def _problem(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[PROBLEM_WORDS] int32 on a device and [1] in host memory, for all kinds."""
        if device not in self._problems:
            problem = torch.zeros(PROBLEM_WORDS, dtype=torch.int32, device=device)
            notice = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
            self._problems[device] = problem, notice
            self._notices.append((notice.numpy(), problem))
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
            for _ in self._arrivals(kind, op, epoch):
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

    def _wait_flags(
        self, kind: str, epoch: int, op: str, operation: EpochState
    ) -> tuple[list[float], list[int]]:
        """Wait for all flags of ``epoch``; raise on an abort whose cause is known.

        Returns:
            Seconds until each flag was posted, and the ranks whose flag is an abort.
        """
        bell, start, aborted = self._control.bell(kind, epoch), clock(), []
        if posted := atomics.load_relaxed(bell):  # not by all
            # The last flag ends this sleep, and mostly the wait.
            self._waits.pause_on(bell, posted)
        if not self._control.all_posted(kind, epoch, operation.digest):
            for flags, arrived in self._arrivals(kind, op, epoch, retry=(kind, epoch)):
                for source in arrived:
                    _, status, digest, _ = flags[source]
                    if status == ABORT or digest != operation.digest:
                        self._raise_abort_cause(kind, epoch, op, source)
                    if status == ABORT:
                        aborted.append(source)
        return self._control.seconds_until_posted(kind, epoch, start), aborted

    def _arrivals(
        self, kind: str, op: str, epoch: int, retry: tuple[str, int] | None = None
    ) -> Iterator[tuple[list[list[int]], list[int]]]:
        """Yield the flags of ``epoch`` and the ranks whose flag is new, until all are there.

        Peers' earlier writes are visible then.
        """
        missing = dict.fromkeys(range(self.size), self._control.bell(kind, epoch))
        for _ in self._waits.polls(op, kind, epoch, missing, retry):
            flags = self._control.flags(kind, epoch)
            arrived = []
            for source in missing:
                if (seen := flags[source][0]) == epoch:
                    arrived.append(source)
                elif atomics.wrap(seen - epoch) > 0:
                    self._raise_overrun(op, source, seen, epoch)
            for source in arrived:
                del missing[source]
            if arrived:
                yield flags, arrived

    def _raise_overrun(self, op: str, source: int, seen: int, epoch: int) -> None:
        """The ranks' epochs differ for good: another wait cannot repair this."""
        self._waits.broken = f"rank {source} is at operation {seen}, this rank at {epoch}"
        self._waits.retry = None
        self._waits.raise_if_broken(op)

    def _raise_abort_cause(self, kind: str, epoch: int, op: str, source: int) -> None:
        """Raise the reason of the abort of ``source``, if ``source`` caused it."""
        message = self._control.handshake(source, kind, epoch)
        if message is None:
            return
        error: MoeError | None = None
        if message.status & ABORT:
            error = PeerAbortError(op, source, message.reason)
        else:
            own = self._control.handshake(self.rank, kind, epoch)
            assert own is not None
            error = mismatch(op, own.text, message.text, source)
        if error is not None:
            self.owe(kind, epoch, read=False)
            raise error

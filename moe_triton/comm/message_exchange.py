"""All-to-alls of messages: a head and a note for the host, and a payload of any size.

    head     int64: key, bytes of the message, status, digest of the arguments, bytes of the note
             and of the payload, first byte of the payload, time sent
    note     what the host of the receiver has to know
    payload  what only its device need read

Between hosts a message travels as one piece over the ranks' own connections (``mesh``). A group of
NCCL, RCCL or HCCL demands equal sizes: there a message takes ``_RECORD`` bytes, whatever the
arguments, and payloads, with notes that do not fit, follow in a second all-to-all, which starts
when the host has read the first. So no graph can hold these operations, and all ranks must issue
all setups and teardowns, and the group's other collectives, in one order. Between hosts they may
set up a combine before or after a dispatch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..errors import (
    ArgumentMismatchError,
    BrokenGroupError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    SequenceError,
    UnavailableError,
)
from ..layout import align
from .failure_detection import FailureDetection, Verdict
from .groups import Group
from .memory import HOST
from .mesh import Incoming, Mesh
from .polling import Backoff, bounded
from .transport import capturing
from .wait_board import Deadlock, WaitBoard

KINDS = ("dispatch", "combine", "gather", "exchange")
_KEY, _TOTAL, _STATUS, _DIGEST, _NOTE, _SIZE, _FIRST, _SENT = range(8)  # words of a head
_WORDS = np.arange(8)
_HEAD = 64  # bytes of a head
_STATEMENT = slice(_STATUS, _NOTE)  # equal on all ranks where all is well
_DATA, _ABORT = 1, 2  # status
_RECORD = 1 << 14  # bytes of a message where sizes must be equal
_MORE = 1 << 62  # in the key there: a second message follows
_LOOK = 0.2  # seconds between looks for ranks that gave up
_STORE_LIMIT = 0.5  # seconds for one access to the store


@dataclasses.dataclass
class Operation:
    """One epoch of a kind.

    Attributes:
        device: of the payloads.
        heads: [W, 8] int64 for each rank.
        notes: [W] int32 arrays for each rank.
        memory: uint8 of the messages, in the host's memory: first those for the other ranks.
        starts: [W] first byte of the message for each rank in it.
        payload: uint8 memory of all payloads, to be filled before ``start``.
        firsts: [W] first byte of each payload in it.
        wait: waits for the messages until a time; returns whether they have come.
        incoming: what has come over the mesh.
        record: [W, _RECORD] uint8, what has come over the device's group.
    """

    device: torch.device
    heads: np.ndarray
    notes: Sequence[Sequence[np.ndarray]]
    memory: torch.Tensor
    starts: list[int]
    payload: torch.Tensor
    firsts: list[int]
    wait: Callable[[float], bool] = lambda _: False
    incoming: Incoming | None = None
    record: torch.Tensor | None = None

    def parts(self) -> list[torch.Tensor]:
        """[W] the payload for each rank."""
        sizes = self.heads[:, _SIZE].tolist()
        pairs = zip(self.firsts, sizes, strict=True)
        return [self.payload[first : first + size] for first, size in pairs]

    def places(self, rows: np.ndarray, counts: Sequence[int], stride: int) -> torch.Tensor:
        """Index that fills ``payload`` with rows in one gather, if all sizes are whole rows.

        Heads and notes take rows too, into which row 0 goes; ``start`` overwrites these.

        Args:
            rows: [n] rows in the order of the ranks.
            counts: [W] how many go to each.
            stride: bytes of a row.
        """
        index = np.zeros(len(self.payload) // stride, dtype=np.int64)
        begin = 0
        for first, count in zip(self.firsts, counts, strict=True):
            at = first // stride
            index[at : at + count] = rows[begin : begin + count]
            begin += count
        return torch.from_numpy(index).to(self.device)


@dataclasses.dataclass(frozen=True)
class Messages:
    """What all ranks have sent, valid until the memory is used again.

    Attributes:
        notes: int32 in the memory of the host, which holds the notes of all ranks.
        note_starts: [W] where each begins.
        data: uint8 that holds all payloads, a multiple of 16 bytes and not empty.
        starts: [W] first byte of each, a multiple of 16 where all sizes are.
        sizes: [W] their bytes.
        waited: [W] seconds waited for each rank: exact for the last one, and for the others by the
            clocks of their hosts.
    """

    notes: np.ndarray
    note_starts: np.ndarray
    data: torch.Tensor
    starts: np.ndarray
    sizes: np.ndarray
    waited: list[float]

    def payloads(self) -> list[torch.Tensor]:
        """[W] the bytes of each source."""
        pairs = zip(self.starts.tolist(), self.sizes.tolist(), strict=True)
        return [self.data[start : start + size] for start, size in pairs]

    def rows(self, stride: int) -> torch.Tensor:
        """[N, stride] overlapping rows, one at every 16 bytes."""
        count = max((len(self.data) - stride) // 16 + 1, 0)
        return self.data.as_strided((count, stride), (16, 1))


class MessageExchange:
    """One rank's end of the all-to-alls of a group.

    Args:
        op: for error messages of the constructor.
        group: the group.
        store: with keys that only the ranks of this connection use.
        name: of this object, equal on all ranks, of no other of the group.
        device_group: sends the tensors of a device; None to send them through host memory.
        in_flight: operations of a kind that may be started before the first is received.
        timeout: seconds a wait may take.

    Raises:
        PeerTimeoutError: a rank was lost while the ranks connected.
    """

    def __init__(
        self,
        op: str,
        group: Group,
        store: dist.Store,
        name: str,
        device_group: dist.ProcessGroup | None,
        *,
        in_flight: int,
        timeout: float,
    ) -> None:
        self.rank, self.size = group.rank, group.size
        self._group, self._store = group, store
        self._timeout, self._limit = timeout, in_flight
        self._broken: str | None = None
        self._mesh: Mesh | None = None
        self._epochs = dict.fromkeys(KINDS, 0)
        self._board = WaitBoard(group, name, self)
        self._in_flight: dict[str, dict[int, Operation]] = {kind: {} for kind in KINDS}
        self._undrained: dict[str, list[Operation]] = {kind: [] for kind in KINDS}
        self._buffers: dict[tuple[str, int, torch.device], torch.Tensor] = {}
        self._sent: dict[tuple[str, int], Incoming] = {}
        self._room = dict.fromkeys(KINDS, 0)  # bytes that the messages of others have taken
        self._digests: dict[str, int] = {}
        self._digested: tuple[Mapping[str, Any] | None, str, int] = (None, "", 0)
        self._failures = FailureDetection(store, self.rank, self.size, timeout)
        self._device_group = device_group
        # Where an abort before the first call of a kind meets the peers' call.
        self._devices = dict.fromkeys(KINDS, _device_of(device_group))
        if device_group is None:
            self._connect(op)

    def __del__(self) -> None:
        self.close()

    def last_epochs(self) -> Mapping[str, int]:
        """The epoch of the last operation of each kind that this rank has begun."""
        return dict(self._epochs)

    def raise_if_broken(self, op: str) -> None:
        """Raise while the group is broken."""
        if self._broken is not None:
            raise BrokenGroupError(
                op,
                f"group {self._group.name!r} is broken since a call failed ({self._broken}); "
                "call recover() on all ranks",
            )

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Take part in the next operation of a kind only to say why this rank cannot."""
        if self._broken is None and not self._is_full(kind):
            self.abort(kind, self.begin(kind, op, self._devices[kind]), error)

    def close(self) -> None:
        """Free the buffers and close the connections."""
        if self._mesh is not None:
            self._mesh.close(at_once=self._broken is not None)
        self._buffers.clear()
        self._device_group = None

    def buffer(self, role: str, epoch: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Bytes that are free again after as many operations as may be in flight."""
        key = (role, epoch % self._limit, device)
        if key not in self._buffers or self._buffers[key].numel() < num_bytes:
            self._buffers[key] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffers[key][:num_bytes]

    # One operation: begin, compose, start, receive; or begin, abort.

    def begin(self, kind: str, op: str, device: torch.device) -> int:
        """The epoch of the next operation of a kind.

        Raises:
            BrokenGroupError, SequenceError, PeerTimeoutError: it cannot begin.
            UnavailableError: a graph is being captured.
        """
        self.raise_if_broken(op)
        if capturing(device):
            problem = "a graph cannot capture the collective transport, whose sizes the host reads"
            raise UnavailableError(op, f"{problem}; use windows, or no graph")
        if self._is_full(kind):
            raise SequenceError.too_many(op, kind, self._limit)
        self._devices[kind] = device
        while self._undrained[kind]:
            operation = self._undrained[kind].pop(0)
            self._wait(op, f"{kind} {self._epochs[kind]}", operation.wait)
        self._board.begin()
        self._epochs[kind] += 1
        return self._epochs[kind]

    def _is_full(self, kind: str) -> bool:
        """Whether the next operation would use the buffers of one that is still in flight."""
        # By epochs, not by their number: those that ended early must not let others run ahead.
        oldest = next(iter(self._in_flight[kind]), None)
        return oldest is not None and self._epochs[kind] + 1 - oldest >= self._limit

    def compose(
        self,
        kind: str,
        epoch: int,
        arguments: Mapping[str, Any],
        device: torch.device,
        sizes: Sequence[int],
        notes: Sequence[Sequence[np.ndarray]] = (),
        unit: int = 16,
    ) -> Operation:
        """Make memory for the payloads to each rank.

        Args:
            kind: of operation.
            epoch: from ``begin``.
            arguments: what must be equal on all ranks, as names and printable values.
            device: of the payloads.
            sizes: [W] their bytes.
            notes: [W] int32 arrays for the host of each rank; or none.
            unit: payloads begin at multiples of this, itself a multiple of 16.
        """
        digest = self._digest(arguments, device)
        return self._compose(kind, epoch, device, (_DATA, digest), sizes, notes, unit)

    def _compose(
        self,
        kind: str,
        epoch: int,
        device: torch.device,
        statement: tuple[int, int],
        sizes: Sequence[int],
        notes: Sequence[Sequence[np.ndarray]] = (),
        unit: int = 16,
    ) -> Operation:
        by_group, inline = self._goes_by_group(device), in_host_memory(device)
        notes = notes or [()] * self.size
        note_bytes = [4 * sum(map(len, note)) for note in notes]
        key = KINDS.index(kind) << 32 | epoch
        if not by_group:
            firsts = [align(_HEAD + note, unit) for note in note_bytes]
            totals = [align(first + size, unit) for first, size in zip(firsts, sizes, strict=True)]
        else:
            fit = align(_HEAD + max(note_bytes)) <= _RECORD
            firsts = [0 if fit else align(note, unit) for note in note_bytes]
            totals, inline = [_RECORD] * self.size, False
            key |= _MORE if any(firsts) or any(sizes) else 0
        heads = np.zeros((self.size, len(_WORDS)), dtype=np.int64)
        heads[:, _KEY], heads[:, _TOTAL] = key, totals
        heads[:, _STATEMENT] = statement
        heads[:, _NOTE], heads[:, _SIZE], heads[:, _FIRST] = note_bytes, sizes, firsts

        starts, start = [0] * self.size, 0
        for rank in (*range(self.rank), *range(self.rank + 1, self.size), self.rank):
            starts[rank] = start
            start += totals[rank]
        slot = kind, epoch % self._limit
        if slot in self._sent and self._sent[slot].unsent:
            del self._buffers[kind, slot[1], HOST]  # a peer is still to read from it
        memory = self.buffer(kind, epoch, start + self._room[kind], HOST)
        if inline:
            payload = memory[:start]
            firsts = [first + at for first, at in zip(firsts, starts, strict=True)]
        else:
            ends = (heads[:, _FIRST] + heads[:, _SIZE]).cumsum()
            firsts = (ends - heads[:, _SIZE]).tolist()
            payload = self.buffer(f"{kind} payload", epoch, int(ends[-1]), device)
        heads[:, _SENT] = time.time_ns()
        return Operation(device, heads, notes, memory, starts, payload, firsts)

    def start(self, kind: str, epoch: int, operation: Operation) -> None:
        """Send what ``compose`` made, once its payload is filled; does not wait."""
        heads, notes, starts = operation.heads, operation.notes, operation.starts
        raw, by_group = operation.memory.numpy(), self._goes_by_group(operation.device)
        longs, words = raw.view(np.int64), raw.view(np.int32)
        for head, note, start in zip(heads, notes, starts, strict=True):
            longs[start // 8 : start // 8 + len(head)] = head
            if not (by_group and head[_FIRST]):
                _write(words, (start + _HEAD) // 4, note)
        if by_group:
            self._start_by_group(operation)
        else:
            if not in_host_memory(operation.device):
                for part, start, head in zip(operation.parts(), starts, heads, strict=True):
                    at = start + int(head[_FIRST])
                    operation.memory[at : at + len(part)].copy_(part)
            mesh = self._connect("connect")
            totals = heads[:, _TOTAL].tolist()
            kept = starts[self.rank] + totals[self.rank]
            incoming = operation.incoming = Incoming(operation.memory, kept, self.size)
            incoming.starts[self.rank] = starts[self.rank]
            view = raw.data
            pairs = zip(starts, totals, strict=True)
            messages = [view[start : start + total] for start, total in pairs]
            mesh.exchange(int(heads[0, _KEY]), messages, incoming)
            self._sent[kind, epoch % self._limit] = incoming
            operation.wait = functools.partial(mesh.wait, incoming)
        self._in_flight[kind][epoch] = operation

    def abort(self, kind: str, epoch: int, error: BaseException) -> None:
        """Post why this rank cannot take part, and send heads that say so."""
        reason = error.problem if isinstance(error, MoeError) else repr(error)
        self._post(_abort_key(kind, epoch, self.rank), reason)
        device, nothing = self._devices[kind], [0] * self.size
        self.start(kind, epoch, self._compose(kind, epoch, device, (_ABORT, 0), nothing))
        self._undrained[kind].append(self._in_flight[kind].pop(epoch))

    def receive(self, op: str, kind: str, epoch: int) -> Messages:
        """Wait for the messages of the oldest operation in flight, which then is over.

        Raises:
            PeerAbortError, ArgumentMismatchError: the ranks cannot do it together.
            PeerTimeoutError: a rank is lost; the group is broken.
            SequenceError: it is not the oldest operation.
        """
        oldest = next(iter(self._in_flight[kind]), None)
        if oldest != epoch:
            raise SequenceError.out_of_order(op, kind, epoch, oldest)
        operation = self._in_flight[kind][epoch]
        began = time.monotonic()
        deadline = began + self._timeout
        self._wait(op, f"{kind} {epoch}", operation.wait, deadline)
        seconds = time.monotonic() - began
        if operation.record is None:
            assert operation.incoming is not None
            data, starts = operation.incoming.memory, np.array(operation.incoming.starts)
            own_end = operation.starts[self.rank] + int(operation.heads[self.rank, _TOTAL])
            self._room[kind] = max(self._room[kind], data.numel() - own_end)
        else:
            data = operation.record.view(-1).cpu()
            starts = np.arange(self.size) * _RECORD
        raw = data.numpy()
        heads = raw.view(np.int64)[starts[:, None] // 8 + _WORDS]
        if (heads[:, _STATEMENT] != heads[self.rank, _STATEMENT]).any():
            del self._in_flight[kind][epoch]
            raise self._disagreement(op, kind, epoch, heads)
        sent = heads[:, _SENT].tolist()
        last = max(sent) - seconds * 1e9  # when the wait began, by the clock of the last rank
        waited = [min(max((one - last) * 1e-9, 0.0), seconds) for one in sent]
        if operation.record is None and not in_host_memory(operation.device):
            data = data.to(operation.device)
        messages = Messages(
            raw.view(np.int32),
            (starts + _HEAD) // 4,
            data,
            starts + heads[:, _FIRST],
            heads[:, _SIZE],
            waited,
        )
        if (heads[:, _KEY] & _MORE).any():
            messages = self._receive_by_group(op, kind, epoch, messages, heads, deadline)
        del self._in_flight[kind][epoch]
        return messages

    # Over the group of a device.

    def _goes_by_group(self, device: torch.device) -> bool:
        return self._device_group is not None and not in_host_memory(device)

    def _start_by_group(self, operation: Operation) -> None:
        # The own message, too, goes by way of the group: all splits are equal.
        records = operation.memory[: self.size * _RECORD].view(self.size, _RECORD)
        order = [start // _RECORD for start in operation.starts]
        outgoing = records[order].to(operation.device)
        operation.record = torch.empty_like(outgoing)
        work = dist.all_to_all_single(
            operation.record, outgoing, group=self._device_group, async_op=True
        )
        operation.wait = functools.partial(_wait_for, work)
        for head, note, first in zip(
            operation.heads, operation.notes, operation.firsts, strict=True
        ):
            if head[_FIRST]:  # the note did not fit
                at, words = first - int(head[_FIRST]), np.empty(head[_NOTE] // 4, dtype=np.int32)
                _write(words, 0, note)
                part = torch.from_numpy(words).view(torch.uint8)
                operation.payload[at : at + len(part)].copy_(part)

    def _receive_by_group(
        self,
        op: str,
        kind: str,
        epoch: int,
        messages: Messages,
        heads: np.ndarray,
        deadline: float,
    ) -> Messages:
        """Exchange the second messages: payloads, behind the notes that did not fit."""
        operation = self._in_flight[kind][epoch]
        own_sizes = operation.heads[:, _FIRST] + operation.heads[:, _SIZE]
        sizes = heads[:, _FIRST] + heads[:, _SIZE]
        ends = np.cumsum(sizes)
        starts, total = ends - sizes, int(ends[-1])
        data = self.buffer(f"{kind} all", epoch, max(align(total), 16), operation.device)
        work = dist.all_to_all_single(
            data[:total],
            operation.payload[: int(own_sizes.sum())],
            sizes.tolist(),
            own_sizes.tolist(),
            group=self._device_group,
            async_op=True,
        )
        wait = functools.partial(_wait_for, work)
        self._wait(op, f"the rows of {kind} {epoch}", wait, deadline)
        notes, note_starts, lengths = messages.notes, messages.note_starts, heads[:, _NOTE] // 4
        if heads[:, _FIRST].any():
            pieces = [notes[at : at + n] for at, n in zip(note_starts, lengths, strict=True)]
            for rank in heads[:, _FIRST].nonzero()[0]:
                note = data[starts[rank] : starts[rank] + heads[rank, _NOTE]]
                pieces[rank] = note.cpu().numpy().view(np.int32)
            notes, note_starts = np.concatenate(pieces), np.cumsum(lengths) - lengths
        return dataclasses.replace(
            messages,
            notes=notes,
            note_starts=note_starts,
            data=data,
            starts=starts + heads[:, _FIRST],
        )

    # Agreement.

    def _digest(self, arguments: Mapping[str, Any], device: torch.device) -> int:
        """64 bits that stand for the arguments, which the store has under them."""
        last, kind, digest = self._digested
        if last is arguments and kind == device.type:
            return digest
        text = f"{arguments!r} {device.type}"
        if text not in self._digests:
            named = arguments
            if not in_host_memory(device):
                named = {**arguments, "device": device.type}
            data = json.dumps(named)
            raw = hashlib.blake2b(data.encode(), digest_size=8).digest()
            digest = int.from_bytes(raw, "big", signed=True)
            self._post(f"arguments/{digest}", data)
            self._digests[text] = digest
        self._digested = (arguments, device.type, self._digests[text])
        return self._digests[text]

    def _disagreement(self, op: str, kind: str, epoch: int, heads: np.ndarray) -> MoeError:
        """The error of ranks that cannot do this operation together."""
        statements = heads[:, _STATEMENT].tolist()
        for rank, (status, _) in enumerate(statements):
            if status == _ABORT:
                reason = self._lookup(_abort_key(kind, epoch, rank))
                return PeerAbortError(op, rank, reason or "the store does not tell why")
        own = statements[self.rank][1]
        rank, other = next((rank, one) for rank, (_, one) in enumerate(statements) if one != own)
        texts = [self._lookup(f"arguments/{digest}") for digest in (own, other)]
        if None not in texts:
            mine, theirs = (json.loads(text or "") for text in texts)
            for name in [*mine, *theirs]:
                if mine.get(name) != theirs.get(name):
                    return ArgumentMismatchError(
                        op, name, mine.get(name), theirs.get(name), rank=rank
                    )
        return ArgumentMismatchError(op, "the arguments", own, other, rank=rank)

    def _post(self, key: str, text: str) -> None:
        """Put a text into the store; without the store, peers still learn that it is there."""
        with contextlib.suppress(TimeoutError, RuntimeError):
            bounded(lambda: self._store.set(key, text), _STORE_LIMIT)

    def _lookup(self, key: str) -> str | None:
        """What a rank put into the store before it sent its heads."""
        with contextlib.suppress(TimeoutError, RuntimeError):
            return bounded(lambda: self._store.get(key), _STORE_LIMIT).decode()
        return None

    # Connections and waits.

    def _connect(self, op: str) -> Mesh:
        """The connections between the hosts, to which all ranks come."""
        if self._mesh is None:
            try:
                self._mesh = Mesh(self._store, self.rank, self.size, self._timeout)
            except (OSError, RuntimeError) as error:
                problem = f"a rank of group {self._group.name!r} was lost while it connected"
                raise PeerTimeoutError(op, (), problem) from error
        return self._mesh

    def _wait(
        self, op: str, place: str, wait: Callable[[float], bool], deadline: float | None = None
    ) -> None:
        """Wait until messages have come; looks at times for ranks that gave up elsewhere.

        Args:
            op: for error messages.
            place: the operation, and the part of it, in words.
            wait: of the operation.
            deadline: end of the wait, by the monotonic clock; None for a whole time-out from now.

        Raises:
            PeerTimeoutError: it failed, was late, or a rank gave up; the group is broken.
        """
        began = time.monotonic()
        deadline = began + self._timeout if deadline is None else deadline
        *_, kind, number = place.split()
        cause: Exception | None = None
        deadlock: Deadlock | None = None
        late = posted = False
        while deadlock is None:
            try:
                if wait(min(deadline, time.monotonic() + _LOOK)):
                    if posted:
                        self._board.clear()
                    return
            except (OSError, RuntimeError) as error:
                cause = error
            late = cause is None and time.monotonic() >= deadline
            if late:
                break
            if not posted:
                self._board.post(kind, int(number))
                posted = True
            # First, as a peer that found out has reported too, and its post stays.
            deadlock = self._board.find_deadlock(kind, int(number), range(self.size))
            if cause is not None or self._failures.reported():
                break
        waited = time.monotonic() - began
        if deadlock is None:
            closed = set if self._mesh is None else self._mesh.closed
            verdict = self._failures.give_up(place, waited, late, closed)
        else:
            verdict = Verdict((deadlock.rank,), deadlock.problem)
            self._failures.conclude(place, waited, late, verdict)
        self._broken = verdict.problem
        self.close()
        message = f"{verdict.problem}, in group {self._group.name!r}"
        raise PeerTimeoutError(op, verdict.ranks, message) from cause


def _wait_for(work: dist.Work, until: float) -> bool:
    """Wait for a collective until a time; NCCL aborts one whose own wait times out."""
    backoff = Backoff(until - time.monotonic())
    while not work.is_completed():
        if backoff.expired:
            return False
        backoff.pause()
    work.wait()
    return True


def _write(words: np.ndarray, at: int, note: Sequence[np.ndarray]) -> None:
    """Write the parts of a note one after the other."""
    for part in note:
        words[at : at + len(part)] = part
        at += len(part)


def _abort_key(kind: str, epoch: int, rank: int) -> str:
    return f"abort/{kind}/{epoch}/{rank}"


def in_host_memory(device: torch.device) -> bool:
    """Whether sockets send and receive the tensors of a device as they are."""
    return device.type == "cpu"


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where the tensors of a group are: on its device, if it has one."""
    types = [] if group is None else [device.type for device in group._device_types]
    kind = next((name for name in types if name != "cpu"), "cpu")
    return torch.device(kind)

"""All-to-alls of messages: a head that every rank can read, and a payload of any size.

    head  status, digest of the arguments, bytes of the payload, marks, time sent, three words that
          depend on the operation; int64

Payloads begin at multiples of 16 bytes, and the bytes between them are sent too. gloo accepts
messages shorter than the memory that waits for them. Each rank waits with ``_ROOM`` bytes in all,
whatever the arguments, so neither sizes nor an agreement have to travel first, and a rank that
aborts sends heads alone. Larger payloads, and all payloads in the memory of a device, whose NCCL,
RCCL or HCCL demand exact sizes, follow in a second all-to-all, which starts when the heads have
come. On a device the host reads the heads, so no graph can hold these operations.

gloo matches collectives by the order in which a group issues them, and ranks may set up a combine
before or after a dispatch. So each kind has a gloo connection of its own, apart from the caller's
groups, and second messages have one more. On the caller's NCCL, RCCL or HCCL group all ranks must
issue all setups and teardowns, and the group's other collectives, in one order.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import datetime as dt
import functools
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

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
from .memory import HOST, on_host
from .polling import Backoff, bounded
from .transport import capturing
from .wait_board import Deadlock, WaitBoard

_Connection: TypeAlias = Any  # dist.ProcessGroup or a bare dist.ProcessGroupGloo

KINDS = ("dispatch", "combine", "gather", "exchange")
_REST = "rest"  # the connection of second messages
_STATUS, _DIGEST, NUM_BYTES, _MARKS, _SENT = range(5)  # columns of heads
WORDS = slice(5, 8)
_HEAD = 64  # bytes
_DATA, _ABORT = 1, 2  # status
_INLINE, _MORE = 1, 2  # marks: the payload follows the head; some payload of this sender does not
_ROOM = 1 << 26  # bytes for the messages of all ranks in one operation; used only where written
_FOREVER = dt.timedelta(days=1)  # teardown counts the time-out, not the collective
_LOOK = 0.2  # seconds between looks for ranks that gave up
_STORE_LIMIT = 0.5  # seconds for one access to the store


@dataclasses.dataclass
class Operation:
    """One epoch of a kind.

    Attributes:
        device: of the payloads.
        connection: carries the heads.
        heads: [W, 8] int64 for each rank.
        incoming: [W, room] messages of all ranks; the own one is in its place from the start.
        outgoing: [bytes] heads and inline payloads for the other ranks.
        splits: [W] bytes of ``outgoing`` for each rank.
        rest: [bytes] the payloads that are not inline.
        rest_splits: [W] bytes of ``rest`` for each rank.
        data: [bytes] uint8 that holds all payloads, which are to be filled before ``start``.
        starts: [W] int64 first byte of each.
        work: the collective; None before ``start``.
    """

    device: torch.device
    connection: _Connection
    heads: np.ndarray
    incoming: torch.Tensor
    outgoing: torch.Tensor
    splits: list[int]
    rest: torch.Tensor
    rest_splits: list[int]
    data: torch.Tensor
    starts: np.ndarray
    work: dist.Work | None = None

    def parts(self) -> list[torch.Tensor]:
        """[W] the payloads for each rank."""
        return _parts(self.data, self.starts, self.heads)

    def write_words(self, positions: np.ndarray, words: np.ndarray) -> None:
        """Write int32 words to payloads; positions count the words of ``data``."""
        data = self.data.view(torch.int32)
        if data.device.type == "cpu":
            data.numpy()[positions] = words
        else:
            at, values = (torch.from_numpy(array).to(data.device) for array in (positions, words))
            data.index_copy_(0, at, values)

    def write_rows(
        self, starts: np.ndarray, rows: torch.Tensor, index: np.ndarray, counts: Sequence[int]
    ) -> None:
        """Write rows to payloads.

        Args:
            starts: [W] byte of ``data`` where those for each rank begin.
            rows: [R, stride] uint8.
            index: [n] int64 rows to write, those for rank 0 first.
            counts: [W] rows for each rank.
        """
        stride = rows.shape[1]
        firsts = (np.cumsum(counts) - counts).tolist()
        spans = [span for span in zip(starts.tolist(), firsts, counts, strict=True) if span[2]]
        if self.data.device.type == "cpu":
            data, source = self.data.numpy(), rows.numpy()
            for start, first, count in spans:
                out = data[start : start + count * stride].reshape(count, stride)
                # To raise for a wrong index, numpy would copy the rows twice.
                source.take(index[first : first + count], 0, out, "clip")
        else:
            chosen = torch.from_numpy(index).to(rows.device)
            for start, first, count in spans:
                part = self.data[start : start + count * stride].view(count, stride)
                torch.index_select(rows, 0, chosen[first : first + count], out=part)


@dataclasses.dataclass(frozen=True)
class Messages:
    """The payloads of all ranks, valid until the memory is used again.

    Attributes:
        heads: [W, 8] int64 of each source.
        data: [bytes] uint8 that holds all payloads, a multiple of 16 bytes and not empty.
        starts: [W] int64 first byte of each, a multiple of 16.
        waited: [W] seconds waited for each rank: exact for the last one, and for the others by the
            clocks of their hosts.
    """

    heads: np.ndarray
    data: torch.Tensor
    starts: np.ndarray
    waited: list[float]

    def payloads(self) -> list[torch.Tensor]:
        """[W] the bytes of each source."""
        return _parts(self.data, self.starts, self.heads)

    def rows(self, stride: int) -> torch.Tensor:
        """[N, stride] overlapping rows, one at every 16 bytes."""
        count = max((len(self.data) - stride) // 16 + 1, 0)
        return self.data.as_strided((count, stride), (16, 1))

    def words(self, offsets: np.ndarray, count: int) -> np.ndarray:
        """[W, count] int32 from these bytes of each payload on; garbage after its end."""
        words = self.data.view(torch.int32)
        first = (self.starts + offsets) // 4
        # In host memory, messages of equal sizes lie evenly: a view will do.
        pitch = int(first[-1] - first[0]) // (len(first) - 1 or 1)
        even = (first == first[0] + np.arange(len(first)) * pitch).all()
        if words.device.type == "cpu" and even and first[-1] + count <= words.shape[0]:
            shape, strides = (len(first), count), (4 * pitch, 4)
            return np.ndarray(shape, np.int32, words.numpy(), 4 * int(first[0]), strides)
        index = np.minimum(first[:, None] + np.arange(count), words.shape[0] - 1)
        return on_host(words[torch.from_numpy(index).to(words.device)])


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
        self._epochs = dict.fromkeys(KINDS, 0)
        self._board = WaitBoard(group, name, self)
        self._in_flight: dict[str, dict[int, Operation]] = {kind: {} for kind in KINDS}
        self._undrained: dict[str, list[Operation]] = {kind: [] for kind in KINDS}
        self._buffers: dict[tuple[str, int, torch.device], torch.Tensor] = {}
        self._digests: dict[tuple[Any, ...], int] = {}
        self._failures = FailureDetection(store, self.rank, self.size, timeout)
        self._options = dist.AllToAllOptions()
        self._options.timeout = _FOREVER
        self._device_group = device_group
        # Where an abort before the first call of a kind meets the peers' call.
        self._devices = dict.fromkeys(KINDS, _device_of(device_group))
        self._gloo: dict[str, dist.ProcessGroupGloo] = {}
        self._works: collections.deque[dist.Work] = collections.deque(maxlen=4 * in_flight + 4)
        if device_group is None:
            for lane in (*KINDS, _REST):
                self._connect(op, lane)

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
        self._buffers.clear()
        self._disconnect()

    def buffer(self, role: str, epoch: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Bytes that are free again after as many operations as may be in flight."""
        key = (role, epoch % self._limit, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape[0] < num_bytes:
            # A quarter more, so that it grows only a few times.
            size = num_bytes if buffer is None else max(num_bytes, buffer.shape[0] * 5 // 4)
            buffer = self._buffers[key] = torch.empty(size, dtype=torch.uint8, device=device)
        return buffer[:num_bytes]

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
            self._wait(op, kind, self._epochs[kind], operation.work, operation.connection)
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
        sizes: Sequence[int] | np.ndarray,
        words: Sequence[Sequence[int] | np.ndarray] | int = 0,
    ) -> Operation:
        """Make memory for the payloads to each rank.

        Args:
            kind: of operation.
            epoch: from ``begin``.
            arguments: what must be equal on all ranks, as names and printable values.
            device: of the payloads.
            sizes: [W] their bytes.
            words: [3, W] what the heads say to each rank.
        """
        digest = self._digest(arguments, device)
        heads = self._heads(_DATA, digest, sizes)
        heads[:, WORDS] = np.asarray(words).T
        return self._compose(kind, epoch, device, heads)

    def _heads(self, status: int, digest: int, sizes: Sequence[int] | np.ndarray) -> np.ndarray:
        heads = np.zeros((self.size, _HEAD // 8), dtype=np.int64)
        heads[:, :NUM_BYTES] = status, digest
        heads[:, NUM_BYTES] = sizes
        heads[:, _SENT] = time.time_ns()
        return heads

    def _compose(self, kind: str, epoch: int, device: torch.device, heads: np.ndarray) -> Operation:
        connection, at = self._lane(kind, device)
        here = in_host_memory(device)
        host = at.type == "cpu"
        room = align(_ROOM // self.size) if host else _HEAD
        sizes = align(heads[:, NUM_BYTES])
        inline = sizes <= (room - _HEAD if here else 0)
        rest_splits = np.where(inline, 0, sizes)
        heads[:, _MARKS] = inline * _INLINE + (not inline.all()) * _MORE

        # Incoming messages, then outgoing ones, and in host memory the rest.
        splits = sizes - rest_splits + _HEAD
        splits[self.rank] = 0
        ends = splits.cumsum()
        starts = self.size * room + ends - splits
        starts[self.rank] = self.rank * room
        rest_ends = rest_splits.cumsum()
        first, rest_bytes = self.size * room, int(rest_ends[-1])
        end = first + int(ends[-1])
        memory = self.buffer(kind, epoch, end + (rest_bytes if here else 0), at)
        numbers = memory.numpy()[:end] if host else np.empty(end, dtype=np.uint8)
        numbers.view(np.int64)[(starts // 8)[:, None] + np.arange(_HEAD // 8)] = heads
        if not host:
            memory.copy_(torch.from_numpy(numbers))
        if here:
            data, rest = memory, memory[end:]
            starts = np.where(inline, starts + _HEAD, end + rest_ends - rest_splits)
        else:
            data = rest = self.buffer(f"{kind} rest", epoch, rest_bytes, device)
            starts = rest_ends - rest_splits
        return Operation(
            device,
            connection,
            heads,
            memory[:first].view(-1, room),
            memory[first:end],
            splits.tolist(),
            rest,
            rest_splits.tolist(),
            data,
            starts,
        )

    def start(self, kind: str, epoch: int, operation: Operation) -> None:
        """Send what ``compose`` made, once its payloads are filled; does not wait."""
        # The own message is in its place already, behind the room of the rank before.
        room = operation.incoming.shape[1]
        rooms, first = [room] * self.size, 0
        rooms[self.rank] = 0
        if self.rank == 0:
            first = 1
        else:
            rooms[self.rank - 1] += room
        output = operation.incoming[first:].view(-1)
        operation.work = self._all_to_all(
            operation.connection, output, operation.outgoing, rooms, operation.splits
        )
        self._in_flight[kind][epoch] = operation

    def abort(self, kind: str, epoch: int, error: BaseException) -> None:
        """Post why this rank cannot take part, and send heads that say so."""
        reason = error.problem if isinstance(error, MoeError) else repr(error)
        self._post(_abort_key(kind, epoch, self.rank), reason)
        heads = self._heads(_ABORT, 0, [0] * self.size)
        operation = self._compose(kind, epoch, self._devices[kind], heads)
        self.start(kind, epoch, operation)
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
        self._wait(op, kind, epoch, operation.work, operation.connection, deadline)
        seconds = time.monotonic() - began
        incoming, room = operation.incoming, operation.incoming.shape[1]
        heads = incoming[:, :_HEAD].cpu().numpy().view(np.int64)
        error = self._disagreement(op, kind, epoch, heads)
        if error is not None:
            del self._in_flight[kind][epoch]
            raise error
        since = seconds - (heads[:, _SENT].max() - heads[:, _SENT]) * 1e-9
        waited = since.clip(0.0, seconds).tolist()
        starts = np.arange(self.size) * room + _HEAD
        messages = Messages(heads, incoming.view(-1), starts, waited)
        if (heads[:, _MARKS] & _MORE).any():
            messages = self._receive_rest(op, kind, epoch, messages, deadline)
        del self._in_flight[kind][epoch]
        return messages

    def _receive_rest(
        self, op: str, kind: str, epoch: int, messages: Messages, deadline: float
    ) -> Messages:
        """Exchange the sized payloads, and put the inline ones behind them."""
        operation, heads = self._in_flight[kind][epoch], messages.heads
        device = operation.device
        sizes = align(heads[:, NUM_BYTES])
        inline = (heads[:, _MARKS] & _INLINE) != 0
        rest_splits, inline_sizes = np.where(inline, 0, sizes), np.where(inline, sizes, 0)
        rest = int(rest_splits.sum())
        data = self.buffer(f"{kind} all", epoch, max(int(sizes.sum()), 16), device)
        connection, at = self._lane(_REST, device)
        direct = at.type == device.type and in_host_memory(device) == (at.type == "cpu")
        output = data[:rest] if direct else torch.empty(rest, dtype=torch.uint8, device=at)
        work = self._all_to_all(
            connection, output, operation.rest.to(at), rest_splits.tolist(), operation.rest_splits
        )
        self._wait(op, kind, epoch, work, connection, deadline, part="the rows of ")
        if not direct:
            data[:rest].copy_(output)
        starts = np.where(
            inline,
            rest + inline_sizes.cumsum() - inline_sizes,
            rest_splits.cumsum() - rest_splits,
        )
        moved = dataclasses.replace(messages, data=data, starts=starts)
        pairs = [*zip(moved.payloads(), messages.payloads(), strict=True)]
        for rank in inline.nonzero()[0]:
            target, payload = pairs[rank]
            target.copy_(payload)
        return moved

    # Agreement.

    def _digest(self, arguments: Mapping[str, Any], device: torch.device) -> int:
        """64 bits that stand for the arguments, which the store has under them."""
        key = (device.type, *arguments.items())
        if key not in self._digests:
            if not in_host_memory(device):
                arguments = {**arguments, "device": device.type}
            data = json.dumps(arguments)
            raw = hashlib.blake2b(data.encode(), digest_size=8).digest()
            digest = int.from_bytes(raw, "big", signed=True)
            self._post(f"arguments/{digest}", data)
            self._digests[key] = digest
        return self._digests[key]

    def _disagreement(self, op: str, kind: str, epoch: int, heads: np.ndarray) -> MoeError | None:
        """The error of ranks that cannot do this operation together."""
        own = int(heads[self.rank, _DIGEST])
        if (heads[:, :NUM_BYTES] == (_DATA, own)).all():
            return None
        for rank, status in enumerate(heads[:, _STATUS]):
            if status == _ABORT:
                reason = self._lookup(_abort_key(kind, epoch, rank))
                return PeerAbortError(op, rank, reason or "the store does not tell why")
        for rank, digest in enumerate(heads[:, _DIGEST].tolist()):
            if digest == own:
                continue
            texts = [self._lookup(f"arguments/{one}") for one in (own, digest)]
            if None in texts:
                return ArgumentMismatchError(op, "the arguments", own, digest, rank=rank)
            mine, theirs = (json.loads(text or "") for text in texts)
            for name in [*mine, *theirs]:
                if (one := mine.get(name)) != (other := theirs.get(name)):
                    return ArgumentMismatchError(op, name, one, other, rank=rank)
        return None

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

    def _connect(self, op: str, lane: str) -> None:
        """Open one of this transport's own gloo connections; all ranks come to it."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = dt.timedelta(seconds=self._timeout)
        options._devices = [_gloo_device(os.getpid())]
        store = dist.PrefixStore(lane, self._store)
        try:
            self._gloo[lane] = dist.ProcessGroupGloo(store, self.rank, self.size, options)
        except RuntimeError as error:
            problem = f"a rank of group {self._group.name!r} was lost while it connected"
            raise PeerTimeoutError(op, (), problem) from error

    def _lane(self, lane: str, device: torch.device) -> tuple[_Connection, torch.device]:
        """What carries the messages of tensors on a device, and where it takes them from."""
        if self._device_group is not None and not in_host_memory(device):
            return self._device_group, device
        if lane not in self._gloo:
            self._connect("connect", lane)
        return self._gloo[lane], HOST

    def _all_to_all(
        self,
        connection: _Connection,
        output: torch.Tensor,
        data: torch.Tensor,
        output_splits: list[int],
        splits: list[int],
    ) -> dist.Work:
        work: dist.Work | None
        if isinstance(connection, dist.ProcessGroupGloo):
            bare: _Connection = connection
            work = bare.alltoall_base(output, data, output_splits, splits, self._options)
            self._works.append(work)
        else:
            work = dist.all_to_all_single(
                output, data, output_splits, splits, group=connection, async_op=True
            )
        assert work is not None
        return work

    def _wait(
        self,
        op: str,
        kind: str,
        epoch: int,
        work: dist.Work | None,
        connection: _Connection,
        deadline: float | None = None,
        *,
        part: str = "",
    ) -> None:
        """Wait until a collective is done; looks at times for ranks that gave up elsewhere.

        Args:
            op: for error messages.
            kind: of the operation that it belongs to.
            epoch: of that operation.
            work: the collective.
            connection: that carries it.
            deadline: end of the wait, by the monotonic clock; None for a whole time-out from now.
            part: of the operation, in words.

        Raises:
            PeerTimeoutError: it failed, was late, or a rank gave up; the group is broken.
        """
        assert work is not None
        began = time.monotonic()
        deadline = began + self._timeout if deadline is None else deadline
        cause: RuntimeError | None = None
        deadlock: Deadlock | None = None
        late = posted = False
        while cause is None and deadlock is None and not late:
            done = work.is_completed()
            try:
                _wait_once(work, connection, min(deadline, time.monotonic() + _LOOK))
                if posted:
                    self._board.clear()
                return
            except RuntimeError as error:
                if done:
                    cause = error
                elif work.is_completed():
                    continue
                elif time.monotonic() >= deadline:
                    late = True
                else:
                    if not posted:
                        self._board.post(kind, epoch)
                        posted = True
                    # First, as a peer that found out has reported too, and its post stays.
                    deadlock = self._board.find_deadlock(kind, epoch, range(self.size))
                    if deadlock is None and self._failures.reported():
                        break
        waited = time.monotonic() - began
        place = f"{part}{kind} {epoch}"
        if deadlock is None:
            verdict = self._failures.give_up(place, waited, late, lambda: self._closed(connection))
        else:
            verdict = Verdict((deadlock.rank,), deadlock.problem)
            self._failures.conclude(place, waited, late, verdict)
        self._broken = verdict.problem
        self._disconnect()
        message = f"{verdict.problem}, in group {self._group.name!r}"
        raise PeerTimeoutError(op, verdict.ranks, message) from cause

    def _closed(self, connection: _Connection) -> set[int]:
        """The ranks to which a gloo connection is closed; sending to others does not wait."""
        closed: set[int] = set()
        if isinstance(connection, dist.ProcessGroupGloo):
            bare: _Connection = connection
            for rank in range(self.size):
                if rank != self.rank:
                    try:
                        bare.send([torch.zeros(1, dtype=torch.uint8)], rank, 0)
                    except RuntimeError:
                        closed.add(rank)
        return closed

    def _disconnect(self) -> None:
        """Drop the connections, without waiting for collectives that are pending.

        The destructor of a connection does wait, so a thread keeps it until they have ended.
        """
        connections, works = [*self._gloo.values()], [*self._works]
        self._gloo.clear()
        self._works.clear()
        self._device_group = None
        works = [work for work in works if not work.is_completed()]
        if not works:
            return
        try:
            threading.Thread(target=_outlast, args=(connections, works), daemon=True).start()
        except RuntimeError:  # the interpreter ends
            for connection in connections:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


@functools.cache
def _gloo_device(pid: int) -> Any:  # noqa: ARG001 (a fork does not have its parent's thread)
    """One thread for the sockets of all connections: it wakes a hundred times a second."""
    return dist.ProcessGroupGloo.create_default_device()


def _outlast(connections: list[dist.ProcessGroupGloo], works: list[dist.Work]) -> None:
    for work in works:
        with contextlib.suppress(RuntimeError):
            work.wait()
    connections.clear()


def _wait_once(work: dist.Work, connection: _Connection, until: float) -> None:
    """Wait for a time; ``RuntimeError`` if the collective failed or is not done by then."""
    if isinstance(connection, dist.ProcessGroupGloo):
        # gloo takes a zero time-out for none at all.
        work.wait(dt.timedelta(seconds=max(until - time.monotonic(), 0.001)))
        return
    # NCCL aborts a collective whose wait times out, so ask it instead.
    backoff = Backoff(until - time.monotonic())
    while not work.is_completed():
        if backoff.expired:
            raise RuntimeError("not done yet")
        backoff.pause()
    work.wait()


def _parts(data: torch.Tensor, starts: np.ndarray, heads: np.ndarray) -> list[torch.Tensor]:
    """[W] the payloads in ``data``."""
    pairs = zip(starts.tolist(), heads[:, NUM_BYTES].tolist(), strict=True)
    return [data[start : start + size] for start, size in pairs]


def _abort_key(kind: str, epoch: int, rank: int) -> str:
    return f"abort/{kind}/{epoch}/{rank}"


def in_host_memory(device: torch.device) -> bool:
    """Whether gloo sends and receives the tensors of a device as they are."""
    return device.type == "cpu"


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where the tensors of a group are: on its device, if it has one."""
    types = [] if group is None else [device.type for device in group._device_types]
    kind = next((name for name in types if name != "cpu"), "cpu")
    return torch.device(kind)

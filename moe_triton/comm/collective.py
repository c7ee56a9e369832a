"""Dispatch and combine over torch.distributed, for ranks that share no memory.

The same steps write into a buffer laid out like a window, from which each rank is sent its headers
and the rows it wants, every row once. A setup sends a notice to every rank: the arguments that must
agree and the number of rows to come, or why this rank rejects the call. A teardown waits for all
notices and, when they agree, exchanges the rows.

Messages go rank to rank, not through one all-to-all: a rank that does not answer is known by name.
gloo sends only some dtypes, so everything travels as bytes. Notices are read on the host and always
go over gloo; rows in the memory of a device go over the group's own NCCL, RCCL or HCCL, or through
host memory where it has none.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from ..errors import (
    ArgumentMismatchError,
    BrokenGroupError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    RoutingMismatchError,
    SequenceError,
)
from ..layout import NOWHERE, DispatchHeader, RoutingPlan
from .groups import Group
from .memory import HOST
from .packing import packed_bytes, write_packed
from .polling import Backoff, ranks_text
from .row_exchange import finish_rows, receive, received_counts, rows_in_plan_order, write_tokens
from .transport import (
    Call,
    CombineEpilogue,
    CombineInput,
    DispatchInput,
    Pending,
    Received,
    outside_autograd,
    phase,
    profiled,
)
from .window import MoeConfig, header_of

# What sends and receives: torch's group, or gloo itself.
Connection: TypeAlias = "dist.ProcessGroup | dist.ProcessGroupGloo"

_T = TypeVar("_T")
_Input = TypeVar("_Input")

_HANDSHAKE_BYTES = 4096
_CLOCK_SLACK = 0.01  # seconds by which gloo, which counts milliseconds, may be early
_KINDS = ("dispatch", "combine", "gather", "exchange")


class _Staged(NamedTuple):
    """State of an operation between its phases: what goes to each rank, and a dispatch's plan."""

    parts: Sequence[torch.Tensor]
    plan: RoutingPlan | None = None


@dataclasses.dataclass
class _Operation:
    """One epoch of a kind: the notices under way.

    Attributes:
        handshakes: [W, bytes] from every rank.
        receives: their works, by rank.
        sends: works of what this rank sent, by rank.
        arguments: this rank's, None when it rejected the call.
    """

    handshakes: torch.Tensor
    receives: dict[int, dist.Work]
    sends: list[tuple[int, dist.Work]]
    arguments: Mapping[str, Any] | None


class CollectiveTransport:
    """The transport over a torch process group.

    Args:
        group: the group.
        connection: what sends and receives CPU tensors between its ranks: the group's own gloo, or
            one from ``reconnect``.
        device_group: what sends and receives the tensors of a device, or None to do it through host
            memory.
        name: sets its messages apart from those of others that use the connection, or did.
        in_flight: setups that may run ahead of teardowns.
        timeout: seconds a wait may take.
    """

    name = "collective"

    def __init__(
        self,
        group: Group,
        connection: Connection,
        device_group: dist.ProcessGroup | None,
        name: str,
        *,
        in_flight: int,
        timeout: float,
    ) -> None:
        self.group_name = group.name
        self._group = group
        self._name = name
        self._connection: Connection | None = connection
        self._device_group = device_group
        self._rank, self._size = group.rank, group.size
        self._timeout = timeout
        self._limit = in_flight
        self._broken: str | None = None
        self._epochs = dict.fromkeys(_KINDS, 0)
        self._in_flight: dict[str, dict[int, _Operation]] = {kind: {} for kind in _KINDS}
        self._undrained: dict[str, list[_Operation]] = {kind: [] for kind in _KINDS}
        self._buffers: dict[tuple[str, int, torch.device], torch.Tensor] = {}

    @outside_autograd
    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:  # noqa: ARG002
        """Compare the arguments; buffers come with the calls."""
        epoch = self._begin(kind, call.op)
        self._post_handshakes(call.op, kind, epoch, call.arguments, [0] * self._size)
        self._await_handshakes(kind, epoch, call.op)
        self._finish(kind, epoch)

    @phase("dispatch send")
    def dispatch_send(self, call: Call, tokens: DispatchInput) -> Pending[DispatchInput]:
        """Stage the tokens, each rank's once, and send the notices."""
        epoch = self._begin("dispatch", call.op)
        config, layout = call.config, call.config.dispatch
        try:
            data = self._buffer("dispatch send", epoch, layout.num_bytes, call.device)
            headers, rows = layout.headers(data), layout.rows(data)
            targets = [header_of(headers, rank) for rank in range(self._size)]
            plan, tokens = write_tokens(call, self._rank, tokens, rows, targets)
            parts = self._parts(config, headers, rows, epoch)
        except BaseException as error:
            self._give_up(call.op, "dispatch", epoch, error)
            raise
        self._post_handshakes(
            call.op, "dispatch", epoch, call.arguments, [len(part) for part in parts]
        )
        return Pending(self, call, tokens, epoch, _Staged(parts, plan))

    @phase("dispatch recv")
    def dispatch_recv(self, pending: Pending[DispatchInput]) -> Received:
        """Exchange the rows that the notices announced, and gather those of each expert."""
        call, config, epoch = pending.call, pending.call.config, pending.epoch
        assert isinstance(pending.state, _Staged)
        parts, plan = pending.state
        assert plan is not None
        layout, stride = config.dispatch, config.row_format.stride
        coming = self._await(pending, "dispatch")
        # The header of a source is one piece of memory, from its count of tokens to its weights.
        device, size = call.device, layout.rows_start
        staged = self._buffer("dispatch send", epoch, size, device).view(self._size, -1)
        received = self._buffer("dispatch headers", epoch, size, device).view(self._size, -1)
        buffer = self._buffer("dispatch receive", epoch, sum(coming) * stride, device)
        rows = buffer.view(-1, stride)
        self._transfer(
            call.op,
            self._tag("dispatch", epoch, "rows"),
            send=[list(pair) for pair in zip(staged, parts, strict=True)],
            receive=[list(pair) for pair in zip(received, rows.split(coming), strict=True)],
        )
        self._finish("dispatch", epoch)
        headers = layout.headers(received.reshape(-1))
        counts = received_counts(config, self._rank, headers).sum(0)
        wanted = self._wanted(config, headers, counts.tolist())
        # A source sent the rows this rank wants in ascending order, behind those of others.
        table = wanted.view(-1).cumsum(0).view(wanted.shape) - 1
        return receive(call, self._rank, pending.data, plan, headers, rows, table=table)

    def _parts(
        self,
        config: MoeConfig,
        headers: DispatchHeader,
        rows: torch.Tensor,
        epoch: int,
    ) -> list[torch.Tensor]:
        """The rows that each rank wants, once each, in ascending order."""
        topology = config.topology
        slot_ids = headers.counts[0].view(-1, topology.experts_per_rank).sum(1).tolist()
        counts = [0] * topology.num_shared_ranks + slot_ids
        for rank in topology.shared_ranks_of(self._rank):
            counts[rank] = int(headers.num_tokens[rank])
        wanted = self._wanted(config, headers, counts)
        index = wanted.nonzero()[:, 1]
        stride = rows.shape[1]
        num_bytes = len(index) * stride
        staged = self._buffer("dispatch rows", epoch, num_bytes, rows.device).view(-1, stride)
        torch.index_select(rows, 0, index, out=staged)
        return list(staged.split(wanted.sum(1).tolist()))

    def _wanted(
        self, config: MoeConfig, headers: DispatchHeader, counts: Iterable[int]
    ) -> torch.Tensor:
        """[W, R] whether each row is named by so many copies of each header."""
        slot_ids = headers.slot_ids
        wanted = torch.zeros(
            (self._size, config.dispatch.num_rows), dtype=torch.bool, device=slot_ids.device
        )
        for rank, count in enumerate(counts):
            wanted[rank, config.row_of(slot_ids[rank, :count])] = True
        return wanted

    @phase("combine send")
    def combine_send(self, call: Call, outputs: CombineInput) -> Pending[CombineInput]:
        """Stage the experts' rows by the rank they return to, and send the notices."""
        epoch = self._begin("combine", call.op)
        fmt = call.config.return_format
        try:
            source = outputs.recv_permutation.source
            real = (source != NOWHERE).nonzero()[:, 0]
            order = real[source[real].argsort(stable=True)]
            num_bytes = len(order) * fmt.stride
            buffer = self._buffer("combine send", epoch, num_bytes, call.device)
            staged = buffer.view(-1, fmt.stride)
            if fmt.scale_offset is None:
                torch.index_select(outputs.y, 0, order, out=fmt.payload(staged))
            else:
                call.steps.encode(outputs.y[order], fmt, staged)
            counts = torch.bincount(source[real], minlength=self._size).tolist()
        except BaseException as error:
            self._give_up(call.op, "combine", epoch, error)
            raise
        self._post_handshakes(call.op, "combine", epoch, call.arguments, counts)
        return Pending(self, call, outputs, epoch, _Staged(staged.split(counts)))

    @phase("combine recv")
    def combine_recv(self, pending: Pending[CombineInput], finish: CombineEpilogue) -> torch.Tensor:
        """Exchange the rows and sum those of each token.

        They come in the order of this rank's plan: a rank returns its experts' rows in the order in
        which it got them, and ranks follow each other as their experts do.
        """
        call, config, outputs = pending.call, pending.call.config, pending.data
        staged = pending.state
        assert isinstance(staged, _Staged)
        topology, stride = config.topology, config.return_format.stride
        coming = self._await(pending, "combine")
        num_bytes = sum(coming) * stride
        buffer = self._buffer("combine receive", pending.epoch, num_bytes, call.device)
        rows = buffer.view(-1, stride)
        # Rows of routed experts first, then those of the shared experts, which have lower ranks.
        ranks = [*range(topology.num_shared_ranks, self._size), *range(topology.num_shared_ranks)]
        parts = dict(zip(ranks, rows.split([coming[rank] for rank in ranks]), strict=True))
        self._transfer(
            call.op,
            self._tag("combine", pending.epoch, "rows"),
            send=[[part] for part in staged.parts],
            receive=[[parts[rank]] for rank in range(self._size)],
        )
        self._finish("combine", pending.epoch)
        # Only now: a peer for which all is well exchanges its rows with this rank in any case.
        self._check_returns(call, outputs, coming)
        return finish_rows(call, outputs, rows, rows_in_plan_order(config, outputs), finish)

    def _check_returns(self, call: Call, outputs: CombineInput, coming: list[int]) -> None:
        """Raise unless every rank returns as many rows as this one sent it."""
        topology = call.config.topology
        routed = outputs.plan.counts.view(-1, topology.experts_per_rank).sum(1).tolist()
        sent = [0] * topology.num_shared_ranks + routed
        for rank in topology.shared_ranks_of(self._rank):
            sent[rank] = int((outputs.expert_ids != NOWHERE).any(1).sum())
        for rank, (mine, theirs) in enumerate(zip(sent, coming, strict=True)):
            if mine != theirs:
                raise RoutingMismatchError(call.op, rank, "its experts", mine, theirs)

    @phase("gather send")
    def all_gather_send(
        self,
        call: Call,
        parts: Sequence[torch.Tensor],
        num_bytes: int,  # noqa: ARG002
    ) -> Pending[None]:
        """Stage the parts and say how long they are."""
        epoch = self._begin("gather", call.op)
        try:
            size = packed_bytes([part.numel() * part.element_size() for part in parts])
            staged = self._buffer("gather send", epoch, size, call.device)
            write_packed(staged, parts)
        except BaseException as error:
            self._give_up(call.op, "gather", epoch, error)
            raise
        self._post_handshakes(call.op, "gather", epoch, call.arguments, [size] * self._size)
        return Pending(self, call, None, epoch, _Staged([staged] * self._size))

    @phase("gather recv")
    def all_gather_recv(
        self, pending: Pending[None], consume: Callable[[list[torch.Tensor]], _T]
    ) -> _T:
        """Exchange the parts."""
        staged = pending.state
        assert isinstance(staged, _Staged)
        coming = self._await(pending, "gather")
        device = pending.call.device
        buffer = self._buffer("gather receive", pending.epoch, sum(coming), device)
        received = buffer.split(coming)
        self._transfer(
            pending.call.op,
            self._tag("gather", pending.epoch, "rows"),
            send=[[part] for part in staged.parts],
            receive=[[data] for data in received],
        )
        self._finish("gather", pending.epoch)
        return consume(list(received))

    @outside_autograd
    def output_rows(self, config: MoeConfig, num_rows: int) -> None:
        """No memory is better than any other: rows have to be sorted before they are sent."""

    @outside_autograd
    def all_to_all_v(self, op: str, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Send the number of rows with the notices, then the rows."""
        epoch = self._begin("exchange", op)
        self._post_handshakes(op, "exchange", epoch, {"op": op, "row_bytes": x.shape[1]}, counts)
        coming, _ = self._await_handshakes("exchange", epoch, op)
        received = [x.new_empty((rows, x.shape[1])) for rows in coming]
        self._transfer(
            op,
            self._tag("exchange", epoch, "rows"),
            send=[[part] for part in x.split(counts)],
            receive=[[rows] for rows in received],
        )
        self._finish("exchange", epoch)
        return [rows.reshape(-1) for rows in received]

    def window_bytes(self, kind: str) -> int:  # noqa: ARG002
        """Nothing: buffers come with the calls."""
        return 0

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Send a notice of rejection in place of data."""
        if self._broken is None and not self._is_full(kind):
            self._give_up(op, kind, self._begin(kind, op), error)

    def raise_if_broken(self, op: str) -> None:
        """Raise while the group is broken."""
        if self._broken is not None:
            raise BrokenGroupError(
                op,
                f"group {self._group.name!r} is broken since a call failed ({self._broken}); "
                "call recover() on all ranks",
            )

    def close(self) -> None:
        """Forget the buffers and the connection."""
        self._buffers.clear()
        self._connection = self._device_group = None

    def _begin(self, kind: str, op: str) -> int:
        self.raise_if_broken(op)
        if self._is_full(kind):
            raise SequenceError.too_many(op, kind, self._limit)
        while self._undrained[kind]:
            self._drain(self._undrained[kind].pop(0), op)
        self._epochs[kind] += 1
        return self._epochs[kind]

    def _is_full(self, kind: str) -> bool:
        """Whether the next setup would use the buffers of one that is still in flight."""
        # By epochs, not by their number: those that ended early must not let others run ahead.
        oldest = next(iter(self._in_flight[kind]), None)
        return oldest is not None and self._epochs[kind] + 1 - oldest >= self._limit

    def _finish(self, kind: str, epoch: int) -> None:
        del self._in_flight[kind][epoch]

    def _buffer(self, role: str, epoch: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Bytes that are free again after as many operations as may be in flight."""
        key = (role, epoch % self._limit, device)
        if key not in self._buffers or self._buffers[key].numel() < num_bytes:
            self._buffers[key] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffers[key][:num_bytes]

    def _tag(self, kind: str, epoch: int, what: str) -> int:
        # Messages of an operation that was given up may never be received: no other may have
        # their tag. It has 31 bits.
        return zlib.crc32(f"{self._name}/{kind}/{epoch}/{what}".encode()) >> 1

    def _post_handshakes(
        self, op: str, kind: str, epoch: int, arguments: Mapping[str, Any], rows: list[int]
    ) -> None:
        """Send every rank the arguments and the number of rows it will get."""
        self._post(op, kind, epoch, [{"arguments": arguments, "rows": n} for n in rows], arguments)

    def _give_up(self, op: str, kind: str, epoch: int, error: BaseException) -> None:
        """Send every rank the reason why nothing will come."""
        reason = error.problem if isinstance(error, MoeError) else repr(error)
        handshake = {"rejected": reason[: _HANDSHAKE_BYTES // 8]}
        self._post(op, kind, epoch, [handshake] * self._size, None)
        self._undrained[kind].append(self._in_flight[kind].pop(epoch))

    def _post(
        self,
        op: str,
        kind: str,
        epoch: int,
        handshakes: list[dict[str, Any]],
        arguments: Mapping[str, Any] | None,
    ) -> None:
        tag = self._tag(kind, epoch, "handshake")
        incoming = torch.empty((self._size, _HANDSHAKE_BYTES), dtype=torch.uint8)
        outgoing = [
            torch.frombuffer(
                bytearray(json.dumps(handshake).encode().ljust(_HANDSHAKE_BYTES)), dtype=torch.uint8
            )
            for handshake in handshakes
        ]
        incoming[self._rank] = outgoing[self._rank]
        peers = [rank for rank in range(self._size) if rank != self._rank]
        sends = self._start(op, [("send", rank, outgoing[rank]) for rank in peers], tag)
        receives = self._start(op, [("receive", rank, incoming[rank]) for rank in peers], tag)
        self._in_flight[kind][epoch] = _Operation(incoming, dict(receives), sends, arguments)

    def _start(
        self, op: str, transfers: list[tuple[str, int, torch.Tensor]], tag: int
    ) -> list[tuple[int, dist.Work]]:
        """Start to send to and receive from other ranks.

        Args:
            op: for error messages.
            transfers: "send" or "receive", the other rank and contiguous bytes.
            tag: tells messages between two ranks apart, beside their order.

        Returns:
            Rank and work of each.

        Raises:
            PeerTimeoutError: a rank is gone.
        """
        works: list[tuple[int, dist.Work]] = []
        failures: dict[int, RuntimeError] = {}
        group: Any = self._connection  # torch's functions take a bare gloo as well
        for action, rank, data in transfers:
            # The others must get their part all the same: they name the rank that is gone, and
            # would else name this one.
            try:
                if action == "send":
                    work = dist.isend(data, group=group, group_dst=rank, tag=tag)
                else:
                    work = dist.irecv(data, group=group, group_src=rank, tag=tag)
            except RuntimeError as error:
                failures[rank] = error
            else:
                assert work is not None
                works.append((rank, work))
        if failures:
            problem = f"the connection to {ranks_text([*failures])} is gone"
            self._break(op, tuple(failures), problem, next(iter(failures.values())))
        return works

    def _drain(self, operation: _Operation, op: str) -> list[float]:
        """Wait for all notices of an operation, one by one; returns the seconds that each took."""
        backoff = Backoff(self._timeout)
        waited = [0.0] * self._size
        while operation.receives:
            rank = next(iter(operation.receives))
            start = backoff.remaining
            self._wait(operation.receives[rank], rank, op, backoff)
            waited[rank] = start - backoff.remaining
            del operation.receives[rank]
        while operation.sends:
            rank, work = operation.sends[0]
            self._wait(work, rank, op, backoff)
            operation.sends.pop(0)
        return waited

    def _await(self, pending: Pending[_Input], kind: str) -> list[int]:
        """The rows that each rank is going to send; notes how long that took to learn."""
        op = pending.call.op
        with profiled(op, f"{kind} wait", self.group_name):
            coming, pending.waited = self._await_handshakes(kind, pending.epoch, op)
        return coming

    def _await_handshakes(self, kind: str, epoch: int, op: str) -> tuple[list[int], list[float]]:
        """Wait for all notices of the oldest operation in flight, and compare them.

        Returns:
            The rows that each rank is going to send, and the seconds until each said so.
        """
        oldest = next(iter(self._in_flight[kind]), None)
        if oldest != epoch:
            raise SequenceError.out_of_order(op, kind, epoch, oldest)
        operation = self._in_flight[kind][epoch]
        waited = self._drain(operation, op)
        handshakes = [json.loads(bytes(raw.numpy())) for raw in operation.handshakes]
        own = handshakes[self._rank]["arguments"]
        error: MoeError | None = None
        for rank, handshake in enumerate(handshakes):
            if "rejected" in handshake:
                error = PeerAbortError(op, rank, handshake["rejected"])
                break
            differing = [
                name
                for name in [*own, *handshake["arguments"]]
                if own.get(name) != handshake["arguments"].get(name)
            ]
            if differing and error is None:
                name = differing[0]
                mine, theirs = own.get(name), handshake["arguments"].get(name)
                error = ArgumentMismatchError(op, name, mine, theirs, rank=rank)
        if error is not None:
            self._finish(kind, epoch)
            raise error
        return [handshake["rows"] for handshake in handshakes], waited

    def _transfer(
        self,
        op: str,
        tag: int,
        send: list[list[torch.Tensor]],
        receive: list[list[torch.Tensor]],
    ) -> None:
        """Move tensors, some to and some from each rank, all contiguous."""
        # Each rank starts with its neighbour, so that not all of them serve rank 0 first.
        steps = range(1, self._size)
        recv_permutation = [(self._rank - step) % self._size for step in steps]
        targets = [(self._rank + step) % self._size for step in steps]
        transfers = [("receive", rank, data) for rank in recv_permutation for data in receive[rank]]
        transfers += [("send", rank, data) for rank in targets for data in send[rank]]
        transfers = [(action, rank, _as_bytes(data)) for action, rank, data in transfers]
        transfers = [transfer for transfer in transfers if len(transfer[2])]
        for own, data in zip(receive[self._rank], send[self._rank], strict=True):
            own.copy_(data)
        if in_host_memory(send[self._rank][0]):
            self._transfer_bytes(op, tag, transfers)
        elif self._device_group is not None:
            self._transfer_on_device(self._device_group, transfers)
        else:
            self._transfer_through_host(op, tag, transfers)

    def _transfer_bytes(
        self, op: str, tag: int, transfers: list[tuple[str, int, torch.Tensor]]
    ) -> None:
        backoff = Backoff(self._timeout)
        for rank, work in self._start(op, transfers, tag):
            self._wait(work, rank, op, backoff)

    def _transfer_on_device(
        self, group: dist.ProcessGroup, transfers: list[tuple[str, int, torch.Tensor]]
    ) -> None:
        """Through NCCL, RCCL or HCCL, which have no tags and keep the order between two ranks.

        The notices have come, so that all ranks are here.
        """
        if not transfers:
            return
        actions = {"send": dist.isend, "receive": dist.irecv}
        batch = [
            dist.P2POp(actions[action], data, dist.get_global_rank(group, rank), group)
            for action, rank, data in transfers
        ]
        for work in dist.batch_isend_irecv(batch):
            work.wait()

    def _transfer_through_host(
        self, op: str, tag: int, transfers: list[tuple[str, int, torch.Tensor]]
    ) -> None:
        staged = [
            (action, rank, data.cpu() if action == "send" else torch.empty_like(data, device=HOST))
            for action, rank, data in transfers
        ]
        self._transfer_bytes(op, tag, staged)
        for (action, _, data), (_, _, copy) in zip(transfers, staged, strict=True):
            if action == "receive":
                data.copy_(copy)

    def _wait(self, work: dist.Work, rank: int, op: str, backoff: Backoff) -> None:
        # gloo takes a zero timeout for none at all.
        remaining = dt.timedelta(seconds=max(backoff.remaining, 0.001))
        try:
            work.wait(remaining)
        except RuntimeError as error:
            problem = f"the connection to rank {rank} is gone"
            if backoff.remaining < _CLOCK_SLACK:
                problem = f"rank {rank} did not come within {self._timeout:g} s"
            self._break(op, (rank,), problem, error)

    def _break(
        self, op: str, ranks: tuple[int, ...], problem: str, cause: RuntimeError
    ) -> NoReturn:
        self._broken = problem
        message = f"{problem}, in group {self._group.name!r}"
        raise PeerTimeoutError(op, ranks, message) from cause


def in_host_memory(data: torch.Tensor) -> bool:
    """Whether gloo sends and receives a tensor as it is."""
    return data.device.type == "cpu"


def _as_bytes(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8).reshape(-1)


def only_on_device(group: Group) -> bool:
    """Whether the group's own torch process group sends the tensors of a device alone."""
    made_by_torch = group.process_group is not None
    return made_by_torch and device_group(group) is not None and not has_gloo(group)


def has_gloo(group: Group) -> bool:
    """Whether the group's own torch process group sends CPU tensors."""
    assert group.process_group is not None
    # One name for all devices, or "cpu:gloo,cuda:nccl".
    backends = dist.get_backend_config(group.process_group).split(",")
    return any(name in ("gloo", "cpu:gloo") for name in backends)


def device_group(group: Group) -> dist.ProcessGroup | None:
    """The group's own torch process group, if it sends the tensors of a device."""
    assert group.process_group is not None
    backends = dist.get_backend_config(group.process_group).split(",")
    vendors = ("nccl", "hccl", "xccl")
    found = any(name.rpartition(":")[2] in vendors for name in backends)
    return group.process_group if found else None


def reconnect(op: str, group: Group, store: dist.Store, timeout: float) -> Connection:
    """A connection of the same ranks to use after the torch process group has failed.

    torch.distributed does not hear of it: what else uses the process group has to make its own.

    Args:
        op: for error messages.
        group: the group.
        store: with keys that nobody has used.
        timeout: seconds that the ranks may take to come.

    Raises:
        PeerTimeoutError: a rank did not come.
    """
    limit = dt.timedelta(seconds=timeout)
    try:
        return dist.ProcessGroupGloo(store, group.rank, group.size, limit)
    except RuntimeError as error:
        problem = f"a rank of group {group.name!r} was lost while it connected"
        raise PeerTimeoutError(op, (), problem) from error

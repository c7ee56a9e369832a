"""Dispatch and combine over torch.distributed, for ranks that share no memory.

The same steps write into a buffer laid out like a window, from which each rank is sent its headers
and the rows it wants, every row once. A setup sends a notice to every rank: the arguments that must
agree and the number of rows to come, or why this rank rejects the call. A teardown waits for all
notices and, when they agree, exchanges the rows.

Messages go rank to rank, not through one all-to-all: a rank that does not answer is known by name.
gloo sends only some dtypes, so everything travels as bytes.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..errors import (
    ArgumentMismatchError,
    BrokenGroupError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    UnavailableError,
)
from ..layout import DispatchHeader
from .groups import Group
from .transport import (
    Call,
    Outputs,
    Pending,
    Received,
    Tokens,
    outside_autograd,
    push_tokens,
    receive,
    reduce_rows,
    rows_in_plan_order,
)
from .waiting import Waiter
from .window import MoeConfig, header_of

_NOTICE_BYTES = 4096
_KINDS = ("dispatch", "combine", "exchange")


@dataclasses.dataclass
class _Operation:
    """One epoch of a kind: the notices under way.

    Attributes:
        notices: [W, bytes] from every rank.
        receives: their works, by rank.
        sends: works of what this rank sent, by rank.
        arguments: this rank's, None when it rejected the call.
    """

    notices: torch.Tensor
    receives: dict[int, dist.Work]
    sends: list[tuple[int, dist.Work]]
    arguments: Mapping[str, Any] | None


class CollectiveTransport:
    """The transport over a torch process group whose back end moves CPU tensors.

    Args:
        group: must have a process group.
        in_flight: setups that may run ahead of teardowns.
        timeout: seconds a wait may take.
    """

    name = "collective"

    def __init__(self, group: Group, *, in_flight: int, timeout: float) -> None:
        assert group.process_group is not None
        backend = dist.get_backend(group.process_group)
        if "gloo" not in backend:
            raise UnavailableError(
                "collective transport",
                f"the process group must have a gloo back end for CPU tensors, got {backend!r}",
            )
        self._group = group
        self._process_group = group.process_group
        self._rank, self._size = group.rank, group.size
        self._timeout = timeout
        self._limit = in_flight
        self._broken: str | None = None
        self._epochs = dict.fromkeys(_KINDS, 0)
        self._in_flight: dict[str, dict[int, _Operation]] = {kind: {} for kind in _KINDS}
        self._debts: dict[str, list[_Operation]] = {kind: [] for kind in _KINDS}
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    @outside_autograd
    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:  # noqa: ARG002
        """Compare the arguments; buffers come with the calls."""
        epoch = self._begin(kind, call.op)
        self._notify(kind, epoch, call.arguments, [0] * self._size)
        self._await_notices(kind, epoch, call.op)
        self._finish(kind, epoch)

    @outside_autograd
    def dispatch_setup(self, call: Call, tokens: Tokens) -> Pending:
        """Stage the tokens, each rank's once, and send the notices."""
        epoch = self._begin("dispatch", call.op)
        config, layout = call.config, call.config.dispatch
        try:
            data = self._buffer("dispatch send", epoch, layout.num_bytes)
            headers, rows = layout.headers(data), layout.rows(data)
            targets = [header_of(headers, rank) for rank in range(self._size)]
            plan = push_tokens(call, self._rank, tokens, rows, targets)
            parts = self._parts(config, tokens, headers, rows, epoch)
        except BaseException as error:
            self._give_up("dispatch", epoch, error)
            raise
        self._notify("dispatch", epoch, call.arguments, [len(part) for part in parts])
        return Pending(call, tokens, epoch, (plan, parts))

    @outside_autograd
    def dispatch_teardown(self, pending: Pending) -> Received:
        """Exchange the rows that the notices announced, and gather those of each expert."""
        call, config, epoch = pending.call, pending.call.config, pending.epoch
        plan, parts = pending.state
        layout, stride = config.dispatch, config.row_format.stride
        coming = self._await_notices("dispatch", epoch, call.op)
        # The header of a source is one piece of memory, from its count of tokens to its weights.
        staged = self._buffer("dispatch send", epoch, layout.rows_start).view(self._size, -1)
        received = self._buffer("dispatch headers", epoch, layout.rows_start).view(self._size, -1)
        rows = self._buffer("dispatch receive", epoch, sum(coming) * stride).view(-1, stride)
        self._transfer(
            call.op,
            send=[list(pair) for pair in zip(staged, parts, strict=True)],
            receive=[list(pair) for pair in zip(received, rows.split(coming), strict=True)],
        )
        self._finish("dispatch", epoch)
        headers = layout.headers(received.reshape(-1))
        first = torch.tensor([0, *coming]).cumsum(0)

        def locate(source: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # A source sent the rows this rank wants in ascending order: find each one's place.
            wanted = torch.zeros((self._size, layout.num_rows), dtype=torch.bool)
            wanted[source, row.long()] = True
            place = wanted.cumsum(1) - 1
            return rows, first[source] + place[source, row.long()]

        return receive(call, self._rank, pending.data, plan, headers, locate)

    def _parts(
        self,
        config: MoeConfig,
        tokens: Tokens,
        headers: DispatchHeader,
        rows: torch.Tensor,
        epoch: int,
    ) -> list[torch.Tensor]:
        """The rows that each rank wants, once each, in ascending order."""
        topology = config.topology
        copies = headers.counts[0].view(-1, topology.experts_per_rank).sum(1).tolist()
        counts = [0] * topology.num_shared_ranks + copies
        for rank in topology.shared_ranks_of(self._rank):
            counts[rank] = len(tokens.x)
        wanted = torch.zeros((self._size, len(rows)), dtype=torch.bool)
        for rank, count in enumerate(counts):
            wanted[rank, headers.slots[rank, :count].long()] = True
        index = wanted.nonzero()[:, 1]
        stride = rows.shape[1]
        staged = self._buffer("dispatch rows", epoch, len(index) * stride).view(-1, stride)
        torch.index_select(rows, 0, index, out=staged)
        return list(staged.split(wanted.sum(1).tolist()))

    @outside_autograd
    def combine_setup(self, call: Call, outputs: Outputs) -> Pending:
        """Stage the experts' rows by the rank they return to, and send the notices."""
        epoch = self._begin("combine", call.op)
        config = call.config
        try:
            source = outputs.sources.source
            num_bytes = len(source) * config.hidden * config.dtype.itemsize
            staged = self._buffer("combine send", epoch, num_bytes).view(config.dtype)
            staged = staged.view(-1, config.hidden)
            torch.index_select(outputs.y, 0, source.argsort(stable=True), out=staged)
            counts = torch.bincount(source, minlength=self._size).tolist()
        except BaseException as error:
            self._give_up("combine", epoch, error)
            raise
        self._notify("combine", epoch, call.arguments, counts)
        return Pending(call, outputs, epoch, staged.split(counts))

    @outside_autograd
    def combine_teardown(self, pending: Pending, addend: torch.Tensor | None) -> torch.Tensor:
        """Exchange the rows and sum those of each token.

        They come in the order of this rank's plan: a rank returns its experts' rows in the order in
        which it got them, and ranks follow each other as their experts do.
        """
        call, config, outputs = pending.call, pending.call.config, pending.data
        topology = config.topology
        coming = self._await_notices("combine", pending.epoch, call.op)
        num_bytes = sum(coming) * config.hidden * config.dtype.itemsize
        rows = self._buffer("combine receive", pending.epoch, num_bytes).view(config.dtype)
        rows = rows.view(-1, config.hidden)
        # Rows of routed experts first, then those of the shared experts, which have lower ranks.
        ranks = [*range(topology.num_shared_ranks, self._size), *range(topology.num_shared_ranks)]
        parts = dict(zip(ranks, rows.split([coming[rank] for rank in ranks]), strict=True))
        self._transfer(
            call.op,
            send=[[part] for part in pending.state],
            receive=[[parts[rank]] for rank in range(self._size)],
        )
        self._finish("combine", pending.epoch)
        return reduce_rows(call, outputs, rows, rows_in_plan_order(config, outputs), addend)

    @outside_autograd
    def output_rows(self, config: MoeConfig, num_rows: int) -> None:
        """No memory is better than any other: rows have to be sorted before they are sent."""

    @outside_autograd
    def all_to_all_v(self, op: str, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Send the number of rows with the notices, then the rows."""
        epoch = self._begin("exchange", op)
        self._notify("exchange", epoch, {"op": op, "row_bytes": x.shape[1]}, counts)
        coming = self._await_notices("exchange", epoch, op)
        received = [x.new_empty((rows, x.shape[1])) for rows in coming]
        self._transfer(op, [[part] for part in x.split(counts)], [[rows] for rows in received])
        self._finish("exchange", epoch)
        return [rows.reshape(-1) for rows in received]

    def reject(self, kind: str, op: str, error: MoeError) -> None:
        """Send a notice of rejection in place of data."""
        if self._broken is None and not self._is_full(kind):
            self._give_up(kind, self._begin(kind, op), error)

    def raise_if_broken(self, op: str) -> None:
        """Raise while the group is broken."""
        if self._broken is not None:
            raise BrokenGroupError(
                op,
                f"group {self._group.name!r} is broken since a call failed ({self._broken}); "
                "call recover() on all ranks",
            )

    def close(self) -> None:
        """Forget the buffers; the process group is its maker's."""
        self._buffers.clear()

    def _begin(self, kind: str, op: str) -> int:
        self.raise_if_broken(op)
        if self._is_full(kind):
            raise MoeError(
                op,
                f"at most {self._limit} {kind} operations may be in flight, and one more was set "
                "up; tear one down first, or ask for more with in_flight",
            )
        while self._debts[kind]:
            self._settle(self._debts[kind].pop(0), op)
        self._epochs[kind] += 1
        return self._epochs[kind]

    def _is_full(self, kind: str) -> bool:
        """Whether the next setup would use the buffers of one that is still in flight."""
        # By epochs, not by their number: those that ended early must not let others run ahead.
        oldest = next(iter(self._in_flight[kind]), None)
        return oldest is not None and self._epochs[kind] + 1 - oldest >= self._limit

    def _finish(self, kind: str, epoch: int) -> None:
        del self._in_flight[kind][epoch]

    def _buffer(self, role: str, epoch: int, num_bytes: int) -> torch.Tensor:
        """Bytes that are free again after as many operations as may be in flight."""
        key = (role, epoch % self._limit)
        if key not in self._buffers or self._buffers[key].numel() < num_bytes:
            self._buffers[key] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffers[key][:num_bytes]

    def _tag(self, kind: str, epoch: int) -> int:
        return (epoch * len(_KINDS) + _KINDS.index(kind)) % 2**30

    def _notify(self, kind: str, epoch: int, arguments: Mapping[str, Any], rows: list[int]) -> None:
        """Send every rank the arguments and the number of rows it will get."""
        self._post(kind, epoch, [{"arguments": arguments, "rows": n} for n in rows], arguments)

    def _give_up(self, kind: str, epoch: int, error: BaseException) -> None:
        """Send every rank the reason why nothing will come."""
        reason = error.problem if isinstance(error, MoeError) else repr(error)
        notice = {"rejected": reason[: _NOTICE_BYTES // 8]}
        self._post(kind, epoch, [notice] * self._size, None)
        self._debts[kind].append(self._in_flight[kind].pop(epoch))

    def _post(
        self,
        kind: str,
        epoch: int,
        notices: list[dict[str, Any]],
        arguments: Mapping[str, Any] | None,
    ) -> None:
        tag = self._tag(kind, epoch)
        incoming = torch.empty((self._size, _NOTICE_BYTES), dtype=torch.uint8)
        operation = _Operation(incoming, {}, [], arguments)
        for rank, notice in enumerate(notices):
            raw = json.dumps(notice).encode().ljust(_NOTICE_BYTES)
            outgoing = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            if rank == self._rank:
                incoming[rank] = outgoing
                continue
            operation.sends.append((rank, self._send(outgoing, rank, tag)))
            operation.receives[rank] = self._receive(incoming[rank], rank, tag)
        self._in_flight[kind][epoch] = operation

    def _send(self, data: torch.Tensor, rank: int, tag: int = 0) -> dist.Work:
        work = dist.isend(data, group=self._process_group, group_dst=rank, tag=tag)
        assert work is not None
        return work

    def _receive(self, data: torch.Tensor, rank: int, tag: int = 0) -> dist.Work:
        work = dist.irecv(data, group=self._process_group, group_src=rank, tag=tag)
        assert work is not None
        return work

    def _settle(self, operation: _Operation, op: str) -> None:
        """Wait for all notices of an operation."""
        waiter = Waiter(self._timeout)
        while operation.receives:
            rank = next(iter(operation.receives))
            self._wait(operation.receives[rank], rank, op, waiter)
            del operation.receives[rank]
        while operation.sends:
            rank, work = operation.sends[0]
            self._wait(work, rank, op, waiter)
            operation.sends.pop(0)

    def _await_notices(self, kind: str, epoch: int, op: str) -> list[int]:
        """Wait for all notices of the oldest operation in flight, and compare them.

        Returns:
            The rows that each rank is going to send.
        """
        if next(iter(self._in_flight[kind]), None) != epoch:
            raise MoeError(op, f"{kind} operations must be torn down in the order of their setup")
        operation = self._in_flight[kind][epoch]
        self._settle(operation, op)
        notices = [json.loads(bytes(raw.numpy())) for raw in operation.notices]
        own = notices[self._rank]["arguments"]
        error: MoeError | None = None
        for rank, notice in enumerate(notices):
            if "rejected" in notice:
                error = PeerAbortError(op, rank, notice["rejected"])
                break
            differing = [
                name
                for name in [*own, *notice["arguments"]]
                if own.get(name) != notice["arguments"].get(name)
            ]
            if differing and error is None:
                name = differing[0]
                mine, theirs = own.get(name), notice["arguments"].get(name)
                error = ArgumentMismatchError(op, name, mine, theirs, rank=rank)
        if error is not None:
            self._finish(kind, epoch)
            raise error
        return [notice["rows"] for notice in notices]

    def _transfer(
        self, op: str, send: list[list[torch.Tensor]], receive: list[list[torch.Tensor]]
    ) -> None:
        """Move tensors, some to and some from each rank, all contiguous."""
        waiter = Waiter(self._timeout)
        works: list[tuple[int, dist.Work]] = []
        for step in range(1, self._size):
            source = (self._rank - step) % self._size
            works += [
                (source, self._receive(_as_bytes(data), source))
                for data in receive[source]
                if data.numel()
            ]
        for step in range(1, self._size):
            target = (self._rank + step) % self._size
            works += [
                (target, self._send(_as_bytes(data), target))
                for data in send[target]
                if data.numel()
            ]
        for own, data in zip(receive[self._rank], send[self._rank], strict=True):
            own.copy_(data)
        for rank, work in works:
            self._wait(work, rank, op, waiter)

    def _wait(self, work: dist.Work, rank: int, op: str, waiter: Waiter) -> None:
        # gloo takes a zero timeout for none at all.
        remaining = dt.timedelta(seconds=max(waiter.remaining, 0.001))
        try:
            work.wait(remaining)
        except RuntimeError as error:
            if waiter.expired:
                self._broken = f"rank {rank} did not come within {self._timeout:g} s"
            else:
                self._broken = f"the connection to rank {rank} is gone"
            raise PeerTimeoutError(
                op, (rank,), f"{self._broken}, in group {self._group.name!r}"
            ) from error


def _as_bytes(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8).reshape(-1)


def reconnect(group: Group, timeout: float) -> Group:
    """The same ranks in a process group of their own, after the old one failed."""
    assert group.process_group is not None
    ranks = dist.get_process_group_ranks(group.process_group)
    fresh = dist.new_group(
        ranks,
        timeout=dt.timedelta(seconds=timeout),
        backend="gloo",
        use_local_synchronization=True,
    )
    return dataclasses.replace(group, process_group=fresh)

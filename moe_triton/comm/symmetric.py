"""Dispatch and combine over shared memory: ranks write rows, signal with flags, and peers read.

The memory may be that of a device on which all ranks of a process work in one stream. There a flag
says that the writes have been issued; the reads are issued after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from ..errors import ArgumentValueError, MoeError
from ..layout import RoutingPlan
from .packing import write_packed
from .ring_protocol import RingProtocol
from .row_exchange import (
    check_overflow,
    check_returns,
    finish_rows,
    receive,
    received_counts,
    returned_rows,
    row_count,
    write_tokens,
)
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
from .window import MoeConfig, PeerWindows, header_of

_T = TypeVar("_T")
_Input = TypeVar("_Input")


class _Dispatched(NamedTuple):
    """State of a dispatch between its phases."""

    plan: RoutingPlan
    windows: PeerWindows


class SymmetricTransport:
    """The transport "local" or "shm": windows that all ranks of the group read and write."""

    def __init__(self, protocol: RingProtocol) -> None:
        self.name = "local" if protocol.group.in_process else "shm"
        self.group_name = protocol.group.name
        self._protocol = protocol
        self._rank = protocol.rank

    @outside_autograd
    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:
        """Allocate the windows of ``kind`` by an operation without data."""
        epoch = self._protocol.acquire(kind, call.op)
        try:
            self._protocol.handshake(kind, epoch, call.op, call.arguments, slot_bytes, call.device)
        except BaseException as error:
            self._protocol.abort(kind, epoch, error)
            raise
        self._protocol.signal(kind, epoch)
        self._protocol.wait(kind, epoch, call.op)
        self._protocol.release(kind, epoch)

    @phase("dispatch send")
    def dispatch_send(self, call: Call, tokens: DispatchInput) -> Pending[DispatchInput]:
        """Write the tokens and their headers; waits for peers only while arguments are new."""
        protocol, layout = self._protocol, call.config.dispatch
        epoch = protocol.acquire("dispatch", call.op)
        slot = protocol.slot(epoch)
        try:
            windows = protocol.handshake(
                "dispatch", epoch, call.op, call.arguments, layout.num_bytes, call.device
            )
            headers = [
                header_of(windows.view(owner, slot, layout, layout.headers), self._rank)
                for owner in range(protocol.size)
            ]
            rows = windows.view(self._rank, slot, layout, layout.rows)
            plan, tokens = write_tokens(call, self._rank, tokens, rows, headers)
        except BaseException as error:
            protocol.abort("dispatch", epoch, error)
            raise
        protocol.signal("dispatch", epoch)
        return Pending(self, call, tokens, epoch, _Dispatched(plan, windows))

    @phase("dispatch recv")
    def dispatch_recv(self, pending: Pending[DispatchInput]) -> Received:
        """Wait for all ranks' tokens and gather those for this rank."""
        protocol, call, layout = self._protocol, pending.call, pending.call.config.dispatch
        assert isinstance(pending.state, _Dispatched)
        plan, windows = pending.state
        self._wait("dispatch", pending)
        slot, stride = protocol.slot(pending.epoch), call.config.row_format.stride
        try:
            headers = windows.view(self._rank, slot, layout, layout.headers)
            global_rows = windows.global_rows(slot, layout.rows_start, stride)
            config, rank = call.config, self._rank
            check_overflow(call, lambda rank: received_counts(config, rank, headers))
            counts = received_counts(config, rank, headers)
            lists = headers.slot_ids, headers.weights
            tokens, rows = pending.data, global_rows._asdict()
            return receive(call, rank, tokens, plan, counts, *lists, **rows)
        finally:
            protocol.release("dispatch", pending.epoch)

    @phase("combine send")
    def combine_send(self, call: Call, outputs: CombineInput) -> Pending[CombineInput]:
        """Write the experts' rows, unless they are in the window already, and the group starts."""
        protocol, layout = self._protocol, call.config.combine
        epoch = protocol.acquire("combine", call.op)
        slot = protocol.slot(epoch)
        try:
            windows = protocol.handshake(
                "combine", epoch, call.op, call.arguments, layout.num_bytes, call.device
            )
            rows = windows.view(self._rank, slot, layout, layout.rows)
            self._put_rows(call, windows, rows, outputs)
            group_starts = outputs.recv_permutation.group_starts
            windows.view(self._rank, slot, layout, layout.group_starts)[: len(group_starts)] = (
                group_starts
            )
        except BaseException as error:
            protocol.abort("combine", epoch, error)
            raise
        protocol.signal("combine", epoch)
        return Pending(self, call, outputs, epoch, windows)

    def _put_rows(
        self, call: Call, windows: PeerWindows, rows: torch.Tensor, outputs: CombineInput
    ) -> None:
        """Write the experts' rows into the window, unless they have been written there."""
        y = outputs.y[: outputs.recv_permutation.source.numel()]
        in_window = windows.holds(self._rank, y)
        if in_window and not outputs.borrowed:
            contract = "not be output_rows() from before another combine, which voids them"
            raise ArgumentValueError(call.op, "y", contract, "other rows of the window")
        fmt = call.config.return_format
        place = fmt.payload(rows)
        if in_window and (y.data_ptr(), y.stride()) == (place.data_ptr(), place.stride()):
            return
        # Elsewhere in the window, source and target might overlap.
        count = row_count(call, outputs.recv_permutation)
        call.steps.encode(y.clone() if in_window else y, fmt, rows[: len(y)], count=count)

    @phase("combine recv")
    def combine_recv(self, pending: Pending[CombineInput], finish: CombineEpilogue) -> torch.Tensor:
        """Wait for all ranks' rows and compute each token's weighted sum from their windows."""
        protocol, call, layout = self._protocol, pending.call, pending.call.config.combine
        windows = pending.state
        assert isinstance(windows, PeerWindows)
        self._wait("combine", pending)
        slot, outputs = protocol.slot(pending.epoch), pending.data
        try:
            group_starts = torch.stack(
                [
                    windows.view(owner, slot, layout, layout.group_starts)
                    for owner in range(protocol.size)
                ]
            )
            check_returns(call, self._rank, outputs, group_starts)
            stride = call.config.return_format.stride
            rows, origins, step = windows.global_rows(slot, layout.rows_start, stride)
            index = returned_rows(call, self._rank, outputs, group_starts, origins, step)
            return finish_rows(call, outputs, rows, index, finish)
        finally:
            protocol.release("combine", pending.epoch)

    @phase("gather send")
    def all_gather_send(
        self, call: Call, parts: Sequence[torch.Tensor], num_bytes: int
    ) -> Pending[None]:
        """Write the parts into this rank's window."""
        protocol = self._protocol
        epoch = protocol.acquire("gather", call.op)
        slot = protocol.slot(epoch)
        try:
            windows = protocol.handshake(
                "gather", epoch, call.op, call.arguments, num_bytes, call.device
            )
            write_packed(windows.data(self._rank, slot), parts)
        except BaseException as error:
            protocol.abort("gather", epoch, error)
            raise
        protocol.signal("gather", epoch)
        return Pending(self, call, None, epoch, windows)

    @phase("gather recv")
    def all_gather_recv(
        self, pending: Pending[None], consume: Callable[[list[torch.Tensor]], _T]
    ) -> _T:
        """Wait for all ranks and read their windows."""
        protocol, windows = self._protocol, pending.state
        assert isinstance(windows, PeerWindows)
        self._wait("gather", pending)
        slot = protocol.slot(pending.epoch)
        try:
            return consume([windows.data(owner, slot) for owner in range(protocol.size)])
        finally:
            protocol.release("gather", pending.epoch)

    def _wait(self, kind: str, pending: Pending[_Input]) -> None:
        with profiled(pending.call.op, f"{kind} wait", self.group_name):
            pending.waited = self._protocol.wait(kind, pending.epoch, pending.call.op)

    @outside_autograd
    def output_rows(self, config: MoeConfig, num_rows: int) -> torch.Tensor | None:
        """The next combine's slot, so that experts can write their rows in place."""
        layout, fmt = config.combine, config.return_format
        free = self._protocol.next_slot("combine")
        if free is None or fmt.scale_offset is not None:
            return None
        windows, slot = free
        rows: torch.Tensor = windows.view(self._rank, slot, layout, layout.rows)
        return fmt.payload(rows)[:num_rows]

    @outside_autograd
    def all_to_all_v(self, op: str, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Exchange counts through one operation, then rows through a second."""
        row_bytes = x.shape[1]
        table = torch.tensor(counts, dtype=torch.int64, device=x.device).view(torch.uint8)
        sizes = [8 * self._protocol.size] * self._protocol.size
        arguments = {"op": op, "row_bytes": row_bytes}
        all_counts = torch.stack(
            self._exchange(op, arguments, [table] * self._protocol.size, sizes, sizes[0])
        )
        matrix = all_counts.view(torch.int64)
        largest = int(matrix.max()) * row_bytes
        # A power of two, so that windows grow only a few times.
        capacity = 1 << max(largest - 1, 4095).bit_length()
        parts = [part.reshape(-1) for part in x.split(counts)]
        received = [int(rows) * row_bytes for rows in matrix[:, self._rank]]
        arguments = {**arguments, "capacity": capacity}
        return self._exchange(op, arguments, parts, received, capacity)

    def _exchange(
        self,
        op: str,
        arguments: dict[str, object],
        parts: list[torch.Tensor],
        sizes: list[int],
        capacity: int,
    ) -> list[torch.Tensor]:
        """Send ``parts[r]`` to rank r; return the ``sizes[r]`` bytes received from each rank r."""
        protocol = self._protocol
        epoch = protocol.acquire("exchange", op)
        try:
            num_bytes, device = protocol.size * capacity, parts[0].device
            windows = protocol.handshake("exchange", epoch, op, arguments, num_bytes, device)
            slot = protocol.slot(epoch)
            for rank, part in enumerate(parts):
                start = self._rank * capacity
                windows.data(rank, slot)[start : start + part.numel()] = part
        except BaseException as error:
            protocol.abort("exchange", epoch, error)
            raise
        protocol.signal("exchange", epoch)
        protocol.wait("exchange", epoch, op)
        own = windows.data(self._rank, slot)
        try:
            return [
                own[rank * capacity : rank * capacity + size].clone()
                for rank, size in enumerate(sizes)
            ]
        finally:
            protocol.release("exchange", epoch)

    def window_bytes(self, kind: str) -> int:
        """Bytes of this rank's windows, all slots and flags included."""
        return self._protocol.window_bytes(kind)

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Send an abort with the reason in place of data."""
        self._protocol.abort_peers(kind, op, error)

    def raise_if_broken(self, op: str) -> None:
        """Raise while the group is broken."""
        self._protocol.raise_if_broken(op)

    def close(self) -> None:
        """Release the windows."""
        self._protocol.close()

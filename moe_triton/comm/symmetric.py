"""Dispatch and combine over memory that ranks share: each writes its rows, flags tell, all read.

The memory may be that of a device on which all ranks of a process work, in one stream: there the
flags say that the work has been issued, and what reads is issued after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..errors import ArgumentValueError, MoeError
from .packing import write_parts
from .ring_protocol import Channel
from .row_exchange import (
    check_returns,
    finish_rows,
    receive,
    returned_rows,
    row_count,
    write_tokens,
)
from .transport import (
    Call,
    Finish,
    Outputs,
    Pending,
    Received,
    Tokens,
    outside_autograd,
    phase,
    profiled,
)
from .window import Arena, MoeConfig, header_of

_T = TypeVar("_T")


class SymmetricTransport:
    """The transport over memory that all ranks of the group can read and write."""

    name = "symmetric"

    def __init__(self, channel: Channel) -> None:
        self.group_name = channel.group.name
        self._channel = channel
        self._rank = channel.rank

    @outside_autograd
    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:
        """Allocate the windows of ``kind`` before the first call, by an operation without data."""
        epoch = self._channel.begin(kind, call.op)
        try:
            self._channel.agree(kind, epoch, call.op, call.arguments, slot_bytes, call.device)
        except BaseException as error:
            self._channel.abort(kind, epoch, error)
            raise
        self._channel.signal(kind, epoch)
        self._channel.wait(kind, epoch, call.op)
        self._channel.finish(kind, epoch)

    @phase("dispatch setup")
    def dispatch_setup(self, call: Call, tokens: Tokens) -> Pending:
        """Write the tokens and say for whom they are; waits only while arguments are new."""
        channel, layout = self._channel, call.config.dispatch
        epoch = channel.begin("dispatch", call.op)
        slot = channel.slot(epoch)
        try:
            arena = channel.agree(
                "dispatch", epoch, call.op, call.arguments, layout.num_bytes, call.device
            )
            headers = [
                header_of(arena.view(owner, slot, layout, layout.headers), self._rank)
                for owner in range(channel.size)
            ]
            rows = arena.view(self._rank, slot, layout, layout.rows)
            plan = write_tokens(call, self._rank, tokens, rows, headers)
        except BaseException as error:
            channel.abort("dispatch", epoch, error)
            raise
        channel.signal("dispatch", epoch)
        return Pending(self, call, tokens, epoch, (plan, arena))

    @phase("dispatch teardown")
    def dispatch_teardown(self, pending: Pending) -> Received:
        """Wait for all ranks' tokens and gather those for this rank."""
        channel, call, layout = self._channel, pending.call, pending.call.config.dispatch
        plan, arena = pending.state
        self._wait("dispatch", pending)
        slot, stride = channel.slot(pending.epoch), call.config.row_format.stride
        try:
            headers = arena.view(self._rank, slot, layout, layout.headers)
            reach = arena.reach(slot, layout.rows_start, stride)
            return receive(call, self._rank, pending.data, plan, headers, **reach._asdict())
        finally:
            channel.finish("dispatch", pending.epoch)

    @phase("combine setup")
    def combine_setup(self, call: Call, outputs: Outputs) -> Pending:
        """Write the experts' rows, unless they are in place already, and where groups begin."""
        channel, layout = self._channel, call.config.combine
        epoch = channel.begin("combine", call.op)
        slot = channel.slot(epoch)
        try:
            arena = channel.agree(
                "combine", epoch, call.op, call.arguments, layout.num_bytes, call.device
            )
            rows = arena.view(self._rank, slot, layout, layout.rows)
            self._put_rows(call, arena, rows, outputs)
            begins = outputs.sources.begins
            arena.view(self._rank, slot, layout, layout.begins)[: len(begins)] = begins
        except BaseException as error:
            channel.abort("combine", epoch, error)
            raise
        channel.signal("combine", epoch)
        return Pending(self, call, outputs, epoch, arena)

    def _put_rows(self, call: Call, arena: Arena, rows: torch.Tensor, outputs: Outputs) -> None:
        """Write the experts' rows into the window, unless they have been written there."""
        y = outputs.y[: outputs.sources.source.numel()]
        in_window = arena.holds(self._rank, y)
        if in_window and not outputs.lent:
            contract = "not be output_rows() from before another combine, which voids them"
            raise ArgumentValueError(call.op, "y", contract, "such rows")
        fmt = call.config.return_format
        place = fmt.payload(rows)
        if in_window and (y.data_ptr(), y.stride()) == (place.data_ptr(), place.stride()):
            return
        # From elsewhere in the window, the copy might overlap what it reads.
        count = row_count(call, outputs.sources)
        call.steps.encode(y.clone() if in_window else y, fmt, rows[: len(y)], count=count)

    @phase("combine teardown")
    def combine_teardown(self, pending: Pending, finish: Finish) -> torch.Tensor:
        """Wait for all ranks' rows and sum those of each token, from where they are."""
        channel, call, layout = self._channel, pending.call, pending.call.config.combine
        arena = pending.state
        self._wait("combine", pending)
        slot, outputs = channel.slot(pending.epoch), pending.data
        try:
            begins = torch.stack(
                [arena.view(owner, slot, layout, layout.begins) for owner in range(channel.size)]
            )
            check_returns(call, self._rank, outputs, begins)
            stride = call.config.return_format.stride
            rows, origins, step = arena.reach(slot, layout.rows_start, stride)
            index = returned_rows(call, self._rank, outputs, begins, origins, step)
            return finish_rows(call, outputs, rows, index, finish)
        finally:
            channel.finish("combine", pending.epoch)

    @phase("gather setup")
    def gather_setup(self, call: Call, parts: Sequence[torch.Tensor], num_bytes: int) -> Pending:
        """Write the parts into this rank's window."""
        channel = self._channel
        epoch = channel.begin("gather", call.op)
        slot = channel.slot(epoch)
        try:
            arena = channel.agree("gather", epoch, call.op, call.arguments, num_bytes, call.device)
            write_parts(arena.data(self._rank, slot), parts)
        except BaseException as error:
            channel.abort("gather", epoch, error)
            raise
        channel.signal("gather", epoch)
        return Pending(self, call, None, epoch, arena)

    @phase("gather teardown")
    def gather_teardown(self, pending: Pending, consume: Callable[[list[torch.Tensor]], _T]) -> _T:
        """Wait for all ranks and read their windows."""
        channel, arena = self._channel, pending.state
        self._wait("gather", pending)
        slot = channel.slot(pending.epoch)
        try:
            return consume([arena.data(owner, slot) for owner in range(channel.size)])
        finally:
            channel.finish("gather", pending.epoch)

    def _wait(self, kind: str, pending: Pending) -> None:
        with profiled(pending.call.op, f"{kind} wait", self.group_name):
            pending.waited = self._channel.wait(kind, pending.epoch, pending.call.op)

    @outside_autograd
    def output_rows(self, config: MoeConfig, num_rows: int) -> torch.Tensor | None:
        """The place from which the next combine sends, so that experts can write there."""
        layout, fmt = config.combine, config.return_format
        free = self._channel.next_slot("combine")
        if free is None or fmt.scale_offset is not None:
            return None
        arena, slot = free
        rows: torch.Tensor = arena.view(self._rank, slot, layout, layout.rows)
        return fmt.payload(rows)[:num_rows]

    @outside_autograd
    def all_to_all_v(self, op: str, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Exchange counts through one operation, then rows through a second."""
        row_bytes = x.shape[1]
        table = torch.tensor(counts, dtype=torch.int64, device=x.device).view(torch.uint8)
        sizes = [8 * self._channel.size] * self._channel.size
        arguments = {"op": op, "row_bytes": row_bytes}
        all_counts = torch.stack(
            self._exchange(op, arguments, [table] * self._channel.size, sizes, sizes[0])
        )
        matrix = all_counts.view(torch.int64)
        largest = int(matrix.max()) * row_bytes
        # In powers of two, so that a window that grows does so a few times only.
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
        """Send ``parts[r]`` to rank r; return what came, ``sizes[r]`` bytes from rank r."""
        channel = self._channel
        epoch = channel.begin("exchange", op)
        try:
            num_bytes, device = channel.size * capacity, parts[0].device
            arena = channel.agree("exchange", epoch, op, arguments, num_bytes, device)
            slot = channel.slot(epoch)
            for rank, part in enumerate(parts):
                start = self._rank * capacity
                arena.data(rank, slot)[start : start + part.numel()] = part
        except BaseException as error:
            channel.abort("exchange", epoch, error)
            raise
        channel.signal("exchange", epoch)
        channel.wait("exchange", epoch, op)
        own = arena.data(self._rank, slot)
        try:
            return [
                own[rank * capacity : rank * capacity + size].clone()
                for rank, size in enumerate(sizes)
            ]
        finally:
            channel.finish("exchange", epoch)

    def window_bytes(self, kind: str) -> int:
        """Bytes of this rank's windows, all slots and flags included."""
        return self._channel.window_bytes(kind)

    def reject(self, kind: str, op: str, error: MoeError) -> None:
        """Announce the error in place of data."""
        self._channel.reject(kind, op, error)

    def raise_if_broken(self, op: str) -> None:
        """Raise while the group is broken."""
        self._channel.raise_if_broken(op)

    def close(self) -> None:
        """Give up the windows."""
        self._channel.close()

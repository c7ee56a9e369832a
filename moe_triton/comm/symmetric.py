"""Dispatch and combine over windows: peers write, flags tell, the owner reads."""

from __future__ import annotations

import torch

from ..errors import MoeError
from .channel import Channel
from .transport import (
    Call,
    Outputs,
    Pending,
    Received,
    Tokens,
    push_tokens,
    receive,
    reduce_rows,
    return_bases,
)


class SymmetricTransport:
    """The transport over memory that all ranks of the group can write."""

    name = "symmetric"

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._rank = channel.rank

    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:
        """Allocate the windows of ``kind`` before the first call, by an operation without data."""
        epoch = self._channel.begin(kind, call.op)
        try:
            self._channel.agree(kind, epoch, call.op, call.arguments, slot_bytes)
        except BaseException as error:
            self._channel.abort(kind, epoch, error)
            raise
        self._channel.signal(kind, epoch)
        self._channel.wait(kind, epoch, call.op)
        self._channel.finish(kind, epoch)

    def dispatch_setup(self, call: Call, tokens: Tokens) -> Pending:
        """Push the tokens into all ranks' windows; waits only while arguments are new."""
        channel, layout = self._channel, call.config.dispatch
        epoch = channel.begin("dispatch", call.op)
        try:
            arena = channel.agree("dispatch", epoch, call.op, call.arguments, layout.num_bytes)
            parts = arena.dispatch_parts(layout, self._rank, channel.slot(epoch))
            plan, written = push_tokens(call, self._rank, tokens, parts)
        except BaseException as error:
            channel.abort("dispatch", epoch, error)
            raise
        channel.signal("dispatch", epoch)
        window = arena.dispatch_window(layout, self._rank, channel.slot(epoch))
        return Pending(call, tokens, epoch, (plan, written, window))

    def dispatch_teardown(self, pending: Pending) -> Received:
        """Wait for all ranks' tokens and pack those for this rank."""
        plan, written, window = pending.state
        self._channel.wait("dispatch", pending.epoch, pending.call.op)
        try:
            return receive(pending.call, self._rank, pending.data, plan, written, window)
        finally:
            self._channel.finish("dispatch", pending.epoch)

    def combine_setup(self, call: Call, outputs: Outputs) -> Pending:
        """Push the experts' rows back to where their tokens came from."""
        channel, layout = self._channel, call.config.combine
        epoch = channel.begin("combine", call.op)
        try:
            arena = channel.agree("combine", epoch, call.op, call.arguments, layout.num_bytes)
            windows = arena.combine_windows(layout, channel.slot(epoch))
            bases = return_bases(call.config, self._rank, outputs)
            call.steps.return_push(outputs.y, outputs.sources, bases, windows)
        except BaseException as error:
            channel.abort("combine", epoch, error)
            raise
        channel.signal("combine", epoch)
        return Pending(call, outputs, epoch, windows[self._rank])

    def combine_teardown(self, pending: Pending, addend: torch.Tensor | None) -> torch.Tensor:
        """Wait for all ranks' rows and sum those of each token."""
        self._channel.wait("combine", pending.epoch, pending.call.op)
        try:
            return reduce_rows(pending.call, pending.data, pending.state, addend)
        finally:
            self._channel.finish("combine", pending.epoch)

    def all_to_all_v(self, op: str, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Exchange counts through one operation, then rows through a second."""
        row_bytes = x.shape[1]
        table = torch.tensor(counts, dtype=torch.int64).view(torch.uint8)
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
            arena = channel.agree("exchange", epoch, op, arguments, channel.size * capacity)
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
        received = [
            own[rank * capacity : rank * capacity + size].clone() for rank, size in enumerate(sizes)
        ]
        channel.finish("exchange", epoch)
        return received

    def reject(self, kind: str, op: str, error: MoeError) -> None:
        """Announce the error in place of data."""
        self._channel.reject(kind, op, error)

    def raise_if_broken(self, op: str) -> None:
        """Raise while the group is broken."""
        self._channel.raise_if_broken(op)

    def close(self) -> None:
        """Give up the windows."""
        self._channel.close()

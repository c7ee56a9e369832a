"""A group of one rank: no window, no waiting; the tokens are permuted in place of being sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..errors import MoeError, SequenceError
from .parts import write_parts
from .rows import as_rows, finish_rows, receive, rows_at_holders, write_tokens
from .transport import Call, Finish, Outputs, Pending, Received, Tokens, outside_autograd, phase
from .window import MoeConfig, header_of

_T = TypeVar("_T")


class SingleTransport:
    """The transport of a group of one."""

    name = "single"

    def __init__(self, group_name: str, in_flight: int) -> None:
        self.group_name = group_name
        self._limit = in_flight
        self._epochs: dict[str, list[int]] = {"dispatch": [], "combine": [], "gather": []}
        self._next = 0

    @outside_autograd
    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:
        """There is nothing to allocate and nobody to disagree with."""

    @phase("dispatch setup")
    def dispatch_setup(self, call: Call, tokens: Tokens) -> Pending:
        """Write the tokens as they would travel."""
        epoch = self._begin("dispatch", call.op)
        layout = call.config.dispatch
        data = torch.empty(layout.num_bytes, dtype=torch.uint8)
        headers, rows = layout.headers(data), layout.rows(data)
        plan = write_tokens(call, 0, tokens, rows, [header_of(headers, 0)])
        return Pending(self, call, tokens, epoch, (plan, headers, rows))

    @phase("dispatch teardown")
    def dispatch_teardown(self, pending: Pending) -> Received:
        """Permute the tokens into expert order."""
        self._finish("dispatch", pending)
        plan, headers, rows = pending.state
        return receive(pending.call, 0, pending.data, plan, headers, lambda _, row: (rows, row))

    @phase("combine setup")
    def combine_setup(self, call: Call, outputs: Outputs) -> Pending:
        """Remember the rows: they have nowhere to go."""
        return Pending(self, call, outputs, self._begin("combine", call.op))

    @phase("combine teardown")
    def combine_teardown(self, pending: Pending, finish: Finish) -> torch.Tensor:
        """Sum the rows where they are."""
        self._finish("combine", pending)
        call, outputs = pending.call, pending.data
        sources = outputs.sources
        rows = as_rows(call, outputs.y[: len(sources.source)])
        _, index = rows_at_holders(call.config, 0, outputs, sources.ends[None])
        return finish_rows(call, outputs, rows, index, finish)

    @phase("gather setup")
    def gather_setup(self, call: Call, parts: Sequence[torch.Tensor], num_bytes: int) -> Pending:
        """Keep the parts."""
        data = torch.empty(num_bytes, dtype=torch.uint8)
        write_parts(data, parts)
        return Pending(self, call, data, self._begin("gather", call.op))

    @phase("gather teardown")
    def gather_teardown(self, pending: Pending, consume: Callable[[list[torch.Tensor]], _T]) -> _T:
        """Read them."""
        self._finish("gather", pending)
        return consume([pending.data])

    def _begin(self, kind: str, op: str) -> int:
        if len(self._epochs[kind]) >= self._limit:
            raise SequenceError.too_many(op, kind, self._limit)
        self._next += 1
        self._epochs[kind].append(self._next)
        return self._next

    def _finish(self, kind: str, pending: Pending) -> None:
        oldest = next(iter(self._epochs[kind]), None)
        if oldest != pending.epoch:
            raise SequenceError.out_of_order(pending.call.op, kind, pending.epoch, oldest)
        self._epochs[kind].pop(0)
        pending.waited = [0.0]

    @outside_autograd
    def output_rows(self, config: MoeConfig, num_rows: int) -> None:
        """No memory is better than any other: nothing is sent."""

    @outside_autograd
    def all_to_all_v(
        self,
        op: str,  # noqa: ARG002
        x: torch.Tensor,
        counts: list[int],  # noqa: ARG002
    ) -> list[torch.Tensor]:
        """What one rank sends itself."""
        return [x.clone()]

    def window_bytes(self, kind: str) -> int:  # noqa: ARG002
        """Nothing: there is no window."""
        return 0

    def reject(self, kind: str, op: str, error: MoeError) -> None:
        """There is nobody to tell."""

    def raise_if_broken(self, op: str) -> None:
        """A group of one cannot break."""

    def close(self) -> None:
        """There is nothing to give up."""

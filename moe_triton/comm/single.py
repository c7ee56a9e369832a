"""A group of one rank: no window, no waiting; the tokens are permuted in place of being sent."""

from __future__ import annotations

import torch

from ..errors import MoeError
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
from .window import MoeConfig, header_of


class SingleTransport:
    """The transport of a group of one."""

    name = "single"

    def __init__(self) -> None:
        self._epoch = 0

    @outside_autograd
    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:
        """There is nothing to allocate and nobody to disagree with."""

    @outside_autograd
    def dispatch_setup(self, call: Call, tokens: Tokens) -> Pending:
        """Remember the call; a group of one has nothing to send."""
        self._epoch += 1
        return Pending(self, call, tokens, self._epoch)

    @outside_autograd
    def dispatch_teardown(self, pending: Pending) -> Received:
        """Permute the tokens into expert order."""
        call, tokens = pending.call, pending.data
        layout = call.config.dispatch
        data = torch.empty(layout.num_bytes, dtype=torch.uint8)
        headers, rows = layout.headers(data), layout.rows(data)
        plan = push_tokens(call, 0, tokens, rows, [header_of(headers, 0)])
        return receive(call, 0, tokens, plan, headers, lambda _, row: (rows, row.long()))

    @outside_autograd
    def combine_setup(self, call: Call, outputs: Outputs) -> Pending:
        """Remember the call."""
        self._epoch += 1
        return Pending(self, call, outputs, self._epoch)

    @outside_autograd
    def combine_teardown(self, pending: Pending, addend: torch.Tensor | None) -> torch.Tensor:
        """Sum the rows where they are: received order is already the order of the plan."""
        call, outputs = pending.call, pending.data
        index = rows_in_plan_order(call.config, outputs)
        return reduce_rows(call, outputs, outputs.y, index, addend)

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

    def reject(self, kind: str, op: str, error: MoeError) -> None:
        """There is nobody to tell."""

    def raise_if_broken(self, op: str) -> None:
        """A group of one cannot break."""

    def close(self) -> None:
        """There is nothing to give up."""

"""A group of one rank: no window, no waiting; the tokens are permuted in place of being sent."""

from __future__ import annotations

import torch

from ..errors import MoeError, ReceiveOverflowError
from .transport import (
    Call,
    Outputs,
    Pending,
    Received,
    Tokens,
    allocate_received,
    reduce_rows,
    traffic,
)


class SingleTransport:
    """The transport of a group of one."""

    name = "single"

    def __init__(self) -> None:
        self._epoch = 0

    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:
        """There is nothing to allocate and nobody to disagree with."""

    def dispatch_setup(self, call: Call, tokens: Tokens) -> Pending:
        """Remember the call; a group of one has nothing to send."""
        self._epoch += 1
        return Pending(call, tokens, self._epoch)

    def dispatch_teardown(self, pending: Pending) -> Received:
        """Permute the tokens into expert order."""
        call, tokens = pending.call, pending.data
        plan = call.steps.plan(tokens.expert_ids, call.config.topology.num_experts)
        counts = plan.counts[:, None]
        sources = call.steps.sources(counts)
        rows = sources.source.numel()
        if tokens.limit is not None and rows > tokens.limit:
            raise ReceiveOverflowError(call.op, 0, rows, tokens.limit)
        x, scales, weights = allocate_received(call, 0, tokens, sources)
        fmt = call.config.row_format
        call.steps.gather_quant(tokens.x, tokens.expert_ids, plan, fmt, tokens.smooth, x, scales)
        if weights is not None:
            weights[:rows] = tokens.weights.reshape(-1)[plan.order.long()]
        sent = traffic(call.config, tokens.x.shape[0], [rows])
        return Received(x, scales, weights, counts, sources, [0], plan, sent)

    def combine_setup(self, call: Call, outputs: Outputs) -> Pending:
        """Remember the call."""
        self._epoch += 1
        return Pending(call, outputs, self._epoch)

    def combine_teardown(self, pending: Pending, addend: torch.Tensor | None) -> torch.Tensor:
        """Sum the rows where they are: received order is already the order of the plan."""
        return reduce_rows(pending.call, pending.data, pending.data.y, addend)

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

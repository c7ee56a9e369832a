"""A group of one rank: dispatch permutes the tokens locally, without windows or waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

from ..errors import MoeError, ReceiveOverflowError, SequenceError
from ..layout import LocalPermutation, RoutingPlan
from .packing import write_packed
from .row_exchange import (
    as_rows,
    capacity_of,
    check_overflow,
    copies_of,
    finish_rows,
    new_rows,
    padded,
    row_count,
)
from .transport import (
    Call,
    CombineEpilogue,
    CombineInput,
    DispatchInput,
    Pending,
    Received,
    capturing,
    outside_autograd,
    phase,
)
from .window import MoeConfig

_T = TypeVar("_T")
_Input = TypeVar("_Input")


class SingleTransport:
    """The transport of a group of one."""

    name = "single"

    def __init__(self, group_name: str, in_flight: int) -> None:
        self.group_name = group_name
        self._limit = in_flight
        self._epochs: dict[str, list[int]] = {"dispatch": [], "combine": [], "gather": []}
        self._next = 0

    def prepare(self, call: Call, kind: str) -> None:
        """Nothing to allocate or to compare."""

    @phase("dispatch send")
    def dispatch_send(self, call: Call, tokens: DispatchInput) -> Pending[DispatchInput]:
        """Permute the tokens into expert order, reading each once."""
        epoch = self._acquire("dispatch", call.op)
        try:
            received, tokens = self._permute(call, tokens)
        except BaseException:
            self._epochs["dispatch"].remove(epoch)
            raise
        return Pending(self, call, tokens, epoch, received)

    def _permute(self, call: Call, tokens: DispatchInput) -> tuple[Received, DispatchInput]:
        config, steps = call.config, call.steps
        copies, own = copies_of(tokens)
        permutation = steps.local_permutation(
            tokens.expert_ids,
            config.topology.num_experts,
            tokens.weights,
            copies,
            alignment=config.alignment,
            capacity=capacity_of(call, 0, tokens),
            load=tokens.load,
            totals_dtype=tokens.totals_dtype,
        )
        try:
            # A captured graph cannot be asked: it leaves out rows without room.
            if call.config.max_rows is not None and not capturing(call.device):
                check_overflow(call, [int(permutation.counts.sum())])
        except ReceiveOverflowError:
            if tokens.load is not None:
                tokens.load.sub_(permutation.counts)  # of rows that are not delivered
            raise
        n = permutation.slot_ids.shape[0]
        num_rows = n if tokens.num_rows is None else tokens.num_rows
        x, scales = new_rows(call, num_rows)
        fmt, ids = config.row_format, own.expert_ids
        steps.gather_quant(
            tokens.x, permutation.row_index, fmt, tokens.smooth_scales, ids, x, scales
        )
        if config.alignment > 1:
            count = row_count(call, permutation.recv_permutation)
            for rows in (x, scales):
                if rows is not None:
                    table = rows[:, None] if rows.dim() == 1 else rows
                    steps.zero_padding(table, permutation.slot_ids, count)
        received = Received(
            x,
            scales,
            padded(permutation.weights, num_rows),
            permutation.counts.unsqueeze(1),
            permutation.recv_permutation,
            permutation.slot_ids,
            permutation.totals,
            permutation,
        )
        return received, own

    @phase("dispatch recv")
    def dispatch_recv(self, pending: Pending[DispatchInput]) -> Received:
        """Return the rows of ``dispatch_send``."""
        self._release("dispatch", pending)
        assert isinstance(pending.state, Received)
        return pending.state

    @phase("combine send")
    def combine_send(self, call: Call, outputs: CombineInput) -> Pending[CombineInput]:
        """Keep the experts' rows for ``combine_recv``."""
        return Pending(self, call, outputs, self._acquire("combine", call.op))

    @phase("combine recv")
    def combine_recv(self, pending: Pending[CombineInput], finish: CombineEpilogue) -> torch.Tensor:
        """Compute the weighted sum of the experts' rows in place."""
        self._release("combine", pending)
        call, outputs = pending.call, pending.data
        recv_permutation = outputs.recv_permutation
        y, num_rows = outputs.y, recv_permutation.source.shape[0]
        if y.shape[0] > num_rows:
            y = y[:num_rows]
        rows = as_rows(call, y, recv_permutation, call.config.return_format)
        if isinstance(outputs.plan, LocalPermutation):
            index = outputs.plan.row_index
        else:
            index = call.steps.combine_row_index(
                recv_permutation.group_starts,
                cast("RoutingPlan", outputs.plan),  # made anew from tensors
                outputs.expert_ids,
                capacity=call.config.capacity(0),
            )
        return finish_rows(call, outputs, rows, index, finish)

    @phase("gather send")
    def all_gather_send(
        self, call: Call, parts: Sequence[torch.Tensor], num_bytes: int
    ) -> Pending[None]:
        """Pack the parts."""
        data = torch.empty(num_bytes, dtype=torch.uint8, device=call.device)
        write_packed(data, parts)
        return Pending(self, call, None, self._acquire("gather", call.op), data)

    @phase("gather recv")
    def all_gather_recv(
        self, pending: Pending[None], consume: Callable[[list[torch.Tensor]], _T]
    ) -> _T:
        """Hand over the packed parts."""
        self._release("gather", pending)
        assert isinstance(pending.state, torch.Tensor)
        return consume([pending.state])

    def _acquire(self, kind: str, op: str) -> int:
        if len(self._epochs[kind]) >= self._limit:
            raise SequenceError.too_many(op, kind, self._limit)
        self._next += 1
        self._epochs[kind].append(self._next)
        return self._next

    def _release(self, kind: str, pending: Pending[_Input]) -> None:
        oldest = next(iter(self._epochs[kind]), None)
        if oldest != pending.epoch:
            raise SequenceError.out_of_order(pending.call.op, kind, pending.epoch, oldest)
        self._epochs[kind].pop(0)
        pending.waited = [0.0]

    def output_rows(self, config: MoeConfig, num_rows: int) -> None:
        """None: combine reads the experts' rows from any memory."""

    @outside_autograd
    def all_to_all_v(
        self,
        call: Call,  # noqa: ARG002
        x: torch.Tensor,
        counts: list[int],  # noqa: ARG002
    ) -> list[torch.Tensor]:
        """A copy of the rows that the rank sends itself."""
        return [x.clone()]

    def window_bytes(self, kind: str) -> int:  # noqa: ARG002
        """0: one rank has no windows."""
        return 0

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """No peers to abort."""

    def raise_if_broken(self, op: str) -> None:
        """A group of one cannot break."""

    def close(self) -> None:
        """No memory to release."""

"""Dispatch and combine over torch.distributed, for ranks that share no memory.

Each operation is one exchange of messages (``message_exchange``): setup starts it, teardown waits
for it. A token is sent once to each rank that wants it, so n routed slots share m rows. The host
makes the indices, and the device the rows.

    dispatch  [L] counts, [W] totals where rows are limited, [R] which of the m rows each row of the
              source is, counted from 1, [n, P] slot ids and weights, padding to 16 bytes, [m] rows
    combine   [n] rows in the order in which dispatch brought them
    gather    the parts, as ``packing`` lays them
    exchange  rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..errors import MoeError, RoutingMismatchError
from ..layout import NOWHERE, RoutingPlan, align
from .groups import Group
from .memory import on_host
from .message_exchange import WORDS, MessageExchange, Messages, Operation
from .packing import packed_bytes, write_packed
from .row_exchange import as_rows, check_overflow, finish_rows, plan_tokens, receive
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
from .window import MoeConfig

_T = TypeVar("_T")
_Input = TypeVar("_Input")


class CollectiveTransport:
    """The transport over torch.distributed.

    Args:
        group: the group.
        exchange: its messages.
    """

    name = "collective"

    def __init__(self, group: Group, exchange: MessageExchange) -> None:
        self.group_name = group.name
        self._exchange = exchange
        self._rank, self._size = group.rank, group.size

    @outside_autograd
    def prepare(self, call: Call, kind: str) -> None:
        """Compare the arguments; buffers come with the calls."""
        epoch = self._exchange.begin(kind, call.op, call.device)
        self._exchange.start(kind, epoch, self._compose(call, kind, epoch, [0] * self._size))
        self._exchange.receive(call.op, kind, epoch)

    @phase("dispatch send")
    def dispatch_send(self, call: Call, tokens: DispatchInput) -> Pending[DispatchInput]:
        """Send each token once to each rank that wants it."""
        planned: list[tuple[RoutingPlan, DispatchInput]] = []

        def compose(epoch: int) -> Operation:
            plan, own = plan_tokens(call, tokens)
            planned.append((plan, own))
            return self._compose_dispatch(call, epoch, own, plan)

        epoch = self._send(call, "dispatch", compose)
        plan, own = planned[0]
        return Pending(self, call, own, epoch, plan)

    def _compose_dispatch(
        self, call: Call, epoch: int, tokens: DispatchInput, plan: RoutingPlan
    ) -> Operation:
        config, topology = call.config, call.config.topology
        rows = self._encode(call, epoch, tokens)
        (num_sources, stride), world = rows.shape, self._size
        counts = on_host(plan.counts).reshape(-1, topology.experts_per_rank)
        slots, num_slots = self._slots(call, tokens, on_host(plan.sorted_slot_ids), counts.sum(1))
        target = np.arange(world).repeat(num_slots)
        wanted = np.zeros((world, num_sources), dtype=bool)
        wanted[target, config.row_of(slots[:, 0])] = True
        numbers = wanted.cumsum(1, dtype=np.int32)
        num_rows = wanted.sum(1)
        index = wanted.nonzero()[1]
        if config.per_expert:  # its rows are sorted by slot first
            index = index % config.num_slots * len(tokens.x) + index // config.num_slots

        local, before = topology.experts_per_rank, self._list_words(config)
        lists = np.zeros((world, before + num_sources), dtype=np.int32)
        lists[topology.num_shared_ranks :, :local] = counts
        if config.max_rows is not None:
            lists[:, local:before] = num_slots
        lists[:, before:] = numbers
        width = slots.shape[1]
        row_starts = align(4 * (lists.shape[1] + width * num_slots))
        heads = num_slots, num_rows, [num_sources] * world
        operation = self._compose(call, "dispatch", epoch, row_starts + num_rows * stride, heads)
        first = operation.starts // 4
        operation.write_words(first[:, None] + np.arange(lists.shape[1]), lists)
        # The slots for a rank lie one after the other.
        gaps = first + lists.shape[1] - (num_slots.cumsum() - num_slots) * width
        at = (gaps.repeat(num_slots) + np.arange(len(slots)) * width)[:, None] + np.arange(width)
        operation.write_words(at, slots)
        operation.write_rows(operation.starts + row_starts, rows, index, num_rows.tolist())
        return operation

    def _list_words(self, config: MoeConfig) -> int:
        """Words of a dispatch's payload before the numbers of its rows."""
        totals = 0 if config.max_rows is None else self._size
        return config.topology.experts_per_rank + totals

    def _encode(self, call: Call, epoch: int, tokens: DispatchInput) -> torch.Tensor:
        """[R, stride] uint8 rows of the tokens; with factors of each expert, by slot and token."""
        config, fmt, factors = call.config, call.config.row_format, tokens.smooth_scales
        if factors is None:
            return as_rows(call, tokens.x, None, fmt)
        num_slots = config.num_slots if config.per_expert else 1
        num_rows = num_slots * len(tokens.x)
        data = self._exchange.buffer("rows", epoch, num_rows * fmt.stride, call.device)
        rows = data.view(num_slots, len(tokens.x), fmt.stride)
        if not config.per_expert:
            call.steps.encode(tokens.x, fmt, rows[0], factors)
            return rows[0]
        top_k, num_shared = config.top_k, config.topology.num_shared_experts
        # Slots that are not sent get some expert's factors: their rows are not read.
        expert = tokens.expert_ids.long().clamp(0, config.topology.num_experts - 1)
        for slot in range(top_k):
            call.steps.encode(tokens.x, fmt, rows[slot], factors[num_shared + expert[:, slot]])
        for shared in range(num_shared):
            shape = tokens.x.shape
            call.steps.encode(tokens.x, fmt, rows[top_k + shared], factors[shared].expand(shape))
        return rows.view(num_rows, fmt.stride)

    def _slots(
        self, call: Call, tokens: DispatchInput, slot_ids: np.ndarray, num_slots: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The slots that are sent, in the order of ranks, for each rank in that of a dispatch.

        Args:
            call: the call.
            tokens: its input.
            slot_ids: the routed slots as flat positions, sorted by expert; others follow.
            num_slots: how many of them go to each rank of routed experts.

        Returns:
            [n, P] int32 slot ids and, where they are sent along, the words of the weights; [W]
            slots for each rank.
        """
        config, topology = call.config, call.config.topology
        num_slots = np.concatenate([np.zeros(topology.num_shared_ranks, np.int64), num_slots])
        slot_ids = slot_ids[: num_slots.sum()]
        columns = []
        if config.with_weights:
            assert tokens.weights is not None
            numbers = on_host(tokens.weights.to(config.weight_dtype)).reshape(-1, 1)
            columns = [numbers[slot_ids].view(np.int32)]
        if topology.num_shared_experts:
            num_shared = topology.num_shared_experts
            slot_ids = slot_ids + slot_ids // config.top_k * num_shared
            tokens_sent = (on_host(tokens.expert_ids) != NOWHERE).any(1).nonzero()[0]
            active = (tokens_sent * config.num_slots).astype(np.int32)
            shared = [active + config.top_k + shared for shared in range(num_shared)]
            slot_ids = np.concatenate([*shared, slot_ids])
            num_slots[[*topology.shared_ranks_of(self._rank)]] = len(active)
            if config.with_weights:
                ones = np.ones((len(active) * num_shared, 1), dtype=numbers.dtype)
                columns = [np.concatenate([ones.view(np.int32), *columns])]
        return np.concatenate([slot_ids[:, None], *columns], axis=1), num_slots

    @phase("dispatch recv")
    def dispatch_recv(self, pending: Pending[DispatchInput]) -> Received:
        """Wait for the rows, and gather those of each expert."""
        call, config, device = pending.call, pending.call.config, pending.call.device
        plan = pending.state
        assert isinstance(plan, RoutingPlan)
        messages = self._receive(pending, "dispatch")
        num_slots, _, num_sources = messages.heads[:, WORDS].T
        local, before = config.topology.experts_per_rank, self._list_words(config)
        width = 1 + (config.weight_dtype.itemsize // 4 if config.with_weights else 0)
        ends = 4 * (before + num_sources)
        lists = messages.words(np.zeros_like(ends), before + int(num_sources.max()))
        slots = messages.words(ends, width * int(num_slots.max())).reshape(self._size, -1, width)
        weights = None
        if config.with_weights:
            # In numpy: torch takes no such view of nothing.
            numbers = slots[:, :, 1:].flatten().view(f"f{config.weight_dtype.itemsize}")
            weights = torch.from_numpy(numbers).view(slots.shape[:2]).to(device)
        if config.max_rows is not None:
            check_overflow(call, lists[:, local:before].sum(0).tolist())
        is_shared = config.topology.is_shared_rank(self._rank)
        counts = num_slots[None].astype(np.int32) if is_shared else lists[:, :local].T.copy()

        # A payload lists its rows from 1 on; they follow its lists.
        step = config.row_format.stride // 16
        origins = (messages.starts + align(ends + 4 * width * num_slots)) // 16 - step
        table = lists[:, before:].astype(np.int64) * step + origins[:, None]
        return receive(
            call,
            self._rank,
            pending.data,
            plan,
            torch.from_numpy(counts).to(device),
            torch.from_numpy(slots[:, :, 0].copy()).to(device),
            weights,
            messages.rows(config.row_format.stride),
            torch.from_numpy(table).to(device),
        )

    @phase("combine send")
    def combine_send(self, call: Call, inputs: CombineInput) -> Pending[CombineInput]:
        """Send the experts' rows back to the ranks of their tokens."""
        return Pending(
            self,
            call,
            inputs,
            self._send(call, "combine", lambda epoch: self._compose_combine(call, epoch, inputs)),
        )

    def _compose_combine(self, call: Call, epoch: int, inputs: CombineInput) -> Operation:
        fmt, permutation = call.config.return_format, inputs.recv_permutation
        source = on_host(permutation.source)
        # Padding, whose source is negative, comes first.
        padding, *num_rows = np.bincount(source + 1, minlength=self._size + 1).tolist()
        index = source.argsort(kind="stable")[padding:]
        sizes = [n * fmt.stride for n in num_rows]
        heads = num_rows, [0] * self._size, [0] * self._size
        operation = self._compose(call, "combine", epoch, sizes, heads)
        rows = as_rows(call, inputs.y, permutation, fmt)
        operation.write_rows(operation.starts, rows, index, num_rows)
        return operation

    @phase("combine recv")
    def combine_recv(
        self, pending: Pending[CombineInput], epilogue: CombineEpilogue
    ) -> torch.Tensor:
        """Wait for the rows and sum those of each token.

        Each rank's rows lie in the order of this rank's plan, by (expert, flat position), and those
        of a shared expert in that of the tokens that take part.
        """
        call, inputs = pending.call, pending.data
        topology, plan, ids = call.config.topology, inputs.plan, on_host(inputs.expert_ids)
        messages = self._receive(pending, "combine")
        step = call.config.return_format.stride // 16
        origins, returned = messages.starts // 16, messages.heads[:, WORDS][:, 0]
        counts = on_host(plan.counts).reshape(-1, topology.experts_per_rank)
        ends = counts.cumsum(1)
        sent = np.zeros_like(returned)
        sent[topology.num_shared_ranks :] = ends[:, -1]
        first = (ends - counts) * step + origins[topology.num_shared_ranks :, None]
        position = on_host(plan.position_in_expert).reshape(ids.shape)
        absent = position == NOWHERE
        index = first.reshape(-1)[np.where(absent, 0, ids)] + position.astype(np.int64) * step
        index[absent] = NOWHERE
        if topology.num_shared_experts:
            holders = [*topology.shared_ranks_of(self._rank)]
            active = (ids != NOWHERE).any(1)
            sent[holders] = active.sum()
            row = origins[holders] + (active.cumsum()[:, None] - 1) * step
            index = np.concatenate([index, np.where(active[:, None], row, NOWHERE)], axis=1)
        if (sent != returned).any():
            rank = int((sent != returned).argmax())
            raise RoutingMismatchError(
                call.op, rank, "its experts", int(sent[rank]), int(returned[rank])
            )
        rows = messages.rows(call.config.return_format.stride)
        return finish_rows(call, inputs, rows, torch.from_numpy(index).to(call.device), epilogue)

    @phase("gather send")
    def all_gather_send(
        self,
        call: Call,
        parts: Sequence[torch.Tensor],
        num_bytes: int,  # noqa: ARG002
    ) -> Pending[None]:
        """Send the parts to all ranks."""

        def compose(epoch: int) -> Operation:
            size = packed_bytes([part.numel() * part.element_size() for part in parts])
            operation = self._compose(call, "gather", epoch, [size] * self._size)
            first, *others = operation.parts()
            write_packed(first, parts)
            for part in others:
                part.copy_(first)
            return operation

        return Pending(self, call, None, self._send(call, "gather", compose))

    @phase("gather recv")
    def all_gather_recv(
        self, pending: Pending[None], consume: Callable[[list[torch.Tensor]], _T]
    ) -> _T:
        """Wait for the parts of all ranks."""
        return consume(self._receive(pending, "gather").payloads())

    @outside_autograd
    def output_rows(self, config: MoeConfig, num_rows: int) -> None:
        """Return None: rows have to be sorted before they are sent, wherever they lie."""

    @outside_autograd
    def all_to_all_v(
        self,
        call: Call,
        x: torch.Tensor,
        counts: list[int],
    ) -> list[torch.Tensor]:
        """Send rows; the results are valid until the next call."""
        op = call.op
        epoch = self._exchange.begin("exchange", op, x.device)
        arguments = {"op": op, "row_bytes": x.shape[1]}
        sizes = [count * x.shape[1] for count in counts]
        operation = self._exchange.compose("exchange", epoch, arguments, x.device, sizes)
        for part, rows in zip(operation.parts(), x.split(counts), strict=True):
            part.view(rows.shape).copy_(rows)
        self._exchange.start("exchange", epoch, operation)
        return self._exchange.receive(op, "exchange", epoch).payloads()

    def window_bytes(self, kind: str) -> int:  # noqa: ARG002
        """Return 0: this transport has no windows."""
        return 0

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Send messages that say why this rank cannot take part."""
        self._exchange.abort_peers(kind, op, error)

    def raise_if_broken(self, op: str) -> None:
        """Raise while the group is broken."""
        self._exchange.raise_if_broken(op)

    def close(self) -> None:
        """Free the buffers and close the connections."""
        self._exchange.close()

    def _compose(
        self,
        call: Call,
        kind: str,
        epoch: int,
        sizes: Sequence[int] | np.ndarray,
        words: Sequence[Sequence[int] | np.ndarray] | int = 0,
    ) -> Operation:
        return self._exchange.compose(kind, epoch, call.arguments, call.device, sizes, words)

    def _send(self, call: Call, kind: str, compose: Callable[[int], Operation]) -> int:
        """Start an operation, or tell the peers why this rank cannot; returns its epoch."""
        epoch = self._exchange.begin(kind, call.op, call.device)
        try:
            operation = compose(epoch)
        except BaseException as error:
            self._exchange.abort(kind, epoch, error)
            raise
        self._exchange.start(kind, epoch, operation)
        return epoch

    def _receive(self, pending: Pending[_Input], kind: str) -> Messages:
        op = pending.call.op
        with profiled(op, f"{kind} wait", self.group_name):
            messages = self._exchange.receive(op, kind, pending.epoch)
        pending.waited = messages.waited
        return messages


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

"""Dispatch and combine over torch.distributed, for ranks that share no memory.

Each operation is one exchange of messages (``message_exchange``): setup starts it, teardown waits
for it. A token is sent once to each rank that wants it, so n routed slots share m rows. The host
plans and numbers the rows; where tensors are on a device, only rows stay there.

    dispatch  note: [L] counts, [W] totals where rows are limited, [n, P] slot ids, which of the m
              rows each is, and weights; payload: [m] rows
    combine   payload: [n] rows in the order in which dispatch brought them
    gather    payload: the parts, as ``packing`` lays them
    exchange  payload: rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..errors import MoeError, RoutingMismatchError
from ..layout import NOWHERE, RoutingPlan
from .groups import Group
from .message_exchange import MessageExchange, Messages, Operation
from .packing import packed_bytes, write_packed
from .row_exchange import (
    as_rows,
    capacity_of,
    finish_rows,
    new_rows,
    padded,
    plan_tokens,
    refuse_overflow,
    row_count,
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
from .window import MoeConfig

_T = TypeVar("_T")
_Input = TypeVar("_Input")


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Its values; the memory itself where that is the host's."""
    array: np.ndarray = tensor.cpu().numpy()
    return array


def _words_of_weight(config: MoeConfig) -> int:
    """int32 words of a weight that travels with its slot; 0 where none does."""
    return config.weight_dtype.itemsize // 4 if config.with_weights else 0


class _Slots(NamedTuple):
    """The routed slots of this rank's tokens in the order of ranks, for each in that of a dispatch.

    Attributes:
        ids: [n] int32.
        weights: [n, P - 2] int32, the words of their weights.
        counts: [W] slots for each rank.
    """

    ids: np.ndarray
    weights: np.ndarray
    counts: list[int]


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
        expert_counts = _array(plan.counts)
        slots = self._slots(call, tokens, plan, expert_counts)
        # A source's rows for all ranks, numbered by (rank, row): those that a slot wants are sent.
        num_rows, stride = rows.shape
        row = slots.ids if config.per_expert else slots.ids // config.num_slots
        wanted = np.arange(self._size).repeat(slots.counts) * num_rows + row
        is_sent = np.zeros(self._size * num_rows, dtype=bool)
        is_sent[wanted] = True
        sent = is_sent.nonzero()[0]
        counts = is_sent.reshape(self._size, num_rows).sum(1)
        number = np.empty(len(is_sent), dtype=np.int32)  # at its rank
        number[sent] = np.arange(len(sent)) - (counts.cumsum() - counts).repeat(counts)
        columns = slots.ids[:, None], number[wanted][:, None], slots.weights
        pairs = np.concatenate(columns, axis=1)
        index = sent % num_rows if num_rows else sent
        if config.per_expert:  # its rows are sorted by slot first
            index = index % config.num_slots * len(tokens.x) + index // config.num_slots

        limited = [] if config.max_rows is None else [np.array(slots.counts)]
        of_experts = expert_counts.reshape(-1, topology.experts_per_rank)
        notes, first = [], 0
        for rank, count in enumerate(slots.counts, -topology.num_shared_ranks):
            local = np.array([count]) if rank < 0 else of_experts[rank]
            notes.append([local, *limited, pairs[first : first + count].reshape(-1)])
            first += count
        listed = counts.tolist()
        operation = self._exchange.compose(
            "dispatch",
            epoch,
            call.arguments,
            call.device,
            [count * stride for count in listed],
            notes,
            stride,
        )
        if len(index):
            places = operation.places(index, listed, stride)
            torch.index_select(rows, 0, places, out=operation.payload.view(-1, stride))
        return operation

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
        self, call: Call, tokens: DispatchInput, plan: RoutingPlan, expert_counts: np.ndarray
    ) -> _Slots:
        config, topology = call.config, call.config.topology
        counts = expert_counts.reshape(-1, topology.experts_per_rank).sum(1).tolist()
        counts = [0] * topology.num_shared_ranks + counts
        routed = ids = _array(plan.sorted_slot_ids)[: sum(counts)]
        if topology.num_shared_experts:
            active = (_array(tokens.expert_ids) != NOWHERE).any(1).nonzero()[0] * config.num_slots
            first = active.astype(np.int32) + config.top_k
            shared = [first + expert for expert in range(topology.num_shared_experts)]
            ids = np.concatenate([*shared, ids + ids // config.top_k * topology.num_shared_experts])
            for rank in topology.shared_ranks_of(self._rank):
                counts[rank] = len(active)
        weights = np.empty((len(ids), _words_of_weight(config)), dtype=np.int32)
        if config.with_weights:
            assert tokens.weights is not None
            values = _array(tokens.weights.to(config.weight_dtype)).reshape(-1)
            num_shared = len(ids) - len(routed)
            weights[:num_shared] = np.ones(1, values.dtype).view(np.int32)
            weights[num_shared:] = values[routed, None].view(np.int32)
        return _Slots(ids, weights, counts)

    @phase("dispatch recv")
    def dispatch_recv(self, pending: Pending[DispatchInput]) -> Received:
        """Wait for the rows, and gather those of each expert."""
        call, config, device = pending.call, pending.call.config, pending.call.device
        plan, tokens = pending.state, pending.data
        assert isinstance(plan, RoutingPlan)
        messages = self._receive(pending, "dispatch")
        words, starts = messages.notes, messages.note_starts
        num_local = config.topology.num_local_experts(self._rank)
        of_sources = words[starts[:, None] + np.arange(num_local)]
        starts = starts + num_local
        if config.max_rows is not None:
            totals = words[starts[:, None] + np.arange(self._size)]
            refuse_overflow(call, totals.sum(0).tolist())
            starts = starts + self._size
        counts = torch.from_numpy(of_sources.T.copy()).to(device)
        capacity = capacity_of(call, self._rank, tokens)
        permutation = call.steps.recv_permutation(counts, config.alignment, capacity)
        assert permutation.index_in_source is not None
        source, index = _array(permutation.source), _array(permutation.index_in_source)
        nowhere = None
        if config.alignment > 1 or capacity is not None:
            nowhere = source == NOWHERE
            source, index = np.where(nowhere, 0, source), np.where(nowhere, 0, index)
        columns = np.arange(2 + _words_of_weight(config))
        pairs = words[(starts[source] + index * len(columns))[:, None] + columns]
        stride = config.row_format.stride
        slot_ids, row_weights = pairs[:, 0].copy(), pairs[:, 2:].copy()
        row_index = messages.starts[source] // 16 + pairs[:, 1] * (stride // 16)
        if nowhere is not None:
            slot_ids[nowhere] = row_index[nowhere] = NOWHERE
            row_weights[nowhere] = 0

        if (load := tokens.load) is not None:
            load += counts.sum(1)
        num_rows = len(row_index) if tokens.num_rows is None else tokens.num_rows
        x, scales = new_rows(call, num_rows)
        call.steps.gather_rows(
            messages.rows(stride),
            torch.from_numpy(row_index).to(device),
            config.row_format,
            x,
            scales,
            row_count(call, permutation),
        )
        weights = None
        if config.with_weights:
            weights = torch.from_numpy(row_weights).view(config.weight_dtype)[:, 0].to(device)
            weights = padded(weights, num_rows)
        return Received(
            x,
            scales,
            weights,
            counts,
            permutation,
            torch.from_numpy(slot_ids).to(device),
            counts.sum(1, dtype=tokens.totals_dtype),
            plan,
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
        fmt, source = call.config.return_format, _array(inputs.recv_permutation.source)
        order = source.astype(np.int32).argsort(kind="stable")  # negative sources of padding first
        padding, *counts = np.bincount(source + 1, minlength=self._size + 1).tolist()
        sizes = [count * fmt.stride for count in counts]
        operation = self._exchange.compose(
            "combine", epoch, call.arguments, call.device, sizes, unit=fmt.stride
        )
        if len(order) > padding:
            places = operation.places(order[padding:], counts, fmt.stride)
            rows = operation.payload.view(-1, fmt.stride)
            if fmt.scale_offset is None:
                torch.index_select(inputs.y, 0, places, out=fmt.payload(rows))
            else:
                call.steps.encode(inputs.y[places], fmt, rows)
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
        topology, plan, ids = call.config.topology, inputs.plan, _array(inputs.expert_ids)
        counts, position = _array(plan.counts), _array(plan.position_in_expert).reshape(ids.shape)
        messages = self._receive(pending, "combine")
        stride = call.config.return_format.stride
        step, origins = stride // 16, messages.starts // 16
        counts = counts.reshape(-1, topology.experts_per_rank)
        ends = counts.cumsum(1)
        sent = [0] * topology.num_shared_ranks + ends[:, -1].tolist()
        first = (ends - counts) * step + origins[topology.num_shared_ranks :, None]
        index = first.take(ids, mode="clip") + position * step
        index[position == NOWHERE] = NOWHERE
        if topology.num_shared_experts:
            active = (ids != NOWHERE).any(1, keepdims=True)
            holders = [*topology.shared_ranks_of(self._rank)]
            for rank in holders:
                sent[rank] = int(active.sum())
            shared = origins[holders] + (active.cumsum(0) - 1) * step
            index = np.concatenate([index, np.where(active, shared, NOWHERE)], axis=1)
        for rank, (mine, size) in enumerate(zip(sent, messages.sizes.tolist(), strict=True)):
            if mine * stride != size:
                raise RoutingMismatchError(call.op, rank, "its experts", mine, size // stride)
        places = torch.from_numpy(index).to(call.device)
        return finish_rows(call, inputs, messages.rows(stride), places, epilogue)

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

    def _compose(self, call: Call, kind: str, epoch: int, sizes: list[int]) -> Operation:
        return self._exchange.compose(kind, epoch, call.arguments, call.device, sizes)

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

"""Dispatch and combine over torch.distributed, for ranks that share no memory.

Each operation is one exchange of messages (``message_exchange``): setup starts it, teardown waits
for it. A token is sent once to each rank that wants it, so n routed slots share m rows.

    dispatch  [L] counts, [W] totals where rows are limited, [R] which of the m rows each row of the
              source is, counted from 1, [n, P] slot ids and weights, padding to 16 bytes, [m] rows
    combine   [n] rows in the order in which dispatch brought them
    gather    the parts, as ``packing`` lays them
    exchange  rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import MoeError, RoutingMismatchError
from ..layout import NOWHERE, RoutingPlan, align
from .groups import Group
from .message_exchange import MessageExchange, Messages, Operation
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
        config, topology, device = call.config, call.config.topology, call.device
        rows = self._encode(call, epoch, tokens)
        slot_ids, weights, num_slots = self._slots(call, tokens, plan)
        slots = torch.tensor(num_slots, dtype=torch.int32, device=device)
        target = torch.arange(self._size, device=device).repeat_interleave(slots)
        wanted = torch.zeros((self._size, len(rows)), dtype=torch.bool, device=device)
        wanted[target, config.row_of(slot_ids)] = True
        numbers = wanted.cumsum(1, dtype=torch.int32)
        num_rows = numbers[:, -1].tolist() if len(rows) else [0] * self._size
        index = wanted.nonzero()[:, 1]
        if config.per_expert:  # its rows are sorted by slot first
            index = index % config.num_slots * len(tokens.x) + index // config.num_slots
        pairs = slot_ids
        if weights is not None:
            words = weights.view(torch.int32).view(len(slot_ids), weights.itemsize // 4)
            pairs = torch.cat([slot_ids[:, None], words], dim=1)

        counts = plan.counts.split(topology.experts_per_rank)
        lists = [[slots[:0]] * topology.num_shared_ranks + [*counts], numbers.unbind()]
        if config.max_rows is not None:
            lists.insert(1, [slots] * self._size)
        lists.append([part.reshape(-1) for part in pairs.split(num_slots)])
        starts, sizes, heads = [], [], []
        for rank, (n, m) in enumerate(zip(num_slots, num_rows, strict=True)):
            used = n > 0 or config.max_rows is not None
            start = align(4 * sum(len(one[rank]) for one in lists)) if used else 0
            starts.append(start)
            sizes.append(start + m * rows.shape[1])
            heads.append((n, m, len(rows) if used else 0))
        operation = self._compose(call, "dispatch", epoch, sizes, heads)
        for rank, part in enumerate(operation.parts):
            if len(part):
                pieces = [one[rank] for one in lists]
                out = part[: starts[rank]].view(torch.int32)[: sum(map(len, pieces))]
                torch.cat(pieces, out=out)
        targets = zip(operation.parts, starts, index.split(num_rows), strict=True)
        for part, start, chosen in targets:
            if len(chosen):
                out = part[start:].view(len(chosen), -1)
                torch.index_select(rows, 0, chosen, out=out)
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
        self, call: Call, tokens: DispatchInput, plan: RoutingPlan
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
        """The routed slots in the order of ranks, for each rank in that of a dispatch.

        Returns:
            [n] int32 slot ids; [n] weights or None; [W] slots for each rank.
        """
        config, topology = call.config, call.config.topology
        num_slots = plan.counts.view(-1, topology.experts_per_rank).sum(1).tolist()
        num_slots = [0] * topology.num_shared_ranks + num_slots
        slot_ids = plan.sorted_slot_ids[: sum(num_slots)]
        weights = None
        if config.with_weights:
            assert tokens.weights is not None
            weights = tokens.weights.reshape(-1)[slot_ids].to(config.weight_dtype)
        if not topology.num_shared_experts:
            return slot_ids, weights, num_slots
        slot_ids = slot_ids + slot_ids // config.top_k * topology.num_shared_experts
        active = (tokens.expert_ids != NOWHERE).any(1).nonzero()[:, 0].int() * config.num_slots
        shared = [active + config.top_k + shared for shared in range(topology.num_shared_experts)]
        for rank in topology.shared_ranks_of(self._rank):
            num_slots[rank] = len(active)
        if weights is not None:
            ones = weights.new_ones(len(active) * topology.num_shared_experts)
            weights = torch.cat([ones, weights])
        return torch.cat([*shared, slot_ids]), weights, num_slots

    @phase("dispatch recv")
    def dispatch_recv(self, pending: Pending[DispatchInput]) -> Received:
        """Wait for the rows, and gather those of each expert."""
        call, config, device = pending.call, pending.call.config, pending.call.device
        plan = pending.state
        assert isinstance(plan, RoutingPlan)
        messages = self._receive(pending, "dispatch")
        num_slots, _, num_rows = zip(*(head.words for head in messages.heads), strict=True)
        is_shared = config.topology.is_shared_rank(self._rank)
        local = 0 if is_shared else config.topology.experts_per_rank
        before = local + (0 if config.max_rows is None else self._size)
        width = 1 + (config.weight_dtype.itemsize // 4 if config.with_weights else 0)
        lists = messages.words([0] * self._size, before + max(num_rows))
        pairs = messages.words([4 * (before + n) for n in num_rows], width * max(num_slots))
        pairs = pairs.view(self._size, -1, width) if pairs.numel() else pairs[..., None]
        weights = None
        if config.with_weights:
            words = pairs[:, :, 1:].clone(memory_format=torch.contiguous_format)
            weights = words.view(-1).view(config.weight_dtype).view(self._size, max(num_slots))
        if config.max_rows is not None:
            totals = lists[:, local:before]
            check_overflow(call, lambda rank: totals[:, rank])
        slots = torch.tensor([num_slots], dtype=torch.int32, device=device)
        counts = slots if is_shared else lists[:, :local].T.where(slots > 0, 0).contiguous()

        stride = config.row_format.stride
        # A payload lists its rows from 1 on; they follow its lists.
        starts = [
            start + (align(4 * (before + rows + width * slots)) if head.num_bytes else 0)
            for start, head, rows, slots in zip(
                messages.starts, messages.heads, num_rows, num_slots, strict=True
            )
        ]
        origins = torch.tensor([[start // 16 - stride // 16] for start in starts], device=device)
        table = lists[:, before:] * (stride // 16) + origins
        return receive(
            call,
            self._rank,
            pending.data,
            plan,
            counts,
            pairs[:, :, 0].contiguous(),
            weights,
            messages.rows(stride),
            table,
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
        fmt, source = call.config.return_format, inputs.recv_permutation.source
        order = source.argsort(stable=True)  # padding, whose source is negative, comes first
        padding, *num_rows = torch.bincount(source + 1, minlength=self._size + 1).tolist()
        sizes = [n * fmt.stride for n in num_rows]
        operation = self._compose(call, "combine", epoch, sizes, [(n, n, 0) for n in num_rows])
        parts = order[padding:].split(num_rows)
        for part, index in zip(operation.parts, parts, strict=True):
            if len(index):
                rows = part.view(len(index), fmt.stride)
                if fmt.scale_offset is None:
                    torch.index_select(inputs.y, 0, index, out=fmt.payload(rows))
                else:
                    call.steps.encode(inputs.y[index], fmt, rows)
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
        topology, plan, ids = call.config.topology, inputs.plan, inputs.expert_ids.long()
        messages = self._receive(pending, "combine")
        stride = call.config.return_format.stride
        step, device = stride // 16, ids.device
        counts = plan.counts.view(-1, topology.experts_per_rank)
        ends = counts.cumsum(1)
        sent = [0] * topology.num_shared_ranks + ends[:, -1].tolist()
        origins = torch.tensor([start // 16 for start in messages.starts], device=device)
        first = (ends - counts) * step + origins[topology.num_shared_ranks :, None]
        position = plan.position_in_expert.view(ids.shape)
        absent = position == NOWHERE
        index = first.view(-1)[ids.masked_fill(absent, 0)] + position * step
        index.masked_fill_(absent, NOWHERE)
        if topology.num_shared_experts:
            holders = topology.shared_ranks_of(self._rank)
            active = (ids != NOWHERE).any(1, keepdim=True)
            token = active.cumsum(0)
            for rank in holders:
                sent[rank] = int(active.sum())
            shared = (origins[[*holders]] + (token - 1) * step).where(active, NOWHERE)
            index = torch.cat([index, shared], dim=1)
        for rank, (mine, head) in enumerate(zip(sent, messages.heads, strict=True)):
            returned = head.words[0]
            if mine != returned:
                raise RoutingMismatchError(call.op, rank, "its experts", mine, returned)
        return finish_rows(call, inputs, messages.rows(stride), index, epilogue)

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
            write_packed(operation.parts[0], parts)
            for part in operation.parts[1:]:
                part.copy_(operation.parts[0])
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
        for part, rows in zip(operation.parts, x.split(counts), strict=True):
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
        sizes: list[int],
        words: list[tuple[int, int, int]] | None = None,
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

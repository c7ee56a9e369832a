"""What every transport does, and what goes in and out of it.

A transport moves tokens between the ranks of one group. It gets its device steps as a table, either
``ref``'s or the Triton ones, so that this package knows neither. Each operation is a setup, which
sends, and a teardown, which waits and consumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ..errors import MoeError, ReceiveOverflowError
from ..layout import DispatchWindow, Plan, Sources
from .window import MoeConfig


@dataclasses.dataclass(frozen=True)
class DeviceSteps:
    """The steps that run on the device; ``ref`` defines each."""

    plan: Callable[..., Plan]
    push: Callable[..., list[int]]
    sources: Callable[..., Sources]
    pack: Callable[..., None]
    gather_quant: Callable[..., None]
    return_push: Callable[..., list[int]]
    reduce: Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Call:
    """What every operation needs to know.

    Attributes:
        op: the public op, for error messages.
        config: sizes and formats.
        arguments: names and printable values that must be equal on all ranks.
        steps: the device steps.
    """

    op: str
    config: MoeConfig
    arguments: Mapping[str, Any]
    steps: DeviceSteps


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The input of a dispatch.

    Attributes:
        x: [T, H].
        expert_ids: [T, K] int32.
        weights: [T, K] fp32 to send along, or None.
        smooth: [NS + E, H] fp32, or None.
        exact: allocate exactly the received rows, not the capacity.
        limit: largest number of rows any rank may receive, or None.
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    exact: bool = False
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a dispatch sent from this rank, its own rows included.

    Attributes:
        rows_sent: rows written.
        rows_saved: further rows that one row per copy would have taken.
        bytes_sent: of the rows written.
        bytes_saved: of the rows saved.
    """

    rows_sent: int
    rows_saved: int
    bytes_sent: int
    bytes_saved: int


@dataclasses.dataclass(frozen=True)
class Received:
    """The output of a dispatch.

    Attributes:
        x: [A, H] rows in (local expert, source, flat position) order; [n, H] when exact.
        scales: [A] fp32, or None.
        weights: [A] fp32, or None.
        counts: [L, W] int32 rows for each local expert from each source.
        sources: the numbering of the n rows.
        bases: [W] where this rank's rows go in each source's compact combine window.
        plan: of this rank's own tokens.
        traffic: what this rank sent.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor | None
    counts: torch.Tensor
    sources: Sources
    bases: list[int]
    plan: Plan
    traffic: Traffic


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The input of a combine.

    Attributes:
        y: [A, H] expert outputs in the order of dispatch.
        sources: dispatch's numbering of the rows.
        bases: [W] rows of each source's window, or None for blocks of full size.
        expert_ids: [T, K] int32 of this rank's tokens.
        plan: their plan.
        weights: [T, K] fp32, or None for all 1.
    """

    y: torch.Tensor
    sources: Sources
    bases: list[int] | None
    expert_ids: torch.Tensor
    plan: Plan
    weights: torch.Tensor | None


@dataclasses.dataclass
class Pending:
    """An operation between setup and teardown.

    Attributes:
        call: of the setup.
        data: its input.
        epoch: its number.
        state: the transport's own.
    """

    call: Call
    data: Any
    epoch: int
    state: Any = None


class Transport(Protocol):
    """One rank's end of a group. Every rank issues the same sequence of operations."""

    name: str

    def prepare(self, call: Call, kind: str, slot_bytes: int) -> None:
        """Compare the arguments and allocate what ``kind`` needs, on all ranks together."""
        ...

    def dispatch_setup(self, call: Call, tokens: Tokens) -> Pending:
        """Send this rank's tokens."""
        ...

    def dispatch_teardown(self, pending: Pending) -> Received:
        """Wait for all ranks' tokens and pack those for this rank."""
        ...

    def combine_setup(self, call: Call, outputs: Outputs) -> Pending:
        """Send the experts' rows back."""
        ...

    def combine_teardown(self, pending: Pending, addend: torch.Tensor | None) -> torch.Tensor:
        """Wait for all ranks' rows and sum those of each token."""
        ...

    def all_to_all_v(self, op: str, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Send consecutive rows of [N, B] uint8 ``x``; return what each rank sent here."""
        ...

    def reject(self, kind: str, op: str, error: MoeError) -> None:
        """Take part in the next operation only to tell the peers that this rank cannot."""
        ...

    def raise_if_broken(self, op: str) -> None:
        """Raise ``BrokenGroupError`` after a timeout."""
        ...

    def close(self) -> None:
        """Give up memory."""
        ...


def push_tokens(
    call: Call, rank: int, tokens: Tokens, parts: list[DispatchWindow]
) -> tuple[Plan, list[int]]:
    """Plan this rank's tokens and write them into its part of every window.

    Returns:
        The plan, and the rows written for each rank.
    """
    config, topology = call.config, call.config.topology
    plan = call.steps.plan(tokens.expert_ids, topology.num_experts)
    written = call.steps.push(
        tokens.x,
        tokens.expert_ids,
        tokens.weights,
        tokens.smooth,
        config.row_format,
        plan,
        parts,
        experts_per_rank=topology.experts_per_rank,
        shared_targets=topology.shared_ranks_of(rank),
        num_shared_ranks=topology.num_shared_ranks,
    )
    return plan, written


def traffic(config: MoeConfig, num_tokens: int, written: list[int]) -> Traffic:
    """Count what a push wrote."""
    copies = num_tokens * (config.top_k + config.topology.num_shared_experts)
    sent, stride = sum(written), config.row_format.stride
    return Traffic(sent, copies - sent, sent * stride, (copies - sent) * stride)


def received_counts(config: MoeConfig, rank: int, window: DispatchWindow) -> torch.Tensor:
    """[L, W] int32 rows for each local expert of ``rank`` from each source."""
    topology = config.topology
    if not topology.is_shared_rank(rank):
        local = topology.local_experts(rank)
        return window.counts[:, local.start : local.stop].T.contiguous()
    serves = [topology.serves(rank, source) for source in range(topology.world_size)]
    return (window.num_tokens.T * torch.tensor(serves, device=window.counts.device)).int()


def check_overflow(call: Call, limit: int, window: DispatchWindow) -> None:
    """Raise on every rank alike when any rank receives more than ``limit`` rows."""
    for rank in range(call.config.topology.world_size):
        rows = int(received_counts(call.config, rank, window).sum())
        if rows > limit:
            raise ReceiveOverflowError(call.op, rank, rows, limit)


def receive(
    call: Call, rank: int, tokens: Tokens, plan: Plan, written: list[int], window: DispatchWindow
) -> Received:
    """Pack a complete window into the outputs of dispatch."""
    config, topology = call.config, call.config.topology
    shared = topology.is_shared_rank(rank)
    if tokens.limit is not None:
        check_overflow(call, tokens.limit, window)
    counts = received_counts(config, rank, window)
    sources = call.steps.sources(counts)
    x, scales, weights = allocate_received(call, rank, tokens, sources)
    call.steps.pack(window, sources, config.row_format, x, scales, weights, shared=shared)
    if shared:
        bases = [config.combine.shared_base(rank)] * topology.world_size
    else:
        bases = window.counts[:, : topology.local_experts(rank).start].sum(1).tolist()
    sent = traffic(config, tokens.x.shape[0], written)
    return Received(x, scales, weights, counts, sources, bases, plan, sent)


def allocate_received(
    call: Call, rank: int, tokens: Tokens, sources: Sources
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Uninitialised x, scales and weights of a dispatch."""
    config = call.config
    rows = config.topology.capacity(rank, config.max_tokens, config.top_k)
    if tokens.exact:
        rows = sources.source.numel()
    elif tokens.limit is not None:
        rows = min(rows, tokens.limit)
    x = tokens.x.new_empty((rows, config.hidden), dtype=config.row_format.dtype)
    scales = x.new_empty(rows, dtype=torch.float32) if config.quant else None
    weights = x.new_empty(rows, dtype=torch.float32) if config.with_weights else None
    return x, scales, weights


def return_bases(config: MoeConfig, rank: int, outputs: Outputs) -> list[int]:
    """Where the rows of ``rank`` go in each source's combine window."""
    world = config.topology.world_size
    if config.topology.is_shared_rank(rank):
        return [config.combine.shared_base(rank)] * world
    if config.compact:
        assert outputs.bases is not None
        return outputs.bases
    return [config.combine.block_base(rank)] * world


def combine_bases(config: MoeConfig, plan: Plan) -> list[int]:
    """[W] where the block of each rank begins in this rank's own combine window."""
    topology, layout = config.topology, config.combine
    shared = [layout.shared_base(rank) for rank in range(topology.num_shared_ranks)]
    moe = range(topology.num_shared_ranks, topology.world_size)
    if not config.compact:
        return shared + [layout.block_base(rank) for rank in moe]
    per_rank = plan.counts.view(len(moe), topology.experts_per_rank).sum(1)
    return shared + (per_rank.cumsum(0) - per_rank).tolist()


def reduce_rows(
    call: Call, outputs: Outputs, rows: torch.Tensor, addend: torch.Tensor | None
) -> torch.Tensor:
    """The weighted sum over a complete combine window."""
    out = outputs.y.new_empty((outputs.expert_ids.shape[0], call.config.hidden))
    index = combine_index(call.config, outputs.expert_ids, outputs.plan)
    call.steps.reduce(rows, index, outputs.weights, addend, out)
    return out


def combine_index(config: MoeConfig, expert_ids: torch.Tensor, plan: Plan) -> torch.Tensor:
    """[T, K + NS] int64 rows of the combine window that hold each token's copies."""
    topology, layout = config.topology, config.combine
    num_tokens = expert_ids.shape[0]
    first = (plan.counts.cumsum(0) - plan.counts).view(-1, topology.experts_per_rank)
    if not config.compact:
        blocks = torch.arange(first.shape[0], device=first.device) * config.max_copies
        first = first - first[:, :1] + blocks[:, None]
    routed = first.reshape(-1)[expert_ids.long()] + plan.expand_idx.view(expert_ids.shape)
    token = torch.arange(num_tokens, device=expert_ids.device)[:, None]
    shared = torch.arange(topology.num_shared_experts, device=expert_ids.device)
    return torch.cat([routed, layout.routed_rows + shared * config.max_tokens + token], dim=1)

"""What every transport does, and what goes in and out of it.

A transport moves tokens between the ranks of one group. It gets its device steps as a table, either
``ref``'s or the Triton ones, so that this package knows neither. Each operation is a setup, which
sends, and a teardown, which waits and consumes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from ..errors import MoeError, ReceiveOverflowError, RoutingMismatchError
from ..layout import DispatchHeader, Plan, Sources
from .window import MoeConfig

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class DeviceSteps:
    """The steps that run on the device; ``ref`` defines each.

    ``pack`` and ``reduce`` gather from one tensor by index. In host memory that tensor can span the
    windows of all ranks; steps for memory that needs a pointer per rank will take a table instead.
    """

    plan: Callable[..., Plan]
    push: Callable[..., None]
    sources: Callable[..., Sources]
    pack: Callable[..., None]
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
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a dispatch asks of the wires between ranks, the one to the rank itself included.

    Over windows in host memory nothing is sent: a row is written once, and read for each copy.

    Attributes:
        rows_sent: one for each token and rank that wants it; with scales per expert, one per copy.
        rows_saved: further rows that one per copy would have taken.
        bytes_sent: of the rows sent.
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
        plan: of this rank's own tokens.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor | None
    counts: torch.Tensor
    sources: Sources
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The input of a combine.

    Attributes:
        y: [A, H] expert outputs in the order of dispatch.
        sources: dispatch's numbering of the rows.
        expert_ids: [T, K] int32 of this rank's tokens.
        plan: their plan.
        weights: [T, K] fp32, or None for all 1.
        lent: y may be what ``output_rows`` gave since the last combine.
    """

    y: torch.Tensor
    sources: Sources
    expert_ids: torch.Tensor
    plan: Plan
    weights: torch.Tensor | None
    lent: bool = False


@dataclasses.dataclass
class Pending:
    """An operation between setup and teardown.

    Attributes:
        owner: the transport that set it up, and that only can tear it down.
        call: of the setup.
        data: its input.
        epoch: its number.
        state: the transport's own.
    """

    owner: Transport
    call: Call
    data: Any
    epoch: int
    state: Any = None


def outside_autograd(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a transport's method without autograd, whatever mode the caller is in.

    Windows outlive the call, so that views of them must not be inference tensors either.
    """

    @functools.wraps(method)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped


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

    def output_rows(self, config: MoeConfig, num_rows: int) -> torch.Tensor | None:
        """[num_rows, H] memory from which the next combine need not copy, if there is such."""
        ...

    def all_to_all_v(self, op: str, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Send consecutive rows of [N, B] uint8 ``x``; return what each rank sent here."""
        ...

    def window_bytes(self, kind: str) -> int:
        """Memory that this rank has set aside for ``kind``."""
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


def write_tokens(
    call: Call, rank: int, tokens: Tokens, rows: torch.Tensor, headers: list[DispatchHeader]
) -> Plan:
    """Plan this rank's tokens, write them into its rows and its headers."""
    topology = call.config.topology
    plan = call.steps.plan(tokens.expert_ids, topology.num_experts)
    call.steps.push(
        tokens.x,
        tokens.expert_ids,
        tokens.weights,
        tokens.smooth,
        call.config.row_format,
        plan,
        rows,
        headers,
        experts_per_rank=topology.experts_per_rank,
        shared_targets=topology.shared_ranks_of(rank),
        num_shared_ranks=topology.num_shared_ranks,
    )
    return plan


def traffic(config: MoeConfig, tokens: Tokens) -> Traffic:
    """Count what a dispatch of ``tokens`` moves."""
    num_tokens, top_k = tokens.expert_ids.shape
    shared = num_tokens * config.topology.num_shared_experts
    copies = num_tokens * top_k
    sent = copies
    if tokens.smooth is None:
        ranks = (tokens.expert_ids // config.topology.experts_per_rank).sort(dim=1).values
        sent -= int((ranks[:, 1:] == ranks[:, :-1]).sum())
    stride = config.row_format.stride
    return Traffic(sent + shared, copies - sent, (sent + shared) * stride, (copies - sent) * stride)


def received_counts(config: MoeConfig, rank: int, headers: DispatchHeader) -> torch.Tensor:
    """[L, W] int32 rows for each local expert of ``rank`` from each source."""
    topology = config.topology
    if not topology.is_shared_rank(rank):
        local = topology.local_experts(rank)
        return headers.counts[:, local.start : local.stop].T.contiguous()
    serves = [topology.serves(rank, source) for source in range(topology.world_size)]
    return (headers.num_tokens.T * torch.tensor(serves, device=headers.counts.device)).int()


def receive(
    call: Call,
    rank: int,
    tokens: Tokens,
    plan: Plan,
    headers: DispatchHeader,
    locate: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Received:
    """Pack what all ranks sent into the outputs of dispatch.

    Args:
        call: the call.
        rank: this rank.
        tokens: its input.
        plan: of its tokens.
        headers: of all sources.
        locate: from the source of each received row, and its number among the source's rows, to a
            tensor of rows and the index of each.
    """
    config = call.config
    if config.max_rows is not None:
        _check_overflow(call, config.max_rows, headers)
    counts = received_counts(config, rank, headers)
    sources = call.steps.sources(counts)
    source, copy = sources.source, sources.copy
    num_rows = len(source) if tokens.exact else config.capacity(rank)
    x = tokens.x.new_empty((num_rows, config.hidden), dtype=config.row_format.dtype)
    scales = x.new_empty(num_rows, dtype=torch.float32) if config.quant else None
    rows, index = locate(source, headers.slots[source, copy])
    call.steps.pack(rows, index, config.row_format, x, scales)
    weights = None
    if headers.weights is not None:
        weights = x.new_empty(num_rows, dtype=torch.float32)
        weights[: len(source)] = headers.weights[source, copy]
    return Received(x, scales, weights, counts, sources, plan)


def _check_overflow(call: Call, limit: int, headers: DispatchHeader) -> None:
    """Raise on every rank alike when any rank receives more than ``limit`` rows."""
    for rank in range(call.config.topology.world_size):
        rows = int(received_counts(call.config, rank, headers).sum())
        if rows > limit:
            raise ReceiveOverflowError(call.op, rank, rows, limit)


def reduce_rows(
    call: Call,
    outputs: Outputs,
    rows: torch.Tensor,
    index: torch.Tensor,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    """The weighted sum of the rows that [T, K + NS] ``index`` names."""
    out = outputs.y.new_empty((len(index), call.config.hidden))
    call.steps.reduce(rows, index, outputs.weights, addend, out)
    return out


def rows_in_plan_order(config: MoeConfig, outputs: Outputs) -> torch.Tensor:
    """[T, K + NS] int64 where each token's rows are, when they lie in the order of its plan.

    That is by (expert, flat position), followed by all tokens for each shared expert.
    """
    plan, shape = outputs.plan, outputs.expert_ids.shape
    first = plan.counts.cumsum(0) - plan.counts
    routed = first[outputs.expert_ids.long()] + plan.expand_idx.view(shape)
    token = torch.arange(shape[0], device=routed.device)[:, None]
    shared = torch.arange(config.topology.num_shared_experts, device=routed.device)
    return torch.cat([routed, shape[0] * (shape[1] + shared) + token], dim=1)


def check_returns(call: Call, rank: int, outputs: Outputs, ends: torch.Tensor) -> None:
    """Raise unless every rank returns as many rows as ``rank`` sent it, expert by expert.

    Args:
        call: the call.
        rank: this rank, the source of the tokens.
        outputs: its input to combine.
        ends: [W, L*W] every rank's prefix sums by (local expert, source).
    """
    topology = call.config.topology
    local, first = topology.experts_per_rank, topology.num_shared_ranks
    counts = ends.diff(dim=1, prepend=ends.new_zeros((len(ends), 1)))
    returned = counts[first:].view(-1, local, topology.world_size)[..., rank].reshape(-1)
    wrong = (returned != outputs.plan.counts).nonzero()
    if len(wrong):
        expert = int(wrong[0])
        sent, got = int(outputs.plan.counts[expert]), int(returned[expert])
        raise RoutingMismatchError(call.op, first + expert // local, f"expert {expert}", sent, got)
    tokens = len(outputs.expert_ids)
    for shared, holder in enumerate(topology.shared_ranks_of(rank)):
        got = int(counts[holder, rank])
        if got != tokens:
            raise RoutingMismatchError(call.op, holder, f"shared expert {shared}", tokens, got)


def rows_at_holders(
    config: MoeConfig, rank: int, outputs: Outputs, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rank holds each token's rows after the experts, and at which place.

    Args:
        config: sizes.
        rank: this rank, the source of the tokens.
        outputs: its input to combine.
        ends: [W, L*W] every rank's prefix sums.

    Returns:
        holder: [T, K + NS] int64.
        row: [T, K + NS] int64 among the holder's rows.
    """
    topology, ids = config.topology, outputs.expert_ids.long()
    local = topology.experts_per_rank
    starts = torch.nn.functional.pad(ends, (1, 0)).long()  # entry i: the rows before group i
    holder = topology.num_shared_ranks + ids // local
    row = starts[holder, ids % local * topology.world_size + rank]
    row = row + outputs.plan.expand_idx.view(ids.shape)
    shared = torch.tensor(topology.shared_ranks_of(rank), dtype=torch.long, device=ids.device)
    shared = shared.expand(len(ids), -1)
    token = torch.arange(len(ids), device=ids.device)[:, None]
    return (
        torch.cat([holder, shared], dim=1),
        torch.cat([row, starts[shared, rank] + token], dim=1),
    )

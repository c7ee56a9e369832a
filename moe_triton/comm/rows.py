"""Which row is where: what every transport does with tokens before they travel and after that."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import ReceiveOverflowError, RoutingMismatchError
from ..layout import NOWHERE, DispatchHeader, Plan
from .transport import Call, Finish, Outputs, Received, Tokens, Traffic
from .window import MoeConfig


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
    topology, ids = config.topology, tokens.expert_ids
    routed = (ids >= 0) & (ids < topology.num_experts)
    active = int((ids != NOWHERE).any(1).sum())
    shared = active * topology.num_shared_experts
    copies = sent = int(routed.sum())
    if not config.per_expert:
        ranks = (ids // topology.experts_per_rank).where(routed, -1).sort(dim=1).values
        sent -= int(((ranks[:, 1:] == ranks[:, :-1]) & (ranks[:, 1:] >= 0)).sum())
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
    sources = call.steps.sources(counts, config.alignment)
    n = len(sources.source)
    num_rows = n if tokens.num_rows is None else tokens.num_rows
    fmt, scales = config.row_format, None
    x = tokens.x.new_empty((num_rows, config.hidden), dtype=fmt.dtype)
    if fmt.scale_offset is not None:
        scales = x.new_empty(fmt.scale_shape(num_rows), dtype=fmt.scale_dtype)
    # Without alignment every row is a real one, and none is a row of padding.
    real = (sources.source != NOWHERE).nonzero()[:, 0]
    source, number = sources.source[real], sources.copy[real]
    copies = headers.copies[source, number]
    rows, index = locate(source, config.row_of(copies))
    call.steps.pack(rows, _spread(index, real, n), fmt, x, scales)
    weights = None
    if headers.weights is not None:
        weights = x.new_empty(num_rows, dtype=config.weight_dtype)
        weights[:n] = 0
        weights[real] = headers.weights[source, number]
    return Received(x, scales, weights, counts, sources, _spread(copies, real, n), plan)


def _spread(values: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    """[size] with the values at their places and ``NOWHERE`` between them."""
    return values.new_full((size,), NOWHERE).index_copy_(0, places, values)


def _check_overflow(call: Call, limit: int, headers: DispatchHeader) -> None:
    """Raise on every rank alike when any rank receives more than ``limit`` rows."""
    for rank in range(call.config.topology.world_size):
        rows = int(received_counts(call.config, rank, headers).sum())
        if rows > limit:
            raise ReceiveOverflowError(call.op, rank, rows, limit)


def finish_rows(
    call: Call, outputs: Outputs, rows: torch.Tensor, index: torch.Tensor, finish: Finish
) -> torch.Tensor:
    """The weighted sum of the rows that [T, K + NS] ``index`` names, or all of them."""
    config, fmt = call.config, call.config.return_format
    if finish.apart:
        apart = outputs.y.new_empty((*index.shape, config.hidden))
        call.steps.pack(rows, index.reshape(-1), fmt, apart.view(-1, config.hidden))
        return apart
    out = outputs.y.new_empty((len(index), config.hidden))
    weights, special, addend = outputs.weights, finish.special, finish.addend
    call.steps.reduce(rows, index, fmt, weights, special, addend, out, finish.norm)
    return out


def as_rows(call: Call, y: torch.Tensor) -> torch.Tensor:
    """[n, stride] uint8 rows in the way they return, without a copy where y already is that."""
    fmt = call.config.return_format
    if fmt.scheme == "none" and y.stride(1) == 1 and y.shape[1] * y.itemsize == fmt.stride:
        return y.view(torch.uint8)
    rows = torch.empty((len(y), fmt.stride), dtype=torch.uint8, device=y.device)
    call.steps.encode(y, fmt, rows)
    return rows


def active_places(expert_ids: torch.Tensor) -> torch.Tensor:
    """[T, 1] int64 number of each token among those that take part, or ``NOWHERE``."""
    active = (expert_ids != NOWHERE).any(1, keepdim=True)
    return (active.cumsum(0) - 1).where(active, NOWHERE)


def rows_in_plan_order(config: MoeConfig, outputs: Outputs) -> torch.Tensor:
    """[T, K + NS] int64 where each token's rows are, when they lie in the order of its plan.

    That is by (expert, flat position), followed by all tokens that take part for each shared
    expert. ``NOWHERE`` for a slot without a row.
    """
    plan, ids = outputs.plan, outputs.expert_ids.long()
    place = plan.expand_idx.view(ids.shape)
    sent = place != NOWHERE
    first = plan.counts.cumsum(0) - plan.counts
    routed = (first[ids.where(sent, 0)] + place).where(sent, NOWHERE)
    token = active_places(ids)
    active = token != NOWHERE
    shared = torch.arange(config.topology.num_shared_experts, device=ids.device)
    start = plan.counts.sum() + active.sum() * shared
    return torch.cat([routed, (start + token).where(active, NOWHERE)], dim=1)


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
    tokens = int((outputs.expert_ids != NOWHERE).any(1).sum())
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
        row: [T, K + NS] int64 among the holder's rows, or ``NOWHERE``.
    """
    topology, ids = config.topology, outputs.expert_ids.long()
    local = topology.experts_per_rank
    starts = _group_starts(ends.view(len(ends), local, -1), config.alignment)
    place = outputs.plan.expand_idx.view(ids.shape)
    sent = place != NOWHERE
    expert = ids.where(sent, 0)
    holder = topology.num_shared_ranks + expert // local
    row = (starts[holder, expert % local, rank] + place).where(sent, NOWHERE)
    shared = torch.tensor(topology.shared_ranks_of(rank), dtype=torch.long, device=ids.device)
    token = active_places(ids)
    shared_row = (starts[shared, 0, rank] + token).where(token != NOWHERE, NOWHERE)
    return (
        torch.cat([holder, shared.expand(len(ids), -1)], dim=1),
        torch.cat([row, shared_row], dim=1),
    )


def _group_starts(ends: torch.Tensor, alignment: int) -> torch.Tensor:
    """The first row of each group from [W, L, W] prefix sums, int64 of that shape."""
    flat = ends.flatten(1).long()
    starts = torch.nn.functional.pad(flat, (1, 0))[:, :-1].view(ends.shape)
    if alignment == 1:
        return starts
    rows = ends[..., -1].long() - starts[..., 0]
    padding = -rows % alignment
    return starts + (padding.cumsum(1) - padding)[..., None]

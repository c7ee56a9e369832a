"""Steps common to the transports: plan and write tokens, place received rows, sum combine rows."""

from __future__ import annotations

import torch

from ..errors import ReceiveOverflowError
from ..layout import NOWHERE, RecvPermutation, RoutingCopies, RoutingPlan, RowFormat
from .transport import (
    Call,
    CombineEpilogue,
    CombineInput,
    DispatchInput,
    Received,
    Traffic,
)
from .window import MoeConfig


def copies_of(tokens: DispatchInput) -> tuple[RoutingCopies | None, DispatchInput]:
    """Outputs for copies of the routing, where the input asks; and the input with the copies."""
    ids, weights = tokens.expert_ids, tokens.weights
    if not tokens.copy_routing:
        return None, tokens
    own_ids = torch.empty(*ids.shape, dtype=torch.int32, device=ids.device)
    own_weights = None
    if weights is not None:
        own_weights = torch.empty(*ids.shape, dtype=weights.dtype, device=ids.device)
    own = tokens._replace(expert_ids=own_ids, weights=own_weights, copy_routing=False)
    return RoutingCopies(own_ids, weights, own_weights), own


def plan_tokens(call: Call, tokens: DispatchInput) -> tuple[RoutingPlan, DispatchInput]:
    """Plan this rank's tokens; the input comes back with its own ids and weights where it asks."""
    copies, own = copies_of(tokens)
    num_experts = call.config.topology.num_experts
    return call.steps.routing_plan(tokens.expert_ids, num_experts, copies), own


def traffic(config: MoeConfig, tokens: DispatchInput) -> Traffic:
    """Rows and bytes that a dispatch of ``tokens`` moves."""
    topology, ids = config.topology, tokens.expert_ids
    routed = (ids >= 0) & (ids < topology.num_experts)
    active = int((ids != NOWHERE).any(1).sum())
    shared = active * topology.num_shared_experts
    slot_ids = sent = int(routed.sum())
    if not config.per_expert:
        ranks = (ids // topology.experts_per_rank).where(routed, -1).sort(dim=1).values
        sent -= int(((ranks[:, 1:] == ranks[:, :-1]) & (ranks[:, 1:] >= 0)).sum())
    stride = config.row_format.stride
    return Traffic(
        sent + shared, slot_ids - sent, (sent + shared) * stride, (slot_ids - sent) * stride
    )


def capacity_of(call: Call, rank: int, tokens: DispatchInput) -> int | None:
    """Rows to number; None for the exact number, which the host reads from the device."""
    if tokens.num_rows is None or not call.fixed_shapes:
        return None
    return min(tokens.num_rows, call.config.capacity(rank))


def row_count(call: Call, recv_permutation: RecvPermutation) -> torch.Tensor | None:
    """[1] int32 number of valid rows, or None where tensors hold exactly the valid rows."""
    return recv_permutation.offsets[-1:] if call.fixed_shapes else None


def new_rows(call: Call, num_rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Allocate dispatch's output rows and their scales."""
    fmt, device = call.config.row_format, call.device
    x = torch.empty(num_rows, fmt.hidden, dtype=fmt.dtype, device=device)
    if fmt.scale_offset is None:
        return x, None
    return x, torch.empty(*fmt.scale_shape(num_rows), dtype=fmt.scale_dtype, device=device)


def receive(
    call: Call,
    rank: int,
    tokens: DispatchInput,
    plan: RoutingPlan,
    counts: torch.Tensor,
    slot_ids: torch.Tensor,
    weights: torch.Tensor | None,
    rows: torch.Tensor,
    table: torch.Tensor,
) -> Received:
    """Gather the rows that all ranks sent into the outputs of dispatch.

    Args:
        call: the call.
        rank: this rank.
        tokens: its input.
        plan: of its tokens.
        counts: [L, W] int32 rows for each local expert from each source.
        slot_ids: [W, C] int32 the sources' lists of routed slots for this rank.
        weights: [W, C] their weights, or None.
        rows: the sources' rows.
        table: [W, R] int64 the index in ``rows`` of each source's row.
    """
    config, steps = call.config, call.steps
    found = steps.recv_row_index(
        counts,
        slot_ids,
        weights,
        table=table,
        slots_per_row=1 if config.per_expert else config.num_slots,
        alignment=config.alignment,
        capacity=capacity_of(call, rank, tokens),
        load=tokens.load,
        totals_dtype=tokens.totals_dtype,
    )
    n = len(found.row_index)
    num_rows = n if tokens.num_rows is None else tokens.num_rows
    x, scales = new_rows(call, num_rows)
    count = row_count(call, found.recv_permutation)
    steps.gather_rows(rows, found.row_index, config.row_format, x, scales, count)
    weights = padded(found.weights, num_rows)
    return Received(
        x, scales, weights, counts, found.recv_permutation, found.slot_ids, found.totals, plan
    )


def padded(weights: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
    """[n] as [num_rows], garbage after the n-th."""
    if weights is None or weights.shape[0] == num_rows:
        return weights
    longer = weights.new_empty(num_rows)
    longer[: len(weights)] = weights
    return longer


def check_overflow(call: Call, totals: list[int]) -> None:
    """Raise on every rank alike when any rank receives more rows than the call allows.

    Args:
        call: the call.
        totals: rows that each rank receives.
    """
    limit = call.config.max_rows
    if limit is not None:
        for rank, rows in enumerate(totals):
            if rows > limit:
                raise ReceiveOverflowError(call.op, rank, rows, limit)


def finish_rows(
    call: Call,
    outputs: CombineInput,
    rows: torch.Tensor,
    index: torch.Tensor,
    finish: CombineEpilogue,
) -> torch.Tensor:
    """The weighted sum of the rows that [T, K + NS] ``index`` names, or the rows apart."""
    config, fmt = call.config, call.config.return_format
    if finish.apart:
        apart = outputs.y.new_empty((*index.shape, config.hidden))
        call.steps.gather_rows(rows, index.reshape(-1), fmt, apart.view(-1, config.hidden))
        return apart
    out = torch.empty(index.shape[0], config.hidden, dtype=outputs.y.dtype, device=call.device)
    weights, special, addend = outputs.weights, finish.special, finish.addend
    call.steps.weighted_sum(rows, index, fmt, weights, special, addend, out, finish.norm)
    return out


def as_rows(
    call: Call, y: torch.Tensor, recv_permutation: RecvPermutation | None, fmt: RowFormat
) -> torch.Tensor:
    """[n, stride] uint8 rows of a format; a view of y where y has it already.

    Of received rows, only those that ``recv_permutation`` numbers are made.
    """
    if fmt.scheme == "none" and y.stride(1) == 1 and y.shape[1] * y.itemsize == fmt.stride:
        return y.view(torch.uint8)
    rows = torch.empty(y.shape[0], fmt.stride, dtype=torch.uint8, device=y.device)
    count = None if recv_permutation is None else row_count(call, recv_permutation)
    call.steps.encode(y, fmt, rows, count=count)
    return rows

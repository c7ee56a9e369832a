"""Rows from one place to another: into a rank's windows, and from all ranks' windows out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import FLOAT8, NOWHERE, DispatchHeader, RoutingPlan, RowFormat
from .quantize import encode, encode_apart


def dispatch_send(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    smooth_scales: torch.Tensor | None,
    fmt: RowFormat,
    routing: RoutingPlan,
    rows: torch.Tensor,
    headers: Sequence[DispatchHeader],
    *,
    experts_per_rank: int,
    shared_targets: Sequence[int],
    num_shared_ranks: int,
) -> None:
    """Write this rank's tokens where all ranks can read them, and tell each rank which are for it.

    A token is written once, however many ranks and experts want it. Only when each expert has
    factors of its own do the copies differ, and then there is a row for each.

    Args:
        x: [T, H] tokens.
        expert_ids: [T, K].
        weights: [T, K] to send along, or None.
        smooth_scales: [1] or [H] fp32 factors of all copies, [NS + E, H] factors of each expert,
            those of shared experts first; or None.
        fmt: the format of the rows.
        routing: the plan of ``expert_ids``.
        rows: [R, stride] uint8 output; row t is token t, or with factors of each expert row
            t * (K + NS) + k slot k of it.
        headers: this rank's header in every rank's window.
        experts_per_rank: L of the MoE ranks.
        shared_targets: the rank that gets all tokens, for each shared expert.
        num_shared_ranks: S; the MoE ranks come after them.
    """
    num_tokens, top_k = expert_ids.shape
    num_shared = len(shared_targets)
    num_slots = top_k + num_shared
    if smooth_scales is None or smooth_scales.dim() == 1:
        encode(x, fmt, rows[:num_tokens], smooth_scales)
    else:
        slots = rows[: num_tokens * num_slots].unflatten(0, (num_tokens, num_slots))
        # Slots that are not sent get some expert's factors: nobody reads them.
        expert = expert_ids.long().clamp(0, len(routing.counts) - 1)
        for k in range(top_k):
            encode(x, fmt, slots[:, k], smooth_scales[num_shared + expert[:, k]])
        for shared in range(num_shared):
            encode(x, fmt, slots[:, top_k + shared], smooth_scales[shared])

    order = routing.sorted_slot_ids
    slot_ids = order + order // top_k * num_shared  # t * K + k becomes t * (K + NS) + k
    ordered = None if weights is None else weights.reshape(-1)[order.long()]
    start = 0
    per_rank = routing.counts.view(-1, experts_per_rank).sum(1).tolist()
    for header, count in zip(headers[num_shared_ranks:], per_rank, strict=True):
        header.slot_ids[:count] = slot_ids[start : start + count]
        if ordered is not None and header.weights is not None:
            header.weights[:count] = ordered[start : start + count]
        start += count
    active = (expert_ids != NOWHERE).any(1).nonzero()[:, 0]
    for shared, rank in enumerate(shared_targets):
        header = headers[rank]
        header.slot_ids[: len(active)] = active * num_slots + top_k + shared
        if header.weights is not None:
            header.weights[: len(active)] = 1.0
    for header in headers:
        header.num_tokens[0] = len(active)
        header.counts.copy_(routing.counts)


def gather_rows(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    x: torch.Tensor,
    scales: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Gather rows from wherever they are into the outputs of dispatch.

    Args:
        rows: [N, stride] uint8; rows may overlap, as they do when N counts every 16 bytes.
        index: [n] int64 rows to take; ``NOWHERE`` makes a row of zeros.
        fmt: their format.
        x: [A, H] output, of the payload's dtype; rows after the n-th stay untouched.
        scales: [A] output of the scales' dtype, [A, C] where a row has several, or None.
        count: [1] int32: only so many rows are taken; None for all n.
    """
    if count is not None:
        index = index[: int(count)]
    n, payload = index.numel(), fmt.payload(rows)
    if fmt.dtype in FLOAT8:
        # torch selects and fills bytes, not every float8.
        payload, x = payload.view(torch.uint8), x.view(torch.uint8)
    absent = (index == NOWHERE).nonzero()[:, 0]
    if len(absent) == n:
        x[:n] = 0
        if scales is not None:
            scales[:n] = 0
        return
    # What is absent takes some row, and is cleared after that.
    index = index.clamp(min=0) if len(absent) else index
    torch.index_select(payload, 0, index, out=x[:n])
    if scales is not None:
        scales = scales.view(len(scales), fmt.num_scales)
        scales[:n] = fmt.scales(rows)[index]
    for out in (x, scales) if len(absent) else ():
        if out is not None:
            out.index_fill_(0, absent, 0)


def zero_padding(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor | None = None) -> None:
    """Zero the rows of [A, C] ``x`` that ``index`` leaves empty.

    Args:
        x: changed in place; rows after the n-th stay untouched.
        index: [n], negative for a row to zero.
        count: [1] int32: only so many rows are looked at; None for all n.
    """
    if count is not None:
        index = index[: int(count)]
    # torch fills bytes, not every float8.
    x.view(torch.uint8).index_fill_(0, (index < 0).nonzero()[:, 0], 0)


def gather_quant(
    x: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    smooth_scales: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Write each token to all rows that want it, in the format of dispatched rows.

    What push and pack do together where the ranks of tokens and experts are the same.

    Args:
        x: [T, H] tokens.
        index: [T, K + NS] int64 row of ``out`` for each slot of each token, or ``NOWHERE``. A row
            is named once at most.
        fmt: scheme, dtypes and block of the rows; its stride is not looked at.
        smooth_scales: [1] or [H] fp32 factors of all copies, [NS + E, H] factors of each expert,
            those of shared experts first; or None.
        expert_ids: [T, K], needed where ``smooth_scales`` has a row for each expert.
        out: [A, H] output, of the payload's dtype; rows that are not named stay untouched.
        scales: [A] or [A, C] output of the scales' dtype, or None for a scheme without scales.
    """
    num_tokens, num_slots = index.shape
    codes = x.new_empty((num_tokens, fmt.hidden), dtype=fmt.dtype)
    found = None if scales is None else scales.new_empty((num_tokens, fmt.num_scales))
    for slot in range(num_slots):
        if smooth_scales is not None and smooth_scales.dim() == 2:
            assert expert_ids is not None
            top_k = expert_ids.shape[1]
            num_shared = num_slots - top_k
            if slot < top_k:
                # Slots that are not sent get some expert's factors: nobody reads them.
                expert = expert_ids[:, slot].long().clamp(0, len(smooth_scales) - num_shared - 1)
                factors = smooth_scales[num_shared + expert]
            else:
                factors = smooth_scales[slot - top_k]
            encode_apart(x, fmt, codes, found, factors)
        elif slot == 0:
            encode_apart(x, fmt, codes, found, smooth_scales)
        token = (index[:, slot] != NOWHERE).nonzero()[:, 0]
        row = index[token, slot].long()
        # torch has no indexed copy of every float8; bytes it has.
        out.view(torch.uint8)[row] = codes.view(torch.uint8)[token]
        if scales is not None and found is not None:
            scales.view(len(scales), fmt.num_scales)[row] = found[token]

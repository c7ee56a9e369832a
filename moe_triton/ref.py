"""The definition of every step in plain PyTorch: CPU back end, test oracle, bench baseline.

Tensors in, tensors out. A kernel computes the same bits; ``comm`` calls either set of steps through
one table, so the names here are the names of that table.

Letters: T tokens of this rank, K experts per token, H hidden size, E routed experts, W ranks,
L experts of one rank, n rows this rank receives. All index tensors are int32 unless said otherwise.
Source: the semantics of Ascend's ``npu_moe_distribute_*`` family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .layout import NOWHERE, DispatchHeader, Plan, RowFormat, Sources, SpecialExperts

INT8_MAX = 127.0
_BLOCK = 2**17  # elements worked on together, so that fp32 intermediates stay in a core's L2 cache


def exclusive_cumsum(counts: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Sum of the entries before each one, in the dtype of ``counts``."""
    return counts.cumsum(dim, dtype=counts.dtype) - counts


def _blocks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Slices of as many rows as make one block."""
    rows = max(_BLOCK // max(row_elements, 1), 1)
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What rows of ``dtype`` are summed and weighted in: float32, for float64 float64."""
    return torch.promote_types(dtype, torch.float32)


def plan(expert_ids: torch.Tensor, num_experts: int) -> Plan:
    """Count and rank the copies of [T, K] int32 ``expert_ids``; ids beyond [0, E) are not sent."""
    ids = expert_ids.reshape(-1).long()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    counts = torch.bincount(ids, minlength=num_experts + 1).int()
    order = torch.argsort(ids, stable=True)
    position = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    expand_idx = torch.empty_like(position)
    expand_idx[order] = position - exclusive_cumsum(counts)[ids[order]]
    expand_idx.masked_fill_(ids == num_experts, NOWHERE)
    return Plan(counts[:num_experts], expand_idx, order.int())


def quantize_int8(
    x: torch.Tensor, smooth: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row to int8 with a scale of its own.

        t = x * smooth;  s = 127 / max |t|;  q = round_half_even(t * s);  scale = 1 / s

    Args:
        x: [R, H] fp16, bf16 or fp32.
        smooth: [R, H] or [H] fp32, or None for no factor.

    Returns:
        q: [R, H] int8, such that q * scale / smooth approximates x.
        scale: [R] fp32. A row whose factor s overflows (all zeros, or nearly) gives zeros, scale 0.
    """
    q = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_empty(len(x), dtype=torch.float32)
    for rows in _blocks(*x.shape):
        t = x[rows].float()
        if smooth is not None:
            t = t * (smooth if smooth.dim() == 1 else smooth[rows])
        amax = torch.maximum(t.amax(dim=1), -t.amin(dim=1)).abs()  # not -0.0
        # One division: of a number over a tensor torch makes 127 * (1 / t), which rounds twice.
        factor = torch.full_like(amax, INT8_MAX) / amax
        q[rows] = (t * factor.where(torch.isfinite(factor), 0.0)[:, None]).round_()
        scale[rows] = factor.reciprocal()
    return q, scale


def quantize_blocks(
    x: torch.Tensor, block: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each ``block`` consecutive elements of a row to int8 with a scale of their own.

        s = max |x| * (1 / 127);  q = round_half_even(fp16(x / s));  scale = s in ``scale_dtype``

    The quotient has s itself, not the rounded scale.

    Args:
        x: [R, H] fp16 or bf16, H a multiple of ``block``.
        block: elements that share a scale.
        scale_dtype: of the scales.

    Returns:
        q: [R, H] int8. Zeros in a block of zeros, or where the quotient is no number.
        scale: [R, H / block] of ``scale_dtype``.
    """
    blocks = x.float().unflatten(1, (-1, block))
    s = blocks.abs().amax(dim=2) * (1.0 / INT8_MAX)
    quotient = (blocks / s[..., None]).half().float().round_()
    # A scale so small that it has lost bits of its own can make a quotient of 128 and more.
    q = quotient.nan_to_num_(0.0).clamp_(-INT8_MAX, INT8_MAX)
    return q.to(torch.int8).flatten(1), s.to(scale_dtype)


def encode(
    x: torch.Tensor, fmt: RowFormat, rows: torch.Tensor, smooth: torch.Tensor | None = None
) -> None:
    """Write [R, H] tokens into [R, stride] uint8 ``rows`` as they travel; padding is left."""
    if fmt.scale_offset is None:
        fmt.payload(rows).copy_(x)
        return
    for part in _blocks(*x.shape):
        if fmt.block:
            q, scales = quantize_blocks(x[part], fmt.block, fmt.scale_dtype)
        else:
            factors = smooth if smooth is None or smooth.dim() == 1 else smooth[part]
            q, scales = quantize_int8(x[part], factors)
            scales = scales[:, None]
        fmt.payload(rows[part]).copy_(q)
        fmt.scales(rows[part]).copy_(scales)


def decode(rows: torch.Tensor, fmt: RowFormat, out: torch.Tensor) -> None:
    """Write into [R, H] ``out`` what [R, stride] uint8 rows with scales per block stand for.

    That is q * scale in fp32, rounded to the dtype of ``out``.
    """
    q = fmt.payload(rows).float().unflatten(1, (-1, fmt.block))
    out.copy_((q * fmt.scales(rows).float()[..., None]).flatten(1))


def push(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    smooth: torch.Tensor | None,
    fmt: RowFormat,
    routing: Plan,
    rows: torch.Tensor,
    headers: Sequence[DispatchHeader],
    *,
    experts_per_rank: int,
    shared_targets: Sequence[int],
    num_shared_ranks: int,
) -> None:
    """Write this rank's tokens where all ranks can read them, and tell each rank which are for it.

    A token is written once, however many ranks and experts want it. Only when each expert has a
    smooth row of its own do the copies differ, and then there is a row for each.

    Args:
        x: [T, H] tokens.
        expert_ids: [T, K].
        weights: [T, K] to send along, or None.
        smooth: [NS + E, H] fp32, or None.
        fmt: the format of the rows.
        routing: the plan of ``expert_ids``.
        rows: [R, stride] uint8 output; row t is token t, or with ``smooth`` row t * (K + NS) + k
            slot k of it.
        headers: this rank's header in every rank's window.
        experts_per_rank: L of the MoE ranks.
        shared_targets: the rank that gets all tokens, for each shared expert.
        num_shared_ranks: S; the MoE ranks come after them.
    """
    num_tokens, top_k = expert_ids.shape
    num_shared = len(shared_targets)
    num_slots = top_k + num_shared
    if smooth is None:
        encode(x, fmt, rows[:num_tokens])
    else:
        slots = rows[: num_tokens * num_slots].unflatten(0, (num_tokens, num_slots))
        # Slots that are not sent get some expert's factors: nobody reads them.
        expert = expert_ids.long().clamp(0, len(routing.counts) - 1)
        for k in range(top_k):
            encode(x, fmt, slots[:, k], smooth[num_shared + expert[:, k]])
        for shared in range(num_shared):
            encode(x, fmt, slots[:, top_k + shared], smooth[shared])

    order = routing.order
    copies = order + order // top_k * num_shared  # t * K + k becomes t * (K + NS) + k
    ordered = None if weights is None else weights.reshape(-1)[order.long()]
    start = 0
    per_rank = routing.counts.view(-1, experts_per_rank).sum(1).tolist()
    for header, count in zip(headers[num_shared_ranks:], per_rank, strict=True):
        header.copies[:count] = copies[start : start + count]
        if ordered is not None and header.weights is not None:
            header.weights[:count] = ordered[start : start + count]
        start += count
    active = (expert_ids != NOWHERE).any(1).nonzero()[:, 0]
    for shared, rank in enumerate(shared_targets):
        header = headers[rank]
        header.copies[: len(active)] = active * num_slots + top_k + shared
        if header.weights is not None:
            header.weights[: len(active)] = 1.0
    for header in headers:
        header.num_tokens[0] = len(active)
        header.counts.copy_(routing.counts)


def sources(counts: torch.Tensor, alignment: int = 1) -> Sources:
    """Number the rows that [L, W] int32 ``counts`` (local expert, source) announce.

    Args:
        counts: rows for each local expert from each source.
        alignment: the rows of each expert are padded to a multiple of this.
    """
    world = counts.shape[1]
    rows = counts.sum(1, dtype=torch.int32)
    padded = (rows + alignment - 1) // alignment * alignment
    groups = torch.cat([counts, (padded - rows)[:, None]], dim=1).reshape(-1)
    group = torch.repeat_interleave(
        torch.arange(groups.numel(), device=counts.device), groups.long()
    )
    # Where the group's copies begin in its source's list, which runs over this rank's experts.
    first = torch.nn.functional.pad(exclusive_cumsum(counts, dim=0), (0, 1)).reshape(-1)
    within = torch.arange(group.numel(), device=counts.device) - exclusive_cumsum(groups)[group]
    source = group % (world + 1)
    return Sources(
        source.where(source < world, NOWHERE),
        (first[group] + within).long(),
        counts.reshape(-1).cumsum(0, dtype=torch.int32),
        padded.cumsum(0, dtype=torch.int32),
    )


def pack(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    x: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Gather rows from wherever they are into the outputs of dispatch.

    Args:
        rows: [N, stride] uint8; rows may overlap, as they do when N counts every 16 bytes.
        index: [n] int64 rows to take; ``NOWHERE`` makes a row of zeros.
        fmt: their format.
        x: [A, H] output, of the payload's dtype; rows after the n-th stay untouched.
        scales: [A] output of the scales' dtype, or None.
    """
    n = index.numel()
    absent = (index == NOWHERE).nonzero()[:, 0]
    if len(absent) == n:
        x[:n] = 0
    else:
        # What is absent takes some row, and is cleared after that.
        index = index.clamp(min=0) if len(absent) else index
        torch.index_select(fmt.payload(rows), 0, index, out=x[:n])
        x.index_fill_(0, absent, 0)
    if scales is not None:
        scales[:n] = fmt.scales(rows)[index, 0] if len(absent) < n else 0
        scales.index_fill_(0, absent, 0)


def reduce(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    weights: torch.Tensor | None,
    special: SpecialExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Sum the rows of each token in fp32 and round once.

        out[t] = sum_k weights[t, k] * term(t, k) + sum_j rows[index[t, K + j]] + addend[t]

    where term(t, k) is rows[index[t, k]], or what a special expert makes of the token. Multiply,
    then add, in ascending order from 0: never contracted to a fused multiply-add. Slots without a
    term are left out, whatever their weights.

    Args:
        rows: [N, stride] uint8; rows may overlap.
        index: [T, K + NS] int64 rows of each token, the unweighted ones last; ``NOWHERE`` for none.
        fmt: of the rows; those with scales are first rounded to the dtype of ``out``.
        weights: [T, K] fp32, or None for all 1.
        special: the experts without a network, or None.
        addend: [T, H] of the dtype of ``out``, or None.
        out: [T, H] output. The sum of float64 runs in float64.
    """
    hidden = fmt.hidden
    most = min(len(index), max(_BLOCK // max(hidden, 1), 1))
    # One set of intermediates for all blocks: fresh memory costs page faults.
    gathered = out.new_empty((most, hidden))
    encoded = None if fmt.scale_offset is None else rows.new_empty((most, fmt.stride))
    sums, terms = out.new_empty((2, most, hidden), dtype=accumulator(out.dtype))
    columns = index.T.contiguous()
    factors = weights.T.contiguous()[..., None] if weights is not None else columns[:0]
    missing = bool((index == NOWHERE).any())
    payload = fmt.payload(rows) if encoded is None else rows
    for tokens in _blocks(len(index), hidden):
        n = tokens.stop - tokens.start
        row, total, term = gathered[:n], sums[:n], terms[:n]
        total.zero_()
        for k, column in enumerate(columns):
            where = column[tokens]
            present = where != NOWHERE if missing else None
            if present is None or bool(present.any()):
                where = where if present is None else where.clamp(min=0)
                if encoded is None:
                    torch.index_select(payload, 0, where, out=row)
                else:
                    torch.index_select(payload, 0, where, out=encoded[:n])
                    decode(encoded[:n], fmt, row)
                term.copy_(row)
            if special is not None and present is not None and k < special.expert_ids.shape[1]:
                present = present | _special_terms(special, k, tokens, term)
            if k < len(factors):
                term.mul_(factors[k][tokens])
            if present is not None:
                term.masked_fill_(~present[:, None], 0.0)
            total.add_(term)
        if addend is not None:
            total.add_(addend[tokens])
        out[tokens] = total


def _special_terms(
    special: SpecialExperts, k: int, tokens: slice, term: torch.Tensor
) -> torch.Tensor:
    """Write the terms of copy and constant experts in slot k; return which tokens have one."""
    ids = special.expert_ids[tokens, k].long()
    copied = (ids >= special.first_copy) & (ids < special.first_constant)
    constant = (ids >= special.first_constant) & (ids < special.end)
    present = copied | constant
    if special.tokens is None or not present.any():
        return present
    own = special.tokens[tokens]
    term[copied] = own[copied].to(term.dtype)
    if constant.any():
        expert = ids[constant] - special.first_constant
        assert special.alpha_1 is not None
        assert special.alpha_2 is not None
        assert special.value is not None
        first, second = (
            (alpha[:, None] if alpha.dim() == 1 else alpha)[expert].to(term.dtype)
            for alpha in (special.alpha_1, special.alpha_2)
        )
        value = special.value[expert].to(term.dtype)
        term[constant] = first * own[constant].to(term.dtype) + second * value
    return present


def add_rows(own: torch.Tensor, peer: torch.Tensor, out: torch.Tensor) -> None:
    """Write into ``out`` the sums of [n, H] rows, in fp32 and rounded once, as TP ranks do."""
    for part in _blocks(*own.shape):
        out[part] = own[part].float() + peer[part].float()

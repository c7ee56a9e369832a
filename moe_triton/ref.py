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

from .layout import DispatchHeader, Plan, RowFormat, Sources

INT8_MAX = 127.0
_BLOCK = 2**17  # elements worked on together, so that fp32 intermediates stay in a core's L2 cache


def exclusive_cumsum(counts: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Sum of the entries before each one, in the dtype of ``counts``."""
    return counts.cumsum(dim, dtype=counts.dtype) - counts


def _blocks(num_rows: int, row_elements: int) -> Iterator[slice]:
    """Slices of as many rows as make one block."""
    rows = max(_BLOCK // max(row_elements, 1), 1)
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def plan(expert_ids: torch.Tensor, num_experts: int) -> Plan:
    """Count and rank the copies of [T, K] int32 ``expert_ids``, each in [0, num_experts)."""
    ids = expert_ids.reshape(-1).long()
    counts = torch.bincount(ids, minlength=num_experts).int()
    order = torch.argsort(ids, stable=True)
    position = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    expand_idx = torch.empty_like(position)
    expand_idx[order] = position - exclusive_cumsum(counts)[ids[order]]
    return Plan(counts, expand_idx, order.int())


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


def encode(
    x: torch.Tensor, fmt: RowFormat, rows: torch.Tensor, smooth: torch.Tensor | None = None
) -> None:
    """Write [R, H] tokens into [R, stride] uint8 ``rows`` as they travel; padding is left."""
    if fmt.scale_offset is None:
        fmt.payload(rows).copy_(x)
        return
    q, scale = quantize_int8(x, smooth)
    fmt.payload(rows).copy_(q)
    fmt.scales(rows).copy_(scale)


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
    smooth row of its own do the copies differ, and then each is written by itself.

    Args:
        x: [T, H] tokens.
        expert_ids: [T, K].
        weights: [T, K] fp32 to send along, or None.
        smooth: [NS + E, H] fp32, or None.
        fmt: the format of the rows.
        routing: the plan of ``expert_ids``.
        rows: [R, stride] uint8 output; R is T, or with ``smooth`` T * (K + NS).
        headers: this rank's header in every rank's window.
        experts_per_rank: L of the MoE ranks.
        shared_targets: the rank that gets all tokens, for each shared expert.
        num_shared_ranks: S; the MoE ranks come after them.
    """
    num_tokens, top_k = expert_ids.shape
    order = routing.order.long()
    token = order // top_k
    if smooth is None:
        encode(x, fmt, rows[:num_tokens])
        slots = token.int()
    else:
        expert = expert_ids.reshape(-1)[order].long()
        copies = order.numel()
        encode(x[token], fmt, rows[:copies], smooth[len(shared_targets) + expert])
        slots = torch.arange(copies, dtype=torch.int32, device=x.device)

    per_rank = routing.counts.view(-1, experts_per_rank).sum(1).tolist()
    ordered = None if weights is None else weights.reshape(-1)[order]
    start = 0
    for header, copies in zip(headers[num_shared_ranks:], per_rank, strict=True):
        header.slots[:copies] = slots[start : start + copies]
        if ordered is not None and header.weights is not None:
            header.weights[:copies] = ordered[start : start + copies]
        start += copies
    for shared, rank in enumerate(shared_targets):
        first = 0
        if smooth is not None:
            first = order.numel() + shared * num_tokens
            encode(x, fmt, rows[first : first + num_tokens], smooth[shared])
        slots = torch.arange(first, first + num_tokens, dtype=torch.int32, device=x.device)
        header = headers[rank]
        header.slots[:num_tokens] = slots
        if header.weights is not None:
            header.weights[:num_tokens] = 1.0
    for header in headers:
        header.num_tokens[0] = num_tokens
        header.counts.copy_(routing.counts)


def sources(counts: torch.Tensor) -> Sources:
    """Number the rows that [L, W] ``counts`` (local expert, source) announce."""
    num_experts, world = counts.shape
    flat = counts.reshape(-1)
    ends = flat.cumsum(0, dtype=torch.int32)
    group = torch.repeat_interleave(
        torch.arange(num_experts * world, device=counts.device), flat.long()
    )
    # Where the group's copies begin in its source's list, which runs over this rank's experts.
    first = exclusive_cumsum(counts, dim=0).reshape(-1)
    within = torch.arange(group.numel(), device=counts.device) - (ends - flat)[group]
    return Sources(group % world, first[group] + within, ends)


def pack(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    x: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Gather rows from wherever they are into the outputs of dispatch.

    Args:
        rows: [N, stride] uint8; rows may overlap, as they do when N counts every 16 bytes.
        index: [n] int64 rows to take.
        fmt: their format.
        x: [A, H] output, of the payload's dtype; rows after the n-th stay untouched.
        scales: [A] fp32 output, or None.
    """
    n = index.numel()
    torch.index_select(fmt.payload(rows), 0, index, out=x[:n])
    if scales is not None:
        scales[:n] = fmt.scales(rows)[index]


def reduce(
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Sum the rows of each token in fp32 and round once.

        out[t] = sum_k weights[t, k] * rows[index[t, k]] + sum_j rows[index[t, K + j]] + addend[t]

    Multiply, then add, in ascending order from 0: never contracted to a fused multiply-add.

    Args:
        rows: [N, H] fp16 or bf16; rows may overlap.
        index: [T, K + NS] int64 rows of each token, the unweighted ones last.
        weights: [T, K] fp32, or None for all 1.
        addend: [T, H] of the dtype of rows, or None.
        out: [T, H] output, of the dtype of rows.
    """
    hidden = rows.shape[1]
    most = min(len(index), max(_BLOCK // max(hidden, 1), 1))
    # One set of intermediates for all blocks: fresh memory costs page faults.
    gathered = rows.new_empty((most, hidden))
    sums, terms = torch.empty((2, most, hidden), device=rows.device)
    columns = index.T.contiguous()
    factors = weights.T.contiguous()[..., None] if weights is not None else columns[:0]
    for tokens in _blocks(len(index), hidden):
        n = tokens.stop - tokens.start
        row, total, term = gathered[:n], sums[:n], terms[:n]
        total.zero_()
        for k, column in enumerate(columns):
            torch.index_select(rows, 0, column[tokens], out=row)
            term.copy_(row)
            if k < len(factors):
                term.mul_(factors[k][tokens])
            total.add_(term)
        if addend is not None:
            total.add_(addend[tokens])
        out[tokens] = total

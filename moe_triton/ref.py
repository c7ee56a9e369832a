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

from .layout import DispatchWindow, Plan, RowFormat, Sources

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


def encode(x: torch.Tensor, fmt: RowFormat, smooth: torch.Tensor | None = None) -> torch.Tensor:
    """[R, H] tokens -> [R, stride] uint8 rows as they travel; padding bytes are unspecified."""
    if fmt.scale_offset is None and fmt.stride == fmt.hidden * x.element_size():
        return x.reshape(-1).view(torch.uint8).view(len(x), fmt.stride)
    rows = torch.empty((x.shape[0], fmt.stride), dtype=torch.uint8, device=x.device)
    if fmt.scale_offset is None:
        fmt.payload(rows).copy_(x)
    else:
        q, scale = quantize_int8(x, smooth)
        fmt.payload(rows).copy_(q)
        fmt.scales(rows).copy_(scale)
    return rows


def push(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    smooth: torch.Tensor | None,
    fmt: RowFormat,
    routing: Plan,
    windows: Sequence[DispatchWindow],
    *,
    experts_per_rank: int,
    shared_targets: Sequence[int],
    num_shared_ranks: int,
) -> list[int]:
    """Write this rank's tokens into the windows of all ranks.

    A token goes once to a rank, however many of its experts live there. Only when each expert has a
    smooth row of its own do the copies differ, and then each travels by itself.

    Args:
        x: [T, H] tokens.
        expert_ids: [T, K].
        weights: [T, K] fp32 to send along, or None.
        smooth: [NS + E, H] fp32, or None.
        fmt: the row format of the windows.
        routing: the plan of ``expert_ids``.
        windows: this rank's part of each rank's window.
        experts_per_rank: L of the MoE ranks.
        shared_targets: the rank to send all tokens to, for each shared expert.
        num_shared_ranks: S; the MoE ranks come after them.

    Returns:
        The rows written for each rank.
    """
    num_tokens, top_k = expert_ids.shape
    num_moe = len(windows) - num_shared_ranks
    order = routing.order.long()
    token = order // top_k
    per_rank = routing.counts.view(num_moe, experts_per_rank).sum(1)
    target = torch.repeat_interleave(torch.arange(num_moe, device=x.device), per_rank)

    if smooth is None:
        wire = encode(x, fmt)
        present = torch.zeros((num_moe, num_tokens), dtype=torch.bool, device=x.device)
        present[target, token] = True
        slots = (present.cumsum(1, dtype=torch.int32) - 1)[target, token]
        row_token = present.nonzero()[:, 1]
        num_rows = present.sum(1)
    else:
        expert = expert_ids.reshape(-1)[order].long()
        wire = encode(x[token], fmt, smooth[len(shared_targets) + expert])
        first = exclusive_cumsum(per_rank)
        slots = (torch.arange(order.numel(), device=x.device) - first[target]).int()
        row_token = torch.arange(order.numel(), device=x.device)
        num_rows = per_rank

    written = [0] * len(windows)
    copies = per_rank.tolist()
    row_weights = None if weights is None else weights.reshape(-1)[order]
    copy_start = row_start = 0
    for rank, (num_copies, rows) in enumerate(
        zip(copies, num_rows.tolist(), strict=True), num_shared_ranks
    ):
        window, ours = windows[rank], slice(copy_start, copy_start + num_copies)
        torch.index_select(wire, 0, row_token[row_start : row_start + rows], out=window.rows[:rows])
        window.slots[:num_copies] = slots[ours]
        if row_weights is not None:
            assert window.weights is not None
            window.weights[:num_copies] = row_weights[ours]
        written[rank] = rows
        copy_start += num_copies
        row_start += rows
    for shared, rank in enumerate(shared_targets):
        own = wire if smooth is None else encode(x, fmt, smooth[shared])
        windows[rank].rows[:num_tokens] = own
        written[rank] = num_tokens
    for window in windows:
        window.num_tokens[0] = num_tokens
        window.counts.copy_(routing.counts)
    return written


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
    window: DispatchWindow,
    src: Sources,
    fmt: RowFormat,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    weights: torch.Tensor | None,
    *,
    shared: bool,
) -> None:
    """Gather the received rows into the order of ``src``; rows after the n-th stay untouched.

    Args:
        window: this rank's window.
        src: the numbering of the rows.
        fmt: the row format of the window.
        x: [A, H] output, of the payload's dtype.
        scales: [A] fp32 output, or None.
        weights: [A] fp32 output, or None.
        shared: the rank holds a shared expert: all tokens in order, each with weight 1.
    """
    n = src.source.numel()
    slot = src.copy if shared else window.slots[src.source, src.copy]
    capacity, stride = window.rows.shape[1:]
    rows = window.rows.view(-1, stride)
    index = src.source * capacity + slot
    torch.index_select(fmt.payload(rows), 0, index, out=x[:n])
    if scales is not None:
        scales[:n] = fmt.scales(rows)[index]
    if weights is not None:
        if shared:
            weights[:n] = 1.0
        else:
            assert window.weights is not None
            weights[:n] = window.weights[src.source, src.copy]


def gather_quant(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    routing: Plan,
    fmt: RowFormat,
    smooth: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Dispatch on a group of one: gather the rows of all copies, quantised, in expert order.

    Args:
        x: [T, H] tokens.
        expert_ids: [T, K].
        routing: their plan.
        fmt: the row format; only its dtypes matter.
        smooth: [E, H] fp32, or None.
        out: [A, H] output, of the payload's dtype.
        scales: [A] fp32 output, or None.
    """
    order = routing.order.long()
    token, n = order // expert_ids.shape[1], order.numel()
    if smooth is None:
        rows, index = encode(x, fmt), token
    else:
        rows = encode(x[token], fmt, smooth[expert_ids.reshape(-1)[order].long()])
        index = torch.arange(n, device=x.device)
    torch.index_select(fmt.payload(rows), 0, index, out=out[:n])
    if scales is not None:
        scales[:n] = fmt.scales(rows)[index]


def return_push(
    y: torch.Tensor,
    src: Sources,
    bases: Sequence[int],
    windows: Sequence[torch.Tensor],
) -> list[int]:
    """Write the experts' rows back into the combine windows of the ranks they came from.

    Args:
        y: [A, H] expert outputs, rows as dispatch delivered them.
        src: the numbering of dispatch.
        bases: [W] row of each source's window where this rank's block begins.
        windows: the combine window of each rank, [rows, H].

    Returns:
        The rows written for each rank, which it finds in the order of its own copies.
    """
    order = torch.argsort(src.source, stable=True)
    written = torch.bincount(src.source, minlength=len(windows)).tolist()
    start = 0
    for rank, rows in enumerate(written):
        block = windows[rank][bases[rank] : bases[rank] + rows]
        torch.index_select(y, 0, order[start : start + rows], out=block)
        start += rows
    return written


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
        rows: [N, H] fp16 or bf16.
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
    for tokens in _blocks(len(index), hidden):
        block = index[tokens]
        row, total, term = (x[: len(block)] for x in (gathered, sums, terms))
        total.zero_()
        for k in range(index.shape[1]):
            torch.index_select(rows, 0, block[:, k], out=row)
            term.copy_(row)
            if weights is not None and k < weights.shape[1]:
                term.mul_(weights[tokens, k, None])
            total.add_(term)
        if addend is not None:
            total.add_(addend[tokens])
        out[tokens] = total

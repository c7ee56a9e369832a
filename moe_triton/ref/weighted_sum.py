"""Sums of rows: those of a token's experts, and those of ranks that share an expert."""

from __future__ import annotations

import torch

from ..layout import NOWHERE, Norm, RowFormat, ZeroComputationExperts
from ._common import BLOCK, blocks
from .quantize import decode


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the sums of rows of ``dtype``: float32, for float64 float64."""
    return torch.promote_types(dtype, torch.float32)


def weighted_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    weights: torch.Tensor | None,
    zero_computation: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None = None,
) -> None:
    """Sum the rows of each token in fp32 and round once.

        out[t] = sum_k weights[t, k] * term(t, k) + sum_j rows[index[t, K + j]] + addend[t]

    where term(t, k) is rows[index[t, k]], or the output of a zero-computation expert. Multiply,
    then add, in ascending order from 0: never contracted to a fused multiply-add. Slots without a
    term are left out, even if their weight is NaN.

    Args:
        rows: [N, stride] uint8; rows may overlap.
        index: [T, K + NS] int64 rows of each token, the unweighted ones last; ``NOWHERE`` for none.
        fmt: of the rows, "none" or "block8"; block8 rows are rounded to the dtype of ``out``.
        weights: [T, K] fp32, for float64 also float64, or None for all 1.
        zero_computation: the zero, copy and constant experts, or None; their ids are [T, K] too.
        addend: [T, H] of the dtype of ``out``, or None.
        out: [T, H] output, fp16, bf16, fp32 or fp64; sums of fp64 run in fp64.
        norm: residual to add before rounding, and RMSNorm of the unrounded sum, or None.
    """
    hidden, slots = fmt.hidden, index.shape[1]
    most = min(len(index), max(BLOCK // max(hidden, 1), 1))
    # Few tokens take all slots at a time: there calls cost more than their rows.
    step = slots if slots * most * hidden <= BLOCK else 1
    # Reuse intermediates for all blocks: fresh memory costs page faults.
    gathered = out.new_empty((step * most, hidden))
    encoded = None if fmt.scale_offset is None else rows.new_empty((step * most, fmt.stride))
    sums = out.new_empty(((1 + step) * most, hidden), dtype=accumulator(out.dtype))
    columns = index.T.contiguous()
    factors = columns[:0] if weights is None else weights.T.contiguous()
    missing = bool((index == NOWHERE).any())
    payload = fmt.payload(rows) if encoded is None else rows
    for tokens in blocks(len(index), hidden):
        n = tokens.stop - tokens.start
        total, row, term = sums[:n].zero_(), gathered[: step * n], sums[most : most + step * n]
        terms = term.view(step, n, hidden)
        weighted, factor = terms[: len(factors)], factors[:, tokens, None].split(step)
        of_slots = terms.unbind()
        for i, source in enumerate(columns[:, tokens].reshape(-1).split(step * n)):
            present = source != NOWHERE if missing else None
            if present is None or bool(present.any()):
                readable = source if present is None else source.clamp(min=0)
                if encoded is None:
                    torch.index_select(payload, 0, readable, out=row)
                else:
                    torch.index_select(payload, 0, readable, out=encoded[: step * n])
                    decode(encoded[: step * n], fmt, row)
                term.copy_(row)
            if present is not None:
                present = present.view(step, n)
                if zero_computation is not None:
                    _add_zero_computation_terms(zero_computation, i * step, tokens, terms, present)
            if i < len(factor):
                weighted.mul_(factor[i])
            if present is not None:
                terms.masked_fill_(~present[..., None], 0.0)
            for of_slot in of_slots:
                total.add_(of_slot)
        if addend is not None:
            total.add_(addend[tokens])
        if norm is not None:
            _normalize(total.add_(norm.residual[tokens]), norm, tokens)
        out[tokens] = total


def _normalize(total: torch.Tensor, norm: Norm, tokens: slice) -> None:
    """RMSNorm of [n, H] sums: y = round(round(total * rstd) * gamma)."""
    mean = (total * total).sum(1) * (1.0 / total.shape[1])
    rstd = (mean + norm.epsilon).sqrt_().reciprocal_()
    norm.rstd[tokens] = rstd
    scaled = (total * rstd[:, None]).to(norm.y.dtype)
    norm.y[tokens] = scaled.float() * norm.gamma.float()


def _add_zero_computation_terms(
    experts: ZeroComputationExperts,
    first: int,
    tokens: slice,
    terms: torch.Tensor,
    present: torch.Tensor,
) -> None:
    """Write the terms of copy and constant experts in the slots from ``first`` on.

    Args:
        experts: the experts.
        first: of the slots.
        tokens: of the terms.
        terms: [k, n, H].
        present: [k, n] whether a slot has a term; updated.
    """
    # [k, n], without the unweighted slots.
    ids = experts.expert_ids[tokens, first : first + len(terms)].T.long()
    copied = (ids >= experts.first_copy) & (ids < experts.first_constant)
    constant = (ids >= experts.first_constant) & (ids < experts.end)
    present[: len(ids)] |= copied | constant
    if experts.tokens is None:
        return
    own = experts.tokens[tokens]
    slot, token = copied.nonzero(as_tuple=True)
    terms[slot, token] = own[token].to(terms.dtype)
    slot, token = constant.nonzero(as_tuple=True)
    if len(slot):
        expert = ids[slot, token] - experts.first_constant
        assert experts.alpha_1 is not None
        assert experts.alpha_2 is not None
        assert experts.value is not None
        alpha_1, alpha_2 = (
            (alpha[:, None] if alpha.dim() == 1 else alpha)[expert].to(terms.dtype)
            for alpha in (experts.alpha_1, experts.alpha_2)
        )
        value = experts.value[expert].to(terms.dtype)
        terms[slot, token] = alpha_1 * own[token].to(terms.dtype) + alpha_2 * value


def add_rows(own: torch.Tensor, peer: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sums of [n, H] fp16, bf16 or fp32 rows of two ranks into ``out``, rounded once."""
    for part in blocks(*own.shape):
        out[part] = own[part].float() + peer[part].float()

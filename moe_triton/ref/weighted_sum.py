"""Sums of rows: those of a token's experts, and those of ranks that share an expert."""

from __future__ import annotations

import numpy as np
import torch

from ..layout import Norm, RowFormat, ZeroComputationExperts
from ._common import BLOCK, blocks
from .quantize import decode

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


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
    payload = fmt.payload(rows) if fmt.scale_offset is None else rows
    sum_payload(payload, index.numpy(), fmt, weights, zero_computation, addend, out, norm)


def sum_payload(
    payload: torch.Tensor,
    index: np.ndarray,
    fmt: RowFormat,
    weights: torch.Tensor | None,
    zero_computation: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None = None,
) -> None:
    """``weighted_sum`` of the payload of rows, or of encoded rows."""
    hidden, columns = fmt.hidden, index.T
    slots, num_tokens = columns.shape
    most = min(num_tokens, max(BLOCK // max(hidden, 1), 1))
    # Reused for all blocks: fresh memory costs page faults.
    gathered = payload.new_empty((slots * most, payload.shape[1]))
    terms = np.empty((slots * most, hidden), _NUMPY[accumulator(out.dtype)])
    missing = np.minimum.reduce(columns, None, initial=0) < 0
    factors = None if weights is None else weights.detach().numpy().T[..., None]
    for tokens in blocks(num_tokens, hidden):
        source = columns[:, tokens]
        present = torch.from_numpy(source >= 0) if missing else None
        term = terms[: source.size]
        of_slots = term.reshape(*source.shape, hidden)
        if present is None or bool(present.any()):
            readable = torch.from_numpy(np.maximum(source, 0).reshape(-1))
            row = torch.index_select(payload, 0, readable, out=gathered[: source.size])
            if fmt.scale_offset is not None:
                row, encoded = out.new_empty((source.size, hidden)), row
                decode(encoded, fmt, row)
            torch.from_numpy(term).copy_(row)
        if present is not None and zero_computation is not None:
            of_experts = torch.from_numpy(of_slots)
            _add_zero_computation_terms(zero_computation, tokens, of_experts, present)
        if factors is not None:
            factor = factors[:, tokens]
            torch.from_numpy(of_slots[: len(factor)]).mul_(torch.from_numpy(factor))
        if present is not None:
            of_slots[~present.numpy()] = 0.0
        total = torch.from_numpy(_in_order(of_slots))
        if addend is not None:
            total.add_(addend[tokens])
        if norm is not None:
            _normalize(total.add_(norm.residual[tokens]), norm, tokens)
        out[tokens] = total


def _in_order(terms: np.ndarray) -> np.ndarray:
    """Sum [k, n, H] to [n, H], from 0 and in ascending order."""
    total: np.ndarray
    with np.errstate(all="ignore"):  # sums of infinities
        if len(terms) and terms[0].size == 1:  # numpy would add a single column pairwise
            total = 0.0 + np.add.accumulate(terms, 0)[-1]
        else:
            total = np.add.reduce(terms, 0, initial=0.0)
    return total


def _normalize(total: torch.Tensor, norm: Norm, tokens: slice) -> None:
    """RMSNorm of [n, H] sums: y = round(round(total * rstd) * gamma)."""
    mean = (total * total).sum(1) * (1.0 / total.shape[1])
    rstd = (mean + norm.epsilon).sqrt_().reciprocal_()
    norm.rstd[tokens] = rstd
    scaled = (total * rstd[:, None]).to(norm.y.dtype)
    norm.y[tokens] = scaled.float() * norm.gamma.float()


def _add_zero_computation_terms(
    experts: ZeroComputationExperts,
    tokens: slice,
    terms: torch.Tensor,
    present: torch.Tensor,
) -> None:
    """Write the terms of copy and constant experts.

    Args:
        experts: the experts.
        tokens: of the terms.
        terms: [k, n, H].
        present: [k, n] whether a slot has a term; updated.
    """
    ids = experts.expert_ids[tokens].T.long()  # without the unweighted slots
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

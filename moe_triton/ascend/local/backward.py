"""Gradients of the single-device ops, in the form that ``torch.library.register_autograd`` takes.

Every op is a sum of terms: row ``row[i]`` of one tensor, times ``weight[i]``, is added to row
``token[i]`` of another. The gradient of the rows is the same sum from ``token`` to ``row``; that of
a weight is the dot product of the two rows. Plain PyTorch, so second derivatives work too.

A ``save_*`` function keeps a tensor only if the gradient of some argument needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ref import accumulator
from .finalize_routing import source_rows
from .routing_map import first_selected, padded_experts

_Gradients = tuple[Tensor | None, ...]


def add_terms(
    source: Tensor, row: Tensor, token: Tensor, weights: Tensor | None, num_out: int
) -> Tensor:
    """[num_out, H]: weights[i] * source[row[i]] added to row token[i], for all i.

    In float32 (float64 for float64), rounded once. A term whose row or token is out of range is
    left out.
    """
    dtype = accumulator(source.dtype)
    out = source.new_zeros((num_out, source.shape[1]), dtype=dtype)
    if not len(source) or not num_out:
        return out.to(source.dtype)
    valid = (row >= 0) & (row < len(source)) & (token >= 0) & (token < num_out)
    terms = source[row.where(valid, 0).long()].to(dtype)
    if weights is not None:
        terms = terms * weights.to(dtype)[:, None]
    terms = terms.where(valid[:, None], 0.0)
    return out.index_add(0, token.where(valid, 0).long(), terms).to(source.dtype)


def dot_products(
    left: Tensor, left_row: Tensor, right: Tensor, right_row: Tensor, dtype: torch.dtype
) -> Tensor:
    """[n] of ``dtype``: left[left_row[i]] . right[right_row[i]]; 0 if a row is out of range."""
    if not len(left) or not len(right):
        return left.new_zeros(len(left_row), dtype=dtype)
    valid = (left_row >= 0) & (left_row < len(left)) & (right_row >= 0) & (right_row < len(right))
    a, b = (
        rows[index.where(valid, 0).long()].to(accumulator(left.dtype))
        for rows, index in ((left, left_row), (right, right_row))
    )
    return (a * b).sum(1).where(valid, 0.0).to(dtype)


def _needs(ctx: Any, argument: int) -> bool:
    """Whether an argument needs a gradient; trailing defaults are not listed."""
    needed = ctx.needs_input_grad
    return argument < len(needed) and bool(needed[argument])


def positions(index: Tensor, repeats: int = 1) -> Tensor:
    """0, 1, 2, ..., each ``repeats`` times, as long as ``index``: the token of each slot."""
    return torch.arange(len(index), device=index.device) // max(repeats, 1)


def save_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what ``permute_backward`` needs."""
    tokens, indices, *_ = inputs
    ctx.num_tokens, ctx.top_k = len(tokens), indices.shape[1:].numel()
    ctx.save_for_backward(output[1])


def permute_backward(ctx: Any, gradient: Tensor, _: Tensor) -> _Gradients:
    """Gradients of ``token_permute``: a token gets the sum over its permuted rows."""
    (position,) = ctx.saved_tensors
    token = positions(position, ctx.top_k)
    return add_terms(gradient, position, token, None, ctx.num_tokens), None, None, None


def save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """Save what ``unpermute_backward`` needs."""
    permuted, position, probs, *_ = inputs
    ctx.num_rows = len(permuted)
    ctx.probs = None if probs is None else (probs.shape, probs.dtype)
    ctx.save_for_backward(
        position, permuted if _needs(ctx, 2) else None, probs if _needs(ctx, 0) else None
    )


def unpermute_backward(ctx: Any, gradient: Tensor) -> _Gradients:
    """Gradients of ``token_unpermute``."""
    position, permuted, probs = ctx.saved_tensors
    token = positions(position, 1 if ctx.probs is None else ctx.probs[0][1])
    to_rows = to_probs = None
    if _needs(ctx, 0):
        weights = None if probs is None else probs.reshape(-1)
        to_rows = add_terms(gradient, token, position, weights, ctx.num_rows)
    if _needs(ctx, 2):
        shape, dtype = ctx.probs
        to_probs = dot_products(permuted, position, gradient, token, dtype).view(shape)
    return to_rows, None, to_probs, None, None


def save_permute_map(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what ``permute_map_backward`` needs."""
    _, routing_map, _, _, ctx.padded = inputs
    ctx.map_shape = routing_map.shape
    needs_map = _needs(ctx, 2) and not ctx.padded
    ctx.save_for_backward(output[2], routing_map if needs_map else None)


def permute_map_backward(
    ctx: Any, gradient: Tensor, probs_gradient: Tensor | None, _: Tensor
) -> _Gradients:
    """Gradients of ``token_permute_with_routing_map``."""
    position, routing_map = ctx.saved_tensors
    num_tokens, num_experts = ctx.map_shape
    top_k = len(position) // max(num_tokens, 1)
    row, token = _rows_and_tokens(position, top_k, ctx.padded)
    to_tokens = to_probs = None
    if _needs(ctx, 0):
        to_tokens = add_terms(gradient, row, token, None, num_tokens)
    if probs_gradient is not None and _needs(ctx, 2):
        expert = _experts(position, routing_map, top_k, num_experts)
        to_probs = scatter_cells(probs_gradient[row.long()], token, expert, ctx.map_shape)
    return to_tokens, None, to_probs, None, None


def save_unpermute_map(
    ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor | None, ...]
) -> None:
    """Save what ``unpermute_map_backward`` needs; of several outputs only the first has one."""
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*(one for one in output[1:] if one is not None))
    permuted, position, shape, probs, routing_map, ctx.padded = inputs
    ctx.num_tokens, ctx.num_rows = shape[0], len(permuted)
    ctx.probs = None if probs is None else (probs.shape, probs.dtype)
    needs_map = probs is not None and not ctx.padded
    ctx.save_for_backward(
        position,
        permuted if _needs(ctx, 3) else None,
        probs if _needs(ctx, 0) else None,
        routing_map if needs_map else None,
    )


def unpermute_map_backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> _Gradients:
    """Gradients of ``token_unpermute_with_routing_map``."""
    position, permuted, probs, routing_map = ctx.saved_tensors
    top_k = len(position) // max(ctx.num_tokens, 1)
    row, token = _rows_and_tokens(position, top_k, ctx.padded)
    expert = None
    if ctx.probs is not None:
        expert = _experts(position, routing_map, top_k, ctx.probs[0][1])
    to_rows = to_probs = None
    if _needs(ctx, 0):
        weights = None if probs is None else probs[token.long(), expert]
        to_rows = add_terms(gradient, token, row, weights, ctx.num_rows)
    if _needs(ctx, 3):
        shape, dtype = ctx.probs
        terms = dot_products(permuted, row, gradient, token, dtype)
        assert expert is not None
        to_probs = scatter_cells(terms, token, expert, shape)
    return to_rows, None, None, to_probs, None, None


def _rows_and_tokens(position: Tensor, top_k: int, padded: bool) -> tuple[Tensor, Tensor]:
    """The row and the token of each term, from sorted_indices."""
    if padded:
        return positions(position), position
    return position, positions(position, top_k)


def _experts(position: Tensor, routing_map: Tensor | None, top_k: int, num_experts: int) -> Tensor:
    """The expert of each term; without a map, of rows padded to equal capacity."""
    if routing_map is None:
        return padded_experts(position, num_experts)
    return first_selected(routing_map, top_k).reshape(-1)


def scatter_cells(values: Tensor, token: Tensor, expert: Tensor, shape: torch.Size) -> Tensor:
    """[N, E] zeros with values [n] added to the cells (token, expert)."""
    flat = token.long() * shape[1] + expert
    return values.new_zeros(shape.numel()).index_add(0, flat, values).view(shape)


def save_init_routing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what ``init_routing_backward`` needs; quantised rows and scales have no gradient."""
    x, ids, *_ = inputs
    quant_mode, bounds, row_idx_type = inputs[10:13]
    expanded, row_idx, _, scales = output
    ctx.mark_non_differentiable(*([scales] if quant_mode == -1 else [expanded, scales]))
    ctx.sizes, ctx.scattered = x.shape, row_idx_type == 1 and expanded.dim() == 2
    start, end = bounds or (0, inputs[6])
    ctx.save_for_backward(row_idx, ((ids >= start) & (ids < end)).reshape(-1))


def init_routing_backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> _Gradients:
    """Gradients of ``init_routing_v2``: a token gets the sum over its rows."""
    row_idx, in_range = ctx.saved_tensors
    row = row_idx.long()
    if ctx.scattered:
        row = torch.empty_like(row).scatter(0, row, positions(row))
    num_tokens, hidden = ctx.sizes
    token = positions(row, len(row) // max(num_tokens, 1))
    row = row.where(in_range, -1)
    x = add_terms(gradient.reshape(-1, hidden), row, token, None, num_tokens)
    return x, *[None] * 14


def save_gating(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what ``gating_backward`` needs; ids and scores have no gradient."""
    x, *_, ctx.norm_type, _, ctx.scaling, ctx.epsilon = inputs
    _, ids, scores = output
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(ids, scores)
    ctx.save_for_backward(ids, scores)


def gating_backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> _Gradients:
    """Gradients of ``gating_top_k``: of x, through the scores of the chosen experts."""
    ids, scores = ctx.saved_tensors
    x = gating_gradient(scores, gradient, ids, ctx.norm_type, ctx.scaling, ctx.epsilon)
    return x.to(ctx.dtype), *[None] * 12


def gating_gradient(
    scores: Tensor, gradient: Tensor, ids: Tensor, norm_type: int, scaling: float, epsilon: float
) -> Tensor:
    """[N, E] float32: the gradient of the logits, from that of the [N, K] weights.

    Args:
        scores: [N, E] float32, softmax (norm_type 0) or sigmoid (1) of the logits.
        gradient: [N, K] of the weights of ``ids``.
        ids: [N, K] the chosen experts.
        norm_type: see there.
        scaling: factor of the weights.
        epsilon: added to the sum by which sigmoid scores are divided.
    """
    index, to_chosen = ids.long(), gradient.float() * scaling
    if norm_type == 1:
        chosen = scores.gather(1, index)
        total = chosen.sum(1, keepdim=True) + epsilon
        to_chosen = (to_chosen - (to_chosen * chosen).sum(1, keepdim=True) / total) / total
    to_scores = torch.zeros_like(scores).scatter_add(1, index, to_chosen)
    if norm_type == 1:
        return to_scores * scores * (1 - scores)
    return scores * (to_scores - (to_scores * scores).sum(1, keepdim=True))


_ROWS, _SKIP1, _SKIP2, _BIAS, _SCALES = range(5)  # arguments of finalize_routing


def save_finalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """Save what ``finalize_backward`` needs."""
    rows, _, _, bias, scales, index, experts, mode, k = inputs
    ctx.shape = rows.shape
    ctx.top_k = (k or 1) if scales is None else scales.shape[1]
    ctx.num_experts = 0 if bias is None else len(bias)
    ctx.scales = None if scales is None else (scales.shape, scales.dtype)
    for_scales = _needs(ctx, _SCALES)
    for_bias = _needs(ctx, _BIAS)
    ctx.save_for_backward(
        source_rows(index, ctx.top_k, mode).reshape(-1),
        experts if bias is not None and (for_bias or for_scales) else None,
        scales if for_bias or _needs(ctx, _ROWS) else None,
        rows if for_scales else None,
        bias if for_scales else None,
    )


def finalize_backward(ctx: Any, gradient: Tensor) -> _Gradients:
    """Gradients of ``finalize_routing``."""
    row, experts, scales, rows, bias = ctx.saved_tensors
    token = positions(row, ctx.top_k)
    expert = None if experts is None else experts.reshape(-1)
    weights = None if scales is None else scales.reshape(-1)
    gradients: list[Tensor | None] = [None] * 9
    if _needs(ctx, _ROWS):
        size = ctx.shape[:-1].numel()
        gradients[_ROWS] = add_terms(gradient, token, row, weights, size).view(ctx.shape)
    for skip in (_SKIP1, _SKIP2):
        if _needs(ctx, skip):
            gradients[skip] = gradient
    if _needs(ctx, _BIAS):
        assert expert is not None
        gradients[_BIAS] = add_terms(gradient, token, expert, weights, ctx.num_experts)
    if _needs(ctx, _SCALES):
        shape, dtype = ctx.scales
        flat = rows.reshape(-1, ctx.shape[-1])
        terms = dot_products(flat, row, gradient, token, dtype)
        if bias is not None:
            assert expert is not None
            terms = terms + dot_products(bias, expert, gradient, token, dtype)
        gradients[_SCALES] = terms.view(shape)
    return tuple(gradients)

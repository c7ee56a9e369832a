"""Gradients of the ops of one device, in the form that ``torch.library.register_autograd`` takes.

Every op is a sum of terms: row ``row[i]`` of one tensor, times ``weight[i]``, goes to row
``token[i]`` of the other. So the gradient of the rows is the same sum read backwards, and that of a
weight is the product of the two rows. All of it is plain PyTorch, which can be differentiated
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ref import accumulator
from .finalize_routing import source_rows
from .routing_map import padded_experts, selected

_Gradients = tuple[Tensor | None, ...]


def add_terms(
    source: Tensor, row: Tensor, token: Tensor, weights: Tensor | None, num_out: int
) -> Tensor:
    """[num_out, H]: sums over i of weights[i] * source[row[i]], each to row token[i].

    In float32 (float64 for float64), rounded once. Terms whose row or token is not there are left
    out.
    """
    accumulated = accumulator(source.dtype)
    out = source.new_zeros((num_out, source.shape[1]), dtype=accumulated)
    if not len(source) or not num_out:
        return out.to(source.dtype)
    there = (row >= 0) & (row < len(source)) & (token >= 0) & (token < num_out)
    terms = source[row.where(there, 0).long()].to(accumulated)
    if weights is not None:
        terms = terms * weights.to(accumulated)[:, None]
    terms = terms.where(there[:, None], 0.0)
    return out.index_add(0, token.where(there, 0).long(), terms).to(source.dtype)


def products(one: Tensor, row: Tensor, other: Tensor, token: Tensor, like: Tensor) -> Tensor:
    """[n] of the dtype of ``like``: products of one[row[i]] and other[token[i]]; 0 if not there."""
    if not len(one) or not len(other):
        return like.new_zeros(len(row))
    there = (row >= 0) & (row < len(one)) & (token >= 0) & (token < len(other))
    accumulated = accumulator(one.dtype)
    left, right = (
        rows[index.where(there, 0).long()].to(accumulated)
        for rows, index in ((one, row), (other, token))
    )
    return (left * right).sum(1).where(there, 0.0).to(like.dtype)


def _needs(ctx: Any, argument: int) -> bool:
    """Whether an argument needs a gradient; those left at their defaults are not listed."""
    needed = ctx.needs_input_grad
    return argument < len(needed) and bool(needed[argument])


def _numbers(index: Tensor, divisor: int = 1) -> Tensor:
    """0, 1, 2, ..., as many as there are in ``index``, each ``divisor`` times."""
    return torch.arange(len(index), device=index.device) // max(divisor, 1)


def save_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of ``token_permute``."""
    tokens, indices, *_ = inputs
    ctx.num_tokens, ctx.top_k = len(tokens), indices.shape[1:].numel()
    ctx.save_for_backward(output[1])


def permute_backward(ctx: Any, gradient: Tensor, _: Tensor) -> _Gradients:
    """Of ``token_permute``: a token gets the gradients of its copies."""
    (position,) = ctx.saved_tensors
    token = _numbers(position, ctx.top_k)
    return add_terms(gradient, position, token, None, ctx.num_tokens), None, None, None


def save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """Of ``token_unpermute``."""
    permuted, position, probs, *_ = inputs
    ctx.save_for_backward(permuted, position, probs)


def unpermute_backward(ctx: Any, gradient: Tensor) -> _Gradients:
    """Of ``token_unpermute``."""
    permuted, position, probs = ctx.saved_tensors
    token = _numbers(position, 1 if probs is None else probs.shape[1])
    weights = None if probs is None else probs.reshape(-1)
    rows = chances = None
    if _needs(ctx, 0):
        rows = add_terms(gradient, token, position, weights, len(permuted))
    if probs is not None and _needs(ctx, 2):
        chances = products(permuted, position, gradient, token, probs).view_as(probs)
    return rows, None, chances, None, None


def save_permute_map(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of ``token_permute_with_routing_map``."""
    _, routing_map, probs, _, ctx.padded = inputs
    ctx.has_probs = probs is not None
    ctx.save_for_backward(routing_map, output[2])


def permute_map_backward(
    ctx: Any, gradient: Tensor, kept_gradient: Tensor | None, _: Tensor
) -> _Gradients:
    """Of ``token_permute_with_routing_map``."""
    routing_map, position = ctx.saved_tensors
    num_tokens, num_experts = routing_map.shape
    if ctx.padded:
        row, token = _numbers(position), position
        expert = padded_experts(position, num_experts)
    else:
        top_k = len(position) // max(num_tokens, 1)
        row, token = position, _numbers(position, top_k)
        expert = selected(routing_map, top_k).reshape(-1)
    tokens = probs = None
    if _needs(ctx, 0):
        tokens = add_terms(gradient, row, token, None, num_tokens)
    if ctx.has_probs and kept_gradient is not None and _needs(ctx, 2):
        probs = _to_cells(kept_gradient[row.long()], token, expert, routing_map.shape)
    return tokens, None, probs, None, None


def save_unpermute_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """Of ``token_unpermute_with_routing_map``."""
    permuted, position, shape, probs, routing_map, ctx.padded = inputs
    ctx.num_tokens = shape[0]
    ctx.save_for_backward(permuted, position, probs, routing_map)


def unpermute_map_backward(ctx: Any, gradient: Tensor) -> _Gradients:
    """Of ``token_unpermute_with_routing_map``."""
    permuted, position, probs, routing_map = ctx.saved_tensors
    top_k = len(position) // max(ctx.num_tokens, 1)
    if ctx.padded:
        row, token = _numbers(position), position
    else:
        row, token = position, _numbers(position, top_k)
    weights = None
    if probs is not None:
        if ctx.padded:
            expert = padded_experts(position, probs.shape[1])
        else:
            expert = selected(routing_map, top_k).reshape(-1)
        weights = probs[token.long(), expert]
    rows = chances = None
    if _needs(ctx, 0):
        rows = add_terms(gradient, token, row, weights, len(permuted))
    if probs is not None and _needs(ctx, 3):
        terms = products(permuted, row, gradient, token, probs)
        chances = _to_cells(terms, token, expert, probs.shape)
    return rows, None, None, chances, None, None


def _to_cells(values: Tensor, token: Tensor, expert: Tensor, shape: torch.Size) -> Tensor:
    """[N, E] with values [n] added to the cells (token, expert), zeros elsewhere."""
    flat = token.long() * shape[1] + expert
    return values.new_zeros(shape.numel()).index_add(0, flat, values).view(shape)


def save_init_routing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of ``init_routing_v2``; what is quantised has no gradient, and scales have none."""
    x, ids, *_ = inputs
    row_idx_type = inputs[12]
    expanded, row_idx, _, scales = output
    if scales is not None:
        ctx.mark_non_differentiable(scales)
    ctx.sizes, ctx.scattered = x.shape, row_idx_type == 1 and expanded.dim() == 2
    start, end = inputs[11] or (0, inputs[6])
    ctx.save_for_backward(row_idx, ((ids >= start) & (ids < end)).reshape(-1))


def init_routing_backward(ctx: Any, gradient: Tensor, *_: Tensor | None) -> _Gradients:
    """Of ``init_routing_v2``: a token gets the gradients of its copies."""
    row_idx, inside = ctx.saved_tensors
    row = row_idx.long()
    if ctx.scattered:
        row = torch.empty_like(row).scatter(0, row, _numbers(row))
    num_tokens, hidden = ctx.sizes
    token = _numbers(row, len(row) // max(num_tokens, 1))
    row = row.where(inside, -1)
    x = add_terms(gradient.reshape(-1, hidden), row, token, None, num_tokens)
    return x, *[None] * 13


def save_finalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """Of ``finalize_routing``."""
    rows, _, _, bias, scales, index, experts, mode, k = inputs
    ctx.shape = rows.shape
    top_k = (k or 1) if scales is None else scales.shape[1]
    row = source_rows(index, top_k, mode).reshape(-1)
    ctx.top_k = top_k
    ctx.num_experts = 0 if bias is None else len(bias)
    # Rows and biases are for the gradient of the weights alone.
    kept = (rows, bias) if scales is not None else (None, None)
    ctx.save_for_backward(row, experts, scales, *kept)


def finalize_backward(ctx: Any, gradient: Tensor) -> _Gradients:
    """Of ``finalize_routing``."""
    row, experts, scales, rows, bias = ctx.saved_tensors
    token = _numbers(row, ctx.top_k)
    expert = None if experts is None else experts.reshape(-1)
    weights = None if scales is None else scales.reshape(-1)
    found: list[Tensor | None] = [None] * 9
    if _needs(ctx, 0):
        size = ctx.shape[:-1].numel()
        found[0] = add_terms(gradient, token, row, weights, size).view(ctx.shape)
    for skip in (1, 2):
        if _needs(ctx, skip):
            found[skip] = gradient
    if ctx.num_experts and expert is not None and _needs(ctx, 3):
        found[3] = add_terms(gradient, token, expert, weights, ctx.num_experts)
    if scales is not None and _needs(ctx, 4):
        flat = rows.reshape(-1, ctx.shape[-1])
        terms = products(flat, row, gradient, token, scales)
        if bias is not None and expert is not None:
            terms = terms + products(bias, expert, gradient, token, scales)
        found[4] = terms.view_as(scales)
    return tuple(found)

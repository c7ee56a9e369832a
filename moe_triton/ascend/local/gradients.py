"""The gradients of routing as operators of their own, for callers with autograd functions.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import checks
from ..op_names import (
    GATING_TOP_K_BACKWARD,
    TOKEN_PERMUTE_GRAD,
    TOKEN_PERMUTE_MAP_GRAD,
    TOKEN_UNPERMUTE_GRAD,
    TOKEN_UNPERMUTE_MAP_GRAD,
)
from .backward import add_terms, dot_products, gating_gradient, positions, scatter_cells
from .gather import FLOATS
from .routing_map import first_selected, padded_experts, token_unpermute_with_routing_map

_MAPS = (torch.bool, torch.int8)
_INDICES = (torch.int32, torch.int64)


def gating_top_k_backward(
    x_norm: Tensor,
    grad_y: Tensor,
    expert_idx: Tensor,
    *,
    renorm: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> Tensor:
    """The gradient of the logits of ``gating_top_k``."""
    op = GATING_TOP_K_BACKWARD
    checks.required(op, x_norm=x_norm, grad_y=grad_y, expertIdx=expert_idx)
    checks.integers(op, renorm=renorm, norm_type=norm_type)
    checks.reals(op, routed_scaling_factor=routed_scaling_factor, eps=eps)
    checks.dtype(op, "x_norm", x_norm, (torch.float32,))
    checks.dtype(op, "grad_y", grad_y, (*checks.FLOATS, torch.float32))
    checks.dtype(op, "expertIdx", expert_idx, (torch.int32,))
    checks.shape(op, "x_norm", x_norm, (None, None), "(N, E)", x_norm.device)
    checks.shape(op, "grad_y", grad_y, (len(x_norm), None), "(N, K)", x_norm.device)
    shape = tuple(grad_y.shape)
    checks.shape(op, "expertIdx", expert_idx, shape, "of grad_y", x_norm.device)
    checks.value(op, "renorm", renorm == 0, "be 0", renorm)
    checks.value(op, "norm_type", norm_type in (0, 1), "be 0 or 1", norm_type)
    checks.indices(op, "expertIdx", expert_idx, x_norm.shape[1])
    gradient = gating_gradient(x_norm, grad_y, expert_idx, norm_type, routed_scaling_factor, eps)
    return gradient.to(grad_y.dtype)


def gating_top_k_backward_outputs(*, x_norm: Tensor, grad_y: Tensor, **_: object) -> Tensor:
    """Fake output of ``gating_top_k_backward``."""
    return grad_y.new_empty(x_norm.shape)


def token_permute_grad(
    tokens: Tensor,
    grad_permuted_tokens: Tensor,
    indices: Tensor,
    sorted_indices: Tensor,
    padded_mode: bool = False,
) -> Tensor:
    """The gradient of the tokens of ``token_permute``."""
    op, gradient = TOKEN_PERMUTE_GRAD, grad_permuted_tokens
    checks.required(
        op,
        tokens=tokens,
        grad_permuted_tokens=gradient,
        indices=indices,
        sorted_indices=sorted_indices,
    )
    checks.flags(op, padded_mode=padded_mode)
    checks.dtype(op, "tokens", tokens, FLOATS)
    checks.dtype(op, "grad_permuted_tokens", gradient, (tokens.dtype,))
    checks.dtype(op, "indices", indices, _INDICES)
    checks.dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    checks.shape(op, "tokens", tokens, (None, None), "(N, H)", tokens.device)
    shape: tuple[int | None, ...] = (None, tokens.shape[1])
    checks.shape(op, "grad_permuted_tokens", gradient, shape, "(rows, H)", tokens.device)
    shape = (len(tokens), None)[: max(indices.dim(), 1)]
    checks.shape(op, "indices", indices, shape, "(N,) or (N, K)", tokens.device)
    number = indices.numel()
    checks.shape(op, "sorted_indices", sorted_indices, (number,), "(N * K,)", tokens.device)
    checks.value(op, "padded_mode", not padded_mode, "be False", padded_mode)
    token = positions(sorted_indices, indices.shape[1:].numel())
    return add_terms(gradient, sorted_indices, token, None, len(tokens))


def token_permute_grad_outputs(*, tokens: Tensor, **_: object) -> Tensor:
    """Fake output of ``token_permute_grad``."""
    return tokens.new_empty(tokens.shape)


def token_unpermute_grad(
    permuted_tokens: Tensor,
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the rows and of the weights of ``token_unpermute``."""
    del restore_shape
    op, rows, gradient = TOKEN_UNPERMUTE_GRAD, permuted_tokens, grad_unpermuted_tokens
    checks.required(
        op, permuted_tokens=rows, grad_unpermuted_tokens=gradient, sorted_indices=sorted_indices
    )
    checks.flags(op, padded_mode=padded_mode)
    checks.dtype(op, "permuted_tokens", rows, FLOATS)
    checks.dtype(op, "grad_unpermuted_tokens", gradient, (rows.dtype,))
    checks.dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    checks.dtype(op, "probs", probs, FLOATS)
    checks.shape(op, "permuted_tokens", rows, (None, None), "(rows, H)", rows.device)
    shape = (None, rows.shape[1])
    checks.shape(op, "grad_unpermuted_tokens", gradient, shape, "(N, H)", rows.device)
    checks.shape(op, "probs", probs, (len(gradient), None), "(N, K)", rows.device)
    top_k = 1 if probs is None else probs.shape[1]
    number = len(gradient) * top_k
    checks.shape(op, "sorted_indices", sorted_indices, (number,), "(N * K,)", rows.device)
    checks.value(op, "padded_mode", not padded_mode, "be False", padded_mode)
    token = positions(sorted_indices, top_k)
    weights = None if probs is None else probs.reshape(-1)
    to_rows = add_terms(gradient, token, sorted_indices, weights, len(rows))
    if probs is None:
        return to_rows, None
    to_probs = dot_products(rows, sorted_indices, gradient, token, probs.dtype)
    return to_rows, to_probs.view(probs.shape)


def token_unpermute_grad_outputs(
    *, permuted_tokens: Tensor, probs: Tensor | None, **_: object
) -> tuple[Tensor, Tensor | None]:
    """Fake outputs of ``token_unpermute_grad``."""
    to_probs = None if probs is None else probs.new_empty(probs.shape)
    return permuted_tokens.new_empty(permuted_tokens.shape), to_probs


def token_permute_with_routing_map_grad(
    permuted_token_out_grad: Tensor,
    probs_grad: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of tokens and probs of ``token_permute_with_routing_map``."""
    op, gradient = TOKEN_PERMUTE_MAP_GRAD, permuted_token_out_grad
    checks.required(
        op,
        permuted_token_out_grad=gradient,
        sorted_indices=sorted_indices,
        routing_map=routing_map,
    )
    checks.integers(op, experts_num=experts_num, tokens_num=tokens_num)
    checks.flags(op, drop_and_pad=drop_and_pad)
    checks.dtype(op, "permuted_token_out_grad", gradient, FLOATS)
    checks.dtype(op, "probs_grad", probs_grad, FLOATS)
    checks.dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    checks.dtype(op, "routing_map", routing_map, _MAPS)
    device = gradient.device
    checks.shape(op, "permuted_token_out_grad", gradient, (None, None), "(rows, H)", device)
    number = len(gradient)
    checks.shape(op, "sorted_indices", sorted_indices, (number,), "(rows,)", device)
    checks.shape(op, "probs_grad", probs_grad, (number,), "(rows,)", device)
    shape = (tokens_num, experts_num)
    checks.shape(op, "routing_map", routing_map, shape, "(tokens_num, experts_num)", device)
    if drop_and_pad:
        row, token = positions(sorted_indices), sorted_indices
        expert = padded_experts(sorted_indices, experts_num)
    else:
        top_k = _top_k(op, number, tokens_num)
        row, token = sorted_indices, positions(sorted_indices, top_k)
        expert = first_selected(routing_map, top_k).reshape(-1)
    to_tokens = add_terms(gradient, row, token, None, tokens_num)
    if probs_grad is None:
        return to_tokens, None
    return to_tokens, scatter_cells(probs_grad[row.long()], token, expert, routing_map.shape)


def token_permute_with_routing_map_grad_outputs(
    *,
    permuted_token_out_grad: Tensor,
    probs_grad: Tensor | None,
    experts_num: int,
    tokens_num: int,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """Fake outputs of ``token_permute_with_routing_map_grad``."""
    gradient = permuted_token_out_grad
    to_probs = None if probs_grad is None else probs_grad.new_empty((tokens_num, experts_num))
    return gradient.new_empty((tokens_num, *gradient.shape[1:])), to_probs


def token_unpermute_with_routing_map_index(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``token_unpermute_with_routing_map`` with what its gradient takes."""
    out = token_unpermute_with_routing_map(
        permuted_tokens, sorted_indices, restore_shape, probs, routing_map, drop_and_pad
    )
    num_tokens = restore_shape[0]
    if drop_and_pad:
        token_id, order = sorted_indices.sort(stable=True)
        of_rows = None
        if probs is not None:
            expert = padded_experts(sorted_indices, probs.shape[1])
            of_rows = probs[sorted_indices.long(), expert]
        return out, order.int(), token_id, of_rows
    top_k = len(sorted_indices) // max(num_tokens, 1)
    token_id = positions(sorted_indices, top_k).int()
    of_rows = None
    if probs is not None:
        assert routing_map is not None
        of_rows = probs.gather(1, first_selected(routing_map, top_k)).reshape(-1)
    return out, sorted_indices.clone(), token_id, of_rows


def token_unpermute_with_routing_map_index_outputs(
    *,
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    probs: Tensor | None,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Fake outputs of ``token_unpermute_with_routing_map_index``."""
    out = permuted_tokens.new_empty([max(size, 0) for size in restore_shape])
    shape = sorted_indices.shape
    order, token_id = sorted_indices.new_empty(shape), sorted_indices.new_empty(shape)
    return out, order, token_id, None if probs is None else probs.new_empty(shape)


def token_unpermute_with_routing_map_grad(
    unpermuted_tokens_grad: Tensor,
    out_index: Tensor,
    permuted_token_id: Tensor,
    routing_map: Tensor | None,
    permuted_tokens: Tensor | None,
    probs: Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of rows and probs of ``token_unpermute_with_routing_map``."""
    op, gradient = TOKEN_UNPERMUTE_MAP_GRAD, unpermuted_tokens_grad
    checks.required(
        op,
        unpermuted_tokens_grad=gradient,
        out_index=out_index,
        permuted_token_id=permuted_token_id,
        restore_shape=restore_shape,
    )
    checks.flags(op, drop_and_pad=drop_and_pad)
    checks.integer_list(op, "restore_shape", restore_shape)
    checks.dtype(op, "unpermuted_tokens_grad", gradient, FLOATS)
    checks.dtype(op, "out_index", out_index, (torch.int32,))
    checks.dtype(op, "permuted_token_id", permuted_token_id, (torch.int32,))
    checks.dtype(op, "routing_map", routing_map, _MAPS)
    checks.dtype(op, "permuted_tokens", permuted_tokens, (gradient.dtype,))
    checks.dtype(op, "probs", probs, FLOATS)
    device, number = gradient.device, len(out_index)
    shape = tuple(restore_shape)
    fits = len(shape) == 2
    checks.value(op, "restore_shape", fits, "be (N, H)", shape)
    num_tokens, hidden = shape
    checks.shape(op, "unpermuted_tokens_grad", gradient, shape, "restore_shape", device)
    checks.shape(op, "out_index", out_index, (number,), "(rows,)", device)
    checks.shape(op, "permuted_token_id", permuted_token_id, (number,), "(rows,)", device)
    rows = permuted_tokens
    checks.shape(op, "permuted_tokens", rows, (number, hidden), "(rows, H)", device)
    checks.shape(op, "probs", probs, (num_tokens, None), "(N, E)", device)
    token: Tensor = permuted_token_id
    expert = None
    if drop_and_pad:
        if probs is not None:
            expert = out_index.long() // max(number // max(probs.shape[1], 1), 1)
    else:
        top_k = _top_k(op, number, num_tokens)
        token = positions(out_index, top_k)
        if probs is not None:
            checks.value(op, "routing_map", routing_map is not None, "be given with probs", None)
            checks.shape(op, "routing_map", routing_map, tuple(probs.shape), "(N, E)", device)
            assert routing_map is not None
            expert = first_selected(routing_map, top_k).reshape(-1)
    if probs is None:
        return add_terms(gradient, token, out_index, None, number), None
    checks.value(op, "permuted_tokens", rows is not None, "be given with probs", None)
    assert rows is not None
    assert expert is not None
    weights = probs[token.long(), expert]
    to_rows = add_terms(gradient, token, out_index, weights, number)
    terms = dot_products(rows, out_index, gradient, token, probs.dtype)
    return to_rows, scatter_cells(terms, token, expert, probs.shape)


def token_unpermute_with_routing_map_grad_outputs(
    *, unpermuted_tokens_grad: Tensor, out_index: Tensor, probs: Tensor | None, **_: object
) -> tuple[Tensor, Tensor | None]:
    """Fake outputs of ``token_unpermute_with_routing_map_grad``."""
    gradient = unpermuted_tokens_grad
    rows = gradient.new_empty((out_index.shape[0], *gradient.shape[1:]))
    return rows, None if probs is None else probs.new_empty(probs.shape)


def _top_k(op: str, num_rows: int, num_tokens: int) -> int:
    """The rows of each token."""
    fits = num_rows % num_tokens == 0 if num_tokens else num_rows == 0
    name = "out_index" if op == TOKEN_UNPERMUTE_MAP_GRAD else "sorted_indices"
    checks.value(op, name, fits, f"be a multiple of N = {num_tokens} long", num_rows)
    return num_rows // max(num_tokens, 1)

"""The ops behind ``npu_moe_token_permute`` and ``npu_moe_token_unpermute``.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import checks
from ..op_names import TOKEN_PERMUTE, TOKEN_UNPERMUTE
from .gather import FLOATS, gather, sort_order, weighted_sums

_MAX_INDEX = 2**24 - 1


def token_permute(
    tokens: Tensor,
    indices: Tensor,
    num_out_tokens: int | None = None,
    padded_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gather the token of every (expert, token) pair, in that order."""
    op = TOKEN_PERMUTE
    number = 0 if num_out_tokens is None else num_out_tokens
    checks.required(op, tokens=tokens, indices=indices)
    checks.integers(op, num_out_tokens=number)
    checks.flags(op, padded_mode=padded_mode)
    checks.dtype(op, "tokens", tokens, (*FLOATS, torch.int8))
    checks.dtype(op, "indices", indices, (torch.int32, torch.int64))

    checks.shape(op, "tokens", tokens, (None, None), "(N, H)", tokens.device)
    shape = (len(tokens), None)[: max(indices.dim(), 1)]
    checks.shape(op, "indices", indices, shape, "(N,) or (N, K)", tokens.device)
    top_k = indices.shape[1:].numel()
    checks.value(op, "indices", top_k > 0, "have columns", f"shape {tuple(indices.shape)}")
    checks.indices(op, "indices", indices, _MAX_INDEX)
    least = -indices.numel()
    checks.value(op, "num_out_tokens", number >= least, f"be at least {least}", number)
    checks.value(op, "padded_mode", not padded_mode, "be False", padded_mode)
    order, position = sort_order(indices.reshape(-1))
    return gather(tokens, order[: _num_rows(number, len(order))] // top_k), position


def token_permute_outputs(
    *, tokens: Tensor, indices: Tensor, num_out_tokens: int | None, **_: object
) -> tuple[Tensor, Tensor]:
    """Fake outputs of ``token_permute``."""
    rows = max(_num_rows(num_out_tokens or 0, indices.numel()), 0)
    permuted = tokens.new_empty((rows, *tokens.shape[1:]))
    return permuted, indices.new_empty(indices.numel(), dtype=torch.int32)


def _num_rows(num_out_tokens: int, num_slots: int) -> int:
    """Permuted rows: a slice that ends at ``num_out_tokens``, 0 for all."""
    return min(num_out_tokens, num_slots) if num_out_tokens > 0 else num_slots + num_out_tokens


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,  # noqa: ARG001 (of padded_mode)
) -> Tensor:
    """Weighted sum of each token's permuted rows."""
    op = TOKEN_UNPERMUTE
    checks.required(op, permuted_tokens=permuted_tokens, sorted_indices=sorted_indices)
    checks.flags(op, padded_mode=padded_mode)
    checks.dtype(op, "permuted_tokens", permuted_tokens, FLOATS)
    checks.dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    checks.dtype(op, "probs", probs, FLOATS)

    device = permuted_tokens.device
    checks.shape(op, "permuted_tokens", permuted_tokens, (None, None), "(rows, H)", device)
    checks.shape(op, "sorted_indices", sorted_indices, (None,), "(N * K,)", device)
    if probs is not None:
        checks.shape(op, "probs", probs, (None, None), "(N, K)", device)
        num_slots = len(sorted_indices)
        fits = probs.numel() == num_slots and probs.shape[1] > 0
        contract = f"have K > 0 and as many elements as sorted_indices, {num_slots}"
        checks.value(op, "probs", fits, contract, f"shape {tuple(probs.shape)}")
    checks.value(op, "padded_mode", not padded_mode, "be False", padded_mode)
    top_k = 1 if probs is None else probs.shape[1]
    return weighted_sums(permuted_tokens, sorted_indices.view(-1, top_k), probs)


def token_unpermute_outputs(
    *, permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None, **_: object
) -> Tensor:
    """Fake output of ``token_unpermute``."""
    rows = sorted_indices.numel() if probs is None else probs.shape[:1].numel()
    return permuted_tokens.new_empty((rows, *permuted_tokens.shape[1:]))

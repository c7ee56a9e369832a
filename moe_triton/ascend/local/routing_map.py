"""The ops behind ``npu_moe_token_permute_with_routing_map`` and its inverse.

A routing map is an [N, E] mask of the experts of each token. Shapes and errors are documented in
``compat.torch_npu``. ``*_outputs`` are the fake implementations and never raise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...layout import NOWHERE
from ...ops import checks
from ...ops.device_steps import steps_on
from ..op_names import TOKEN_PERMUTE_MAP, TOKEN_UNPERMUTE_MAP
from .gather import FLOATS, gather, sort_order, weighted_sums

_MAPS = (torch.bool, torch.int8)


def first_selected(routing_map: Tensor, number: int) -> Tensor:
    """[.., number] int64: columns that are True in ascending order, then the False ones."""
    order = routing_map.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return order[..., :number]


def token_permute_with_routing_map(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gather the token of every (expert, token) pair of the map, in that order."""
    op = TOKEN_PERMUTE_MAP
    checks.required(op, tokens=tokens, routing_map=routing_map)
    if num_out_tokens is not None:
        checks.integers(op, num_out_tokens=num_out_tokens)
    checks.flags(op, drop_and_pad=drop_and_pad)
    checks.dtype(op, "tokens", tokens, FLOATS)
    checks.dtype(op, "routing_map", routing_map, _MAPS)
    checks.dtype(op, "probs", probs, _probs_dtypes(tokens))

    checks.shape(op, "tokens", tokens, (None, None), "(N, H)", tokens.device)
    num_tokens = len(tokens)
    _check_map(op, routing_map, num_tokens, tokens.device)
    checks.shape(op, "probs", probs, tuple(routing_map.shape), "(N, E)", tokens.device)
    number = num_tokens if num_out_tokens is None else num_out_tokens
    most = routing_map.numel()
    contract = f"be in [0, N * E] = [0, {most}]"
    checks.value(op, "num_out_tokens", 0 <= number <= most, contract, number)
    if drop_and_pad:
        capacity = number // routing_map.shape[1]
        token = first_selected(routing_map.T, capacity)
        permuted_probs = None if probs is None else probs.T.gather(1, token).reshape(-1)
        token = token.reshape(-1)
        return gather(tokens, token), permuted_probs, token.int()
    top_k = number // max(num_tokens, 1)
    if routing_map.device.type == "cpu" and bool((routing_map.sum(1) != top_k).any()):
        contract = f"have num_out_tokens // N = {top_k} experts for each token"
        row = int((routing_map.sum(1) != top_k).nonzero()[0])
        got = f"{int(routing_map[row].sum())} for token {row}"
        checks.value(op, "routing_map", False, contract, got)
    expert = first_selected(routing_map, top_k)
    order, position = sort_order(expert.reshape(-1))
    permuted_probs = None if probs is None else probs.gather(1, expert).reshape(-1)[order]
    return gather(tokens, order // max(top_k, 1)), permuted_probs, position


def token_permute_with_routing_map_outputs(
    *,
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    num_out_tokens: int | None,
    drop_and_pad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fake outputs of ``token_permute_with_routing_map``."""
    num_tokens, num_experts, *_ = *routing_map.shape, 0, 0
    number = num_tokens if num_out_tokens is None else max(num_out_tokens, 0)
    divisor = max(num_experts if drop_and_pad else num_tokens, 1)
    rows = number // divisor * divisor
    permuted = tokens.new_empty((rows, *tokens.shape[1:]))
    permuted_probs = None if probs is None else probs.new_empty(rows)
    return permuted, permuted_probs, tokens.new_empty(rows, dtype=torch.int32)


def token_unpermute_with_routing_map(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> Tensor:
    """Weighted sum of each token's permuted rows."""
    op = TOKEN_UNPERMUTE_MAP
    checks.required(
        op,
        permuted_tokens=permuted_tokens,
        sorted_indices=sorted_indices,
        restore_shape=restore_shape,
    )
    checks.integer_list(op, "restore_shape", restore_shape)
    checks.flags(op, drop_and_pad=drop_and_pad)
    checks.dtype(op, "permuted_tokens", permuted_tokens, FLOATS)
    checks.dtype(op, "sorted_indices", sorted_indices, (torch.int32,))
    checks.dtype(op, "probs", probs, _probs_dtypes(permuted_tokens))
    checks.dtype(op, "routing_map", routing_map, _MAPS)

    device = permuted_tokens.device
    checks.shape(op, "permuted_tokens", permuted_tokens, (None, None), "(rows, H)", device)
    checks.shape(op, "sorted_indices", sorted_indices, (None,), "(rows,)", device)
    fits = len(restore_shape) == 2 and restore_shape[0] >= 0
    fits = fits and restore_shape[1] == permuted_tokens.shape[1]
    contract = f"be (N, H) with H = {permuted_tokens.shape[1]}"
    checks.value(op, "restore_shape", fits, contract, tuple(restore_shape))
    num_tokens, num_rows = restore_shape[0], len(sorted_indices)
    checks.shape(op, "probs", probs, (num_tokens, None), "(N, E)", device)
    if routing_map is not None:
        _check_map(op, routing_map, num_tokens, device)
        if probs is not None:
            shape = tuple(routing_map.shape)
            checks.shape(op, "probs", probs, shape, "that of routing_map", device)
    if drop_and_pad:
        return _unpermute_padded(permuted_tokens, sorted_indices, num_tokens, probs)

    contract = f"be a multiple of N = {num_tokens} long"
    fits = num_rows % num_tokens == 0 if num_tokens else num_rows == 0
    checks.value(op, "sorted_indices", fits, contract, num_rows)
    top_k = num_rows // max(num_tokens, 1)
    weights = None
    if probs is not None:
        checks.value(op, "routing_map", routing_map is not None, "be given with probs", None)
        assert routing_map is not None
        most = probs.shape[1]
        contract = f"have at most N * E = {num_tokens * most} elements"
        checks.value(op, "sorted_indices", top_k <= most, contract, num_rows)
        weights = probs.gather(1, first_selected(routing_map, top_k))
    return weighted_sums(permuted_tokens, sorted_indices.view(num_tokens, top_k), weights)


def token_unpermute_with_routing_map_outputs(
    *, permuted_tokens: Tensor, restore_shape: Sequence[int], **_: object
) -> Tensor:
    """Fake output of ``token_unpermute_with_routing_map``."""
    return permuted_tokens.new_empty([max(size, 0) for size in restore_shape])


def padded_experts(sorted_indices: Tensor, num_experts: int) -> Tensor:
    """[E * capacity] int64: the expert of each row with drop_and_pad."""
    num_rows = len(sorted_indices)
    row = torch.arange(num_rows, device=sorted_indices.device)
    return row // max(num_rows // max(num_experts, 1), 1)


def _unpermute_padded(
    permuted: Tensor, token_of: Tensor, num_tokens: int, probs: Tensor | None
) -> Tensor:
    """Sum rows by the token of each, in the order of the rows."""
    op, num_rows = TOKEN_UNPERMUTE_MAP, len(token_of)
    contract = f"have as many rows as sorted_indices, {num_rows}"
    checks.value(op, "permuted_tokens", len(permuted) == num_rows, contract, len(permuted))
    if probs is not None:
        fits = num_rows % probs.shape[1] == 0 if probs.shape[1] else num_rows == 0
        contract = f"be a multiple of E = {probs.shape[1]} long"
        checks.value(op, "sorted_indices", fits, contract, num_rows)
    checks.indices(op, "sorted_indices", token_of, num_tokens)
    # The rank of each row among its token's rows; the busiest token sets the number of slots.
    slot = (
        steps_on(token_of.device)
        .routing_plan(token_of[:, None], num_tokens)
        .position_in_expert.long()
    )
    slots = int(slot.max()) + 1 if num_rows else 0
    token = token_of.long()
    row = torch.arange(num_rows, device=token.device)
    index = token.new_full((num_tokens, slots), NOWHERE)
    index[token, slot] = row
    weights = None
    if probs is not None:
        weights = probs.new_zeros(index.shape)
        weights[token, slot] = probs[token, padded_experts(token_of, probs.shape[1])]
    return weighted_sums(permuted, index, weights)


def _probs_dtypes(tokens: Tensor) -> tuple[torch.dtype, ...]:
    """Probs have the dtype of the tokens; float32 also goes with bfloat16."""
    return (tokens.dtype, torch.float32) if tokens.dtype == torch.bfloat16 else (tokens.dtype,)


def _check_map(op: str, routing_map: Tensor, num_tokens: int, device: torch.device) -> None:
    """A map is [N, E] with E > 0, all zeros and ones."""
    checks.shape(op, "routing_map", routing_map, (num_tokens, None), "(N, E)", device)
    fits = routing_map.shape[1] > 0
    checks.value(op, "routing_map", fits, "have columns", f"shape {tuple(routing_map.shape)}")
    if routing_map.dtype == torch.int8:
        checks.indices(op, "routing_map", routing_map, 2)

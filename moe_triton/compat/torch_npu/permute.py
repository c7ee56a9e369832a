"""Permute tokens into the order of their experts, and back; on one device, with gradients.

The gradients are operators too, for callers that write their own autograd functions.

Letters: N tokens, H hidden size, K experts of a token, E experts. float64 is accepted in addition
to the dtypes of torch_npu.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...ascend.local import schemas


def npu_moe_token_permute(
    tokens: Tensor,
    indices: Tensor,
    num_out_tokens: int | None = None,
    padded_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Copy each token once per expert of it, in the order of (expert, token).

        permuted_tokens[sorted_indices[i]] = tokens[i // K]

    Args:
        tokens: (N, H) float16, bfloat16, float32, float64 or int8. Gradients go to it.
        indices: (N, K) or (N,) int32 or int64, the experts, at least 0 and below 2**24 - 1.
        num_out_tokens: number of rows to keep, from the first; None or 0 for all. A negative
            number drops as many of the last.
        padded_mode: False.

    Returns:
        permuted_tokens: (N * K, H), or (num_out_tokens, H) if that is less.
        sorted_indices: (N * K,) int32, the row of each slot; the row may be one that is not kept.

    Raises:
        MissingArgumentError: 161001.
        ArgumentTypeError: 161002.
        ArgumentValueError: 561002, a shape or value; values in tensors are checked on the CPU.
    """
    return schemas.token_permute(**locals())


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """Sum each token's rows, weighted; the inverse of ``npu_moe_token_permute``.

        out[t] = sum_k probs[t, k] * permuted_tokens[sorted_indices[t * K + k]]

    in float32 (float64 for float64), in this order, rounded once. Slots whose index is negative or
    beyond the last row add nothing.

    Args:
        permuted_tokens: (rows, H) float16, bfloat16, float32 or float64. Gradients go to it.
        sorted_indices: (N * K,) int32 from permute.
        probs: (N, K) of one of these dtypes, with gradients; None for K = 1 and weights of 1.
        padded_mode: False.
        restore_shape: for padded_mode; ignored.

    Returns:
        (N, H) of the dtype of permuted_tokens.

    Raises:
        The errors of ``npu_moe_token_permute``.
    """
    return schemas.token_unpermute(**locals())


def npu_moe_token_permute_with_routing_map(
    tokens: Tensor,
    routing_map: Tensor,
    *,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Copy each token once per expert of it, in the order of (expert, token).

    With drop_and_pad every expert has num_out_tokens // E rows: its first tokens, then, if these
    are too few, the first tokens without this expert.

    Args:
        tokens: (N, H) float16, bfloat16, float32 or float64. Gradients go to it.
        routing_map: (N, E) bool or int8, the experts of each token; without drop_and_pad
            K = num_out_tokens // N for every token.
        probs: (N, E) of the dtype of tokens, or float32 for bfloat16; with gradients.
        num_out_tokens: number of rows, at most N * E; None for N.
        drop_and_pad: whether every expert gets the same number of rows.

    Returns:
        permuted_tokens: (N * K, H), with drop_and_pad (E * (num_out_tokens // E), H).
        permuted_probs: the probs of the rows, of their dtype; None without probs.
        sorted_indices: int32, one per row. Element t * K + k is the row of token t for the k-th of
            its experts in order; with drop_and_pad element i is the token of row i.

    Raises:
        The errors of ``npu_moe_token_permute``.
    """
    return schemas.token_permute_with_routing_map(**locals())


def npu_moe_token_unpermute_with_routing_map(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    *,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> Tensor:
    """Sum each token's rows; the inverse of ``npu_moe_token_permute_with_routing_map``.

        out[t] = sum_k p * permuted_tokens[sorted_indices[t * K + k]]
        out[sorted_indices[i]] += p * permuted_tokens[i]      with drop_and_pad

    where p is the token's prob for the expert of the row, 1 without probs; in float32 (float64 for
    float64), in this order, rounded once. Without drop_and_pad, slots whose index is negative or
    beyond the last row add nothing.

    Args:
        permuted_tokens: (rows, H) float16, bfloat16, float32 or float64. Gradients go to it.
        sorted_indices: int32 from permute, (N * K,) or (E * capacity,).
        restore_shape: (N, H).
        probs: (N, E) of the dtype of permuted_tokens, or float32 for bfloat16; with gradients.
        routing_map: (N, E) bool or int8 as given to permute; needed with probs, unless
            drop_and_pad.
        drop_and_pad: as in permute.

    Returns:
        (N, H) of the dtype of permuted_tokens.

    Raises:
        The errors of ``npu_moe_token_permute``.
    """
    return schemas.token_unpermute_with_routing_map(**locals())


def npu_moe_token_permute_grad(
    tokens: Tensor,
    grad_permuted_tokens: Tensor,
    indices: Tensor,
    sorted_indices: Tensor,
    padded_mode: bool = False,
) -> Tensor:
    """The gradient of the tokens of ``npu_moe_token_permute``: the sums of their rows' gradients.

    In float32 (float64 for float64), rounded once.

    Args:
        tokens: (N, H) as in permute; only shape and dtype matter.
        grad_permuted_tokens: (rows, H) of the dtype of tokens.
        indices: (N, K) or (N,) as in permute; only the shape matters.
        sorted_indices: (N * K,) int32 from permute.
        padded_mode: False.

    Returns:
        (N, H) of the dtype of tokens.

    Raises:
        The errors of ``npu_moe_token_permute``.
    """
    return schemas.token_permute_grad(**locals())


def npu_moe_token_unpermute_grad(
    permuted_tokens: Tensor,
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of rows and weights of ``npu_moe_token_unpermute``.

    In float32 (float64 for float64), each rounded once.

    Args:
        permuted_tokens: (rows, H) as in unpermute.
        grad_unpermuted_tokens: (N, H) of its dtype.
        sorted_indices: (N * K,) int32 as in unpermute.
        probs: (N, K) as in unpermute.
        padded_mode: False.
        restore_shape: ignored.

    Returns:
        permuted_tokens_grad: (rows, H) of the dtype of permuted_tokens.
        probs_grad: (N, K) of the dtype of probs; None without probs.

    Raises:
        The errors of ``npu_moe_token_permute``.
    """
    return schemas.token_unpermute_grad(**locals())


def npu_moe_token_permute_with_routing_map_grad(
    permuted_token_out_grad: Tensor,
    probs_grad: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of tokens and probs of ``npu_moe_token_permute_with_routing_map``.

    In float32 (float64 for float64), rounded once.

    Args:
        permuted_token_out_grad: (rows, H) float16, bfloat16, float32 or float64.
        probs_grad: (rows,) the gradient of permuted_probs, or None.
        sorted_indices: (rows,) int32 from permute.
        routing_map: (N, E) bool or int8 as in permute.
        experts_num: E.
        tokens_num: N.
        drop_and_pad: as in permute.

    Returns:
        tokens_grad: (N, H) of the dtype of permuted_token_out_grad.
        probs_grad: (N, E) of the dtype of probs_grad; None without it.

    Raises:
        The errors of ``npu_moe_token_permute``.
    """
    return schemas.token_permute_with_routing_map_grad(**locals())


def _npu_moe_token_unpermute_with_routing_map(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: Sequence[int],
    *,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``npu_moe_token_unpermute_with_routing_map`` with what its gradient takes.

    Args:
        permuted_tokens: as there, with gradients.
        sorted_indices: as there.
        restore_shape: as there.
        probs: as there, with gradients.
        routing_map: as there.
        drop_and_pad: as there.

    Returns:
        unpermuted_tokens: as there.
        out_index: (rows,) int32, the rows in the order of their tokens; without drop_and_pad
            sorted_indices, where torch_npu leaves it open.
        permuted_token_id: (rows,) int32, the token of each of these.
        permute_probs: (rows,) the probs of the rows, with drop_and_pad in the order of the rows,
            otherwise in that of tokens and experts; without gradients, None without probs.

    Raises:
        The errors of ``npu_moe_token_permute``.
    """
    return schemas.token_unpermute_with_routing_map_index(**locals())


def npu_moe_token_unpermute_with_routing_map_grad(
    unpermuted_tokens_grad: Tensor,
    out_index: Tensor,
    permuted_token_id: Tensor,
    routing_map: Tensor | None,
    permuted_tokens: Tensor | None,
    probs: Tensor | None,
    drop_and_pad: bool,
    restore_shape: Sequence[int],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of rows and probs of ``npu_moe_token_unpermute_with_routing_map``.

    In float32 (float64 for float64), each rounded once.

    Args:
        unpermuted_tokens_grad: (N, H) float16, bfloat16, float32 or float64.
        out_index: (rows,) int32. With drop_and_pad from
            ``_npu_moe_token_unpermute_with_routing_map``, otherwise sorted_indices.
        permuted_token_id: the same; without drop_and_pad not used.
        routing_map: (N, E) bool or int8, needed with probs, unless drop_and_pad.
        permuted_tokens: (rows, H) as in unpermute, needed with probs.
        probs: (N, E) as in unpermute.
        drop_and_pad: as in unpermute.
        restore_shape: (N, H).

    Returns:
        permuted_tokens_grad: (rows, H) of the dtype of unpermuted_tokens_grad.
        probs_grad: (N, E) of the dtype of probs; None without probs.

    Raises:
        The errors of ``npu_moe_token_permute``.
    """
    return schemas.token_unpermute_with_routing_map_grad(**locals())

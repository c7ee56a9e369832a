"""Seeded inputs for tests and benchmarks: routing tables, tokens and weights.

Shapes: T tokens, E experts, K experts per token, H hidden size. The CPU draws all tensors, so a
seed gives the same data on every device.
"""

from __future__ import annotations

import torch


def routing_uniform(
    num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0
) -> torch.Tensor:
    """Draw experts uniformly.

    Args:
        num_tokens: T, may be 0.
        num_experts: E.
        top_k: K, at most E.
        seed: seed of the generator.

    Returns:
        Expert ids, [T, K] int32, distinct within a row.

    Raises:
        ValueError: if ``top_k`` is not in [1, E].
    """
    return _sample(torch.zeros(num_experts), num_tokens, top_k, seed)


def routing_zipf(
    num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0, exponent: float = 1.2
) -> torch.Tensor:
    """Draw experts with a probability that falls as ``(id + 1) ** -exponent``.

    The order of popularity does not depend on the seed: ranks that draw with different seeds agree
    on the popular experts, as the ranks of a real model do, and the first ranks receive the most.

    Args:
        num_tokens: T, may be 0.
        num_experts: E.
        top_k: K, at most E.
        seed: seed of the generator.
        exponent: of the distribution; 0 is uniform.

    Returns:
        Expert ids, [T, K] int32, distinct within a row.

    Raises:
        ValueError: if ``top_k`` is not in [1, E].
    """
    log_popularity = -exponent * torch.arange(1, num_experts + 1, dtype=torch.float32).log()
    return _sample(log_popularity, num_tokens, top_k, seed)


def routing_hot(
    num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0, expert: int = 0
) -> torch.Tensor:
    """Send every token to one expert; the other K - 1 choices are uniform.

    Args:
        num_tokens: T, may be 0.
        num_experts: E.
        top_k: K, at most E.
        seed: seed of the generator.
        expert: the expert of every token.

    Returns:
        Expert ids, [T, K] int32, distinct within a row; column 0 is ``expert``.

    Raises:
        ValueError: if ``top_k`` is not in [1, E] or ``expert`` not in [0, E).
    """
    if not 0 <= expert < num_experts:
        raise ValueError(f"routing_hot: expert must be in [0, {num_experts}), got {expert}")
    log_popularity = torch.zeros(num_experts)
    log_popularity[expert] = torch.inf
    return _sample(log_popularity, num_tokens, top_k, seed)


def tokens(
    num_tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0
) -> torch.Tensor:
    """Draw token rows from the standard normal distribution.

    Args:
        num_tokens: T, may be 0.
        hidden: H.
        dtype: a floating-point dtype; values are drawn in fp32 and rounded to it.
        seed: seed of the generator.

    Returns:
        Tokens, [T, H] of ``dtype``.
    """
    return torch.randn(num_tokens, hidden, generator=_generator(seed)).to(dtype)


def weights(num_tokens: int, top_k: int, *, seed: int = 0) -> torch.Tensor:
    """Draw router weights: positive, each row with sum 1.

    Args:
        num_tokens: T, may be 0.
        top_k: K.
        seed: seed of the generator.

    Returns:
        Weights, [T, K] fp32.
    """
    return torch.randn(num_tokens, top_k, generator=_generator(seed)).softmax(dim=1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sample(log_popularity: torch.Tensor, num_tokens: int, top_k: int, seed: int) -> torch.Tensor:
    """Draw K of E without replacement for every token, from unnormalised log probabilities [E]."""
    num_experts = log_popularity.numel()
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in [1, {num_experts}] (the experts), got {top_k}")
    # The K largest of log p + Gumbel noise are such a draw; the negative logarithm of an
    # exponential variable is Gumbel.
    noise = torch.empty(num_tokens, num_experts).exponential_(generator=_generator(seed))
    return (log_popularity - noise.log()).topk(top_k, dim=1).indices.to(torch.int32)

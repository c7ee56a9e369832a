"""Random tokens and expert outputs for a group, with the outputs that the definition gives."""

from __future__ import annotations

from typing import Any

import definition
import harness
import numpy as np
from definition import Group, Received, Tokens
from definition_checks import check_dispatch


def random_tokens(rng: np.random.Generator, group: Group, batch: int) -> Tokens:
    """The tokens of one rank, with the tensors that the zero-computation experts need."""
    constants = group.const_experts
    num_experts = group.num_experts + group.zero_experts + group.copy_experts + constants
    ids = [rng.permutation(num_experts)[: group.top_k] for _ in range(batch)]

    def rows(count: int) -> np.ndarray:
        return definition.encode(rng.normal(size=(count, group.hidden)), group.dtype)

    return Tokens(
        x=rows(batch),
        ids=np.array(ids, np.int32).reshape(batch, group.top_k),
        weights=rng.normal(size=(batch, group.top_k)).astype(np.float32),
        ori_x=rows(batch) if group.copy_experts or constants else None,
        alpha_1=rows(constants)[:, 0] if constants else None,
        alpha_2=rows(constants)[:, 0] if constants else None,
        const_v=rows(constants) if constants else None,
    )


def case_of(
    rng: np.random.Generator,
    group: Group,
    tokens: list[Tokens],
    *,
    shared_x: list[np.ndarray | None] | None = None,
    **options: Any,
) -> tuple[list[dict | None], list[Received | None], list]:
    """Calls with random expert outputs, and the outputs of dispatch and combine.

    ``options`` are those of ``harness.make_calls``.
    """
    received = definition.dispatch(group, tokens)
    rows = [
        None
        if mine is None
        else definition.encode(rng.normal(size=(len(mine.expand_x), group.hidden)), group.dtype)
        for mine in received
    ]
    combined = definition.combine(group, tokens, received, rows, shared_x)
    calls = harness.make_calls(group, tokens, rows, shared_x=shared_x, **options)
    return calls, received, combined


def check_round(
    group: Group, received: list, combined: list, rank: int, result: tuple, version: int = 1
) -> None:
    """Assert that a round trip of ``rank`` returned the bits of the definition."""
    outputs, x = result
    check_dispatch(group, received[rank], outputs, rank=rank, version=version)
    definition.same_bits(x, combined[rank], f"rank {rank} x")

"""Whole layers for ``bench kernels``: dispatch and combine of ranks that share one device.

One thread drives the ranks, so a call is every rank's setup and then every rank's teardown. Without
experts, combine sums whatever ``output_rows`` holds, or any memory for one rank. Bytes are those of
the kernels that move rows; plans and indices are small.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from .. import ExpertParallel, ref, testing
from ..layout import RowFormat
from .kernel_cases import (
    BF16,
    gather_quant_bytes,
    numbers,
    row_bytes,
    weighted_sum_bytes,
)
from .models import Shape

# Above this many rows per rank, max_recv_tokens is twice the mean: memory for the worst case would
# fill the device. Eager calls then check for overflow.
MOST_ROWS = 2**16


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """Dispatch or combine of a layer, like ``kernel_cases.Case`` for a kernel.

    Attributes:
        name: the half, and the format of rows.
        shape: of the model.
        tokens: of each rank.
        world_size: W.
        num_bytes: of all ranks together.
        calls: one per set of inputs.
    """

    name: str
    shape: Shape
    tokens: int
    world_size: int
    num_bytes: int
    calls: list[Callable[[], object]]


@contextlib.contextmanager
def layer(
    shape: Shape,
    tokens: int,
    device: torch.device,
    *,
    world_size: int,
    quant: str | None,
    num_sets: Callable[[int], int],
) -> Iterator[list[LayerCase]]:
    """The two halves of a layer whose sums are right; ``num_sets`` of bytes says how many sets."""
    most = world_size * tokens * min(shape.top_k, shape.experts // world_size)
    limited = world_size > 1 and most > MOST_ROWS
    limit = 2 * tokens * shape.top_k if limited else None

    def make(ctx: testing.RankContext) -> ExpertParallel:
        return ExpertParallel(
            ctx.ep_group,
            rank=ctx.ep_rank,
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            max_tokens=tokens,
            quant=cast("Any", quant),
            max_recv_tokens=limit,
            # Combines in a row take a ring of slots, which one thread for all ranks cannot grow.
            in_flight=2 if world_size > 1 else 1,
            device=ctx.device,
        )

    dispatch_bytes, combine_bytes = layer_bytes(shape, tokens, world_size, quant)
    sets = [
        [drawn(shape, tokens, device, rank) for rank in range(world_size)]
        for _ in range(num_sets(dispatch_bytes))
    ]
    with testing.lockstep(world_size, make, device=device) as ranks:
        check(ranks, sets[0], quant)
        received = [dispatch(ranks, inputs) for inputs in sets]
        outputs: list[Any] = [None] * len(sets)
        if world_size == 1:
            outputs = [[recv.x.to(BF16) for recv in of_set] for of_set in received]
        names = [f"{half} {quant or 'bf16'}" for half in ("dispatch", "combine")]
        common = shape, tokens, world_size
        yield [
            LayerCase(
                names[0],
                *common,
                dispatch_bytes,
                [functools.partial(dispatch, ranks, inputs) for inputs in sets],
            ),
            LayerCase(
                names[1],
                *common,
                combine_bytes,
                [
                    functools.partial(combine, ranks, of_set, rows)
                    for of_set, rows in zip(received, outputs, strict=True)
                ],
            ),
        ]


def layer_bytes(shape: Shape, tokens: int, world_size: int, quant: str | None) -> tuple[int, int]:
    """Bytes of dispatch and of combine, of all ranks."""
    fmt = RowFormat.quantized(quant, BF16, shape.hidden)
    returned = world_size * weighted_sum_bytes(shape, tokens, normalised=False)
    if world_size == 1:
        return gather_quant_bytes(shape, tokens, fmt), returned
    packed = 2 * tokens * shape.top_k * row_bytes(fmt)
    routing = tokens * shape.top_k * 16 + world_size * (16 + 4 * (1 + shape.experts))
    sent = world_size * (tokens * (shape.hidden * 2 + fmt.stride) + routing + packed)
    # Combines in a row copy the experts' rows into the windows.
    copied = 2 * tokens * shape.top_k * row_bytes(RowFormat.tight(BF16, shape.hidden))
    return sent, returned + world_size * copied


def drawn(shape: Shape, tokens: int, device: torch.device, rank: int) -> tuple[torch.Tensor, ...]:
    """Tokens, ids and weights of a rank."""
    ids = testing.routing_uniform(tokens, shape.experts, shape.top_k, seed=rank)
    weights = testing.weights(tokens, shape.top_k, seed=rank)
    return numbers((tokens, shape.hidden), device), ids.to(device), weights.to(device)


@torch.no_grad()  # else rows after the last one are zeroed, for training
def dispatch(ranks: list[ExpertParallel], inputs: list[tuple[torch.Tensor, ...]]) -> list[Any]:
    """Dispatch the inputs of all ranks: every setup, then every teardown."""
    pending = [ep.dispatch_setup(*values) for ep, values in zip(ranks, inputs, strict=True)]
    return [ep.dispatch_teardown(sent) for ep, sent in zip(ranks, pending, strict=True)]


def combine(
    ranks: list[ExpertParallel], received: list[Any], rows: list[Any] | None
) -> list[torch.Tensor]:
    """Combine the experts' outputs ``rows``; None for whatever the output rows hold."""
    if rows is None:
        rows = [ep.output_rows(recv.handle) for ep, recv in zip(ranks, received, strict=True)]
    pending = [
        ep.combine_setup(y, recv.handle) for ep, y, recv in zip(ranks, rows, received, strict=True)
    ]
    return [ep.combine_teardown(sent) for ep, sent in zip(ranks, pending, strict=True)]


def check(ranks: list[ExpertParallel], inputs: list[Any], quant: str | None) -> None:
    """With experts that return the received codes, a sum is weights times codes, in order."""
    received = dispatch(ranks, inputs)
    outputs = [ep.output_rows(recv.handle) for ep, recv in zip(ranks, received, strict=True)]
    for y, recv in zip(outputs, received, strict=True):
        y.copy_(recv.x[: len(y)])
    for (x, _, weights), out in zip(inputs, combine(ranks, received, outputs), strict=True):
        check_sums(out, x, weights, quant)


def check_sums(
    out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, quant: str | None
) -> None:
    """Raise unless ``out`` is the sum of the weighted codes of ``x``, in the order of the slots."""
    codes = x
    if quant is not None:
        fmt = RowFormat.quantized(quant, BF16, x.shape[1])
        codes = torch.empty(x.shape, dtype=fmt.dtype, device=x.device)
        scales = torch.empty(fmt.scale_shape(len(x)), dtype=fmt.scale_dtype, device=x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        ref.gather_quant(x, rows, fmt, None, None, codes, scales)
    total = torch.zeros(x.shape, device=x.device)
    for k in range(weights.shape[1]):
        total += codes.to(BF16).float() * weights[:, k, None]
    if not torch.equal(out, total.to(BF16)):
        raise AssertionError("sums of combine differ from those computed directly")

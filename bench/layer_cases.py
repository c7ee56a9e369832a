"""Whole layers for bench_kernels: dispatch and combine of all ranks that share one device.

One thread drives the ranks, so a call is every rank's setup and then every rank's teardown. Experts
are left out: combine sums what stands in the memory that ``output_rows`` names, or for one rank in
any memory. Bytes are those of the kernels underneath that move rows; plans and places are small.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from kernel_cases import (
    BF16,
    Shape,
    dispatch_send_bytes,
    gather_quant_bytes,
    numbers,
    row_bytes,
    weighted_sum_bytes,
)

from moe_triton import ExpertParallel, ref, testing
from moe_triton.layout import RowFormat

# Above this many rows for a rank, what it may receive is limited to twice the mean: memory for the
# worst case of many ranks would fill the device. Eager calls then look at what comes.
MOST_ROWS = 2**16


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One half of a layer, as ``kernel_cases.Case`` is one kernel.

    Attributes:
        name: of the half, and of the rows that travel.
        shape: of the model.
        tokens: of each rank.
        world_size: W.
        num_bytes: of all ranks together.
        calls: one for each set of inputs.
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

    def make(ctx) -> ExpertParallel:
        return ExpertParallel(
            ctx.ep_group,
            rank=ctx.ep_rank,
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            max_tokens=tokens,
            quant=quant,
            max_recv_tokens=limit,
            device=ctx.device,
        )

    dispatch_bytes, combine_bytes = layer_bytes(shape, tokens, world_size, quant)
    sets = [
        [drawn(shape, tokens, device, rank) for rank in range(world_size)]
        for _ in range(num_sets(dispatch_bytes))
    ]
    with testing.lockstep(world_size, make, device=device) as ranks:
        check(ranks, sets[0], quant)
        received = [dispatch(ranks, given) for given in sets]
        outputs = [[one.x.to(BF16) for one in of_set] for of_set in received]
        if world_size > 1:
            outputs = [None] * len(sets)
        names = [f"{half} {quant or 'bf16'}" for half in ("dispatch", "combine")]
        common = shape, tokens, world_size
        yield [
            LayerCase(
                names[0],
                *common,
                dispatch_bytes,
                [lambda given=given: dispatch(ranks, given) for given in sets],
            ),
            LayerCase(
                names[1],
                *common,
                combine_bytes,
                [
                    lambda one=one, rows=rows: combine(ranks, one, rows)
                    for one, rows in zip(received, outputs, strict=True)
                ],
            ),
        ]


def layer_bytes(shape: Shape, tokens: int, world_size: int, quant: str | None) -> tuple[int, int]:
    """Of dispatch and of combine, all ranks together."""
    fmt = RowFormat.quantized(quant, BF16, shape.hidden)
    returned = world_size * weighted_sum_bytes(shape, tokens, normalised=False)
    if world_size == 1:
        return gather_quant_bytes(shape, tokens, fmt), returned
    packed = 2 * tokens * shape.top_k * row_bytes(fmt)
    return world_size * (dispatch_send_bytes(shape, tokens, fmt, world_size) + packed), returned


def drawn(shape: Shape, tokens: int, device: torch.device, rank: int) -> tuple[torch.Tensor, ...]:
    """Tokens, ids and weights of a rank."""
    ids = testing.routing_uniform(tokens, shape.experts, shape.top_k, seed=rank)
    weights = testing.weights(tokens, shape.top_k, seed=rank)
    return numbers((tokens, shape.hidden), device), ids.to(device), weights.to(device)


def dispatch(ranks: list[ExpertParallel], given: list[tuple[torch.Tensor, ...]]) -> list:
    sent = [ep.dispatch_setup(*values) for ep, values in zip(ranks, given, strict=True)]
    return [ep.dispatch_teardown(one) for ep, one in zip(ranks, sent, strict=True)]


def combine(ranks: list[ExpertParallel], received: list, rows: list | None) -> list[torch.Tensor]:
    """``rows`` are the experts' outputs; None for whatever stands where they belong."""
    if rows is None:
        rows = [ep.output_rows(one.handle) for ep, one in zip(ranks, received, strict=True)]
    sent = [
        ep.combine_setup(y, one.handle) for ep, y, one in zip(ranks, rows, received, strict=True)
    ]
    return [ep.combine_teardown(one) for ep, one in zip(ranks, sent, strict=True)]


def check(ranks: list[ExpertParallel], given: list, quant: str | None) -> None:
    """Experts that return the codes they get: a sum is the codes times the weights, in order."""
    received = dispatch(ranks, given)
    outputs = [ep.output_rows(one.handle) for ep, one in zip(ranks, received, strict=True)]
    for y, one in zip(outputs, received, strict=True):
        y.copy_(one.x[: len(y)])
    for (x, _, weights), found in zip(given, combine(ranks, received, outputs), strict=True):
        codes = x if quant is None else ref.quantize_rows(x)[0]
        total = torch.zeros(x.shape, device=x.device)
        for k in range(weights.shape[1]):
            total += codes.to(BF16).float() * weights[:, k, None]
        if not torch.equal(found, total.to(BF16)):
            raise AssertionError(f"{len(ranks)} ranks: sums differ from those of the tokens alone")

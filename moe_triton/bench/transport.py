"""How fast do tokens move between processes of one host: windows and collectives, beside by hand?

By hand is what a user writes over torch.distributed: sort the routed slots by rank, exchange the
counts, exchange the rows, and the same way back. Each case runs all of them in the same processes,
in turn, and checks each against the sum computed directly before it times them. A round is a
dispatch and a combine; a sample is a few rounds one after the other, as a model's layers are, and
its time is the slowest rank's. The floor is a plain copy of the rows that a rank gets delivered, in
both directions, by all ranks at once.

The experts are left out: their outputs are taken to stand where ``output_rows`` says. "copied" is
the same with outputs anywhere else, which combine must copy into its window.

With torchrun its processes are the ranks, which must be of one host.

    moe-triton bench transport [--world-size 2 4 8] [--samples 15]
    moe-triton bench transport --preset qwen3-235b --tokens 8 64 --quant int8 --plot transport.svg
    torchrun --nproc-per-node 4 -m moe_triton bench transport
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

import moe_triton

from .. import testing
from . import bars, models, output, ranks, tables

# Names in the results, and what ``ExpertParallel`` calls them.
TRANSPORTS = {"shm": "shm", "collective": "collective"}
DECODE = {"hidden": 2048, "top_k": 8, "experts": 64}
LARGE = {"hidden": 7168, "top_k": 8, "experts": 32}
# Quantisation, tokens of a rank and the rest of the shape, where no option chooses others.
CASES: list[tuple[str | None, int, dict[str, int]]] = [
    *((None, tokens, DECODE) for tokens in (1, 8, 64, 512)),
    *((quant, 128, LARGE) for quant in (None, "int8")),
]
TOKENS = (1, 8, 64)  # of the models that options choose

# Of a rank: seconds of a round by implementation and sample, and the traffic of its windows.
Measured = tuple[dict[str, list[float]], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    models.add_arguments(parser, (), "small cases of hidden 2048 and 7168")
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", metavar="T", help="of a rank")
    add("--quant", nargs="+", choices=("bf16", "int8"), help="dispatched rows")
    add("--world-size", type=int, nargs="+", default=[2, 4, 8], help="without torchrun")
    add("--samples", type=int, default=15, help="of each implementation")
    output.add_arguments(parser, plot="the time of a round, by implementation", record=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the bench; returns the exit code."""
    output.check_arguments(arguments)
    rows = []
    with ranks.torchrun(torch.device("cpu")) as context:
        leading = context is None or context.rank == 0
        for world in [context.world_size] if context else arguments.world_size:
            for quant, shape in _cases(arguments):
                row = _measured(context, world, quant, shape, arguments.samples)
                if leading:
                    rows.append(row)
                    _announce(row)
    if leading:
        output.show(rows, tables.present(rows, tables.TRANSPORT))
        output.finish(arguments, rows, plot, record="transport")
    return 0


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[str | None, dict[str, int]]]:
    """Quantisation, and tokens of a rank with the sizes of the layer."""
    shapes = models.chosen(arguments)
    if not shapes and not arguments.tokens and not arguments.quant:
        for quant, tokens, sizes in CASES:
            yield quant, {"tokens": tokens, **sizes}
        return
    sizes_of_shapes = [
        {"hidden": shape.hidden, "top_k": shape.top_k, "experts": shape.experts} for shape in shapes
    ]
    for sizes in sizes_of_shapes or [DECODE]:
        for payload in arguments.quant or ["bf16"]:
            for tokens in arguments.tokens or TOKENS:
                yield None if payload == "bf16" else payload, {"tokens": tokens, **sizes}


def _measured(
    context: ranks.Rank | None, world: int, quant: str | None, shape: dict[str, int], samples: int
) -> dict[str, Any]:
    work = functools.partial(measure, quant=quant, samples=samples, **shape)
    load = os.getloadavg()[0]
    of_ranks = ranks.gathered(work(ctx=context)) if context else testing.run_processes(world, work)
    row = {"bench": "transport", "world_size": world, "payload": quant or "bf16", **shape}
    return row | summary(of_ranks) | {"samples": samples, "load_before": load}


def _announce(row: tables.Row) -> None:
    print(
        f"W {row['world_size']}, {row['tokens']} tokens, hidden {row['hidden']}, "
        f"{row['payload']}: by hand {row['by_hand_ms']:.2f} ms; shm {row['shm_ms']:.2f} ms, "
        f"{row['shm_ratio']:.2f}x; collective {row['collective_ms']:.2f} ms, "
        f"{row['collective_ratio']:.2f}x; copy {row['share_of_copy']:.0%} of shm; "
        f"load {row['load_before']:.1f}",
        flush=True,
    )


def plot(rows: Sequence[tables.Row], path: Path) -> None:
    """Draw the time of a round of each case, by implementation."""
    cases = [
        f"{row['world_size']} ranks, {row['tokens']} x {row['hidden']}, {row['payload']}"
        for row in rows
    ]
    names = {"by_hand": "by hand", "collective": "collective", "shm": "shm", "copy": "plain copy"}
    ways = {label: [row[f"{name}_ms"] for row in rows] for name, label in names.items()}
    title = f"dispatch and combine, {rows[0]['device']}"
    bars.draw(path, cases, ways, "milliseconds", title)


def by_hand(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int
) -> torch.Tensor:
    """Dispatch and combine by rank with three collectives; experts leave the rows alone."""
    tokens, top_k = ids.shape
    ranks = ids.reshape(-1) // (experts // dist.get_world_size())
    order = ranks.argsort(stable=True)
    counts = torch.bincount(ranks, minlength=dist.get_world_size())
    incoming = torch.empty_like(counts)
    dist.all_to_all_single(incoming, counts)
    sent, received = counts.tolist(), incoming.tolist()
    rows = x[order // top_k].view(torch.uint8)
    delivered = rows.new_empty((sum(received), rows.shape[1]))
    dist.all_to_all_single(delivered, rows, received, sent)
    returned = torch.empty_like(rows)
    dist.all_to_all_single(returned, delivered, sent, received)
    sorted_back = torch.empty_like(returned)
    sorted_back[order] = returned
    terms = sorted_back.view(x.dtype).view(tokens, top_k, -1).float()
    return torch.einsum("tk,tkh->th", weights, terms).to(x.dtype)


def measure(
    ctx: Any,
    *,
    quant: str | None,
    samples: int,
    tokens: int,
    hidden: int,
    top_k: int,
    experts: int,
) -> Measured:
    """One rank: seconds per round of each implementation, and of the copy, sample by sample."""
    x = testing.tokens(tokens, hidden, torch.bfloat16, seed=ctx.rank)
    ids = testing.routing_uniform(tokens, experts, top_k, seed=ctx.rank)
    weights = testing.weights(tokens, top_k, seed=ctx.rank)
    layers: dict[str, moe_triton.ExpertParallel] = {}
    results: dict[str, torch.Tensor] = {}
    for name, transport in TRANSPORTS.items():
        layers[name] = layer = moe_triton.ExpertParallel(
            ctx.ep_group,
            num_experts=experts,
            top_k=top_k,
            hidden=hidden,
            max_tokens=tokens,
            quant=cast("Any", quant),
            exact=True,
            transport=cast("Any", transport),
        )
        received = layer.dispatch(x, ids, weights)
        results[name] = received.x
        if received.scales is not None:
            results[name] = (received.x.float() * received.scales[:, None]).to(torch.bfloat16)
        check(layer.combine(results[name], received.handle), x, weights, quant)
        received = layer.dispatch(x, ids, weights)
        rows = layer.output_rows(received.handle)
        rows.copy_(results[name])
        check(layer.combine(rows, received.handle), x, weights, quant)

    delivered = [received.x, torch.zeros((tokens * top_k, hidden), dtype=torch.bfloat16)]
    targets = [torch.zeros_like(rows) for rows in delivered]

    def copy() -> None:
        for target, rows in zip(targets, delivered, strict=True):
            target.copy_(rows)

    def in_place(name: str) -> None:
        received = layers[name].dispatch(x, ids, weights)
        layers[name].combine(layers[name].output_rows(received.handle), received.handle)

    def elsewhere(name: str) -> None:
        received = layers[name].dispatch(x, ids, weights)
        layers[name].combine(results[name], received.handle)

    hand = functools.partial(by_hand, x, ids, weights, experts)
    check(hand(), x, weights, "in another order")
    works: dict[str, Callable[[], object]] = {"by_hand": hand}
    works |= {name: functools.partial(in_place, name) for name in TRANSPORTS}
    works |= {"copied": functools.partial(elsewhere, "shm"), "copy": copy}
    times: dict[str, list[float]] = {name: [] for name in works}
    rounds = max(5, min(40, 320 // tokens))
    for sample in range(-1, samples):
        for name, work in works.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(rounds):
                work()
            if sample >= 0:
                times[name].append((time.perf_counter() - start) / rounds)
    traffic = layers["shm"].traffic
    for layer in layers.values():
        layer.close()
    return times, traffic


def check(out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, quant: str | None) -> None:
    """Identity experts: the result is the token times its weights, summed in order."""
    expected = torch.zeros(x.shape)
    for k in range(weights.shape[1]):
        expected += x.float() * weights[:, k, None]
    if quant is None:
        torch.testing.assert_close(out, expected.to(x.dtype), rtol=0, atol=0)
    else:
        # Half a step of int8 per element, and two roundings to bf16.
        step = x.float().abs().amax(dim=1, keepdim=True) / 127
        assert ((out.float() - expected).abs() <= 0.5 * step + expected.abs() * 2**-7 + 1e-6).all()


def summary(measured: Sequence[Measured]) -> dict[str, Any]:
    """Medians over samples of the slowest rank, in milliseconds, and ratios of them."""
    traffic = measured[0][1]
    row: dict[str, Any] = {"bytes_sent": traffic.bytes_sent, "bytes_saved": traffic.bytes_saved}
    for name in ("by_hand", *TRANSPORTS, "copied", "copy"):
        samples = zip(*(times[name] for times, _ in measured), strict=True)
        slowest = [max(sample) * 1e3 for sample in samples]
        quartiles = statistics.quantiles(slowest, n=4)
        row[f"{name}_ms"] = statistics.median(slowest)
        row[f"{name}_iqr_ms"] = quartiles[2] - quartiles[0]
    for name in TRANSPORTS:
        row[f"{name}_ratio"] = row["by_hand_ms"] / row[f"{name}_ms"]
    row["share_of_copy"] = row["copy_ms"] / row["shm_ms"]
    return row

"""How fast do tokens move between processes of one host: windows and collectives, beside by hand?

By hand is what a user writes over torch.distributed: sort the routed slots by rank, exchange the
counts, exchange the rows, and the same way back. Each case runs all of them in the same processes,
in turn, and checks each against the sum computed directly before it times them. A round is a
dispatch and a combine; a sample is a few rounds one after the other, as a model's layers are, and
its time is the slowest rank's. The floor is a plain copy of the rows that a rank gets delivered, in
both directions, by all ranks at once.

The experts are left out: their outputs are taken to stand where ``output_rows`` says. "copied" is
the same with outputs anywhere else, which combine must copy into its window.

    moe-triton bench transport [--world-size 2 4 8] [--samples 15]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time

import torch
import torch.distributed as dist

import moe_triton

from .. import testing
from . import output, tables

# Names in the results, and what ``ExpertParallel`` calls them.
TRANSPORTS = {"shm": "shm", "collective": "collective"}
DECODE = {"hidden": 2048, "top_k": 8, "experts": 64}
LARGE = {"hidden": 7168, "top_k": 8, "experts": 32}
# Quantisation, tokens of a rank and the rest of the shape.
CASES = [
    *((None, tokens, DECODE) for tokens in (1, 8, 64, 512)),
    *((quant, 128, LARGE) for quant in (None, "int8")),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--world-size", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--samples", type=int, default=15, help="of each implementation")
    output.add_arguments(parser, plot=None, record=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the bench; returns the exit code."""
    output.check_arguments(arguments)
    rows = []
    for world in arguments.world_size:
        for quant, tokens, sizes in CASES:
            shape = {"tokens": tokens, **sizes}
            work = functools.partial(measure, quant=quant, samples=arguments.samples, **shape)
            load = os.getloadavg()[0]
            ranks = testing.run_processes(world, work)
            row = {"bench": "transport", "world_size": world, "payload": quant or "bf16", **shape}
            row |= summary(ranks) | {"samples": arguments.samples, "load_before": load}
            rows.append(row)
            print(
                f"W {world}, {tokens} tokens, hidden {shape['hidden']}, {row['payload']}: by hand "
                f"{row['by_hand_ms']:.2f} ms; shm {row['shm_ms']:.2f} ms, "
                f"{row['shm_ratio']:.2f}x; collective {row['collective_ms']:.2f} ms, "
                f"{row['collective_ratio']:.2f}x; copy {row['share_of_copy']:.0%} of shm; "
                f"load {load:.1f}",
                flush=True,
            )
    output.show(rows, tables.present(rows, tables.TRANSPORT))
    output.finish(arguments, rows, record="transport")
    return 0


def by_hand(x, ids, weights, experts):
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


def measure(ctx, *, quant, samples, tokens, hidden, top_k, experts):
    """One rank: seconds per round of each implementation, and of the copy, sample by sample."""
    x = testing.tokens(tokens, hidden, torch.bfloat16, seed=ctx.rank)
    ids = testing.routing_uniform(tokens, experts, top_k, seed=ctx.rank)
    weights = testing.weights(tokens, top_k, seed=ctx.rank)
    layers, results = {}, {}
    for name, transport in TRANSPORTS.items():
        layers[name] = layer = moe_triton.ExpertParallel(
            ctx.ep_group,
            num_experts=experts,
            top_k=top_k,
            hidden=hidden,
            max_tokens=tokens,
            quant=quant,
            exact=True,
            transport=transport,
        )
        received = layer.dispatch(x, ids, weights)
        results[name] = received.x
        if quant:
            results[name] = (received.x.float() * received.scales[:, None]).to(torch.bfloat16)
        check(layer.combine(results[name], received.handle), x, weights, quant)
        received = layer.dispatch(x, ids, weights)
        rows = layer.output_rows(received.handle)
        rows.copy_(results[name])
        check(layer.combine(rows, received.handle), x, weights, quant)

    delivered = [received.x, torch.zeros((tokens * top_k, hidden), dtype=torch.bfloat16)]
    targets = [torch.zeros_like(rows) for rows in delivered]

    def copy():
        for target, rows in zip(targets, delivered, strict=True):
            target.copy_(rows)

    def in_place(name):
        received = layers[name].dispatch(x, ids, weights)
        layers[name].combine(layers[name].output_rows(received.handle), received.handle)

    def elsewhere(name):
        received = layers[name].dispatch(x, ids, weights)
        layers[name].combine(results[name], received.handle)

    hand = functools.partial(by_hand, x, ids, weights, experts)
    check(hand(), x, weights, "in another order")
    works = {"by_hand": hand}
    works |= {name: functools.partial(in_place, name) for name in TRANSPORTS}
    works |= {"copied": functools.partial(elsewhere, "shm"), "copy": copy}
    times = {name: [] for name in works}
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


def check(out, x, weights, quant):
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


def summary(ranks):
    """Medians over samples of the slowest rank, in milliseconds, and ratios of them."""
    row = {"bytes_sent": ranks[0][1].bytes_sent, "bytes_saved": ranks[0][1].bytes_saved}
    for name in ("by_hand", *TRANSPORTS, "copied", "copy"):
        samples = zip(*(times[name] for times, _ in ranks), strict=True)
        slowest = [max(sample) * 1e3 for sample in samples]
        quartiles = statistics.quantiles(slowest, n=4)
        row[f"{name}_ms"] = statistics.median(slowest)
        row[f"{name}_iqr_ms"] = quartiles[2] - quartiles[0]
    for name in TRANSPORTS:
        row[f"{name}_ratio"] = row["by_hand_ms"] / row[f"{name}_ms"]
    row["share_of_copy"] = row["copy_ms"] / row["shm_ms"]
    return row

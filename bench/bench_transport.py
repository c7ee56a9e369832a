"""How fast do tokens move between processes of one host: windows against gloo, in one run?

Each case runs both transports in the same processes, in turn, and checks them against the sum
computed directly before it times them. A round is a dispatch and a combine; a sample is a few
rounds one after the other, as a model's layers are, and its time is the slowest rank's. The floor
is a plain copy of the rows that a rank gets delivered, in both directions, by all ranks at once.

The experts are left out: their outputs are taken to stand where ``output_rows`` says. "copied" is
the same with outputs anywhere else, which combine must copy into its window.

    python bench/bench_transport.py [--world-size 4 8] [--samples 15]
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import report
import torch
import torch.distributed as dist

import moe_triton
from moe_triton import testing

TRANSPORTS = ("symmetric", "collective")
ROUNDS = 5  # of a sample
SHAPE = {"tokens": 128, "hidden": 7168, "top_k": 8, "experts": 32}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--samples", type=int, default=15, help="of each transport")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench/results/transport.jsonl")
    arguments = parser.parse_args()

    rows = []
    for world in arguments.world_size:
        for quant in (None, "int8"):
            work = functools.partial(measure, quant=quant, samples=arguments.samples)
            ranks = testing.run_processes(world, work)
            rows.append(summary(world, quant, ranks) | {"samples": arguments.samples})
            row = rows[-1]
            print(
                f"W {world} {row['payload']:5}: windows {row['symmetric_ms']:.1f} ms, gloo "
                f"{row['collective_ms']:.1f} ms, ratio {row['ratio']:.2f}, copy floor "
                f"{row['copy_ms']:.1f} ms = {row['share_of_copy']:.0%} of windows",
                flush=True,
            )
    report.write(arguments.out, rows)
    print(report.table(rows, report.TRANSPORT))


def measure(ctx, *, quant, samples):
    """One rank: seconds per round of each transport, and of the copy, sample by sample."""
    tokens, hidden, top_k = SHAPE["tokens"], SHAPE["hidden"], SHAPE["top_k"]
    x = testing.tokens(tokens, hidden, torch.bfloat16, seed=ctx.rank)
    ids = testing.routing_uniform(tokens, SHAPE["experts"], top_k, seed=ctx.rank)
    weights = testing.weights(tokens, top_k, seed=ctx.rank)
    layers, results = {}, {}
    for name in TRANSPORTS:
        layers[name] = layer = moe_triton.ExpertParallel(
            ctx.ep_group,
            num_experts=SHAPE["experts"],
            top_k=top_k,
            hidden=hidden,
            max_tokens=tokens,
            quant=quant,
            exact=True,
            transport=name,
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

    works = {name: functools.partial(in_place, name) for name in TRANSPORTS}
    works |= {"copied": functools.partial(elsewhere, "symmetric"), "copy": copy}
    times = {name: [] for name in works}
    for sample in range(-1, samples):
        for name, work in works.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(ROUNDS):
                work()
            if sample >= 0:
                times[name].append((time.perf_counter() - start) / ROUNDS)
    traffic = layers["symmetric"].traffic
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


def summary(world, quant, ranks):
    """Medians over samples of the slowest rank, in milliseconds."""
    row = {
        "bench": "transport",
        "world_size": world,
        "payload": quant or "bf16",
        **SHAPE,
        "bytes_sent": ranks[0][1].bytes_sent,
        "bytes_saved": ranks[0][1].bytes_saved,
    }
    for name in (*TRANSPORTS, "copied", "copy"):
        slowest = [max(one) * 1e3 for one in zip(*(times[name] for times, _ in ranks), strict=True)]
        quartiles = statistics.quantiles(slowest, n=4)
        row[f"{name}_ms"] = statistics.median(slowest)
        row[f"{name}_iqr_ms"] = quartiles[2] - quartiles[0]
    row["ratio"] = row["collective_ms"] / row["symmetric_ms"]
    row["share_of_copy"] = row["copy_ms"] / row["symmetric_ms"]
    return row


if __name__ == "__main__":
    main()

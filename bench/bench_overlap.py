"""What do the split-phase ops hide? Own compute between setup and teardown, while a peer is late.

The last rank enters each operation late, as a rank does whose part of the batch was longer. The
others have compute that does not need the exchange, as that of a shared expert. In sequence they
set up, tear down, which waits for the late rank, and then compute; overlapped they compute in
between. At best that takes the longer of delay and compute, where the sequence takes both.

It is the wait that is hidden. Between processes of one host the cores that compute also copy the
rows, and that is never hidden: where nobody is late there is little to gain. The late rank sleeps,
and leaves its core to the others.

A sample is one operation, timed from a barrier on, and its time that of the slowest rank that is
not late; every result is compared with the sum computed directly. The time until the setups are
back shows that they wait for nobody.

    python bench/bench_overlap.py [--world-size 2 4] [--late 0 10 40] [--samples 21]
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import report
import torch
import torch.distributed as dist

from moe_triton import testing
from moe_triton.compat import torch_npu

WAYS = ("sequence", "overlap")
OPERATIONS = ("dispatch", "combine")
SHAPE = {"tokens": 16, "hidden": 7168, "top_k": 8, "experts": 32}
COMPUTE = 20e-3  # seconds, on a rank that has a core for itself
WARM_UP = 2  # samples


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--late", type=float, nargs="+", default=[0, 10, 40], help="ms")
    parser.add_argument("--samples", type=int, default=21, help="of each way")
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench/results/overlap.jsonl")
    arguments = parser.parse_args()

    rows = []
    for world in arguments.world_size:
        work = functools.partial(measure, late=arguments.late, samples=arguments.samples)
        ranks = testing.run_processes(world, work, transport="symmetric")
        for operation in OPERATIONS:
            for late in arguments.late:
                row = summary(world, operation, late, ranks)
                rows.append(row | {"samples": arguments.samples})
    report.write(arguments.out, rows)
    print(report.table(rows, report.OVERLAP))


def measure(ctx, *, late, samples):
    """One rank: seconds of the compute alone, and (all, setup) by (operation, way, delay)."""
    layer, compute = Layer(ctx), calibrated(ctx)
    times = {"compute": []}
    for sample in range(-WARM_UP, samples):
        dist.barrier()
        start = time.perf_counter()
        compute()
        times["compute"].append(time.perf_counter() - start)
        for delay in late:
            for way in WAYS:
                for operation in OPERATIONS:
                    found = timed(ctx, layer, operation, way, delay * 1e-3, compute)
                    if sample >= 0:
                        times.setdefault((operation, way, delay), []).append(found)
                layer.check()
    return times


def timed(ctx, layer, operation, way, delay, compute):
    """Seconds until the operation and the compute are done, and until the setup is."""
    dist.barrier()
    start = time.perf_counter()
    if ctx.rank == ctx.world_size - 1:
        time.sleep(delay)
    layer.setup(operation)
    sent = time.perf_counter()
    if way == "overlap":
        compute()
    layer.teardown(operation)
    if way == "sequence":
        compute()
    return time.perf_counter() - start, sent - start


def calibrated(ctx):
    """Matrix products that take about ``COMPUTE`` on one core; as many on every rank."""
    left, right = torch.ones(64, 512), torch.ones(512, 512)

    def compute(count):
        for _ in range(count):
            left @ right

    count = torch.zeros(1, dtype=torch.int64)
    if ctx.rank == 0:  # alone: the others wait for its answer
        compute(50)
        start = time.process_time()
        compute(200)
        count[0] = round(COMPUTE * 200 / (time.process_time() - start))
    dist.broadcast(count, 0)
    return functools.partial(compute, int(count))


class Layer:
    """The four ops, with experts that return what they get."""

    def __init__(self, ctx):
        tokens, top_k, experts = SHAPE["tokens"], SHAPE["top_k"], SHAPE["experts"]
        self.x = testing.tokens(tokens, SHAPE["hidden"], torch.bfloat16, seed=ctx.rank)
        self.ids = testing.routing_uniform(tokens, experts, top_k, seed=ctx.rank)
        self.weights = testing.weights(tokens, top_k, seed=ctx.rank)
        self.where = ctx.ep_group, ctx.ep_world_size, ctx.ep_rank, experts
        self.expected = torch.zeros(self.x.shape)
        for k in range(top_k):
            self.expected += self.x.float() * self.weights[:, k, None]

    def setup(self, operation):
        if operation == "dispatch":
            self.sent = torch_npu.npu_moe_distribute_dispatch_setup(self.x, self.ids, *self.where)
        else:
            rows, _, assist, _ = self.received
            self.returned = torch_npu.npu_moe_distribute_combine_setup(
                rows, self.ids, assist, *self.where
            )

    def teardown(self, operation):
        if operation == "dispatch":
            y, _, info = self.sent
            self.received = torch_npu.npu_moe_distribute_dispatch_teardown(
                self.x, y, self.ids, info, *self.where
            )
        else:
            (quantised, info), (_, expand_idx, _) = self.returned, self.sent
            self.out = torch_npu.npu_moe_distribute_combine_teardown(
                self.received[0], quantised, self.ids, expand_idx, self.weights, info, *self.where
            )

    def check(self):
        wanted = self.expected.to(self.out.dtype)
        torch.testing.assert_close(self.out, wanted, rtol=0, atol=0)


def summary(world, operation, late, ranks):
    """Medians over samples of the slowest rank that is not late, in milliseconds."""
    punctual = ranks[:-1]

    def median(name, which):
        samples = zip(*(times[name] for times in punctual), strict=True)
        slowest = [max(one[which] for one in sample) * 1e3 for sample in samples]
        quartiles = statistics.quantiles(slowest, n=4)
        return statistics.median(slowest), quartiles[2] - quartiles[0]

    compute = [max(one) * 1e3 for one in zip(*(t["compute"] for t in punctual), strict=True)]
    row = {"bench": "overlap", "world_size": world, "operation": operation, "late_ms": late}
    row |= SHAPE | {"compute_ms": statistics.median(compute)}
    for way in WAYS:
        row[f"{way}_ms"], row[f"{way}_iqr_ms"] = median((operation, way, late), 0)
    row["setup_ms"], row["setup_iqr_ms"] = median((operation, "overlap", late), 1)
    row["saved_ms"] = row["sequence_ms"] - row["overlap_ms"]
    return row


if __name__ == "__main__":
    main()

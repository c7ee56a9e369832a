"""How much waiting for a late peer do the split-phase ops hide?

The last rank enters each operation late, like a rank with a longer part of the batch. The others
have compute that does not need the exchange, as a shared expert has. In sequence they set up, tear
down, which waits for the late rank, and compute; overlapped they compute between setup and
teardown. At best that takes the longer of delay and compute instead of their sum.

Only waiting is hidden. Between processes of one host the cores that compute also copy the rows, so
without a late rank the gain is small. The late rank sleeps and leaves its core to the others.

A sample is one operation from a barrier on, and its time that of the slowest rank that is not late;
every result is compared with the sum computed directly. The time until the setups return shows that
they do not wait.

    moe-triton bench overlap [--world-size 2 4] [--late 0 10 40] [--samples 21]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import testing
from ..compat import torch_npu
from . import bars, output, results, tables

WAYS = ("sequence", "overlap")
OPERATIONS = ("dispatch", "combine")
SHAPE = {"tokens": 16, "hidden": 7168, "top_k": 8, "experts": 32}
COMPUTE = 20e-3  # seconds, on a rank that has a core for itself
WARM_UP = 2  # samples

# Seconds of a rank: those of the compute, and (total, setup) by (operation, way, delay).
Times = dict[Any, list[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--world-size", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--late", type=float, nargs="+", default=[0, 10, 40], help="ms")
    parser.add_argument("--samples", type=int, default=21, help="of each way")
    output.add_arguments(parser, plot="times by delay", record=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the bench; returns the exit code."""
    output.check_arguments(arguments)
    rows = []
    for world in arguments.world_size:
        work = functools.partial(measure, late=arguments.late, samples=arguments.samples)
        ranks = testing.run_processes(world, work, transport="symmetric")
        for operation in OPERATIONS:
            for late in arguments.late:
                row = summary(world, operation, late, ranks)
                rows.append(row | {"samples": arguments.samples})
    output.show(rows, tables.OVERLAP)
    output.finish(arguments, rows, plot, record="overlap")
    return 0


def plot(rows: Sequence[tables.Row], path: Path) -> None:
    """Draw both ways of each case, and the time until the setup returns."""
    cases = [
        f"{row['operation']}, {row['world_size']} ranks, {row['late_ms']:g} ms late" for row in rows
    ]
    ways = {name: [row[f"{name}_ms"] for row in rows] for name in (*WAYS, "setup")}
    bars.draw(path, cases, ways, "milliseconds", f"split phases, {rows[0]['device']}")


def measure(ctx: testing.RankContext, *, late: Sequence[float], samples: int) -> Times:
    """On a rank: seconds of the compute alone, and (total, setup) by (operation, way, delay)."""
    layer, compute = Layer(ctx), calibrated(ctx)
    times: Times = {"compute": []}
    for sample in range(-WARM_UP, samples):
        dist.barrier()
        start = time.perf_counter()
        compute()
        times["compute"].append(time.perf_counter() - start)
        for delay in late:
            for way in WAYS:
                for operation in OPERATIONS:
                    seconds = timed(ctx, layer, operation, way, delay * 1e-3, compute)
                    if sample >= 0:
                        times.setdefault((operation, way, delay), []).append(seconds)
                layer.check()
    return times


def timed(
    ctx: testing.RankContext,
    layer: Layer,
    operation: str,
    way: str,
    delay: float,
    compute: Callable[[], None],
) -> tuple[float, float]:
    """Seconds until the operation and the compute end, and until the setup returns."""
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


def calibrated(ctx: testing.RankContext) -> Callable[[], None]:
    """Matrix products that take about ``COMPUTE`` on one core, equally many on every rank."""
    left, right = torch.ones(64, 512), torch.ones(512, 512)

    def compute(count: int) -> None:
        for _ in range(count):
            left @ right

    number = torch.zeros(1, dtype=torch.int64)
    if ctx.rank == 0:  # alone, while the others wait for the broadcast
        compute(50)
        start = time.process_time()
        compute(200)
        number[0] = round(COMPUTE * 200 / (time.process_time() - start))
    dist.broadcast(number, 0)
    return functools.partial(compute, int(number))


class Layer:
    """The four ops, with identity experts."""

    def __init__(self, ctx: testing.RankContext) -> None:
        tokens, top_k, experts = SHAPE["tokens"], SHAPE["top_k"], SHAPE["experts"]
        self.x = testing.tokens(tokens, SHAPE["hidden"], torch.bfloat16, seed=ctx.rank)
        self.ids = testing.routing_uniform(tokens, experts, top_k, seed=ctx.rank)
        self.weights = testing.weights(tokens, top_k, seed=ctx.rank)
        self.where = ctx.ep_group, ctx.ep_world_size, ctx.ep_rank, experts
        self.expected = torch.zeros(self.x.shape)
        for k in range(top_k):
            self.expected += self.x.float() * self.weights[:, k, None]

    def setup(self, operation: str) -> None:
        """Send, and keep what the teardown needs."""
        if operation == "dispatch":
            self.sent = torch_npu.npu_moe_distribute_dispatch_setup(self.x, self.ids, *self.where)
        else:
            rows, _, assist, _ = self.received
            self.returned = torch_npu.npu_moe_distribute_combine_setup(
                rows, self.ids, assist, *self.where
            )

    def teardown(self, operation: str) -> None:
        """Wait for the rows, and keep them."""
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

    def check(self) -> None:
        """Raise unless the sums are right, bit for bit."""
        expected = self.expected.to(self.out.dtype)
        torch.testing.assert_close(self.out, expected, rtol=0, atol=0)


def summary(
    world: int, operation: str, late: float, ranks: Sequence[Mapping[Any, Any]]
) -> dict[str, Any]:
    """Medians over samples of the slowest rank that is not late, in milliseconds."""
    punctual = ranks[:-1]

    def median(name: tuple[str, str, float], index: int) -> tuple[float, float]:
        return results.slowest([[pair[index] for pair in times[name]] for times in punctual])

    row: dict[str, Any] = {
        "bench": "overlap",
        "world_size": world,
        "operation": operation,
        "late_ms": late,
    }
    row |= SHAPE | {"compute_ms": results.slowest([times["compute"] for times in punctual])[0]}
    for way in WAYS:
        row[f"{way}_ms"], row[f"{way}_iqr_ms"] = median((operation, way, late), 0)
    row["setup_ms"], row["setup_iqr_ms"] = median((operation, "overlap", late), 1)
    row["saved_ms"] = row["sequence_ms"] - row["overlap_ms"]
    return row

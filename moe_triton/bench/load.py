"""How evenly do replicas of hot experts spread the load, and how long does planning take?

DeepSeek-V3's shape: 256 experts, and 32 redundant ones on 8 to 32 ranks. 64 ranks get 64 redundant
experts, 5 slots per rank, because 288 slots do not divide by 64. The load of experts follows Zipf's
law, in an order drawn per layer; a balance is maximum over mean of the ranks, of the worst layer.

Each plan is compared with DeepSeek's published greedy scheme on the same loads: as that scheme
assumes, with equal parts for all replicas of an expert, and as ``npu_moe_update_expert`` picks the
replica by rank. Predictions are checked first against ids mapped by that operator. Unseen ids are
drawn from the same law after the planned ones: top-8 of 256, 512 tokens per rank, so that no expert
gets more than an eighth.

    moe-triton bench load [--layers 3] [--plot load.svg]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import eplb, testing
from ..compat.torch_npu import npu_moe_update_expert
from . import output, tables

EXPERTS, TOP_K, TOKENS = 256, 8, 512
SHAPES = ((8, 288), (16, 288), (32, 288), (64, 320))  # ranks, slots
EXPONENTS = (0.5, 1.0, 1.2, 1.5, 2.0)
BY_RANK, BY_TOKEN = 0, 1
PICTURE = {"exponent": 1.0, "ranks": 32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--layers", type=int, default=3, help="orders of the experts")
    output.add_arguments(parser, plot="one case", record=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the bench; returns the exit code."""
    output.check_arguments(arguments)
    rows = []
    with output.progress(len(SHAPES) * len(EXPONENTS)) as announce:
        for num_ranks, num_slots in SHAPES:
            for exponent in EXPONENTS:
                announce(f"{num_ranks} ranks, {num_slots} slots, Zipf {exponent}")
                rows.append(measure(num_ranks, num_slots, exponent, arguments.layers))
    output.show(rows, tables.LOAD)
    output.finish(arguments, rows, plot, record="load")
    return 0


def plot(_: Sequence[tables.Row], path: Path) -> None:
    """Draw one case."""
    ranks, slots = next(shape for shape in SHAPES if shape[0] == PICTURE["ranks"])
    load = zipf(PICTURE["exponent"], layers=1)[0]
    figure = eplb.plot_load(eplb.plan(load, num_ranks=ranks, num_slots=slots))
    figure.savefig(path, metadata={"Date": None})


def measure(num_ranks: int, num_slots: int, exponent: float, layers: int) -> dict[str, Any]:
    """Balances and CPU time of one shape and exponent."""
    load = zipf(exponent, layers)
    sizes: dict[str, Any] = {"num_ranks": num_ranks, "num_slots": num_slots}
    planners = {
        "plan": functools.partial(eplb.plan, **sizes),
        "plan_by_token": functools.partial(eplb.plan, **sizes, balance_mode=BY_TOKEN),
        "greedy": functools.partial(eplb.plan_greedy, **sizes),
        "greedy_equal_parts": functools.partial(eplb.plan_greedy, **sizes, balance_mode=BY_TOKEN),
    }
    seconds: dict[str, list[float]] = {name: [] for name in planners}
    plans: dict[str, list[eplb.Plan]] = {name: [] for name in planners}
    for layer in load:
        for name, planner in planners.items():
            start = time.process_time()
            plans[name].append(planner(layer))
            seconds[name].append(time.process_time() - start)
    check(load[0], plans["plan"][0])
    check(load[0], plans["greedy"][0])
    row: dict[str, Any] = {
        "bench": "load",
        "experts": EXPERTS,
        "ranks": num_ranks,
        "slots": num_slots,
        "exponent": exponent,
        "layers": layers,
        "no_replicas": worst(plan.balance_before for plan in plans["plan"]),
        "at_least": worst(map(functools.partial(least, **sizes), load)),
    }
    for name in planners:
        row[name] = worst(plan.balance_after for plan in plans[name])
        row[f"{name}_ms"] = statistics.median(seconds[name]) * 1e3
    return row | unseen(num_ranks, num_slots, exponent)


def zipf(exponent: float, layers: int) -> torch.Tensor:
    """[layers, E], popularity ``rank ** -exponent`` with ranks drawn per layer."""
    popularity = np.arange(1, EXPERTS + 1) ** -exponent
    draws = np.random.default_rng(0)
    return torch.from_numpy(np.stack([draws.permutation(popularity) for _ in range(layers)]))


def worst(balances: Iterable[Any]) -> float:
    """The largest balance of the layers."""
    return max(map(float, balances))


def least(load: torch.Tensor, num_ranks: int, num_slots: int) -> float:
    """A lower bound of the balance of any table that is read by rank.

    The hottest expert has at most 1 + redundant replicas; its parts are W-ths of its load. If no
    rank takes two parts, every rank has a replica, and the remaining redundant slots divide the
    second hottest expert.
    """
    hottest, second = (load * num_ranks / load.sum()).topk(2).values.tolist()
    redundant = num_slots - EXPERTS
    one_part = float("inf")
    if redundant >= num_ranks - 1:
        replicas = min(1 + redundant - (num_ranks - 1), num_ranks)
        one_part = hottest / num_ranks + second / replicas
    two_parts = max(hottest / min(1 + redundant, num_ranks), 2 * hottest / num_ranks)
    return max(1.0, min(one_part, two_parts))


def check(load: torch.Tensor, plan: eplb.Plan) -> None:
    """Ids mapped by the operator, equal on all ranks, give the predicted load."""
    rows = (load / load.sum() * 10_000).round().long()
    ids = torch.repeat_interleave(torch.arange(EXPERTS, dtype=torch.int32), rows)[:, None]
    received = receive([ids] * plan.num_ranks, plan)
    expected = eplb.rank_load(
        rows * plan.num_ranks,
        plan.eplb_table,
        num_ranks=plan.num_ranks,
        num_slots=len(plan.placement),
    )
    torch.testing.assert_close(received.double(), expected, rtol=1e-9, atol=0)


def receive(ids: Sequence[torch.Tensor], plan: eplb.Plan) -> torch.Tensor:
    """[W], the rows that each rank receives if each sends ``ids[rank]``."""
    received = torch.zeros(plan.num_ranks, dtype=torch.int64)
    for rank, expert_ids in enumerate(ids):
        mapped, _ = npu_moe_update_expert(
            expert_ids, plan.eplb_table, local_rank_id=rank, world_size=plan.num_ranks
        )
        received += plan.ranks[mapped.long()].flatten().bincount(minlength=plan.num_ranks)
    return received


def unseen(num_ranks: int, num_slots: int, exponent: float) -> dict[str, float]:
    """Balances of ids drawn after those that are planned for."""
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0)).int()

    def batch(first: int) -> list[torch.Tensor]:
        draws = (
            testing.routing_zipf(TOKENS, EXPERTS, TOP_K, seed=first + rank, exponent=exponent)
            for rank in range(num_ranks)
        )
        return [order[ids.long()] for ids in draws]

    load = torch.cat(batch(0)).flatten().bincount(minlength=EXPERTS)
    following = batch(num_ranks)
    balances = {}
    for name, planner in (("plan", eplb.plan), ("greedy", eplb.plan_greedy)):
        received = receive(following, planner(load, num_ranks=num_ranks, num_slots=num_slots))
        balances[f"{name}_next"] = float(received.max() / received.double().mean())
    return balances

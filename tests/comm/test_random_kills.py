"""Ranks killed at random moments of a running loop, whose peers leave as soon as they notice.

A survivor that has left must not be taken for the culprit.
"""

from __future__ import annotations

import json
import os
import random
import time

import pytest
import torch
import torch.distributed as dist

from moe_triton import ExpertParallel, PeerTimeoutError, testing

pytestmark = pytest.mark.full

WORLD, TIMEOUT, SLACK = 3, 2.0, 1.0  # ranks, seconds, seconds
SIZES = {"num_experts": 6, "top_k": 2, "hidden": 64, "max_tokens": 8}


def loop(ctx, *, transport: str) -> None:
    """Rounds until a peer is lost; the process ends with its error."""
    store = dist.PrefixStore("process group", ctx.store)
    dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=WORLD)
    ep = ExpertParallel(None, transport=transport, timeout=TIMEOUT, **SIZES)
    batches = [inputs(ctx.rank, seed) for seed in range(8)]
    for number in range(10**9):
        x, ids, weights = batches[number % 8]
        try:
            received = ep.dispatch(x, ids, weights)
            out = ep.combine(received.x, received.handle)
        except PeerTimeoutError as error:
            found = {"ranks": error.ranks, "at": time.monotonic(), "text": str(error)}
            ctx.store.set(f"found {ctx.rank}", json.dumps(found))
            os._exit(0)
        assert torch.equal(out, x)
        if number == 4:
            ctx.store.set(f"running {ctx.rank}", "")


def inputs(rank: int, seed: int):
    tokens, number = (rank + seed) % 9, 10 * seed + rank
    x = testing.tokens(tokens, SIZES["hidden"], torch.bfloat16, seed=number)
    ids = testing.routing_uniform(tokens, 6, 2, seed=number)
    return x, ids, torch.full((tokens, 2), 0.5)


def check(transport: str, number: int) -> None:
    draw = random.Random(number)
    victim = draw.randrange(WORLD)
    with testing.start_processes(WORLD, loop_of(transport)) as ranks:
        ranks.store.wait([f"running {rank}" for rank in range(WORLD)])
        time.sleep(draw.random() * 0.1)
        killed = time.monotonic()  # the same clock in all processes of a host
        ranks.kill(victim)
        survivors = [rank for rank in range(WORLD) if rank != victim]
        ranks.store.wait([f"found {rank}" for rank in survivors])
        for rank in survivors:
            found = json.loads(ranks.store.get(f"found {rank}"))
            assert found["ranks"] == [victim], (number, victim, rank, found["text"])
            assert found["at"] - killed < TIMEOUT + SLACK, (number, rank, found["text"])


def loop_of(transport: str):
    def work(ctx):
        loop(ctx, transport=transport)

    return work


@pytest.mark.parametrize("number", range(50))
def test_over_windows(number):
    check("symmetric", number)


@pytest.mark.parametrize("number", range(20))
def test_over_collectives(number):
    check("collective", number)

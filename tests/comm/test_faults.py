"""Late, absent and stalled ranks: time-outs that name them, and retries.

test_fault_points.py loses ranks at every step of an operation. Ranks are processes started over a
store without torch process groups.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from moe_triton import BrokenGroupError, ExpertParallel, PeerTimeoutError, testing

WORLD, VICTIM, TIMEOUT, SLACK = 3, 1, 2.0, 1.0  # seconds
TOKENS, HIDDEN, EXPERTS, TOP_K = 5, 12, 6, 2


def make(ctx):
    return ExpertParallel(
        ctx.ep_group,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        max_tokens=TOKENS,
        timeout=TIMEOUT,
    )


def batch(rank, seed):
    x = testing.tokens(TOKENS, HIDDEN, torch.bfloat16, seed=100 * seed + rank)
    ids = testing.routing_uniform(TOKENS, EXPERTS, TOP_K, seed=100 * seed + rank)
    return x, ids, torch.full(ids.shape, 0.5)


def rounds(ep, count=3):
    """Rounds with identity experts and weights of sum 1: the output is x."""
    for seed in range(count):
        x, ids, weights = batch(ep.rank, seed)
        received = ep.dispatch(x, ids, weights)
        assert torch.equal(ep.combine(received.x, received.handle), x)


def failure(call, *inputs):
    """The error of a call and the seconds it took."""
    start = time.monotonic()
    with pytest.raises((PeerTimeoutError, BrokenGroupError)) as caught:
        call(*inputs)
    return caught.value, time.monotonic() - start


def barrier(ctx, key):
    """A barrier over the test's store."""
    ctx.store.add(key, 1)
    while ctx.store.add(key, 0) < WORLD:
        time.sleep(0.002)


def wait_for(store, key):
    while not store.check([key]):
        time.sleep(0.005)


def wait_until(condition, timeout=30.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the ranks did not get there"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = {path.name for path in Path("/dev/shm").glob("moe_triton-*")}
    yield
    assert {path.name for path in Path("/dev/shm").glob("moe_triton-*")} <= before


def late(ctx):
    ep = make(ctx)
    x, ids, weights = batch(ctx.rank, 3)
    pending = ep.dispatch_setup(x, ids, weights) if ctx.rank != VICTIM else None
    barrier(ctx, "ready")
    if ctx.rank == VICTIM:
        wait_for(ctx.store, "go on")
        received = ep.dispatch(x, ids, weights)
    else:
        error, _ = failure(ep.dispatch_teardown, pending)
        assert error.ranks == (VICTIM,)
        ctx.store.add("named", 1)
        wait_for(ctx.store, "go on")
        received = ep.dispatch_teardown(pending)
    assert torch.equal(ep.combine(received.x, received.handle), x)
    rounds(ep)
    ep.close()
    return "retried"


def test_the_same_teardown_may_be_tried_again():
    with testing.start_processes(WORLD, late) as ranks:
        wait_until(lambda: ranks.store.add("named", 0) == WORLD - 1)
        ranks.store.set("go on", "")
        assert ranks.results() == ["retried"] * WORLD


def absent(ctx):
    if ctx.rank == VICTIM:
        ctx.store.set("here", "")
        wait_for(ctx.store, "never")
    error, seconds = failure(make, ctx)
    assert error.ranks == (VICTIM,)
    assert seconds < TIMEOUT + SLACK
    return "named"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stalled"])
def test_a_rank_that_never_comes_to_the_first_call(number):
    with testing.start_processes(WORLD, absent) as ranks:
        wait_until(lambda: ranks.store.check(["here"]))
        ranks.kill(VICTIM, number)
        assert [ranks.result(rank) for rank in range(WORLD) if rank != VICTIM] == ["named"] * 2


def collective_stall(ctx):
    """Stands in for a stall: the rank sleeps, and its gloo threads do not answer for it."""
    with ExpertParallel(
        ctx.ep_group,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        max_tokens=TOKENS,
        timeout=TIMEOUT,
    ) as ep:
        rounds(ep, 2)
        x, ids, weights = batch(ctx.rank, 7)
        barrier(ctx, "ready")
        if ctx.rank == VICTIM:
            wait_for(ctx.store, "named 2")
        else:
            error, seconds = failure(ep.dispatch, x, ids, weights)
            assert error.ranks == (VICTIM,)
            assert seconds < TIMEOUT + SLACK
            error, seconds = failure(ep.dispatch, x, ids, weights)
            assert isinstance(error, BrokenGroupError)
            assert seconds < 0.1
            ctx.store.set(f"named {ctx.store.add('named', 1)}", "")
        barrier(ctx, "awake")
        ep.recover()
        rounds(ep)
        return ep.transport


def test_a_stall_over_gloo_is_named_and_recovers():
    """A killed rank cannot come back here: torch's process groups end with their members."""
    found = testing.run_processes(WORLD, collective_stall, transport="collective")
    assert found == ["collective"] * WORLD

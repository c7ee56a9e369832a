"""Late, absent and stalled ranks: time-outs that name them, and retries.

test_fault_points.py loses ranks at every step of an operation. Ranks are processes started over a
store without torch process groups.
"""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
import shm_names
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
    before = shm_names.names()
    yield
    assert not shm_names.left(before)


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
    actual = testing.run_processes(WORLD, collective_stall, transport="collective")
    assert actual == ["collective"] * WORLD


WORLDS = ["local", "symmetric", "collective"]
CALLS = {
    "combine and dispatch": ("combine", "dispatch"),
    "dispatch and another exchange": ("dispatch", "exchange"),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("first, second", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("before", [0, 3])
def test_ranks_in_different_calls_are_named_at_once(world, first, second, before):
    """Long before the time-out, on all ranks; recover() repairs the group."""

    def fn(ctx):
        sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": TOKENS}
        options = {"in_flight": 2, "timeout": 30.0, "count_load": True}
        with ExpertParallel(ctx.ep_group, **sizes, **options) as ep:
            rounds(ep, before)
            x, ids, weights = batch(ep.rank, 0)
            received = ep.dispatch(x, ids, weights)
            calls = {
                "combine": lambda: ep.combine(received.x, received.handle),
                "dispatch": lambda: ep.dispatch(x, ids, weights),
                "exchange": ep.gather_load,
            }
            error, seconds = failure(calls[second if ep.rank == VICTIM else first])
            assert seconds < 5
            ep.recover()
            rounds(ep)
        return type(error), str(error), error.ranks

    # The constructor takes the first dispatch and combine.
    numbers = {"dispatch": before + 3, "combine": before + 2, "exchange": 1}
    for rank, (kind, text, ranks) in enumerate(harness.run_world(world, WORLD, fn)):
        peer, own, other = VICTIM, first, second
        if rank == VICTIM:
            (peer,) = ranks
            own, other = second, first
        assert kind is PeerTimeoutError
        assert ranks == (peer,)
        assert (
            f"rank {peer} waits in {other} {numbers[other]}, this rank in {own} {numbers[own]}: "
            "all ranks must issue the same calls in the same order"
        ) in text


@pytest.mark.parametrize("world", WORLDS)
def test_two_objects_in_another_order_are_named_at_once(world):
    """The objects that go on are not accused of the calls in which the others failed."""

    def fn(ctx):
        sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": TOKENS}
        first, second, third = (ExpertParallel(ctx.ep_group, **sizes, timeout=30.0) for _ in "123")
        rounds(first)
        rounds(second, 1)
        swapped = (second, first) if ctx.rank == VICTIM else (first, second)
        error, seconds = failure(swapped[0].dispatch, *batch(first.rank, 0))
        assert seconds < 5
        barrier(ctx, "failed")
        rounds(third, 2)
        for ep in (first, second):
            ep.recover()
            rounds(ep)
        return str(error), error.ranks

    here, there = "dispatch 5 of object 0", "dispatch 3 of object 1"
    for rank, (text, ranks) in enumerate(harness.run_world(world, WORLD, fn)):
        if rank == VICTIM:
            here, there = there, here
        (peer,) = ranks
        assert (peer == VICTIM) == (rank != VICTIM)
        assert f"rank {peer} waits in {there}, this rank in {here}: all ranks must issue" in text
        if rank == VICTIM:
            here, there = there, here


@pytest.mark.parametrize("world", WORLDS)
def test_threads_of_a_rank_may_use_objects_in_any_order(world):
    """One rank is late with the first object in one thread, the other in another."""

    def fn(ctx):
        sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": TOKENS}
        objects = [ExpertParallel(ctx.ep_group, **sizes, timeout=30.0) for _ in "12"]

        def call(ep, seconds):
            time.sleep(seconds)
            rounds(ep)
            return True

        waits = (0.6, 0.0) if ctx.rank == VICTIM else (0.0, 0.6)
        with ThreadPoolExecutor(2) as pool:
            return all(pool.map(call, objects, waits))

    assert harness.run_world(world, WORLD, fn) == [True] * WORLD

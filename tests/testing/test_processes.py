"""Ranks that a test stops, kills and starts again."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from moe_triton import ExpertParallel, PeerTimeoutError, testing

SIZES = {"num_experts": 6, "top_k": 2, "hidden": 32, "max_tokens": 8}


def one_round(ep):
    x = testing.tokens(8, 32, torch.float32, seed=ep.rank).to(torch.bfloat16)
    received = ep.dispatch(x, testing.routing_zipf(8, 6, 2, seed=ep.rank), torch.full((8, 2), 0.5))
    return torch.equal(ep.combine(received.x, received.handle), x)


def serve(ctx, timeout):
    """Rounds until a peer is missing; then recover, and one more round."""
    ep = ExpertParallel(ctx.ep_group, **SIZES, timeout=timeout)
    try:
        while one_round(ep):
            ctx.store.add("rounds", 1)
    except PeerTimeoutError as error:
        missing = error.ranks
    ctx.store.add("broken", 1)
    ep.recover()
    return missing, one_round(ep)


def join(ctx):
    return one_round(ExpertParallel(ctx.ep_group, **SIZES, timeout=10.0))


def reached(store, key, count, limit=30.0):
    end = time.monotonic() + limit
    while store.add(key, 0) < count:
        assert time.monotonic() < end, f"{key} is {store.add(key, 0)} after {limit} s"
        time.sleep(0.01)


def test_a_killed_rank_is_started_into_the_same_group():
    with testing.start_processes(3, serve, args=(10.0,)) as ranks:
        reached(ranks.store, "rounds", 6)
        pid = ranks.pid(1)
        ranks.kill(1)
        with pytest.raises(testing.WorkerDiedError, match=rf"rank 1 \(pid {pid}\).*SIGKILL"):
            ranks.result(1)
        reached(ranks.store, "broken", 2)
        ranks.restart(1, join, args=())
        assert ranks.pid(1) != pid
        assert ranks.results() == [((1,), True), True, ((1,), True)]


def count(ctx):
    """Count in the store until somebody sets "enough"."""
    while not ctx.store.check(["enough"]):
        ctx.store.add(f"count{ctx.rank}", 1)
        time.sleep(1e-3)


def test_a_stopped_rank_holds_up_nobody_else():
    with testing.start_processes(2, count) as ranks:
        reached(ranks.store, "count1", 10)
        ranks.kill(1, signal.SIGSTOP)
        time.sleep(0.1)
        before = [ranks.store.add(f"count{rank}", 0) for rank in range(2)]
        reached(ranks.store, "count0", before[0] + 10)
        assert ranks.store.add("count1", 0) == before[1]
        ranks.store.set("enough", "")
        with pytest.raises(TimeoutError, match=rf"rank 1 \(pid {ranks.pid(1)}\): no result"):
            ranks.result(1, timeout=0.1)
        ranks.kill(1, signal.SIGCONT)
        assert ranks.results() == [None, None]


def test_stopped_and_busy_processes_end_with_the_handle():
    with testing.start_processes(3, lambda ctx: time.sleep(100 * ctx.rank)) as ranks:
        pids = [ranks.pid(rank) for rank in range(3)]
        assert ranks.result(0) is None
        os.kill(pids[0], 0)  # stays, with its memory, for its peers
        ranks.kill(2, signal.SIGSTOP)
        start = time.monotonic()
    assert time.monotonic() - start < 10
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_errors_of_a_rank_are_raised_where_its_result_is_asked_for():
    def fail(ctx, text):
        if ctx.rank == 1:
            raise KeyError(text)
        return text

    with testing.start_processes(2, fail, args=("word",)) as ranks:
        assert ranks.result(0) == "word"
        for _ in range(2):
            with pytest.raises(KeyError, match="word") as caught:
                ranks.result(1)
            assert caught.value.failed_rank == 1
        ranks.restart(1, lambda ctx: "again", args=())
        assert ranks.results() == ["word", "again"]


def test_restart_kills_what_still_runs():
    with testing.start_processes(1, lambda ctx, seconds: time.sleep(seconds), args=(100,)) as ranks:
        old = ranks.pid(0)
        ranks.restart(0, args=(0,))
        assert ranks.result(0) is None
        with pytest.raises(ProcessLookupError):
            os.kill(old, 0)


def test_the_collective_transport_has_no_process_group_here():
    def attempt(ctx):
        ExpertParallel(ctx.ep_group, **SIZES)

    with (
        testing.start_processes(2, attempt, transport="collective") as ranks,
        pytest.raises(RuntimeError, match="no torch process group"),
    ):
        ranks.result(0)


def test_arguments_are_checked_before_anything_starts():
    with pytest.raises(ValueError, match="transport must be one of"):
        testing.start_processes(2, join, transport="telegraph")
    with pytest.raises(ValueError, match="world_size must be"):
        testing.start_processes(0, join)

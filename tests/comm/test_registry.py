"""Communicators by group, rank and number, after aborts, delays and restarts."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from moe_triton import ExpertParallel, MoeError, PeerAbortError, PeerTimeoutError, comm

SIZES = {"num_experts": 4, "top_k": 1, "hidden": 8, "max_tokens": 2}
OP = "test_op"


@pytest.fixture
def group():
    """An in-process group of two ranks."""
    comm.register_group("two", dist.HashStore(), 2, in_process=True)
    yield "two"
    comm.unregister_group("two")


def make(group, rank, **options):
    """An object, or the error of its constructor."""
    try:
        return ExpertParallel(group, rank=rank, **{**SIZES, "timeout": 0.4, **options})
    except MoeError as error:
        return error.with_traceback(None)


def at_once(*calls) -> list:
    results: list = [None] * len(calls)

    def run(index):
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "hung"
    return results


def test_a_rank_that_is_late_meets_peers_that_try_again(group):
    """Their first object never was; the second takes its place."""
    assert isinstance(make(group, 0), PeerTimeoutError)
    assert isinstance(make(group, 0), PeerTimeoutError)
    made = at_once(lambda: make(group, 0, timeout=5), lambda: make(group, 1, timeout=5))
    assert [type(one) for one in made] == [ExpertParallel] * 2
    for one in made:
        one.close()


def test_a_rank_whose_constructor_failed_meets_peers_that_recover(group):
    made = at_once(lambda: make(group, 0, timeout=5), lambda: make(group, 1, timeout=5))
    made[1].close()
    comm.registry._opened["two", 1] = 0  # rank 1 is restarted
    assert isinstance(make(group, 1), PeerTimeoutError)

    def recover():
        made[0].recover()
        return made[0]

    made = at_once(recover, lambda: make(group, 1, timeout=5))
    assert [type(one) for one in made] == [ExpertParallel] * 2
    for one in made:
        one.close()


def test_a_slow_rank_hears_every_refusal(group):
    """Its peer has failed twice and waits for its third object when this rank opens its first."""

    def refuses_twice():
        errors = [make(group, 0, hidden=0) for _ in range(2)]
        return [*errors, make(group, 0, timeout=5)]

    def slow():
        time.sleep(0.3)
        return [make(group, 1, timeout=5) for _ in range(3)]

    refusing, slow_rank = at_once(refuses_twice, slow)
    for error in slow_rank[:2]:
        assert isinstance(error, PeerAbortError)
        assert "hidden must be positive" in error.reason
    assert isinstance(slow_rank[2], ExpertParallel)
    refusing[2].close()
    slow_rank[2].close()


def test_functional_ops_of_a_group_share_an_communicator(group):
    first = comm.default_communicator(comm.resolve(OP, group, 0))
    assert comm.default_communicator(comm.resolve(OP, group, 0)) is first
    assert comm.default_communicator(comm.resolve(OP, group, 1)) is not first


def test_closing_a_group_closes_its_communicators_only(group):
    comm.register_group("other", dist.HashStore(), 2, in_process=True)
    try:
        communicators = [
            comm.default_communicator(comm.resolve(OP, group, 0)),
            comm.open_communicator(
                comm.resolve(OP, group, 1), transport="auto", in_flight=1, timeout=1.0
            ),
        ]
        other = comm.default_communicator(comm.resolve(OP, "other", 0))
        comm.unregister_group(group)
        for communicator in communicators:
            with pytest.raises(MoeError, match="is closed"):
                communicator.raise_if_broken(OP)
        other.raise_if_broken(OP)
        assert comm.default_communicator(comm.resolve(OP, "other", 0)) is other
        comm.close_all()
        with pytest.raises(MoeError, match="is closed"):
            other.raise_if_broken(OP)
    finally:
        comm.unregister_group("other")


def test_a_group_registered_again_begins_anew(group):
    store = dist.HashStore()
    for _ in range(2):
        comm.unregister_group(group)
        comm.register_group(group, store, 2, in_process=True)
        made = at_once(lambda: make(group, 0, timeout=5), lambda: make(group, 1, timeout=5))
        assert [type(one) for one in made] == [ExpertParallel] * 2

"""Rendezvous through a store: late, aborting and restarted ranks, and a store that hangs."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from moe_triton import PeerAbortError, PeerTimeoutError
from moe_triton.comm.groups import Group
from moe_triton.comm.rendezvous import Rendezvous

OP = "test_op"


class World:
    """The ranks of one group; a rank that is made again stands for a new process."""

    def __init__(self, world_size: int, *, timeout: float = 5.0, store: object = None) -> None:
        self.size, self.timeout = world_size, timeout
        self.store = store or dist.HashStore()
        self.members = [self.make(rank) for rank in range(world_size)]

    def make(self, rank: int) -> Rendezvous:
        group = Group("test", rank, self.size, self.store, in_process=True)
        return Rendezvous(group, "tag", self.timeout)

    def restart(self, rank: int) -> None:
        self.members[rank] = self.make(rank)

    def connect(self, *ranks: int, rounds: int = 2) -> list:
        """Connect some ranks at once; what each gets, or its exception."""
        results: dict = {}

        def run(rank):
            try:
                results[rank] = connect(self.members[rank], rank, rounds)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "hung"
        return [results[rank] for rank in ranks]


def connect(rendezvous: Rendezvous, info: object, rounds: int) -> list:
    """The records of all ranks in every round, as a communicator gathers them."""
    records: list = []
    while len(records) < rounds:
        with rendezvous.catching_up():
            records = [rendezvous.gather_peer_info(OP, {"info": info})]
            rendezvous.check_generation(OP)
            for step in range(rounds - 1):
                records.append(rendezvous.exchange(OP, f"step {step}", {"info": info}))
    return [[record["info"] for record in records] for records in records]


def generations(world: World) -> set[int]:
    return {rendezvous._call_id.generation for rendezvous in world.members}


def test_all_ranks_hear_all_facts():
    world = World(3)
    assert world.connect(0, 1, 2) == [[[0, 1, 2]] * 2] * 3
    assert generations(world) == {1}


def test_calls_go_on_in_the_same_generation():
    world = World(2)
    for _ in range(3):
        assert world.connect(0, 1) == [[[0, 1]] * 2] * 2
    assert generations(world) == {1}


def test_an_abort_does_not_wait_and_reaches_all_ranks():
    world = World(3)
    for call in range(3):
        world.members[1].abort_peers(f"reason {call}")
    for call in range(3):
        began = time.monotonic()
        # An abort decides the call for each rank alone.
        for error in [*world.connect(0), *world.connect(2)]:
            assert isinstance(error, PeerAbortError)
            assert (error.rank, error.reason) == (1, f"reason {call}")
        assert time.monotonic() - began < 1
    assert world.connect(0, 1, 2) == [[[0, 1, 2]] * 2] * 3


def test_all_ranks_reject():
    world = World(3)
    for rendezvous in world.members:
        rendezvous.abort_peers("wrong")
    assert world.connect(0, 1, 2) == [[[0, 1, 2]] * 2] * 3


def test_a_missing_rank_is_named():
    world = World(3, timeout=0.2)
    began = time.monotonic()
    for error in world.connect(0, 2):
        assert isinstance(error, PeerTimeoutError)
        assert error.ranks == (1,)
        assert "rank 1 did not come to the first call within 0.2 s, in group 'test'" in str(error)
    assert time.monotonic() - began < 1.2


def test_ranks_that_come_a_different_number_of_times_meet_in_the_end():
    """A late rank must not use a peer's record of a call that has timed out."""
    world = World(2, timeout=0.3)
    for _ in range(3):
        world.members[0].new_generation()
        assert isinstance(world.connect(0)[0], PeerTimeoutError)
    (stale,) = world.connect(1)
    assert isinstance(stale, PeerTimeoutError)
    assert stale.ranks == (0,)
    for rendezvous in world.members:
        rendezvous.new_generation()
    assert world.connect(0, 1) == [[[0, 1]] * 2] * 2


def test_a_late_rank_follows_peers_that_recover():
    """It has read a peer's record of a timed-out call, and waits for the peer's next record."""
    world = World(2, timeout=0.3)
    assert isinstance(world.connect(0)[0], PeerTimeoutError)
    world.timeout = 5.0
    world.restart(1)
    late: list = []
    thread = threading.Thread(target=lambda: late.extend(world.connect(1)), daemon=True)
    thread.start()
    time.sleep(0.2)
    world.members[0].new_generation()
    assert world.connect(0) == [[[0, 1]] * 2]
    thread.join(10)
    assert late == [[[0, 1]] * 2]


@pytest.mark.parametrize("first", ["survivors", "restarted"])
def test_a_restarted_rank_meets_survivors_that_recover(first):
    world = World(3)
    for restarts in (1, 2):
        assert world.connect(0, 1, 2) == [[[0, 1, 2]] * 2] * 3
        world.restart(1)
        survivors = [world.members[0], world.members[2]]
        for rendezvous in survivors:
            rendezvous.new_generation()
        early, late = ((0, 2), (1,)) if first == "survivors" else ((1,), (0, 2))
        thread = threading.Thread(target=world.connect, args=early)
        thread.start()
        time.sleep(0.1)
        assert world.connect(*late) == [[[0, 1, 2]] * 2] * len(late)
        thread.join(10)
        assert generations(world) == {1 + restarts}


def test_a_rank_lost_between_the_rounds_is_named():
    world = World(2, timeout=0.3)
    errors = []

    def dies_after_the_first_round():
        world.members[1].gather_peer_info(OP, {"info": 1})

    thread = threading.Thread(target=dies_after_the_first_round, daemon=True)
    thread.start()
    errors += world.connect(0)
    thread.join(10)
    assert errors[0].ranks == (1,)


class SilentStore:
    """A store whose server stops, or goes away, after so many accesses."""

    def __init__(self, accesses: int, failure: Exception | None) -> None:
        self.store, self.accesses, self.failure = dist.HashStore(), accesses, failure
        self.goes_on = threading.Event()

    def __getattr__(self, name):
        def access(*args):
            self.accesses -= 1
            if self.accesses < 0 and self.failure is not None:
                raise self.failure
            if self.accesses < 0:
                self.goes_on.wait()
            return getattr(self.store, name)(*args)

        return access


@pytest.mark.parametrize("failure", [None, RuntimeError("connection reset")])
@pytest.mark.parametrize("accesses", [0, 5])
def test_a_store_that_stops_is_not_waited_for(accesses, failure):
    """It is served by one of the ranks, perhaps the one that stalls."""
    store = SilentStore(accesses, failure)
    world = World(2, timeout=0.3, store=store)
    began = time.monotonic()
    (error,) = world.connect(0)
    assert isinstance(error, PeerTimeoutError)
    assert error.ranks == (1,)
    assert ("connection reset" if failure else "the store does not answer") in str(error)
    world.members[0].abort_peers("unread")
    assert time.monotonic() - began < 0.3 + 1 + 0.5
    # When the store answers again, a new generation begins as if nothing had been.
    store.accesses = 10**6
    store.goes_on.set()
    time.sleep(0.2)
    for rendezvous in world.members:
        rendezvous.new_generation()
    assert world.connect(0, 1) == [[[0, 1]] * 2] * 2

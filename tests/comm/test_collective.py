"""The transport over torch.distributed: which process groups it takes, and what breaks it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import time
from pathlib import Path

import harness
import pytest
import torch
import torch.distributed as dist

from moe_triton import (
    ArgumentMismatchError,
    ArgumentValueError,
    BrokenGroupError,
    ExpertParallel,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    comm,
    testing,
)
from moe_triton.comm import Call, MoeConfig, collective, message_exchange
from moe_triton.ops import steps_on
from moe_triton.topology import Topology

WORLD = 3

CALL = comm.exchange_call("test", WORLD, steps_on(torch.device("cpu")), torch.device("cpu"))


def shout(rank: int, number: int = 0) -> torch.Tensor:
    """One row for each rank: where it comes from, where it goes, which exchange it is."""
    return torch.tensor([[rank, target, number] for target in range(WORLD)])


def delivered(rank: int, number: int = 0) -> list[list[int]]:
    return [[source, rank, number] for source in range(WORLD)]


def exchange(group, number: int = 0) -> list[list[int]]:
    rank = dist.get_rank()
    out, counts = comm.all_to_all_v(shout(rank, number), [1] * WORLD, group=group)
    assert counts == [1] * WORLD
    return out.tolist()


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo"], ids=str)
def test_a_process_group_that_has_gloo_for_the_cpu(backend):
    """Also the group that torch makes when nobody names a back end."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = comm.resolve("test", None)
        assert collective.has_gloo(group)
        assert collective.device_group(group) is None
        assert not collective.only_on_device(group)
    finally:
        dist.destroy_process_group()


def test_objects_share_the_thread_of_gloos_sockets():
    """Such a thread wakes a hundred times a second, and each object has five connections."""

    def fn(ctx):
        def threads() -> int:
            names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
            return names.count("gloo_tcp_loop\n")

        before = threads()
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                options = {"num_experts": WORLD, "top_k": 1, "hidden": 8, "max_tokens": 1}
                stack.enter_context(ExpertParallel(ctx.ep_group, **options))
            return threads() - before

    assert all(more <= 1 for more in harness.run_world("collective", WORLD, fn))


def test_a_process_group_without_gloo():
    """Tensors in host memory go over the transport's own gloo connections."""

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
            assert collective.only_on_device(comm.resolve("test", ctx.ep_group))
            return exchange(ctx.ep_group)

    assert harness.run_world("collective", WORLD, fn) == [delivered(rank) for rank in range(WORLD)]


@pytest.mark.parametrize("through", ["the group", "host memory"])
def test_rows_that_are_not_in_host_memory(through):
    """As with the tensors of a device: exact sizes over the group, or by way of copies."""

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(message_exchange, "in_host_memory", lambda device: False)
            if through == "the group":
                patch.setattr(collective, "device_group", lambda group: group.process_group)
            rounds = [exchange(ctx.ep_group, number) for number in range(3)]
            check_rounds(ctx, 3)
            with pytest.raises(PeerAbortError if ctx.rank else ArgumentValueError):
                comm.all_to_all_v(shout(ctx.rank), [1, -1 if ctx.rank == 0 else 1, 1])
            return [*rounds, exchange(ctx.ep_group, 3)]

    results = harness.run_world("collective", WORLD, fn)
    for rank, actual in enumerate(results):
        assert actual == [delivered(rank, number) for number in range(4)]


def check_rounds(ctx, count: int, **options) -> None:
    """Dispatch and combine whose experts leave the rows alone: each token comes back."""
    with ExpertParallel(
        ctx.ep_group, num_experts=6, top_k=2, hidden=24, max_tokens=9, **options
    ) as ep:
        for seed in range(count):
            x = testing.tokens(seed * 4 % 9, 24, torch.bfloat16, seed=10 * seed + ctx.rank)
            ids = testing.routing_uniform(len(x), 6, 2, seed=seed)
            received = ep.dispatch(x, ids, torch.full(ids.shape, 0.5))
            assert torch.equal(ep.combine(received.x, received.handle), x)


@pytest.mark.parametrize("room", [0, 500, 4000], ids="{} bytes of room".format)
def test_payloads_with_and_without_room_behind_the_head(room):
    """Those that have none come in a second message; a rank may get some of either kind."""

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(message_exchange, "_ROOM", room + 64 * ctx.world_size)
            check_rounds(ctx, 6, transport="collective")
            return [
                comm.all_to_all_v(torch.full((sum(counts), 100), ctx.rank), counts)[0][
                    :, 7
                ].tolist()
                for counts in ([0, 3, 0], [1, 0, 1], [0, 1, 2])
            ]

    for rank, actual in enumerate(harness.run_world("collective", WORLD, fn)):
        for counts, values in zip(([0, 3, 0], [1, 0, 1], [0, 1, 2]), actual, strict=True):
            assert values == [source for source in range(WORLD) for _ in range(counts[rank])]


@pytest.mark.parametrize("reverse", [False, True])
def test_ranks_may_set_up_and_tear_down_in_different_orders(reverse):
    """Each kind has a connection of its own; within a kind, setups may run ahead of teardowns."""

    def fn(ctx):
        def tokens(seed):
            x = testing.tokens(4, 24, torch.bfloat16, seed=10 * seed + ctx.rank)
            ids = testing.routing_uniform(4, 6, 2, seed=seed)
            return x, ids, torch.full(ids.shape, 0.5)

        options = {"transport": "collective", "in_flight": 2}
        swap = ctx.rank == 1
        with ExpertParallel(
            ctx.ep_group, num_experts=6, top_k=2, hidden=24, max_tokens=4, **options
        ) as ep:
            first = ep.dispatch(*tokens(0))
            for seed in range(1, 6):
                pending = {}

                def dispatch(seed=seed, pending=pending):
                    pending["dispatch"] = ep.dispatch_setup(*tokens(seed))

                def combine(first=first, pending=pending):
                    pending["combine"] = ep.combine_setup(first.x, first.handle)

                for setup in (combine, dispatch) if swap else (dispatch, combine):
                    setup()
                if swap != reverse:
                    out = ep.combine_teardown(pending["combine"])
                    following = ep.dispatch_teardown(pending["dispatch"])
                else:
                    following = ep.dispatch_teardown(pending["dispatch"])
                    out = ep.combine_teardown(pending["combine"])
                assert torch.equal(out, tokens(seed - 1)[0])
                first = following

    harness.run_world("collective", WORLD, fn)


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_rank_that_rejects(rounds):
    def fn(ctx):
        for number in range(rounds):
            assert exchange(None, number) == delivered(ctx.rank, number)
        errors = []
        for number in range(3):
            counts = [1] * WORLD if ctx.rank != 1 else [1, -1, number]
            try:
                comm.all_to_all_v(shout(ctx.rank), counts)
            except MoeError as error:
                errors.append((type(error), getattr(error, "rank", None), str(error)))
        return errors, [exchange(None, number) for number in range(3)]

    for rank, (errors, rounds_after) in enumerate(harness.run_world("collective", WORLD, fn)):
        assert rounds_after == [delivered(rank, number) for number in range(3)]
        for number, (kind, culprit, text) in enumerate(errors):
            assert f"got [1, -1, {number}]" in text
            if rank != 1:
                assert (kind, culprit) == (PeerAbortError, 1)


def test_ranks_that_disagree():
    def fn(ctx):
        width = 3 if ctx.rank != 1 else 4
        with pytest.raises(ArgumentMismatchError) as caught:
            comm.all_to_all_v(torch.zeros(WORLD, width), [1] * WORLD)
        return caught.value.argument, str(caught.value), exchange(None)

    for rank, (argument, text, after) in enumerate(harness.run_world("collective", WORLD, fn)):
        assert argument == "row_bytes"
        assert "12 on" in text and "16 on" in text
        assert after == delivered(rank)


def test_a_rank_that_is_late_breaks_the_group_until_recover():
    def fn(ctx):
        communicator = comm.open_communicator(
            comm.resolve("test", ctx.ep_group), transport="collective", in_flight=1, timeout=0.5
        )

        def call(number):
            transport = communicator.transport("test")
            rows = shout(ctx.rank, number).view(torch.uint8)
            received = transport.all_to_all_v(CALL, rows, [1] * WORLD)
            return torch.cat(received).view(torch.int64).view(-1, 3).tolist()

        seen = [call(0)]
        dist.barrier()
        if ctx.rank == 1:
            time.sleep(1.6)  # gives the others time to miss this rank, and to recover
            assert call(1) == delivered(1, 1)  # what the others sent is there
        began = time.monotonic()
        with pytest.raises(PeerTimeoutError) as caught:
            call(1)
        seen.append((caught.value.ranks, time.monotonic() - began))
        began = time.monotonic()
        with pytest.raises(BrokenGroupError):
            call(2)
        seen.append(time.monotonic() - began)
        # The others wait for the late rank, each as long as it takes.
        while True:
            try:
                communicator.recover("test")
                break
            except PeerTimeoutError:
                pass
        seen.append([call(number) for number in range(3)])
        comm.close_communicator(communicator)
        return seen

    for rank, seen in enumerate(harness.run_world("collective", WORLD, fn)):
        first, (missing, seconds), at_once, after = seen
        assert first == delivered(rank)
        assert seconds < 0.5 + 1
        assert at_once < 0.05
        assert missing == (1,)
        assert after == [delivered(rank, number) for number in range(3)]


def test_ranks_in_different_calls():
    """Each says where the other is."""

    def fn(ctx):
        communicator = comm.open_communicator(
            comm.resolve("test", ctx.ep_group), transport="collective", in_flight=1, timeout=0.5
        )
        transport = communicator.transport("test")
        config = MoeConfig(Topology(2, 2), 1, 8, 4)
        cpu = torch.device("cpu")
        call = Call("test", config, {}, steps_on(cpu), cpu)
        with pytest.raises(PeerTimeoutError) as caught:
            transport.prepare(call, ("dispatch", "combine")[ctx.rank])
        comm.close_communicator(communicator)
        return caught.value.ranks, str(caught.value)

    places = ("dispatch 1", "combine 1")
    for rank, (ranks, text) in enumerate(harness.run_world("collective", 2, fn)):
        other = 1 - rank
        assert ranks == (other,)
        assert f"rank {other} waits in {places[other]}, this rank in {places[rank]}" in text


def test_what_a_closed_object_has_sent_is_nobody_elses():
    """Messages of halves that were never torn down stay in torch's group; none may match them."""

    def fn(ctx):
        for number in range(3):
            communicator = comm.open_communicator(
                comm.resolve("test", None), transport="collective", in_flight=2, timeout=5.0
            )
            transport = communicator.transport("test")
            rows = shout(ctx.rank, number).view(torch.uint8)
            received = transport.all_to_all_v(CALL, rows, [1] * WORLD)
            actual = torch.cat(received).view(torch.int64).view(-1, 3).tolist()
            assert actual == delivered(ctx.rank, number)
            if ctx.rank == number:
                communicator.abort_peers("exchange", "test", MoeError("test", "nobody hears this"))
            comm.close_communicator(communicator)
            dist.barrier()

    harness.run_world("collective", WORLD, fn)


# A rank that dies while the others work.

TIMEOUT = 5.0


def loop_until_a_loss(ctx, hosts_store):
    """Rounds without end; an error goes to the test's store, and this process ends at once."""
    store = dist.PrefixStore("group", ctx.store)
    if hosts_store:  # by rank 0, as without a launcher
        if ctx.rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            ctx.store.set("port", str(store.port))
        else:
            port = int(ctx.store.get("port"))
            store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=ctx.world_size)
    options = {"num_experts": 6, "top_k": 2, "hidden": 24, "max_tokens": 9, "timeout": TIMEOUT}
    ep = ExpertParallel(None, transport="collective", **options)
    for seed in itertools.count():
        x = testing.tokens(seed % 9, 24, torch.bfloat16, seed=10 * seed + ctx.rank)
        ids = testing.routing_uniform(len(x), 6, 2, seed=seed)
        began = time.monotonic()
        try:
            received = ep.dispatch(x, ids, torch.full(ids.shape, 0.5))
            assert torch.equal(ep.combine(received.x, received.handle), x)
        except MoeError as error:
            actual = (type(error).__name__, list(error.ranks), str(error), time.monotonic() - began)
            ctx.store.set(f"lost {ctx.rank}", json.dumps(actual))
            os._exit(1)
        if seed == 3:
            ctx.store.add("running", 1)


def lose(victim: int, seconds: float, hosts_store: bool) -> None:
    with testing.start_processes(WORLD, loop_until_a_loss, args=(hosts_store,)) as ranks:
        until(lambda: ranks.store.add("running", 0) == WORLD)
        time.sleep(seconds)
        ranks.kill(victim)
        survivors = [rank for rank in range(WORLD) if rank != victim]
        until(lambda: ranks.store.check([f"lost {rank}" for rank in survivors]))
        for rank in survivors:
            kind, culprits, text, took = json.loads(ranks.store.get(f"lost {rank}"))
            assert (kind, culprits) == ("PeerTimeoutError", [victim]), text
            assert f"rank {victim} is gone" in text
            assert took < TIMEOUT + 1


def until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    "hosts_store, count",
    [(False, 3), (True, 2), pytest.param(False, 20, marks=pytest.mark.full)],
)
def test_all_survivors_name_the_killed_rank_though_they_leave_at_once(hosts_store, count):
    generator = random.Random(count)
    for number in range(count):
        victim = 0 if hosts_store else number % WORLD
        lose(victim, generator.random() * 0.2, hosts_store)

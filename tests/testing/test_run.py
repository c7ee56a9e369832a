"""Both launchers: the context of each rank, the order of results, and whose exception is raised."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch

from moe_triton import ExpertParallel, PeerAbortError, comm, testing

LAUNCHERS = (testing.run_local, testing.run_processes)
both = pytest.mark.parametrize("run", LAUNCHERS, ids=["threads", "processes"])


class OwnError(Exception):
    """Of a class that no worker can import."""

    def __init__(self, rank, *, detail):
        super().__init__(f"{detail} of {rank}")
        self.detail = detail


def own_rank(ctx):
    return ctx.rank


@both
def test_layout_with_tensor_parallelism(run):
    ranks = run(8, lambda ctx: {**vars(ctx), "store": None}, tp_world_size=2)
    assert [r["rank"] for r in ranks] == list(range(8))
    assert [(r["ep_rank"], r["tp_rank"]) for r in ranks] == [divmod(i, 2) for i in range(8)]
    assert {(r["world_size"], r["ep_world_size"], r["tp_world_size"]) for r in ranks} == {(8, 4, 2)}
    assert {r["device"] for r in ranks} == {torch.device("cpu")}
    # One name per plane, shared by its ranks; one per pair; and all of them different.
    planes = [{ranks[i]["ep_group"] for i in range(plane, 8, 2)} for plane in range(2)]
    pairs = [{ranks[i]["tp_group"] for i in (pair, pair + 1)} for pair in range(0, 8, 2)]
    names = set().union(*planes, *pairs)
    assert len(names) == sum(len(group) for group in (*planes, *pairs)) == 6
    assert all(0 < len(name) < 128 for name in names)


@both
@pytest.mark.parametrize("tp_world_size", [0, 1])
def test_layout_without_tensor_parallelism(run, tp_world_size):
    ranks = run(2, lambda ctx: {**vars(ctx), "store": None}, tp_world_size=tp_world_size)
    assert [(r["ep_rank"], r["tp_rank"]) for r in ranks] == [(0, 0), (1, 0)]
    assert [r["tp_world_size"] for r in ranks] == [1, 1]
    assert [r["tp_group"] for r in ranks] == ["", ""]
    assert ranks[0]["ep_group"] == ranks[1]["ep_group"] != ""


@both
def test_any_function_will_do(run):
    offset = 10
    assert run(3, own_rank) == [0, 1, 2]
    assert run(3, lambda ctx: offset + own_rank(ctx)) == [10, 11, 12]
    assert run(1, lambda ctx: ctx.world_size) == [1]


@both
@pytest.mark.parametrize("world_size, tp_world_size", [(0, 1), (3, 2)])
def test_sizes_must_fit(run, world_size, tp_world_size):
    with pytest.raises(ValueError, match="world_size must be a positive multiple"):
        run(world_size, own_rank, tp_world_size=tp_world_size)


def round_trip(ctx):
    """Largest difference between tokens and what identity experts and weights of sum 1 make."""
    x = testing.tokens(8, 32, torch.float32, seed=ctx.rank).to(torch.bfloat16)
    ids = testing.routing_zipf(8, 8, 2, seed=ctx.rank)
    sizes = {"num_experts": 8, "top_k": 2, "hidden": 32, "max_tokens": 8}
    with ExpertParallel(ctx.ep_group, **sizes, timeout=20.0) as ep:
        received = ep.dispatch(x, ids, torch.full((8, 2), 0.5))
        out = ep.combine(received.x, received.handle)
        return ep.transport, (out.float() - x.float()).abs().max().item()


@both
def test_groups_are_usable(run):
    transport = "local" if run is testing.run_local else "shm"
    assert run(4, round_trip) == [(transport, 0.0)] * 4
    assert run(4, round_trip, tp_world_size=2) == [(transport, 0.0)] * 4


@pytest.mark.parametrize("transport", ["shm", "collective"])
def test_transport_is_passed_on(transport):
    assert testing.run_processes(2, round_trip, transport=transport) == [(transport, 0.0)] * 2
    ranks = testing.run_processes(4, round_trip, tp_world_size=2, transport=transport)
    assert ranks == [(transport, 0.0)] * 4


def test_transport_of_the_functional_ops_can_change_between_calls():
    def of_functional_ops(ctx):
        communicator = comm.default_communicator(comm.resolve("test", ctx.ep_group))
        return communicator.transport("test").name

    for transport in ("collective", "shm", "shm", "collective"):
        actual = testing.run_processes(2, of_functional_ops, transport=transport)
        assert actual == [transport] * 2


def test_transport_must_exist():
    with pytest.raises(ValueError, match=r"transport must be one of .*got 'telegraph'"):
        testing.run_processes(2, own_rank, transport="telegraph")


@both
def test_the_exception_names_its_rank(run):
    def fail(ctx):
        if ctx.rank == 2:
            raise OwnError(ctx.rank, detail="fault")
        return ctx.rank

    with pytest.raises(OwnError) as caught:
        run(4, fail)
    assert str(caught.value) == "fault of 2 (on rank 2)"
    assert caught.value.failed_rank == 2
    assert caught.value.detail == "fault"
    assert not hasattr(caught.value, "__notes__")
    if run is testing.run_processes:
        assert "in fail\n    raise OwnError" in str(caught.value.__cause__)


@both
def test_the_first_failure_in_time_is_raised(run):
    def fail(ctx):
        time.sleep(0.2 * (ctx.world_size - ctx.rank - 1))
        raise KeyError(ctx.rank)

    with pytest.raises(KeyError) as caught:
        run(3, fail)
    assert caught.value.failed_rank == 2


@both
def test_the_cause_goes_before_its_echoes(run):
    def fail(ctx):
        sizes = {"num_experts": 8, "top_k": 2, "hidden": 32, "max_tokens": 8}
        ep = ExpertParallel(ctx.ep_group, **sizes, timeout=20.0)
        ids = testing.routing_uniform(8, 8, 2)
        try:
            ep.dispatch(testing.tokens(8, 32), ids + 8 if ctx.rank == 1 else ids)
        except ValueError:
            time.sleep(0.3)  # the peers report first
            raise

    with pytest.raises(ValueError, match="topk_ids") as caught:
        run(4, fail)
    assert not isinstance(caught.value, PeerAbortError)
    assert caught.value.failed_rank == 1


@both
def test_echoes_are_raised_if_there_is_no_cause(run):
    def fail(ctx):
        if ctx.rank == 0:
            raise PeerAbortError("dispatch", 1, "bad ids")

    with pytest.raises(PeerAbortError, match="bad ids") as caught:
        run(2, fail)
    assert caught.value.failed_rank == 0
    assert caught.value.rank == 1


@both
def test_leaving_the_program_is_a_failure_too(run):
    def leave(ctx):
        if ctx.rank == 1:
            sys.exit(3)

    with pytest.raises(SystemExit) as caught:
        run(2, leave)
    assert caught.value.code == 3


@both
def test_the_store_belongs_to_one_call(run):
    def agree(ctx):
        fresh = not ctx.store.check(["key0"])
        ctx.store.add("ready", 1)
        while ctx.store.add("ready", 0) < ctx.world_size:
            time.sleep(1e-3)
        ctx.store.set(f"key{ctx.rank}", str(ctx.rank))
        return fresh, ctx.store.get(f"key{1 - ctx.rank}")

    for _ in range(2):
        assert run(2, agree) == [(True, b"1"), (True, b"0")]


@both
def test_calls_from_several_threads_do_not_meet(run):
    results = {}

    def call(number):
        results[number] = run(2, lambda ctx: (number, ctx.rank, round_trip(ctx)[1]))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [(n, 0, 0.0), (n, 1, 0.0)] for n in range(2)}


def test_threads_end_and_groups_are_forgotten():
    names = testing.run_local(2, lambda ctx: ctx.ep_group)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]
    with pytest.raises(ValueError, match="group"):
        ExpertParallel(names[0], num_experts=2, top_k=1, hidden=32, max_tokens=1, rank=0)


def test_threads_compute_where_they_are_told():
    assert testing.run_local(2, lambda ctx: ctx.device, device="meta") == [torch.device("meta")] * 2

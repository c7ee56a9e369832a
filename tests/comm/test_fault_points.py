"""Ranks that die or stall at every point of an operation, and memory that cannot be shared.

A rank stops or kills itself where a given method of the channel would be called, so that a fault
comes exactly there. SIGSTOP stops all its threads, SIGKILL ends it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import signal
import time
from pathlib import Path

import harness
import pytest
import shm_names
import torch
import torch.distributed as dist

from moe_triton import (
    BrokenGroupError,
    ExpertParallel,
    MoeError,
    PeerTimeoutError,
    UnavailableError,
    comm,
    testing,
)
from moe_triton.comm.message_exchange import MessageExchange
from moe_triton.comm.rendezvous import Rendezvous
from moe_triton.comm.ring_protocol import RingProtocol
from moe_triton.comm.shm import MemfdMemory, PosixMemory

WORLD, VICTIM, SURVIVORS = 3, 1, (0, 2)
SIZES = {"num_experts": 6, "top_k": 2, "hidden": 16, "max_tokens": 8}
TIMEOUT = 2.5  # seconds
LIMIT = 60.0  # seconds for a whole test

KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)


def losses(points, always: set[tuple[str, int]]):
    """Parametrize by point and signal; a case costs a timeout, so that most need the full run."""
    cases = [
        pytest.param(
            point,
            number,
            marks=[] if (point, number) in always else [pytest.mark.full],
            id=f"{point}-{'killed' if number == KILL else 'stopped'}",
        )
        for point in points
        for number in (KILL, STOP)
    ]
    return pytest.mark.parametrize("point, number", cases)


@pytest.fixture(autouse=True)
def nothing_in_dev_shm():
    before = shm_names.names()
    yield
    assert not shm_names.left(before)


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


# What runs on the ranks.


def make(group, **options) -> ExpertParallel:
    return ExpertParallel(group, **{**SIZES, "timeout": TIMEOUT, **options})


def inputs_of(rank: int, seed: int):
    count, seed = (rank + seed) % 9, 10 * seed + rank
    return (
        testing.tokens(count, 16, seed=seed),
        testing.routing_zipf(count, 6, 2, seed=seed),
        testing.weights(count, 2, seed=seed),
    )


def expected_of(x, ids, weights) -> torch.Tensor:
    """Expert e adds e to its rows."""
    total = torch.zeros(x.shape)
    for slot in range(2):
        y = (x.float() + ids[:, slot, None]).to(x.dtype)
        total = total + y.float() * weights[:, slot, None]
    return total.to(x.dtype)


def run_experts(ep, received) -> torch.Tensor:
    numbers = torch.tensor(ep.local_experts).repeat_interleave(received.tokens_per_expert)
    y = received.x.clone()
    y[: len(numbers)] = (y[: len(numbers)].float() + numbers[:, None]).to(y.dtype)
    return y


def layer(ep, seed: int) -> None:
    inputs = inputs_of(ep.rank, seed)
    received = ep.dispatch(*inputs)
    out = ep.combine(run_experts(ep, received), received.handle)
    assert torch.equal(out, expected_of(*inputs)), f"wrong in round {seed}"


def arm(owner, name: str, applies, number: int) -> None:
    """Let the fault come instead of the first call of ``owner.name`` to which it applies."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if applies(*args):
            setattr(owner, name, method)
            os.kill(os.getpid(), number)
        return method(self, *args, **kwargs)

    setattr(owner, name, wrapper)


# Where a rank is lost: the method that it no longer calls.
POINTS = {
    "before its handshake": (RingProtocol, "handshake", lambda kind, *_: kind == "dispatch"),
    "before its flags of dispatch": (RingProtocol, "signal", lambda kind, *_: kind == "dispatch"),
    "after its flags of dispatch": (RingProtocol, "wait", lambda kind, *_: kind == "dispatch"),
    "before its slot is free": (RingProtocol, "release", lambda kind, *_: kind == "dispatch"),
    "before combine": (RingProtocol, "acquire", lambda kind, *_: kind == "combine"),
    "before its flags of combine": (RingProtocol, "signal", lambda kind, *_: kind == "combine"),
    "after its flags of combine": (RingProtocol, "wait", lambda kind, *_: kind == "combine"),
}


def refusals(ep, received) -> list[tuple[type, float]]:
    """Exceptions of calls on a broken group, and their seconds."""
    calls = [ep.check, lambda: ep.dispatch(*inputs_of(ep.rank, 0))]
    if received is not None:
        calls.append(lambda: ep.combine(received.x, received.handle))
    actual = []
    for call in calls:
        began = time.monotonic()
        with pytest.raises(MoeError) as caught:
            call()
        actual.append((type(caught.value), time.monotonic() - began))
    return actual


def recover(ep) -> None:
    """Repeat recover() until all ranks come at the same time."""
    for _ in range(20):
        with contextlib.suppress(PeerTimeoutError):
            return ep.recover()
    raise AssertionError("the ranks do not find each other")


def report_of(ctx, error: MoeError, began: float) -> dict:
    """Report an error without its traceback, which would keep memory alive."""
    ctx.store.add("report_of", 1)
    seconds = time.monotonic() - began
    return {"error": error.with_traceback(None), "seconds": seconds, "refusals": [], "files": 0}


def rounds_until_a_loss(ctx, ep) -> dict:
    """Rounds until a peer is missing; the error, and those of the calls after it."""
    received = None
    for seed in range(100):
        began = time.monotonic()
        try:
            received = ep.dispatch(*inputs_of(ep.rank, seed))
            began = time.monotonic()
            ep.combine(received.x, received.handle)
        except PeerTimeoutError as error:
            actual = report_of(ctx, error, began)
            return actual | {"refusals": refusals(ep, received)}
    raise AssertionError("no rank was lost")


def serve(ctx, point, number):
    """Rounds with a fault on one rank, then recovery and exact rounds."""
    files = open_files()
    with make(ctx.ep_group) as ep:
        for seed in range(3):
            layer(ep, seed)
        if ctx.rank == VICTIM:
            arm(*POINTS[point], number)
        actual = rounds_until_a_loss(ctx, ep)
        recover(ep)
        for seed in range(5):
            layer(ep, seed)
        ep.check()
    del ep
    return actual | {"files": open_files() - files}


def join(ctx):
    """A rank that was restarted."""
    with make(ctx.ep_group, timeout=20.0) as ep:
        for seed in range(5):
            layer(ep, seed)


# What a test does with them.


def wait_for(ranks, key: str, count: int) -> None:
    """Wait until ``count`` ranks have added to ``key``; raise the exception of a rank."""
    end = time.monotonic() + LIMIT
    while ranks.store.add(key, 0) < count:
        assert time.monotonic() < end, f"{key}: {ranks.store.add(key, 0)} of {count}"
        for rank in SURVIVORS:
            with contextlib.suppress(TimeoutError):
                ranks.result(rank, 0)
        time.sleep(0.01)


def together(ctx, fn, *args):
    """``fn(ctx, *args)`` once all ranks have started, which may take longer than the time-out."""
    ctx.store.add("started", 1)
    while ctx.store.add("started", 0) < WORLD:
        time.sleep(0.01)
    return fn(ctx, *args)


def results_after(fn, args, number, joining=join) -> list:
    """The results of all ranks: a lost one is restarted, or continued, once its peers raised."""

    def call():
        with testing.start_processes(WORLD, together, args=(fn, *args)) as ranks:
            wait_for(ranks, "report_of", len(SURVIVORS))
            if number == KILL:
                ranks.restart(VICTIM, joining, args=())
            else:
                ranks.kill(VICTIM, signal.SIGCONT)
            return ranks.results(LIMIT)

    return harness.within(LIMIT, call)


def check_loss(actual: dict, number: int) -> None:
    assert type(actual["error"]) is PeerTimeoutError
    assert actual["error"].ranks == (VICTIM,)
    assert f"rank {VICTIM}" in str(actual["error"])
    # A dead process is noticed before the time-out.
    assert actual["seconds"] < (1.0 if number == KILL else TIMEOUT + 1)
    for kind, seconds in actual["refusals"]:
        assert kind is BrokenGroupError
        assert seconds < 0.05
    assert actual["files"] == 0


@losses(POINTS, {(point, KILL) for point in POINTS} | {(point, STOP) for point in [*POINTS][::3]})
def test_a_rank_is_lost(point, number):
    actual = results_after(serve, (point, number), number)
    for rank in SURVIVORS:
        check_loss(actual[rank], number)


def serve_growing(ctx, number, memory):
    """The fault comes after the victim's handshake, when it opens its peers' new windows."""
    if memory == "posix":
        MemfdMemory.open = refuse
    files = open_files()
    smooth_scales = torch.ones(6, 16)
    with make(ctx.ep_group, quant="int8") as ep:
        ep.dispatch(*inputs_of(ep.rank, 0))
        if ctx.rank == VICTIM:
            arm(PosixMemory if memory == "posix" else MemfdMemory, "open", lambda *_: True, number)
        began = time.monotonic()
        try:
            ep.dispatch(*inputs_of(ep.rank, 0), scales=smooth_scales)
            raise AssertionError("no rank was lost")
        except (PeerTimeoutError, UnavailableError) as error:
            # A rank that comes back finds the windows of its peers gone.
            actual = report_of(ctx, error, began)
        recover(ep)
        ep.dispatch(*inputs_of(ep.rank, 1), scales=smooth_scales)
    del ep
    return actual | {"files": open_files() - files}


def join_growing(ctx, memory):
    if memory == "posix":
        MemfdMemory.open = refuse
    with make(ctx.ep_group, quant="int8", timeout=20.0) as ep:
        ep.dispatch(*inputs_of(ep.rank, 1), scales=torch.ones(6, 16))


def refuse(self, handle):
    raise PermissionError(1, "Operation not permitted")


@losses(["memfd", "posix"], {("memfd", STOP), ("memfd", KILL), ("posix", KILL)})
def test_a_rank_is_lost_while_windows_grow(point, number):
    """Its new windows may have a name that it can no longer take away."""
    joining = functools.partial(join_growing, memory=point)
    actual = results_after(serve_growing, (number, point), number, joining)
    for rank in SURVIVORS:
        check_loss(actual[rank], number)


def serve_connecting(ctx, number, step):
    files = open_files()
    actual = {}
    if ctx.rank == VICTIM:
        arm(Rendezvous, "exchange", lambda _, name, *rest: name.endswith(step), number)
    for _ in range(20):
        began = time.monotonic()
        try:
            with make(ctx.ep_group) as ep:
                layer(ep, 0)
        except PeerTimeoutError as error:
            actual = actual or report_of(ctx, error, began)
        else:
            break
    del ep
    return actual | {"files": open_files() - files}


@losses(["handle", "opened"], {("handle", KILL), ("opened", STOP)})
def test_a_rank_is_lost_while_the_ranks_connect(point, number):
    """Control blocks are released too; another try finds the restarted rank."""
    actual = results_after(serve_connecting, (number, point), number, join_once)
    for rank in SURVIVORS:
        # The ranks do not know yet whether it lives.
        check_loss(actual[rank], STOP)


def join_once(ctx):
    with make(ctx.ep_group, timeout=20.0) as ep:
        layer(ep, 0)


# Memory that cannot be shared.


def refused(*owners):
    """A context in which these providers open nothing."""
    stack = contextlib.ExitStack()
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    for owner in owners:
        patch.setattr(owner, "open", refuse)
    return stack


def mappings() -> set[str]:
    """Of this process, which may still have some of earlier tests."""
    return set(Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "on one rank"])
def test_named_memory_where_descriptors_cannot_be_opened(everywhere):
    def fn(ctx):
        files, earlier = open_files(), mappings()
        with refused(*([MemfdMemory] if everywhere or ctx.rank == VICTIM else [])):
            ep = make(ctx.ep_group)
        with ep:
            for seed in range(3):
                layer(ep, seed)
            assert ep.transport == "shm"
            mapped = "\n".join(mappings() - earlier)
            assert "/dev/shm/moe_triton-" in mapped
            assert "memfd:moe_triton-" not in mapped
        del ep
        return open_files() - files

    assert harness.run_world("auto", WORLD, fn) == [0] * WORLD


def test_no_memory_can_be_shared():
    """The automatic choice falls to torch.distributed; the explicit one says why it cannot."""

    def fn(ctx):
        files = open_files()
        owners = {0: [MemfdMemory], VICTIM: [PosixMemory]}.get(ctx.rank, [])
        with refused(*owners):
            with make(ctx.ep_group) as ep:
                layer(ep, 0)
                chosen = ep.transport
            with pytest.raises(UnavailableError) as caught:
                make(ctx.ep_group, transport="symmetric")
        text = str(caught.value)
        del ep, caught
        return chosen, text, open_files() - files

    for chosen, text, files in harness.run_world("auto", WORLD, fn):
        assert chosen == "collective"
        assert "transport 'symmetric' cannot work here" in text
        assert "memfd: [Errno 1] Operation not permitted on rank 0" in text
        assert "posix: [Errno 1] Operation not permitted on rank 1" in text
        assert files == 0


def test_no_memory_can_be_shared_and_there_is_no_process_group():
    def fn(ctx):
        with refused(MemfdMemory, PosixMemory), pytest.raises(UnavailableError) as caught:
            make(ctx.ep_group)
        with make(ctx.ep_group) as ep:
            layer(ep, 0)
        return str(caught.value)

    with testing.start_processes(WORLD, fn) as ranks:
        for text in ranks.results(LIMIT):
            assert "transport 'auto' cannot work here: memfd: " in text
            assert "posix: " in text


# The same faults where messages go through gloo.


def gloo_group(ctx, name: str):
    """A torch process group of the ranks, made for the purpose."""
    store = dist.PrefixStore(name, ctx.store)
    dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=WORLD)
    return dist.group.WORLD


GLOO_POINTS = {
    "before its message of dispatch": ("start", lambda kind, *_: kind == "dispatch"),
    "after its message of dispatch": ("receive", lambda op, kind, *_: kind == "dispatch"),
    "before combine": ("begin", lambda kind, *_: kind == "combine"),
}


def serve_over_gloo(ctx, point, number):
    group = gloo_group(ctx, "first")
    with make(group, transport="collective") as ep:
        layer(ep, 0)
        if ctx.rank == VICTIM:
            arm(MessageExchange, *GLOO_POINTS[point], number)
        actual = rounds_until_a_loss(ctx, ep)
        if number == STOP:
            recover(ep)
            for seed in range(5):
                layer(ep, seed)
            return actual
        with pytest.raises(PeerTimeoutError) as caught:
            ep.recover()
        actual["again"] = caught.value.ranks
    comm.close_all()
    dist.destroy_process_group()
    with make(gloo_group(ctx, "second"), transport="collective", timeout=20.0) as ep:
        for seed in range(5):
            layer(ep, seed)
    return actual


def join_over_gloo(ctx):
    with make(gloo_group(ctx, "second"), transport="collective", timeout=20.0) as ep:
        for seed in range(5):
            layer(ep, seed)


@losses(
    GLOO_POINTS,
    {
        ("before its message of dispatch", STOP),
        ("after its message of dispatch", KILL),
        ("before combine", STOP),
    },
)
def test_a_rank_is_lost_over_gloo(point, number):
    """A stalled rank is met again by recover(), with new connections.

    A killed one is not: torch's process groups end with their members, so that ``recover()`` names
    it once more. The ranks that are left make a new process group with it, when it has been
    restarted, and new objects.
    """
    actual = results_after(serve_over_gloo, (point, number), number, join_over_gloo)
    for rank in SURVIVORS:
        check_loss(actual[rank], number)
        if number == KILL:
            assert actual[rank]["again"] == (VICTIM,)


# Anything, anywhere.


def serve_on(ctx):
    """Exact rounds for as long as the test goes on, through whatever happens to the other ranks."""
    recoveries = rounds = 0
    ep = None
    while not ctx.store.check(["end"]):
        try:
            if ep is None:
                ep = make(ctx.ep_group, num_experts=8, timeout=1.0)
            for seed in range(rounds, rounds + 10):
                layer(ep, seed)
            rounds += 10
            ctx.store.add(f"rounds of {ctx.rank}", 10)
        except (PeerTimeoutError, BrokenGroupError, UnavailableError):
            if ep is not None:
                with contextlib.suppress(PeerTimeoutError, BrokenGroupError, UnavailableError):
                    ep.recover()
                    recoveries += 1
    if ep is not None:
        ep.close()
    return recoveries, rounds


@pytest.mark.full
def test_losses_at_any_time(record_evidence):
    """Ranks are killed and stopped at random moments, also while others connect and recover.

    Every result is exact, and after every loss the ranks find each other again.
    """
    generator = random.Random(0)
    world, losses = 4, 40
    seconds = []

    def rounds(ranks) -> list[int]:
        return [ranks.store.add(f"rounds of {rank}", 0) for rank in range(world)]

    def wait_for_rounds(ranks):
        """Until every rank has done more rounds than now."""
        began, before = time.monotonic(), rounds(ranks)
        while not all(now > then for now, then in zip(rounds(ranks), before, strict=True)):
            assert time.monotonic() - began < LIMIT, f"{before}, then {rounds(ranks)}"
            for rank in range(world):
                with contextlib.suppress(TimeoutError):
                    ranks.result(rank, 0)
            time.sleep(0.01)
        seconds.append(time.monotonic() - began)

    with testing.start_processes(world, serve_on) as ranks:
        wait_for_rounds(ranks)
        for _ in range(losses):
            time.sleep(generator.random() * 0.3)
            victims = generator.sample(range(world), generator.choice([1, 1, 1, 2]))
            for victim in victims:
                if generator.random() < 0.5:
                    ranks.restart(victim)
                else:
                    ranks.kill(victim, signal.SIGSTOP)
                    time.sleep(generator.choice([0.05, 0.5, 2.0]))
                    ranks.kill(victim, signal.SIGCONT)
            wait_for_rounds(ranks)
        ranks.store.set("end", "")
        ends = ranks.results(LIMIT)
    assert any(recoveries for recoveries, _ in ends)
    record_evidence(
        "Losses at random",
        f"- {losses} losses in a world of {world} processes, {sum(rounds for _, rounds in ends)} "
        f"exact rounds on the ranks that lived to the end; at most {max(seconds):.1f} s from a "
        "loss to exact rounds on all ranks, with a timeout of 1 s",
    )

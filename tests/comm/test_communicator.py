"""Communicators: the choice of a transport, and the end of one."""

from __future__ import annotations

import gc
import logging
import os
import time
from pathlib import Path

import harness
import pytest
import shm_names
import torch

from moe_triton import (
    ArgumentMismatchError,
    BrokenGroupError,
    ExpertParallel,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    UnavailableError,
    comm,
)
from moe_triton.comm import registry
from moe_triton.comm.control_blocks import control_bytes
from moe_triton.comm.shm import MemfdMemory, PosixMemory

OP = "test_op"
worlds = pytest.mark.parametrize("world", harness.WORLDS)


def open_communicator(ctx, *, in_flight=1, timeout=5.0, transport="auto"):
    group = comm.resolve(OP, harness.own_group(ctx), ctx.ep_rank)
    return comm.open_communicator(group, transport=transport, in_flight=in_flight, timeout=timeout)


def barrier(ctx, name: str) -> None:
    """All ranks come here; over the store, apart from what is tested."""
    ctx.store.add(name, 1)
    while ctx.store.add(name, 0) < ctx.world_size:
        pass


@worlds
def test_an_abort_on_a_broken_group_raises_nothing(world):
    """A rank aborts more calls than may be in flight, and its peer never comes."""

    def fn(ctx):
        communicator = open_communicator(ctx, timeout=0.3)
        communicator.transport(OP)
        if ctx.rank == 0:
            for _ in range(2):
                communicator.abort_peers("dispatch", OP, MoeError(OP, "wrong"))
            with pytest.raises(BrokenGroupError, match="call recover"):
                communicator.raise_if_broken(OP)
            communicator.abort_peers("dispatch", OP, MoeError(OP, "wrong"))
        barrier(ctx, "done")
        comm.close_communicator(communicator)

    harness.run_world(world, 2, fn)


SIZES = {"num_experts": 6, "top_k": 1, "hidden": 16, "max_tokens": 4}

# Providers without room for windows on rank 1, the choice, and parts of the error text.
SCARCITY = {
    "none": ((), "auto", "memfd", ()),
    "memfd": (("memfd",), "auto", "posix", ()),
    "both": (("memfd", "posix"), "auto", "collective", ()),
    "memfd, shm": (("memfd",), "shm", "posix", ()),
    "both, shm": (("memfd", "posix"), "shm", None, ("memfd: ", "; posix: ")),
}


def make(ctx, **options) -> ExpertParallel:
    return ExpertParallel(ctx.ep_group, rank=ctx.ep_rank, **{**SIZES, **options})


def round_trip(ep: ExpertParallel) -> None:
    x = torch.full((3, ep._exchange.config.hidden), 1.5 + ep.rank, dtype=torch.bfloat16)
    received = ep.dispatch(x, torch.arange(3, dtype=torch.int32)[:, None])
    assert torch.equal(ep.combine(received.x, received.handle), x)


def scarce(memory: type, patch: pytest.MonkeyPatch, broken: str) -> None:
    """Let a provider fail to allocate, or to open, blocks larger than a control block."""
    refused = getattr(memory, broken)

    def refuse(self, what, *rest):
        num_bytes = what if broken == "allocate" else what["bytes"]
        if num_bytes > control_bytes(1):
            raise OSError(28, "No space left on device")
        return refused(self, what, *rest)

    patch.setattr(memory, broken, refuse)


# What each choice comes to: the transport's name, or why it cannot work.
CHOICES = {
    "threads": {
        "auto": "local",
        "single": "has 2 ranks",
        "symmetric": "local",
        "local": "local",
        "shm": "are threads of one process",
        "collective": "has no torch process group",
    },
    "processes": {
        "auto": "shm",
        "single": "has 2 ranks",
        "symmetric": "shm",
        "local": "are processes",
        "shm": "shm",
        "collective": "collective",
    },
}


@pytest.mark.parametrize("transport", comm.TRANSPORTS)
@pytest.mark.parametrize("world", CHOICES)
def test_names_of_transports(world, transport):
    """A choice that cannot work fails on every rank with its reason; the group stays usable."""
    expected = CHOICES[world][transport]

    def fn(ctx):
        if " " not in expected:
            with make(ctx, transport=transport) as ep:
                round_trip(ep)
                assert ep.transport == expected
            return
        with pytest.raises(UnavailableError, match=expected) as caught:
            make(ctx, transport=transport)
        assert f"transport {transport!r} cannot work here: " in str(caught.value)
        with make(ctx) as ep:
            round_trip(ep)

    harness.run_world("local" if world == "threads" else "auto", 2, fn)


class Lines(logging.Handler):
    """The lines that the library logs on this rank about the choice of a transport."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        if ": transport " in record.getMessage():
            self.lines.append(f"{record.levelname} {record.getMessage()}")


def logged(ctx, transport: str, *, lacking: bool = False) -> list[str]:
    """What one object logs on this rank of a world of processes; each logs alike."""
    log, handler = logging.getLogger("moe_triton"), Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for memory in (MemfdMemory, PosixMemory) if lacking and ctx.rank == 1 else ():
                scarce(memory, patch, "allocate")
            with make(ctx, transport=transport, hidden=4096, max_tokens=16) as ep:
                name = ep._exchange.communicator.group.name
                round_trip(ep)
                round_trip(ep)
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    return [line.replace(repr(name), "G") for line in handler.lines]


def test_the_choice_is_logged_once_with_its_reason():
    """On each rank, and not with its calls."""

    def fn(ctx):
        choices = [logged(ctx, transport) for transport in ("auto", "shm", "collective")]
        return [*choices, logged(ctx, "auto", lacking=True)]

    for rank, lines in enumerate(harness.run_world("auto", 2, fn)):
        start = f"INFO group G, rank {rank} of 2: transport"
        ranks = "the ranks are processes that share memory by memfd"
        assert lines[0] == [f"{start} shm, because 'auto' was asked for, {ranks}"]
        assert lines[1] == [f"{start} shm, because 'shm' was asked for, {ranks}"]
        assert lines[2] == [f"{start} collective, because 'collective' was asked for"]
        ((last),) = lines[3]
        assert last.startswith(f"{start} collective, because 'auto' was asked for; memfd: ")
        assert last.count("No space left on device") == 2


def test_the_choices_of_threads_and_of_one_rank_are_logged(caplog):
    """The application's own handlers get them; nothing is below INFO."""
    with caplog.at_level(logging.INFO, "moe_triton"):
        harness.run_world("local", 2, lambda ctx: round_trip(make(ctx)))
        harness.run_world("local", 1, lambda ctx: round_trip(make(ctx)))
    lines = [r.getMessage() for r in caplog.records if ": transport " in r.getMessage()]
    lines = sorted(line.partition(", ")[2] for line in lines)
    threads = "'auto' was asked for, the ranks are threads of one process"
    assert lines == [
        "rank 0 of 1: transport single, because the group has one rank",
        f"rank 0 of 2: transport local, because {threads}",
        f"rank 1 of 2: transport local, because {threads}",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moe_triton"):
        harness.run_world("local", 2, lambda ctx: round_trip(make(ctx)))
    assert caplog.records == []


@pytest.mark.parametrize("transport", comm.TRANSPORTS)
def test_one_rank_needs_no_transport(transport):
    def fn(ctx):
        with make(ctx, transport=transport) as ep:
            x = torch.full((3, 16), 1.5, dtype=torch.bfloat16)
            received = ep.dispatch(x, torch.arange(3, dtype=torch.int32)[:, None])
            assert torch.equal(ep.combine(received.x, received.handle), x)
            assert ep.transport == "single"

    harness.run_world("local", 1, fn)


@pytest.mark.parametrize("broken", ["allocate", "open"])
@pytest.mark.parametrize("lacking, choice, provider, texts", SCARCITY.values(), ids=SCARCITY)
def test_one_rank_has_no_room_for_windows(lacking, choice, provider, texts, broken):
    """All ranks try the next provider without waiting for a time-out, and leave no files."""

    def fn(ctx):
        before = shm_names.names()
        began = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            for memory in (MemfdMemory, PosixMemory):
                if ctx.rank == 1 and memory.name in lacking:
                    scarce(memory, patch, broken)
            options = {"transport": choice, "hidden": 4096, "max_tokens": 16}
            if provider is None:
                with pytest.raises(UnavailableError) as caught:
                    make(ctx, **options)
                for text in ("transport 'shm' cannot work here", "No space left", *texts):
                    assert text in str(caught.value)
                assert "rank 1" in str(caught.value)
            else:
                with make(ctx, **options) as ep:
                    actual = ep.transport
                    if actual == "shm":
                        actual = ep._exchange.communicator._connected._protocol._opener.memory.name
                    assert actual == provider
        assert time.monotonic() - began < 10
        with make(ctx) as ep:
            assert ep.transport == "shm"
            round_trip(ep)
        barrier(ctx, "over")
        assert not shm_names.left(before)

    harness.run_world("auto", 3, fn)


def test_no_room_for_windows_after_recover():
    """recover() chooses the provider anew."""

    def fn(ctx):
        with make(ctx, hidden=4096) as ep, pytest.MonkeyPatch.context() as patch:
            assert ep.transport == "shm"
            if ctx.rank == 2:
                for memory in (MemfdMemory, PosixMemory):
                    scarce(memory, patch, "allocate")
            ep.recover()
            assert ep.transport == "collective"
            round_trip(ep)
            patch.undo()
            ep.recover()
            assert ep.transport == "shm"
            round_trip(ep)

    harness.run_world("auto", 3, fn)


def test_ranks_that_disagree_where_one_has_no_room():
    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            if ctx.rank == 1:
                scarce(MemfdMemory, patch, "allocate")
            began = time.monotonic()
            with pytest.raises(MoeError) as caught:
                make(ctx, top_k=2 if ctx.rank == 0 else 1, hidden=4096, max_tokens=16)
            assert time.monotonic() - began < 10
        with make(ctx) as ep:
            round_trip(ep)
        return type(caught.value)

    kinds = harness.run_world("auto", 3, fn)
    assert set(kinds) <= {ArgumentMismatchError, PeerAbortError, UnavailableError}
    assert ArgumentMismatchError in kinds


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_dropped_objects_free_descriptors_and_mappings(world):
    def left() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").count("moe_triton-")
        return len(list(Path("/proc/self/fd").iterdir())), maps, len(registry._others)

    def fn(ctx):
        round_trip(make(ctx))
        barrier(ctx, "first is over")
        before = left()
        barrier(ctx, "counted")
        for _ in range(20):
            round_trip(make(ctx))
        barrier(ctx, "all are over")
        return before, left()

    for before, after in harness.run_world(world, 2, fn):
        assert after == before


def test_a_rank_that_drops_its_object_has_left():
    """Its peers notice as soon as they wait for it."""

    def fn(ctx):
        ep = make(ctx)
        barrier(ctx, "made")
        if ctx.rank == 1:
            del ep
            gc.collect()
            barrier(ctx, "dropped")
            return
        barrier(ctx, "dropped")
        began = time.monotonic()
        with pytest.raises(PeerTimeoutError, match="rank 1 left the group or died"):
            round_trip(ep)
        assert time.monotonic() - began < 5

    harness.run_world("symmetric", 2, fn)


def test_a_forked_child_does_not_leave_for_its_parent():
    def fn(ctx):
        with make(ctx) as ep:
            if ctx.rank == 1:
                child = os.fork()
                if child == 0:
                    ep._exchange.communicator._connected._protocol._leave()
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
            barrier(ctx, "forked")
            assert not ep._exchange.communicator._connected._protocol._control.is_gone(1)
            round_trip(ep)

    harness.run_world("symmetric", 2, fn)

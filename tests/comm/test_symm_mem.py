"""The provider over torch's symmetric memory: what it refuses, and who hears of it."""

from __future__ import annotations

import os
import signal
import time

import harness
import pytest
import torch
import torch.distributed as dist
from symmetric_memory import StandIn, installed

from moe_triton import (
    ExpertParallel,
    PeerTimeoutError,
    UnavailableError,
    comm,
    testing,
)
from moe_triton.comm import communicator, symm_mem
from moe_triton.comm.symm_mem import OVERLAP, DeviceFacts

SIZES = {"num_experts": 6, "top_k": 2, "hidden": 16, "max_tokens": 4}


def make(ctx, **options) -> ExpertParallel:
    return ExpertParallel(ctx.ep_group, rank=ctx.ep_rank, **{**SIZES, **options})


def round_trip(ep: ExpertParallel) -> None:
    x = torch.full((3, 16), 1.5 + ep.rank, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 5], [1, 2], [3, 4]], dtype=torch.int32)
    received = ep.dispatch(x, ids, torch.full((3, 2), 0.5))
    assert torch.equal(ep.combine(received.x, received.handle), x)


def provider_of(ep: ExpertParallel) -> str:
    """The provider of the dispatch windows."""
    windows = ep._exchange.communicator._connected._protocol._kinds["dispatch"].windows
    return "symm_mem" if windows.blocks[0].mapping is not None else "shm"


def test_windows_come_from_the_provider():
    """They are used, grow and are replaced by recover() like others, and hold no garbage."""

    def fn(ctx):
        with make(ctx, transport="symmetric") as ep:
            for _ in range(5):
                round_trip(ep)
            assert provider_of(ep) == "symm_mem"
            ep.recover()
            round_trip(ep)
            assert provider_of(ep) == "symm_mem"
        for rows in (3, 3000):
            x = torch.arange(3 * rows, dtype=torch.int32)
            received, counts = comm.all_to_all_v(x, [rows] * 3, group=ctx.ep_group)
            assert counts == [rows] * 3
            assert torch.equal(received.view(3, rows), x[ctx.rank * rows :][:rows].expand(3, rows))

    harness.run_world("symm_mem", 3, fn)


# Faults of rank 1, and what its own error says.
FAULTS = {
    "zero pointers": ({"far": (1,)}, r"ranks \[1\] are reached over a network"),
    "interior pointers": ({"offset": 512}, "does not begin where its allocation does"),
    "unknown memory": ({"unknown": True}, "torch does not know this block"),
    "the rendezvous raises": ({"failing": True}, "torch's rendezvous failed: recvmsg"),
}


@pytest.mark.parametrize("fault, text", FAULTS.values(), ids=FAULTS)
def test_one_rank_cannot(fault, text):
    """All ranks raise before the time-out, and with "auto" all take the collective transport."""

    def fn(ctx):
        stand_in = StandIn(**fault) if ctx.rank == 1 else StandIn()
        with installed(stand_in):
            began = time.monotonic()
            with pytest.raises(UnavailableError, match=text):
                make(ctx, transport="symmetric", timeout=2.0)
            with make(ctx, timeout=2.0) as ep:
                assert ep.transport == "collective"
                round_trip(ep)
            assert time.monotonic() - began < 15

    harness.run_world("auto", 3, fn)


def test_a_rank_never_comes():
    """It sleeps in its rendezvous: its peers do not wait for longer than the time-out."""

    def fn(ctx):
        with installed(StandIn(hanging=ctx.rank == 1)):
            began = time.monotonic()
            with pytest.raises(UnavailableError):
                make(ctx, transport="symmetric", timeout=2.0)
            assert time.monotonic() - began < 10
        with make(ctx) as ep:
            assert ep.transport == "shm"
            round_trip(ep)

    harness.run_world("auto", 3, fn)


def test_a_rank_dies_on_the_way():
    """Its peers name it long before the time-out."""

    def fn(ctx):
        class Dying(StandIn):
            def rendezvous(self, tensor, group_name):
                os.kill(os.getpid(), signal.SIGKILL)

        store = dist.PrefixStore("process group", ctx.store)
        dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=3)
        with installed(Dying() if ctx.rank == 1 else StandIn()):
            began = time.monotonic()
            with pytest.raises(PeerTimeoutError) as caught:
                ExpertParallel(None, transport="symmetric", timeout=60.0, **SIZES)
            return caught.value.ranks, time.monotonic() - began < 30

    with testing.start_processes(3, fn) as processes:
        for rank in (0, 2):
            assert processes.result(rank) == ((1,), True)


def handles(**changes: list) -> list[dict]:
    """What three ranks with a device each would exchange."""
    facts = {
        "bytes": [64] * 3,
        "torch": ["2.14.1"] * 3,
        "uuid": ["a", "b", "c"],
        "index": [0, 1, 2],
        "backend": ["CUDA"] * 3,
        "out_of_reach": [""] * 3,
        "overlap": [0] * 3,
    } | changes
    return [{name: values[rank] for name, values in facts.items()} for rank in range(3)]


UNFIT = {
    "versions": ({"torch": ["2.14.1", "2.13.0", "2.14.1"]}, "versions of PyTorch: 2.13.0 and 2.14"),
    "back ends": ({"backend": ["CUDA", "NVSHMEM", "CUDA"]}, "back ends: CUDA and NVSHMEM"),
    "no access": ({"out_of_reach": ["", "", "x a"]}, "rank 2 cannot access that of rank 0"),
    "one device": ({"uuid": ["a", "b", "a"], "overlap": [1, 1, 0]}, f"2 ranks share.*{OVERLAP}=1"),
}


@pytest.mark.parametrize("changes, text", UNFIT.values(), ids=UNFIT)
def test_facts_that_end_it_before_the_rendezvous(changes, text):
    with pytest.raises(OSError, match=text):
        symm_mem._check_handles(handles(**changes))


def test_facts_that_fit():
    symm_mem._check_handles(handles())
    symm_mem._check_handles(handles(uuid=["a", "a", "a"], overlap=[1, 1, 1]))
    symm_mem._check_handles(handles(out_of_reach=["x", "y", ""]))  # devices of no rank


@pytest.mark.parametrize("before", [None, "0"])
def test_masked_devices_of_equal_index(monkeypatch, before):
    """torch compares indices; ranks that see one device each all have index 0."""
    monkeypatch.delenv(OVERLAP, raising=False)
    if before is not None:
        monkeypatch.setenv(OVERLAP, before)
    with symm_mem._masked_devices(handles(index=[0, 0, 0])):
        assert os.environ[OVERLAP] == "1"
    assert os.environ.get(OVERLAP) == before
    with symm_mem._masked_devices(handles()):
        assert os.environ.get(OVERLAP) == before


def test_two_ranks_on_one_device():
    """Refused without the variable, on all ranks; with it they work."""

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch, installed(facts=DeviceFacts("gpu", "CUDA", ())):
            patch.delenv(OVERLAP, raising=False)
            with pytest.raises(UnavailableError, match=f"2 ranks share the device gpu.*{OVERLAP}"):
                make(ctx, transport="symmetric")
            patch.setenv(OVERLAP, "1")
            with make(ctx, transport="symmetric") as ep:
                round_trip(ep)

    harness.run_world("auto", 2, fn)


def test_causes(monkeypatch):
    """In the words of ``moe-triton doctor``."""
    monkeypatch.setattr(symm_mem, "_finds_device", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert symm_mem.unavailable_because() is None
    alone = comm.Group("alone", 0, 2, None)
    assert "no torch process group" in symm_mem.unavailable_because(alone)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "not proved on ROCm" in symm_mem.unavailable_because()
    assert symm_mem.unavailable_because(explicit=True) is None
    for version in ("2.10.1+cu128", "2.9.0", "1.13.1"):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert symm_mem.unavailable_because() == f"PyTorch 2.11 or later is needed, got {version}"
    monkeypatch.undo()
    monkeypatch.setattr(symm_mem, "_finds_device", lambda: False)
    assert "finds no CUDA or ROCm device" in symm_mem.unavailable_because()


def test_an_older_torch_takes_the_collective_transport():
    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch, installed():
            if ctx.rank == 1:
                old = torch.torch_version.TorchVersion("2.10.0")
                patch.setattr(torch, "__version__", old)
            with pytest.raises(UnavailableError, match=r"PyTorch 2.11 or later is needed"):
                make(ctx, transport="symmetric")
            with make(ctx) as ep:
                assert ep.transport == "collective"
                round_trip(ep)

    harness.run_world("auto", 2, fn)


def test_a_group_over_two_hosts():
    """Their control block cannot be shared, so that nobody tries the rendezvous."""

    def fn(ctx):
        def host(path):
            return f"host of {ctx.rank}" if "boot_id" in path else read(path)

        with pytest.MonkeyPatch.context() as patch, installed(StandIn(hanging=True)):
            read = communicator._read
            patch.setattr(communicator, "_read", host)
            with pytest.raises(UnavailableError, match="the ranks are on different hosts"):
                make(ctx, transport="symmetric")
            with make(ctx) as ep:
                assert ep.transport == "collective"

    harness.run_world("auto", 2, fn)


def test_a_group_without_a_process_group():
    def fn(ctx):
        with installed(), pytest.raises(UnavailableError, match="no torch process group"):
            make(ctx, transport="symmetric")

    with testing.start_processes(2, fn) as processes:
        processes.results()

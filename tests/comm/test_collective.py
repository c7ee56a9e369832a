"""The transport over torch.distributed: which process groups it takes, and what breaks it."""

from __future__ import annotations

import time

import harness
import pytest
import torch
import torch.distributed as dist

from moe_triton import (
    ArgumentMismatchError,
    BrokenGroupError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    comm,
)
from moe_triton.comm import collective

WORLD = 3


def shout(rank: int, number: int = 0) -> torch.Tensor:
    """One row for each rank: where it comes from, where it goes, which exchange it is."""
    return torch.tensor([[rank, target, number] for target in range(WORLD)])


def heard(rank: int, number: int = 0) -> list[list[int]]:
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


def test_a_process_group_without_gloo():
    """Notices, and tensors in host memory, go over a gloo of the group's store."""

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
            assert collective.only_on_device(comm.resolve("test", ctx.ep_group))
            return exchange(ctx.ep_group)

    assert harness.run_world("collective", WORLD, fn) == [heard(rank) for rank in range(WORLD)]


@pytest.mark.parametrize("through", ["the group", "host memory"])
def test_rows_that_are_not_in_host_memory(through):
    """As with the tensors of a device: in batches over the group, or by way of copies."""

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collective, "in_host_memory", lambda data: False)
            if through == "the group":
                patch.setattr(collective, "device_group", lambda group: group.process_group)
            return [exchange(ctx.ep_group, number) for number in range(3)]

    results = harness.run_world("collective", WORLD, fn)
    for rank, found in enumerate(results):
        assert found == [heard(rank, number) for number in range(3)]


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_rank_that_rejects(rounds):
    def fn(ctx):
        for number in range(rounds):
            assert exchange(None, number) == heard(ctx.rank, number)
        errors = []
        for number in range(3):
            counts = [1] * WORLD if ctx.rank != 1 else [1, -1, number]
            try:
                comm.all_to_all_v(shout(ctx.rank), counts)
            except MoeError as error:
                errors.append((type(error), getattr(error, "rank", None), str(error)))
        return errors, [exchange(None, number) for number in range(3)]

    for rank, (errors, rounds_after) in enumerate(harness.run_world("collective", WORLD, fn)):
        assert rounds_after == [heard(rank, number) for number in range(3)]
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
        assert after == heard(rank)


def test_a_rank_that_is_late_breaks_the_group_until_recover():
    """gloo gives up its connections after a timeout: a wait cannot be tried again."""

    def fn(ctx):
        communicator = comm.open_communicator(
            comm.resolve("test", harness.own_group(ctx)),
            transport="collective",
            in_flight=1,
            timeout=0.5,
        )

        def call(number):
            transport = communicator.transport("test")
            rows = shout(ctx.rank, number).view(torch.uint8)
            received = transport.all_to_all_v("test", rows, [1] * WORLD)
            return torch.cat(received).view(torch.int64).view(-1, 3).tolist()

        seen = [call(0)]
        dist.barrier()
        if ctx.rank == 1:
            time.sleep(1.2)  # gives the others time to miss this rank, and to recover
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
        assert first == heard(rank)
        assert seconds < 0.5 + 1
        assert at_once < 0.05
        if rank != 1:
            assert missing == (1,)
        assert after == [heard(rank, number) for number in range(3)]


def test_what_a_closed_object_has_sent_is_nobody_elses():
    """Messages of halves that were never torn down stay in torch's group; none may match them."""

    def fn(ctx):
        for number in range(3):
            communicator = comm.open_communicator(
                comm.resolve("test", None), transport="collective", in_flight=2, timeout=5.0
            )
            transport = communicator.transport("test")
            rows = shout(ctx.rank, number).view(torch.uint8)
            received = transport.all_to_all_v("test", rows, [1] * WORLD)
            found = torch.cat(received).view(torch.int64).view(-1, 3).tolist()
            assert found == heard(ctx.rank, number)
            if ctx.rank == number:
                communicator.abort_peers("exchange", "test", MoeError("test", "nobody hears this"))
            comm.close_communicator(communicator)
            dist.barrier()

    harness.run_world("collective", WORLD, fn)

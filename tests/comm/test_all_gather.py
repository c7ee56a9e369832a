"""One piece of data for all ranks: the exchange under tensor parallelism."""

from __future__ import annotations

import harness
import pytest
import torch
from harness import run_world

from moe_triton import ArgumentMismatchError, ArgumentValueError, PeerAbortError, comm
from moe_triton.comm import Call, MoeConfig, PackedReader, packed_bytes
from moe_triton.comm.packing import write_packed
from moe_triton.ops import steps_on
from moe_triton.topology import Topology

CONFIG = MoeConfig(Topology(2, 2), 1, 8, 4)
worlds = pytest.mark.parametrize("world", harness.WORLDS)


def call_with(**arguments) -> Call:
    cpu = torch.device("cpu")
    return Call("test_gather", CONFIG, arguments, steps_on(cpu), cpu)


def gather(communicator, call, parts, num_bytes):
    """The parts of each rank, as a list of (head, rows)."""

    def consume(received):
        actual = []
        for data in received:
            reader = PackedReader(data)
            head = reader.take((1,), torch.int32).clone()
            actual.append((head, reader.take((int(head), 3), torch.bfloat16).clone()))
        return actual

    transport = communicator.transport(call.op)
    return transport.all_gather_recv(transport.all_gather_send(call, parts, num_bytes), consume)


def parts_of(rank: int, seed: int) -> list[torch.Tensor]:
    rows = (rank + seed) % 4
    values = torch.arange(3 * rows).view(rows, 3) + 100 * rank + seed
    return [torch.tensor([rows], dtype=torch.int32), values.bfloat16()]


@worlds
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_reads_the_parts_of_all(world, size):
    def fn(ctx):
        communicator = comm.default_communicator(comm.resolve("test", ctx.ep_group, ctx.ep_rank))
        num_bytes = packed_bytes([4, 4 * 3 * 2])
        for seed in range(6):
            actual = gather(communicator, call_with(), parts_of(ctx.rank, seed), num_bytes)
            for rank, (head, rows) in enumerate(actual):
                expected = parts_of(rank, seed)
                assert torch.equal(head, expected[0])
                assert torch.equal(rows, expected[1])

    run_world(world, size, fn)


@worlds
def test_a_rank_that_rejects_is_named_and_the_next_call_works(world):
    def fn(ctx):
        communicator = comm.default_communicator(comm.resolve("test", ctx.ep_group, ctx.ep_rank))
        for seed in range(3):
            if ctx.rank == 1:
                communicator.transport("test").abort_peers(
                    "gather", "test", ArgumentValueError("test", "a", "be right", "wrong")
                )
            else:
                with pytest.raises(PeerAbortError) as caught:
                    gather(communicator, call_with(), parts_of(0, seed), 4096)
                assert caught.value.rank == 1
                assert "a must be right, got wrong" in str(caught.value)
            actual = gather(communicator, call_with(), parts_of(ctx.rank, seed), 4096)
            assert torch.equal(actual[1][1], parts_of(1, seed)[1])

    run_world(world, 3, fn)


@worlds
def test_arguments_must_agree(world):
    def fn(ctx):
        communicator = comm.default_communicator(comm.resolve("test", ctx.ep_group, ctx.ep_rank))
        with pytest.raises(ArgumentMismatchError, match="hidden"):
            gather(communicator, call_with(hidden=ctx.rank), parts_of(ctx.rank, 0), 4096)

    run_world(world, 2, fn)


def test_parts_begin_at_multiples_of_16():
    data = torch.full((64,), 7, dtype=torch.uint8)
    parts = [torch.tensor([1, 2], dtype=torch.int32), torch.empty((0, 5)), torch.tensor([[3.5]])]
    write_packed(data, parts)
    assert packed_bytes([8, 0, 4]) == 32
    reader = PackedReader(data)
    for part in parts:
        assert torch.equal(reader.take(tuple(part.shape), part.dtype), part)
    assert (data[8:16] == 7).all()
    assert (data[20:] == 7).all()


def test_a_subgroup_works_without_the_other_ranks():
    """The members only, by new numbers; the whole group in its own order is the group itself."""

    def fn(ctx):
        group = comm.resolve("test", ctx.ep_group, ctx.ep_rank)
        assert comm.subgroup(group, (0, 1, 2, 3)) is group
        if ctx.rank == 2:
            return None
        part = comm.subgroup(group, (3, 0, 1))
        assert (part.rank, part.size) == ((1, 2, None, 0)[ctx.rank], 3)
        communicator = comm.default_communicator(part)
        assert communicator is not comm.default_communicator(group)
        actual = gather(communicator, call_with(), parts_of(ctx.rank, 0), 4096)
        return [rows.tolist() for _, rows in actual]

    expected = [parts_of(rank, 0)[1].tolist() for rank in (3, 0, 1)]
    for world in harness.WORLDS:
        assert run_world(world, 4, fn) == [expected, expected, None, expected]

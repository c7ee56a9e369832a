"""Windows: how many slots, how many bytes, and the memory of all ranks as one rank sees it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_triton import ref
from moe_triton.comm.local import LocalMemory
from moe_triton.comm.memory import HOST
from moe_triton.comm.window import (
    MoeConfig,
    PeerWindows,
    bytes_ring,
    combine_slots,
    num_slots,
    union,
    window_bytes,
)
from moe_triton.layout import Ring
from moe_triton.layout.windows import DATA, PROBLEM_WORDS, RECEIVED, SENT
from moe_triton.topology import Topology

# DeepSeek-V3 on 8 ranks, 128 tokens each.
LARGE = MoeConfig(
    Topology(8, 256), 8, 7168, 128, quant="int8", with_weights=True, dtype=torch.bfloat16
)


@given(st.integers(1, 40))
def test_num_slots(in_flight):
    """A power of two, so that slots survive the wrap of epochs, and at least 2f."""
    slots = num_slots(in_flight)
    assert slots >= 2 * in_flight
    assert slots & (slots - 1) == 0
    assert slots < 4 * in_flight + 1


@pytest.mark.parametrize(
    "in_flight, in_a_row, slots", [(1, False, 1), (1, True, 2), (2, False, 4), (3, True, 8)]
)
def test_data_slots_of_combine(in_flight, in_a_row, slots):
    assert combine_slots(in_flight, in_a_row=in_a_row) == slots
    ring = LARGE.ring("combine", in_flight, in_a_row=in_a_row)
    assert (ring.slots, ring.data_slots) == (num_slots(in_flight), slots)


def test_window_memory_of_a_large_model():
    """At most 120 MiB for the worst case; fewer rows take less in proportion."""
    worst = window_bytes(LARGE)
    assert worst.total <= 120 * 2**20
    assert worst.total == worst.dispatch + worst.combine
    rows = 8 * 128 * 8 * 2 * 7168
    assert rows < worst.combine < rows + 2**20
    limited = window_bytes(dataclasses.replace(LARGE, max_rows=8 * 128))
    assert limited.combine < worst.combine / 7.9


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dispatch", "combine"])
def test_bytes_are_those_of_the_ring(kind, in_flight):
    """The data slots come last, and are as many as the ring says."""
    ring = LARGE.ring(kind, in_flight)
    assert getattr(window_bytes(LARGE, in_flight=in_flight), kind) == ring.num_bytes
    assert ring.num_bytes == ring.data_start(0) + ring.data_slots * ring.data_bytes
    assert ring.data_start(0) >= ring.slots * 8 * 16


def test_shared_ranks_have_a_capacity_of_their_own():
    config = MoeConfig(Topology(4, 4, num_shared_experts=1, num_shared_ranks=2), 2, 16, 3)
    assert config.layout.capacity == config.capacity(3) == 4 * 3 * 2
    assert config.layout.shared_capacity == config.capacity(0) == 2 * 3
    assert LARGE.layout.shared_capacity == 0


rings = st.builds(
    Ring,
    st.sampled_from([2, 4, 8]),
    st.integers(1, 99).map(lambda n: 16 * n),
    st.sampled_from([1, 2]),
    st.integers(1, 99).map(lambda n: 16 * n),
)


@given(rings, rings)
def test_the_union_holds_both(first, second):
    both = union(first, second)
    assert both.holds(first)
    assert both.holds(second)
    assert union(first, first) == first


def open_windows(world_size: int, ring: Ring, *, epoch: int = 0) -> list[PeerWindows]:
    """The windows of one process as each of its ranks sees them."""
    memory = LocalMemory()
    blocks = [memory.allocate(ring.num_bytes) for _ in range(world_size)]
    for block in blocks:
        ring.clear(block.data, world_size, epoch)
    return [
        PeerWindows(
            blocks,
            ring,
            rank,
            kind=2,
            epoch=epoch,
            problem=torch.zeros(PROBLEM_WORDS, dtype=torch.int32),
            notice=torch.zeros(1, dtype=torch.int32),
            hard=False,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("epoch", [0, 5, 2**31 - 2, -3])
def test_records_reach_every_rank(epoch):
    """Each rank's record lies in its own place at every rank, in the slot of the epoch."""
    windows = open_windows(3, bytes_ring(3, 40, 2), epoch=epoch)
    for number in range(1, 6):
        for peer in windows:
            ref.send_record(peer.steps, digest=7, status=DATA, extra=peer.steps.rank)
        expected = (epoch + number + 2**31) % 2**32 - 2**31
        for peer in windows:
            start = peer.ring.record(expected, 0)
            records = peer.blocks[peer.steps.rank].data[start : start + 3 * 16].view(torch.int32)
            assert records.view(3, 4).tolist() == [[expected, DATA, 7, rank] for rank in range(3)]
            ref.recv_records(peer.steps, digest=7, timeout=0.0)
            assert not peer.steps.problem.any()
            assert peer.steps.state[[SENT, RECEIVED]].tolist() == [expected, expected]


def test_data_slots_do_not_overlap():
    ring = bytes_ring(2, 100, 2)
    (windows, _) = open_windows(2, ring)
    for slot in range(ring.data_slots):
        data = windows.data(1, slot)
        assert len(data) == 112
        assert not data.any()
        data.fill_(slot + 1)
    assert not windows.blocks[0].data[ring.data_start(0) :].any()
    assert not windows.blocks[1].data[: ring.data_start(0)].any()


def test_which_calls_windows_serve():
    ring = bytes_ring(2, 100, 1)
    windows, _ = open_windows(2, ring)
    assert windows.serves(ring, HOST)
    assert windows.serves(bytes_ring(2, 112, 1), HOST)
    assert not windows.serves(bytes_ring(2, 113, 1), HOST)
    assert not windows.serves(ring._replace(data_slots=4), HOST)
    assert not windows.serves(ring, torch.device("cuda"))
    assert not windows.serves(ring, torch.device("meta"))


def test_windows_hold_their_own_tensors():
    windows, _ = open_windows(2, bytes_ring(2, 100, 1))
    assert windows.holds(windows.data(0, 1)[3:])
    assert not windows.holds(windows.data(1, 1)[3:])
    assert not windows.holds(torch.zeros(4))

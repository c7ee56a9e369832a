"""Layout of the windows: nothing overlaps, everything is aligned, and the sizes add up."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_triton.comm.local import LocalMemory
from moe_triton.comm.window import (
    FLAG_BYTES,
    MoeConfig,
    PeerWindows,
    WindowBytes,
    align,
    clear_flags,
    header_of,
    num_slots,
    ring_bytes,
    window_bytes,
)
from moe_triton.topology import Topology


@st.composite
def configs(draw):
    world = draw(st.integers(2, 5))
    shared_ranks = draw(st.integers(0, world - 1))
    shared = draw(st.sampled_from([n for n in (1, 2, 4) if n <= shared_ranks] or [0]))
    shared_ranks -= shared_ranks % max(shared, 1)
    experts = draw(st.integers(1, 4)) * (world - shared_ranks)
    return MoeConfig(
        Topology(world, experts, shared if shared_ranks else 0, shared_ranks),
        top_k=draw(st.integers(1, min(experts, 5))),
        hidden=draw(st.sampled_from([1, 3, 7, 8, 9, 16, 40])),
        max_tokens=draw(st.integers(0, 5)),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])),
        quant=draw(st.sampled_from([None, "int8"])),
        per_expert=draw(st.booleans()),
        with_weights=draw(st.booleans()),
        max_rows=draw(st.sampled_from([None, None, 0, 3])),
        alignment=draw(st.sampled_from([1, 4])),
        quant_return=draw(st.sampled_from([None, "int8"])),
    )


def arena_of(world: int, slot_bytes: int, in_flight: int) -> PeerWindows:
    memory = LocalMemory()
    size = ring_bytes(world, slot_bytes, in_flight)
    return PeerWindows([memory.allocate(size) for _ in range(world)], num_slots(in_flight))


def test_windows_on_a_device_are_zero_before_another_stream_writes(monkeypatch):
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("zeros"))
    monkeypatch.setattr(
        torch, "get_device_module", lambda _: SimpleNamespace(current_stream=lambda _: stream)
    )
    LocalMemory().allocate(64)
    assert waited == []
    LocalMemory().allocate(64, torch.device("meta"))
    assert waited == ["zeros"]


def distinct(views: list[torch.Tensor]) -> None:
    """Assert that no two of the views share memory."""
    for number, view in enumerate(views, 1):
        view.fill_(number)
    for number, view in enumerate(views, 1):
        assert bool((view == number).all())


@pytest.mark.parametrize(
    "value, to, aligned", [(0, 16, 0), (1, 16, 16), (16, 16, 16), (17, 16, 32), (5, 4, 8)]
)
def test_align(value, to, aligned):
    assert align(value, to) == aligned


@pytest.mark.parametrize("in_flight", range(1, 20))
def test_num_slots(in_flight):
    """Twice as many as in flight, or more, and a power of two, for the wrap of the epoch."""
    slots = num_slots(in_flight)
    assert 2 * in_flight <= slots < 4 * in_flight
    assert 2**32 % slots == 0


def test_a_layout_by_hand():
    """W 2, E 4, K 2, H 5, 3 tokens: L 2, C 6, A 12."""
    config = MoeConfig(Topology(2, 4), 2, 5, 3, with_weights=True)
    assert config.max_slot_ids == 6
    assert config.row_format.stride == 16  # 10 bytes
    layout = config.dispatch
    assert layout.header_bytes == 64 + 32  # 4 + 4 + 6 words, then 6
    assert layout.rows_start == 192
    assert layout.num_rows == 3
    assert layout.num_bytes == 192 + 3 * 16
    layout = config.combine
    assert layout.groups == (2, 3)
    assert layout.rows_start == 32
    assert layout.num_rows == 12
    assert layout.num_bytes == 32 + 12 * 16
    # Two slots with two flags of 16 bytes each.
    assert window_bytes(config) == WindowBytes(2 * (32 + 240), 2 * (32 + 224))
    assert window_bytes(config, in_flight=2) == WindowBytes(4 * (32 + 240), 4 * (32 + 224))
    assert window_bytes(config).total == 1056


@pytest.mark.parametrize(
    "options, stride, offset",
    [
        ({"hidden": 8}, 16, None),
        ({"hidden": 9}, 32, None),
        ({"hidden": 7168}, 14336, None),
        ({"hidden": 16, "quant": "int8"}, 32, 16),
        ({"hidden": 17, "quant": "int8"}, 48, 32),
        ({"hidden": 7168, "quant": "int8"}, 7184, 7168),
    ],
)
def test_rows_begin_at_multiples_of_16(options, stride, offset):
    """For 128-bit accesses; the scale of a quantised row follows it."""
    fmt = MoeConfig(Topology(2, 4), top_k=2, max_tokens=3, **options).row_format
    assert (fmt.stride, fmt.scale_offset) == (stride, offset)


def test_how_many_rows_a_rank_writes():
    """One per token; with smooth scales per expert, one per slot."""
    topology = Topology(6, 8, num_shared_experts=2, num_shared_ranks=2)
    sizes = {"top_k": 3, "hidden": 8, "max_tokens": 5, "quant": "int8"}
    assert MoeConfig(topology, **sizes).dispatch.num_rows == 5
    assert MoeConfig(topology, **sizes, per_expert=True).dispatch.num_rows == 5 * (3 + 2)


@given(configs(), st.integers(1, 3))
def test_nothing_overlaps_in_a_dispatch_window(config, in_flight):
    layout, world = config.dispatch, config.topology.world_size
    windows = arena_of(world, layout.num_bytes, in_flight)
    assert windows.capacity >= layout.num_bytes
    views = []
    for slot in range(windows.slots):
        data = windows.data(0, slot)
        headers = layout.headers(data)
        for source in range(world):
            one = header_of(headers, source)
            assert one.num_tokens.shape == (1,)
            assert one.counts.shape == (config.topology.num_experts,)
            assert one.slot_ids.shape == (config.max_slot_ids,)
            views += [one.num_tokens, one.counts, one.slot_ids]
            assert (one.weights is not None) == config.with_weights
            if one.weights is not None:
                assert one.weights.shape == one.slot_ids.shape
                assert one.weights.dtype == config.weight_dtype
                views.append(one.weights.view(torch.int32))
        rows = layout.rows(data)
        assert rows.shape == (layout.num_rows, config.row_format.stride)
        views += [row.view(torch.int32) for row in rows]
        views += flags_of(windows, slot)
    distinct(views)
    inside(windows, views)


@given(configs(), st.integers(1, 3))
def test_nothing_overlaps_in_a_combine_window(config, in_flight):
    layout, world = config.combine, config.topology.world_size
    windows = arena_of(world, layout.num_bytes, in_flight)
    assert windows.capacity >= layout.num_bytes
    views = []
    for slot in range(windows.slots):
        data = windows.data(0, slot)
        group_starts, rows = layout.group_starts(data), layout.rows(data)
        assert group_starts.shape == (config.topology.experts_per_rank, world + 1)
        assert rows.shape == (layout.num_rows, config.return_format.stride)
        for rank in range(world):
            assert layout.num_rows >= config.capacity(rank)
            assert len(group_starts) >= config.topology.num_local_experts(rank)
        views += [
            group_starts.view(-1),
            *(row.view(torch.int32) for row in rows),
            *flags_of(windows, slot),
        ]
    distinct(views)
    inside(windows, views)


def flags_of(windows: PeerWindows, slot: int) -> list[torch.Tensor]:
    """The flag records of a slot of rank 0, each as four words."""
    base = windows.blocks[0].data
    actual = []
    for source in range(len(windows.blocks)):
        offset = windows.flag_address(0, slot, source) - base.data_ptr()
        actual.append(base[offset : offset + FLAG_BYTES].view(torch.int32))
    return actual


def inside(windows: PeerWindows, views: list[torch.Tensor]) -> None:
    """Assert that the views are in the memory of rank 0, on multiples of their own alignment."""
    block = windows.blocks[0].data
    for view in views:
        offset = view.data_ptr() - block.data_ptr()
        assert view.numel() == 0 or 0 <= offset < block.numel()
        assert offset % view.itemsize == 0


@given(configs(), st.integers(1, 3))
def test_addresses_are_multiples_of_16(config, in_flight):
    world = config.topology.world_size
    for layout in (config.dispatch, config.combine):
        windows = arena_of(world, layout.num_bytes, in_flight)
        base = windows.blocks[1].data.data_ptr()
        for slot, source in itertools.product(range(windows.slots), range(world)):
            assert (windows.flag_address(1, slot, source) - base) % 16 == 0
            rows = layout.rows(windows.data(1, slot))
            assert (rows.data_ptr() - base) % 16 == 0 or rows.numel() == 0
            assert rows.stride(0) * rows.itemsize % 16 == 0
    assert config.dispatch.header_bytes % 16 == 0


@given(configs(), st.integers(1, 3))
def test_rows_of_all_ranks_as_one_tensor(config, in_flight):
    """Row r of rank d is where the layout of rank d says, whatever lies between the windows."""
    world, layout = config.topology.world_size, config.combine
    windows = arena_of(world, layout.num_bytes, in_flight)
    for slot in range(windows.slots):
        numbers = {}
        for owner in range(world):
            rows = layout.rows(windows.data(owner, slot))
            for row in range(layout.num_rows):
                numbers[owner, row] = len(numbers) % 250 + 1
                rows[row] = numbers[owner, row]
        stride = config.return_format.stride
        global_rows = windows.global_rows(slot, layout.rows_start, stride)
        for (owner, row), number in numbers.items():
            index = global_rows.origins[owner] + row * global_rows.step
            actual = torch.index_select(global_rows.rows, 0, index.reshape(1))
            assert actual.shape == (1, stride)
            assert bool((actual == number).all())


def test_windows_hold_their_own_tensors():
    windows = arena_of(2, 64, 1)
    for owner in range(2):
        for slot in range(2):
            data = windows.data(owner, slot)
            assert windows.holds(owner, data)
            assert windows.holds(owner, data[-1:])
            assert not windows.holds(1 - owner, data)
    assert not windows.holds(0, torch.empty(4))
    assert not windows.holds(0, torch.empty(0))


def test_views_are_cached_up_to_a_limit():
    """By layout, owner and slot; the cache is bounded."""
    config = MoeConfig(Topology(2, 4), 2, 8, 3)
    windows = arena_of(2, config.combine.num_bytes, 1)
    layout = config.combine
    first = windows.view(0, 0, layout, layout.rows)
    assert windows.view(0, 0, layout, layout.rows) is first
    for owner, slot, make in (
        (1, 0, layout.rows),
        (0, 1, layout.rows),
        (0, 0, layout.group_starts),
    ):
        assert windows.view(owner, slot, layout, make).data_ptr() != first.data_ptr()
    smaller = MoeConfig(Topology(2, 4), 2, 8, 2).combine
    assert windows.view(0, 0, smaller, smaller.rows).shape != first.shape
    for hidden in range(1, 3000):
        windows.view(0, 0, hidden, layout.rows)
    assert len(windows._views) < 2000


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("world", [2, 5])
def test_flags_of_new_windows(world, in_flight):
    windows = arena_of(world, 100, in_flight)
    block = windows.blocks[0]
    block.data.fill_(0x55)
    clear_flags(block, world, windows.slots, -7)
    for slot, source in itertools.product(range(windows.slots), range(world)):
        address = windows.flag_address(0, slot, source)
        assert ctypes.c_int32.from_address(address).value == -7
    for slot in range(windows.slots):
        assert bool((windows.data(0, slot) == 0x55).all())


@given(configs())
def test_windows_of_every_configuration_fit(config):
    """Equal arguments give equal sizes on all ranks, and larger ones never smaller windows."""
    taken = window_bytes(config)
    assert taken.dispatch == ring_bytes(config.topology.world_size, config.dispatch.num_bytes, 1)
    assert taken.combine == ring_bytes(config.topology.world_size, config.combine.num_bytes, 1)
    for change in ({"hidden": config.hidden + 1}, {"max_tokens": config.max_tokens + 1}):
        larger = window_bytes(dataclasses.replace(config, **change))
        assert larger.dispatch >= taken.dispatch
        assert larger.combine >= taken.combine

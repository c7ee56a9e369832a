"""Words shared by threads and processes, and the memory order of their writes."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time

import harness
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_triton.comm import atomics
from moe_triton.comm.atomics import _locked_fetch_add
from moe_triton.comm.shm import MemfdMemory

FETCH_ADDS = {"locked": _locked_fetch_add, "chosen": atomics.fetch_add}
fetch_adds = pytest.mark.parametrize("fetch_add", FETCH_ADDS.values(), ids=FETCH_ADDS)

INT32 = st.integers(-(2**31), 2**31 - 1)


def test_this_platform_orders_memory_between_processes():
    """Where torch runs on Linux, libstdc++ is there; without it, processes cannot share windows."""
    assert atomics.BETWEEN_PROCESSES
    assert atomics.fetch_add is not _locked_fetch_add


@pytest.mark.parametrize(
    "value, wrapped",
    [
        (0, 0),
        (2**31 - 1, 2**31 - 1),
        (2**31, -(2**31)),
        (2**31 + 5, -(2**31) + 5),
        (-(2**31), -(2**31)),
        (-(2**31) - 1, 2**31 - 1),
        (2**32, 0),
        (-(2**32) - 3, -3),
    ],
)
def test_wrap(value, wrapped):
    assert atomics.wrap(value) == wrapped


@given(INT32, st.integers(-(2**31), 2**31 - 1))
def test_a_difference_survives_the_wrap(epoch, steps):
    """Flags compare by their signed difference: later, equal or earlier, up to 2**31 steps."""
    assert atomics.wrap(atomics.wrap(epoch + steps) - epoch) == steps


@fetch_adds
@given(start=INT32, value=INT32)
def test_fetch_add(fetch_add, start, value):
    words = (ctypes.c_int32 * 3)(7, start, 9)
    assert fetch_add(ctypes.addressof(words) + 4, value) == start
    assert list(words) == [7, atomics.wrap(start + value), 9]


@pytest.mark.parametrize("name", FETCH_ADDS)
@given(before=INT32, after=INT32)
def test_loads_and_stores(name, before, after):
    words = (ctypes.c_int32 * 3)(7, before, 9)
    address = ctypes.addressof(words) + 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomics, "fetch_add", FETCH_ADDS[name])
        assert atomics.load_relaxed(address) == before
        assert atomics.load_acquire(address) == before
        atomics.store_release(address, after)
        assert atomics.load_acquire(address) == atomics.load_relaxed(address) == after
    assert list(words) == [7, after, 9]


@fetch_adds
def test_no_addition_is_lost_between_threads(fetch_add):
    word = ctypes.c_int32(0)
    address = ctypes.addressof(word)
    start = threading.Barrier(4)
    seen: list[list[int]] = [[] for _ in range(4)]

    def add(mine):
        start.wait()
        for _ in range(5000):
            mine.append(fetch_add(address, 1))

    threads = [threading.Thread(target=add, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert word.value == 20_000
    assert sorted(itertools.chain(*seen)) == list(range(20_000))


def test_no_addition_is_lost_between_processes():
    block = MemfdMemory().allocate(64)
    handle, times = block.handle, 20_000

    def add(ctx):
        data = MemfdMemory().open(handle).data
        address = data.data_ptr()
        atomics.fetch_add(address, 1)
        while atomics.load_acquire(address) < ctx.world_size:
            time.sleep(0)  # they begin together
        for _ in range(times):
            atomics.fetch_add(address + 4, 1)

    harness.run_world("symmetric", 2, add)
    assert block.data.view(torch.int32)[:2].tolist() == [2, 2 * times]
    block.release()


def test_data_written_before_a_flag_are_seen_after_it():
    """A mailbox between two processes; it fails at once with the flag before the data."""
    block = MemfdMemory().allocate(4096)
    handle, rounds = block.handle, 3000

    def play(ctx):
        data = MemfdMemory().open(handle).data
        address = data.data_ptr()
        box = data[64 + 1024 * ctx.rank :][:1024]
        other = data[64 + 1024 * (1 - ctx.rank) :][:1024]
        wrong = 0
        for number in range(1, rounds + 1):
            box.fill_(number % 251)
            atomics.store_release(address + 4 * ctx.rank, number)
            while atomics.load_relaxed(address + 4 * (1 - ctx.rank)) < number:
                time.sleep(0)
            assert atomics.load_acquire(address + 4 * (1 - ctx.rank)) == number
            wrong += not bool((other == number % 251).all())
            # Neither may write again before both have read.
            atomics.store_release(address + 32 + 4 * ctx.rank, number)
            while atomics.load_acquire(address + 32 + 4 * (1 - ctx.rank)) < number:
                time.sleep(0)
        return wrong

    assert harness.run_world("symmetric", 2, play) == [0, 0]
    block.release()

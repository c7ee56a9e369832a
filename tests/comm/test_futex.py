"""Sleeping on a word: woken at once by the writer, and asleep by other means without a futex."""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
import threading
import time

import harness
import pytest
import torch

from moe_triton import comm
from moe_triton.comm import atomics, futex, polling
from moe_triton.comm.polling import Backoff
from moe_triton.comm.shm import MemfdMemory


def word(value: int = 0) -> tuple[ctypes.c_int32, int]:
    """A word of this process, and its address."""
    memory = ctypes.c_int32(value)
    return memory, ctypes.addressof(memory)


def test_this_platform_has_futexes():
    _, address = word(7)
    assert futex.wait(address, 8, 30.0)  # at once: the word is not 8


@pytest.mark.parametrize("value", [0, -1, -(2**31), 2**31 - 1])
def test_a_wait_without_a_wake_ends_in_time(value):
    _, address = word(value)
    began = time.monotonic()
    assert futex.wait(address, value, 0.05)
    assert 0.04 < time.monotonic() - began < 5


def store_and_wake(address: int, value: int) -> None:
    atomics.store_release(address, value)
    futex.wake(address)


def test_a_write_wakes_all_threads_that_wait():
    memory, address = word()
    done = []

    def sleep():
        while atomics.load_acquire(address) == 0:
            assert futex.wait(address, 0, 30.0)
        done.append(memory.value)

    threads = [threading.Thread(target=sleep, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    store_and_wake(address, 5)
    for thread in threads:
        thread.join(10)
    assert done == [5, 5, 5]


def test_processes_wake_each_other():
    """Turns through shared memory; a missed wake-up would cost 30 s."""
    block = MemfdMemory().allocate(64)
    handle, turns = block.handle, 1000

    def play(ctx):
        data = MemfdMemory().open(handle).data
        address = data.data_ptr()
        for turn in range(turns):
            while (seen := atomics.load_acquire(address)) < 2 * turn + ctx.rank:
                assert futex.wait(address, seen, 30.0)
            store_and_wake(address, 2 * turn + ctx.rank + 1)

    harness.run_world("shm", 2, play)
    assert atomics.load_acquire(block.data.data_ptr()) == 2 * turns
    block.release()


def test_the_number_of_the_system_call(monkeypatch):
    machine = platform.machine()
    for name, number in {"x86_64": 202, "aarch64": 98, "riscv64": None}.items():
        monkeypatch.setattr(platform, "machine", lambda name=name: name)
        assert futex._number() == number
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(ctypes, "sizeof", lambda kind: 4)  # a 32-bit program
    assert futex._number() is None
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert futex._number() is None


def without_number(patch):
    """Another system, or a processor whose system calls are not in the table."""
    patch.setattr(futex, "_FUTEX", None)


def refused(number):
    """A kernel or a sandbox that refuses the system call."""

    def patch_calls(patch):
        def refuse(*arguments):
            ctypes.set_errno(number)
            return -1

        patch.setattr(futex, "_wait", refuse)
        patch.setattr(futex, "_wake", refuse)

    return patch_calls


FALLBACKS = {
    "unknown": without_number,
    "ENOSYS": refused(errno.ENOSYS),
    "EPERM": refused(errno.EPERM),
}
fallbacks = pytest.mark.parametrize("take_away", FALLBACKS.values(), ids=FALLBACKS)


@fallbacks
def test_without_a_futex_a_wait_sleeps(take_away, monkeypatch):
    take_away(monkeypatch)
    _memory, address = word()
    assert not futex.wait(address, 0, 30.0)
    futex.wake(address)
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    backoff = Backoff(30.0)
    for _ in range(100):
        backoff.pause_on(address, 0)
    assert naps[-1] == polling._LONGEST_SLEEP
    assert sorted(naps) == naps


@fallbacks
@pytest.mark.parametrize("world", ["local", "shm"])
def test_without_a_futex_ranks_exchange_all_the_same(take_away, world):
    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            take_away(patch)
            for number in range(20):
                rows = torch.full((2, 4), 10 * ctx.rank + number)
                received, _ = comm.all_to_all_v(rows, [1, 1], group=ctx.ep_group, rank=ctx.ep_rank)
                assert received[:, 0].tolist() == [number, 10 + number]

    harness.run_world(world, 2, fn)


@pytest.mark.parametrize("spin", [False, True])
def test_a_pause_ends_when_the_word_changes(spin):
    memory, address = word(1)
    backoff = Backoff(30.0, spin=spin)
    began = time.monotonic()
    while memory.value == 1:
        backoff.pause_on(address, 1)
        if time.monotonic() - began > 0.05:
            memory.value = 2
    for _ in range(100):
        backoff.pause_on(address, 1)  # has changed already: none of them sleeps
    assert time.monotonic() - began < 5

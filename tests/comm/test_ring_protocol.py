"""The ring protocol between ranks of one process: handshakes, aborts, drains and limits.

Most tests step through an interleaving by hand, all ranks in one thread; only waits that block need
a thread of their own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import threading
import time

import pytest
import shm_names
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_triton import (
    ArgumentMismatchError,
    BrokenGroupError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    SequenceError,
    UnavailableError,
    ref,
)
from moe_triton.comm import atomics, futex, window_opener
from moe_triton.comm.control_blocks import ControlBlocks, control_bytes
from moe_triton.comm.groups import Group
from moe_triton.comm.local import LocalMemory
from moe_triton.comm.memory import Memory
from moe_triton.comm.ring_protocol import RingProtocol, Terms
from moe_triton.comm.shm import PosixMemory
from moe_triton.comm.window import bytes_ring
from moe_triton.layout.windows import DATA, RECEIVED

OP = "test_op"
PAYLOAD = 16  # bytes from each rank to each rank


def connect(
    world_size: int,
    *,
    in_flight: int = 1,
    timeout: float = 5.0,
    pids: list[int] | None = None,
    memory: Memory | None = None,
) -> list[RingProtocol]:
    """The protocol objects of all ranks, as a communicator makes them."""
    memory, store = memory or LocalMemory(), dist.HashStore()
    own = [memory.allocate(control_bytes(in_flight)) for _ in range(world_size)]
    return [
        RingProtocol(
            Group("test", rank, world_size, store, in_process=True),
            "test",
            memory,
            [memory.open(block.handle) for block in own],
            pids,
            in_flight=in_flight,
            timeout=timeout,
        )
        for rank in range(world_size)
    ]


def payload(source: int, target: int, number: int) -> torch.Tensor:
    """The bytes from ``source`` to ``target`` in an operation, unique."""
    return torch.tensor([source, target, number, ~number], dtype=torch.int32).view(torch.uint8)


def handshake(protocol: RingProtocol, kind: str, epoch: int, slot_bytes: int = 0, **arguments):
    """The handshake of a call with room for ``payload`` or for ``slot_bytes``."""
    ring = bytes_ring(protocol.size, slot_bytes or protocol.size * PAYLOAD, protocol.in_flight)
    terms = Terms.of(ring, torch.device("cpu"), *arguments.items())
    return protocol.handshake(kind, epoch, OP, terms, ref), terms.digest


def setup(protocol: RingProtocol, number: int = 0, *, kind="exchange", slot_bytes=0, **arguments):
    """Show ``payload(.., number)`` to all ranks, as the transports do; returns the epoch."""
    epoch = protocol.acquire(kind, OP)
    try:
        windows, digest = handshake(protocol, kind, epoch, slot_bytes, **arguments)
        parts = [payload(protocol.rank, target, number) for target in range(protocol.size)]
        slot = windows.data(protocol.rank, protocol.slot(epoch))
        slot[: protocol.size * PAYLOAD] = torch.cat(parts)
        ref.send_record(windows.steps, digest=digest, status=DATA)
    except BaseException as error:
        protocol.abort(kind, epoch, error)
        raise
    protocol.signal(kind, epoch)
    return epoch


def teardown(protocol: RingProtocol, epoch: int, number: int = 0, *, kind="exchange") -> None:
    """Wait, and assert that all payloads and records are there."""
    state = protocol._kinds[kind]
    operation = state.in_flight.get(epoch)
    protocol.wait(kind, epoch, OP)
    windows, slot, start = operation.windows, protocol.slot(epoch), protocol.rank * PAYLOAD
    data = [
        windows.data(source, slot)[start : start + PAYLOAD].clone()
        for source in range(protocol.size)
    ]
    ref.recv_records(windows.steps, digest=operation.digest, timeout=0.0)
    assert not windows.steps.problem.any()
    assert windows.steps.state[RECEIVED] == epoch
    protocol.release(kind, epoch)
    expected = [payload(source, protocol.rank, number) for source in range(protocol.size)]
    assert torch.equal(torch.cat(data), torch.cat(expected))


def exchange(protocol: RingProtocol, number: int = 0, **options) -> None:
    """A whole operation."""
    kind = options.get("kind", "exchange")
    teardown(protocol, setup(protocol, number, **options), number, kind=kind)


def together(protocols: list[RingProtocol], fn) -> list:
    """``fn(protocol)`` on all ranks at once: results in their order, exceptions as results."""
    results: list = [None] * len(protocols)

    def run(index):
        try:
            results[index] = fn(protocols[index])
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(protocols))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "hung"
    return results


def agreed(world_size: int, **options) -> list[RingProtocol]:
    """Connected ranks that have done one operation, so that no setup waits any more."""
    protocols = connect(world_size, **options)
    assert together(protocols, exchange) == [None] * world_size
    return protocols


def error_of(call, *args, **options) -> Exception:
    """The exception of a call, without its traceback, which would keep the call's memory alive."""
    try:
        call(*args, **options)
    except Exception as error:
        return error.with_traceback(None)
    raise AssertionError("raised nothing")


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_no_more_setups_than_may_be_in_flight(in_flight):
    protocols = agreed(2, in_flight=in_flight)
    epochs = [[setup(protocol, i) for protocol in protocols] for i in range(in_flight)]
    for protocol in protocols:
        error = error_of(setup, protocol)
        assert type(error) is SequenceError
        assert f"at most {in_flight} exchange operations may be in flight" in str(error)
    # The error changes nothing: the operations in flight and the next one complete.
    for i in range(in_flight):
        for protocol, epoch in zip(protocols, epochs[i], strict=True):
            teardown(protocol, epoch, i)
    assert together(protocols, lambda c: exchange(c, 9)) == [None, None]


def test_aborted_calls_count_as_in_flight():
    """The oldest epoch in flight limits the setups, not the number of epochs.

    A rank that rejects a call beside one in flight is not a step ahead of its peers by that: its
    next setup would write into a slot that they may still have to read.
    """
    first, second = agreed(2, in_flight=2)
    one = [setup(protocol, 1) for protocol in (first, second)]
    two = setup(second, 2)
    first.abort_peers("exchange", OP, MoeError(OP, "wrong"))
    assert "may be in flight" in str(error_of(setup, first, 3))
    first.abort_peers("exchange", OP, MoeError(OP, "cannot take part"))
    teardown(first, one[0], 1)
    teardown(second, one[1], 1)
    assert "wrong" in str(error_of(teardown, second, two, 2))
    assert together([first, second], lambda c: exchange(c, 3)) == [None, None]


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("with_window", [False, True])
def test_a_rank_aborts_many_calls_before_its_peers_make_the_first(in_flight, with_window):
    """Each peer reads the reason of each abort: a rank waits before it reuses a message."""
    make = agreed if with_window else connect
    protocols = make(3, in_flight=in_flight)
    reasons = [f"reason {i}" for i in range(9)]
    started = threading.Event()

    def abort(protocol):
        for i, reason in enumerate(reasons):
            if i > in_flight:
                started.set()
            protocol.abort_peers("exchange", OP, MoeError(OP, reason))

    def call(protocol):
        # The aborting rank must not get this far alone; the wait gives it time to try.
        assert not started.wait(0.2)
        return [str(error_of(exchange, protocol, i)) for i in range(len(reasons))]

    results = together(protocols, lambda c: abort(c) if c.rank == 1 else call(c))
    for rank in (0, 2):
        assert results[rank] == [f"{OP}: rank 1 rejected this call: {why}" for why in reasons]
    assert together(protocols, exchange) == [None] * 3


def test_a_rank_whose_peer_aborted_releases_its_new_window():
    """Later peers read the reason and do not open released memory."""
    first, second, third = agreed(3)
    third.abort_peers("exchange", OP, MoeError(OP, "wrong"))
    for protocol in (first, second):
        error = error_of(exchange, protocol, slot_bytes=4096)
        assert str(error) == f"{OP}: rank 2 rejected this call: wrong"
    protocols = [first, second, third]
    assert together(protocols, lambda c: exchange(c, 1, slot_bytes=4096)) == [None] * 3


@pytest.mark.parametrize("new", [False, True], ids=["flag", "handshake"])
def test_a_flag_set_at_the_last_moment_counts(new, monkeypatch):
    """A peer sends its last flag and dies, or this rank is stopped while it waits."""
    first, second = agreed(2)
    monkeypatch.setattr("moe_triton.comm.peer_wait._LIVENESS_INTERVAL", 0.0)

    options = {"word": "new"} if new else {}
    epoch = 2
    sent = threading.Thread(target=lambda: exchange(second, 1, **options))
    asked = []

    def sends_and_dies(control, rank):
        if control is second._control or asked:
            return False
        asked.append(rank)
        sent.start()
        while new and second._control.handshake(1, "exchange", epoch) is None:
            time.sleep(1e-3)  # until the peer has posted its handshake
        if not new:
            sent.join(10)
        return True

    monkeypatch.setattr(ControlBlocks, "is_gone", sends_and_dies)
    exchange(first, 1, **options)
    assert asked == [1]
    sent.join(10)


def test_a_wait_that_timed_out_can_be_tried_again():
    first, second = agreed(2, timeout=0.1)
    epoch = setup(first, 1)
    error = error_of(teardown, first, epoch, 1)
    assert isinstance(error, PeerTimeoutError)
    assert error.ranks == (1,)
    assert "rank 1 did not come within 0.1 s" in str(error)
    for call in (exchange, lambda c: c.raise_if_broken(OP), lambda c: exchange(c, kind="combine")):
        began = time.monotonic()
        assert isinstance(error_of(call, first), BrokenGroupError)
        assert time.monotonic() - began < 0.05
    assert isinstance(error_of(teardown, first, epoch, 1), PeerTimeoutError)
    exchange(second, 1)
    teardown(first, epoch, 1)
    assert together([first, second], exchange) == [None, None]


def test_another_wait_does_not_repair_the_group():
    first, second = agreed(2, timeout=0.1)
    assert together([first, second], lambda c: exchange(c, kind="combine")) == [None, None]
    late, other = setup(first, 1), setup(first, 2, kind="combine")
    setup(second, 2, kind="combine")
    assert isinstance(error_of(teardown, first, late, 1), PeerTimeoutError)
    teardown(first, other, 2, kind="combine")
    assert isinstance(error_of(setup, first, kind="combine"), BrokenGroupError)


def test_a_setup_that_timed_out_cannot_be_repeated():
    """Its caller has no operation to tear down, so the epochs differ for good."""
    first, second = agreed(2, in_flight=2, timeout=0.1)
    epoch = setup(first, 1)
    assert isinstance(error_of(setup, first, 2, word="new"), PeerTimeoutError)
    setup(second, 1)
    teardown(first, epoch, 1)
    assert isinstance(error_of(setup, first, 3), BrokenGroupError)


def begin_at(protocols: list[RingProtocol], epoch: int) -> None:
    """Let all ranks continue as if ``epoch`` had been the last operation, in every slot."""
    for protocol in protocols:
        for kind, state in protocol._kinds.items():
            state.last = epoch
            for slot in range(protocol.slots):
                address = protocol._control.flag_address(protocol.rank, kind, slot)
                ctypes.c_int32.from_address(address).value = epoch


WRAPS = pytest.mark.parametrize("start", [2**31 - 4, -4], ids=["to negative", "through zero"])


@WRAPS
@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_epochs_wrap(start, in_flight):
    protocols = connect(3, in_flight=in_flight)
    begin_at(protocols, start)

    def run(protocol):
        pending = []
        for number in range(20):
            if len(pending) == in_flight:
                teardown(protocol, *pending.pop(0))
            pending.append((setup(protocol, number), number))
        for epoch, number in pending:
            teardown(protocol, epoch, number)
        return pending[-1][0]

    last = (start + 20 + 2**31) % 2**32 - 2**31
    assert together(protocols, run) == [last] * 3


@WRAPS
def test_windows_grow_while_epochs_wrap(start):
    """The flags of a new window must look old, also to a negative epoch."""
    protocols = connect(2)
    begin_at(protocols, start)

    def run(protocol):
        for number in range(10):
            exchange(protocol, number, slot_bytes=1000 * (number + 1))

    assert together(protocols, run) == [None, None]


@WRAPS
def test_aborts_while_epochs_wrap(start):
    protocols = connect(2)
    begin_at(protocols, start)

    def run(protocol):
        for number in range(10):
            if number % 3 == 1 and protocol.rank == 1:
                protocol.abort_peers("exchange", OP, MoeError(OP, f"reason {number}"))
            elif number % 3 == 1:
                assert f"reason {number}" in str(error_of(exchange, protocol, number))
            else:
                exchange(protocol, number)

    assert together(protocols, run) == [None, None]


def test_memory_that_cannot_be_allocated(monkeypatch):
    """All ranks learn the reason and keep using the old windows."""
    protocols = agreed(3)
    allocate = LocalMemory.allocate

    def refuse(memory, *sizes):
        if memory is protocols[1]._opener.memory:
            raise OSError(28, "No space left on device")
        return allocate(memory, *sizes)

    protocols[1]._opener.memory = LocalMemory()
    monkeypatch.setattr(LocalMemory, "allocate", refuse)
    results = together(protocols, lambda c: exchange(c, slot_bytes=4096))
    assert isinstance(results[1], UnavailableError)
    slot = 3 * 16 + 4096
    for part in ("exchange windows", "2 slots of 4096", f"{2 * slot} bytes", "No space left"):
        assert part in str(results[1])
    for rank in (0, 2):
        assert isinstance(results[rank], PeerAbortError)
        assert results[rank].rank == 1
        assert "No space left" in results[rank].reason
    assert together(protocols, exchange) == [None] * 3
    monkeypatch.undo()
    assert together(protocols, lambda c: exchange(c, slot_bytes=4096)) == [None] * 3


def test_operations_torn_down_in_the_wrong_order():
    protocols = agreed(2, in_flight=2)
    epochs = [[setup(protocol, i) for protocol in protocols] for i in range(2)]
    wrong = f"{OP}: exchange operations must be torn down in the order of their setup, and once, "
    error = error_of(teardown, protocols[0], epochs[1][0])
    assert str(error) == wrong + "got number 3 while number 2 is the oldest in flight"
    for i in range(2):
        for protocol, epoch in zip(protocols, epochs[i], strict=True):
            teardown(protocol, epoch, i)
    error = error_of(protocols[0].wait, "exchange", epochs[0][0], OP)
    assert str(error) == wrong + "got number 2 while none is in flight"


class Hooked:
    """A rank's provider that calls a function before it opens a peer's block."""

    def __init__(self, memory: Memory, before_open) -> None:
        self.allocate, self._open, self._before_open = memory.allocate, memory.open, before_open

    def open(self, handle):
        self._before_open()
        return self._open(handle)


def refuse_to_open() -> None:
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("with_window", [False, True])
def test_windows_that_one_rank_cannot_open(with_window, in_flight):
    """No rank uses them, all learn the reason at once, and a later call can open them."""
    protocols = (agreed if with_window else connect)(3, in_flight=in_flight, timeout=20)
    memory = protocols[1]._opener.memory
    protocols[1]._opener.memory = Hooked(memory, refuse_to_open)
    for _ in range(3):
        before = [protocol._kinds["exchange"].windows for protocol in protocols]
        began = time.monotonic()
        results = together(protocols, lambda c: exchange(c, slot_bytes=4096))
        assert time.monotonic() - began < 5
        assert isinstance(results[1], UnavailableError)
        for part in ("exchange windows of rank 0", "opened by rank 1", "Too many open files"):
            assert part in str(results[1])
        for rank in (0, 2):
            assert isinstance(results[rank], PeerAbortError)
            assert results[rank].rank == 1
            assert "Too many open files" in results[rank].reason
        assert [protocol._kinds["exchange"].windows for protocol in protocols] == before
        if with_window:
            assert together(protocols, exchange) == [None] * 3
    protocols[1]._opener.memory = memory
    assert together(protocols, lambda c: exchange(c, slot_bytes=4096)) == [None] * 3
    assert together(protocols, lambda c: exchange(c, 1)) == [None] * 3


def test_windows_whose_owner_has_freed_them():
    """The error is like that of a missing file."""
    protocols = connect(2)
    allocate = LocalMemory.allocate

    def allocate_and_forget(*sizes):
        block = allocate(protocols[1]._opener.memory, *sizes)
        block.handle["number"] = -1
        return block

    protocols[1]._opener.memory = Hooked(protocols[1]._opener.memory, lambda: None)
    protocols[1]._opener.memory.allocate = allocate_and_forget
    results = together(protocols, exchange)
    assert isinstance(results[0], UnavailableError)
    assert isinstance(results[0].__cause__, FileNotFoundError)
    assert isinstance(results[1], PeerAbortError)


def test_a_rank_that_fails_after_all_have_opened_the_windows():
    """Ranks that poll later must count it as one that has opened them."""
    protocols = connect(3)
    failed = threading.Event()
    look = protocols[2]._opener._await_opened

    def look_late(*args):
        assert failed.wait(10)
        return look(*args)

    protocols[2]._opener._await_opened = look_late

    def run(protocol):
        if protocol.rank != 0:
            return exchange(protocol)
        epoch = protocol.acquire("exchange", OP)
        handshake(protocol, "exchange", epoch)
        protocol.abort("exchange", epoch, ZeroDivisionError("in the middle"))
        failed.set()
        return None

    results = together(protocols, run)
    assert results[0] is None
    for rank in (1, 2):
        assert isinstance(results[rank], PeerAbortError)
        assert "in the middle" in results[rank].reason
    assert together(protocols, lambda c: exchange(c, 1)) == [None] * 3


def test_new_windows_lose_their_names_within_the_call():
    before = shm_names.names()
    protocols = connect(3, memory=PosixMemory())
    for protocol in protocols:
        for block in protocol._control.blocks:
            block.release()
    epochs = together(protocols, setup)
    assert not shm_names.left(before)
    for protocol, epoch in zip(protocols, epochs, strict=True):
        teardown(protocol, epoch)


def test_a_rank_that_fails_leaves_the_names_of_its_peers():
    """A third rank may be about to open them; its error must not depend on timing."""
    protocols = connect(3, memory=PosixMemory())
    for protocol in protocols:
        for block in protocol._control.blocks:
            block.release()
    before, refused = shm_names.names(), threading.Event()

    def refuse_and_tell():
        refused.set()
        refuse_to_open()

    def open_late():
        assert refused.wait(10)
        time.sleep(0.1)

    protocols[1]._opener.memory = Hooked(protocols[1]._opener.memory, refuse_and_tell)
    protocols[2]._opener.memory = Hooked(protocols[2]._opener.memory, open_late)
    results = together(protocols, exchange)
    assert isinstance(results[1], UnavailableError)
    for rank in (0, 2):
        assert isinstance(results[rank], PeerAbortError)
        assert results[rank].rank == 1
    assert not shm_names.left(before)


def test_peers_remove_the_names_of_a_lost_rank():
    protocols = connect(2, memory=PosixMemory(), timeout=0.3)
    for protocol in protocols:
        for block in protocol._control.blocks:
            block.release()
    before, over = shm_names.names(), threading.Event()
    stalled = Hooked(protocols[1]._opener.memory, lambda: over.wait(10))
    protocols[1]._opener.memory = stalled
    thread = threading.Thread(target=lambda: error_of(exchange, protocols[1]), daemon=True)
    thread.start()
    assert error_of(exchange, protocols[0]).ranks == (1,)
    assert not shm_names.left(before)
    over.set()
    thread.join(10)


def test_a_failed_release_does_not_stop_the_others():
    first, second = connect(2)
    blocks, released = first._control.blocks, []

    def refuse():
        raise PermissionError(1, "not permitted")

    blocks[0].hide, blocks[1].hide = lambda: released.append(0), refuse
    with pytest.raises(PermissionError):
        window_opener.release_blocks(blocks)
    assert released == [0]
    first._control._pidfds.update({0: os.open(os.devnull, os.O_RDONLY), 1: -1})
    with pytest.raises(OSError, match="Bad file descriptor"):
        first.close()
    first.close()
    second.close()


@pytest.mark.parametrize("word", ["old", "new"])
def test_a_rank_that_has_left_is_not_waited_for(word):
    protocols = connect(3, timeout=60)
    assert together(protocols, lambda c: exchange(c, word="old")) == [None] * 3
    protocols[1].close()
    began = time.monotonic()
    errors = together([protocols[0], protocols[2]], lambda c: exchange(c, word=word))
    assert time.monotonic() - began < 5
    for error in errors:
        assert isinstance(error, PeerTimeoutError)
        assert error.ranks == (1,)


def test_a_rank_may_leave_after_its_last_operation():
    protocols = agreed(3)
    epochs = [setup(protocol, 1) for protocol in protocols]
    teardown(protocols[1], epochs[1], 1)
    protocols[1].close()
    for rank in (0, 2):
        teardown(protocols[rank], epochs[rank], 1)


def test_the_process_of_a_peer_that_is_already_gone():
    """It has no descriptor, so the time-out finds it."""
    child = subprocess.Popen(["true"])
    child.wait()
    protocols = connect(2, timeout=0.1, pids=[child.pid, child.pid])
    assert error_of(exchange, protocols[0]).ranks == (1,)


def combine(protocols: list[RingProtocol], number: int, *, aborting: bool = False) -> None:
    """A combine of all ranks, one after the other; rank 1 may abort it."""
    epochs = []
    for protocol in protocols:
        if aborting and protocol.rank == 1:
            protocol.abort_peers("combine", OP, MoeError(OP, "wrong"))
            continue
        epochs.append((protocol, setup(protocol, number, kind="combine")))
        protocol.claim_combine_slot(epochs[-1][1])
    for protocol, epoch in epochs:
        if aborting:
            assert isinstance(error_of(teardown, protocol, epoch, kind="combine"), PeerAbortError)
        else:
            teardown(protocol, epoch, number, kind="combine")


def free(protocols: list[RingProtocol]) -> bool:
    """Whether the data slot of combine is free, on all ranks alike."""
    (answer,) = {protocol.combine_slot_free for protocol in protocols}
    return answer


def test_when_the_combine_slot_is_free():
    """After a whole dispatch that all ranks began after their last combine."""
    protocols = agreed(2)
    for kind in ("dispatch", "combine"):
        assert together(protocols, lambda c, k=kind: exchange(c, kind=k)) == [None, None]
    assert free(protocols)  # nothing has claimed it
    combine(protocols, 1)
    assert not free(protocols)
    exchanges = [setup(protocol, 2, kind="dispatch") for protocol in protocols]
    assert not free(protocols)  # not torn down
    for protocol, epoch in zip(protocols, exchanges, strict=True):
        teardown(protocol, epoch, 2, kind="dispatch")
    assert free(protocols)
    combine(protocols, 3, aborting=True)
    assert free(protocols)  # nobody reads rows of an aborted combine
    combine(protocols, 4)
    combine(protocols, 5, aborting=True)
    assert not free(protocols)  # those of the one before


def test_a_dispatch_that_began_before_the_combine_ended_frees_nothing():
    first, second = protocols = agreed(2)
    for kind in ("dispatch", "combine"):
        assert together(protocols, lambda c, k=kind: exchange(c, kind=k)) == [None, None]
    combines = [setup(protocol, 1, kind="combine") for protocol in protocols]
    for protocol, epoch in zip(protocols, combines, strict=True):
        protocol.claim_combine_slot(epoch)
        assert protocol.borrowable_windows() is None
    dispatches = [setup(protocol, 2, kind="dispatch") for protocol in protocols]
    for protocol, epoch in zip(protocols, combines, strict=True):
        teardown(protocol, epoch, 1, kind="combine")
    for protocol, epoch in zip(protocols, dispatches, strict=True):
        teardown(protocol, epoch, 2, kind="dispatch")
    assert not free(protocols)
    assert first.borrowable_windows() is second.borrowable_windows() is None
    assert together(protocols, lambda c: exchange(c, kind="dispatch")) == [None, None]
    assert free(protocols)
    assert first.borrowable_windows() is first._kinds["combine"].windows


def test_an_aborted_dispatch_frees_nothing():
    """Its culprit has not seen the flags of its peers."""
    protocols = agreed(2)
    for kind in ("dispatch", "combine"):
        assert together(protocols, lambda c, k=kind: exchange(c, kind=k)) == [None, None]
    combine(protocols, 1)
    epoch = setup(protocols[0], 2, kind="dispatch")
    protocols[1].abort_peers("dispatch", OP, MoeError(OP, "wrong"))
    assert isinstance(error_of(teardown, protocols[0], epoch, kind="dispatch"), PeerAbortError)
    assert not free(protocols)


def test_an_overrun_is_an_error():
    """A flag ahead of the epoch: the slot was written again before it was read."""
    first, second = agreed(2)
    epoch = setup(first, 1)
    setup(second, 1)
    flag = first._control.flag_address(1, "exchange", epoch)
    ctypes.c_int32.from_address(flag).value = epoch + first.slots
    error = error_of(teardown, first, epoch, 1)
    assert isinstance(error, BrokenGroupError)
    numbers = f"rank 1 is at operation {epoch + first.slots}, this rank at {epoch}"
    assert numbers in str(error)
    assert "call recover() on all ranks" in str(error)
    assert isinstance(error_of(exchange, first), BrokenGroupError)


def test_a_known_call_wakes_its_ranks_once(monkeypatch):
    """The last flag does; no other flag, and no handshake once all slots have its text."""
    protocols = agreed(3)
    for number in range(protocols[0].slots):
        assert together(protocols, lambda c, n=number: exchange(c, n)) == [None] * 3
    wakes: list[int] = []
    wake = futex.wake
    monkeypatch.setattr(futex, "wake", lambda address: (wakes.append(address), wake(address)))
    for number in range(1, 4):
        assert together(protocols, lambda c, n=number: exchange(c, n)) == [None] * 3
    epochs = [protocols[0].last_epochs()["exchange"] - ago for ago in (2, 1, 0)]
    assert wakes == [protocols[0]._control.bell("exchange", epoch) for epoch in epochs]


def test_a_wait_tells_when_each_flag_was_posted():
    first, *others = agreed(3)
    epoch = setup(first, 1)
    results: list[list[float]] = []
    thread = threading.Thread(target=lambda: results.append(first.wait("exchange", epoch, OP)))
    thread.start()
    for protocol in others:
        time.sleep(0.05)
        setup(protocol, 1)
    thread.join()
    (waited,) = results
    assert waited[0] == 0.0
    assert waited[2] - 0.05 >= waited[1] > 0.0


def test_flags_are_acquired_where_a_load_does_not(monkeypatch):
    """As on 64-bit Arm."""
    protocols = agreed(2)
    acquired: list[int] = []
    load = atomics.load_acquire
    monkeypatch.setattr(atomics, "LOADS_ACQUIRE", False)
    monkeypatch.setattr(atomics, "load_acquire", lambda at: (acquired.append(at), load(at))[1])
    epochs = [setup(protocol, 1) for protocol in protocols]
    for protocol, epoch in zip(protocols, epochs, strict=True):
        acquired.clear()
        teardown(protocol, epoch, 1)
        flags = [protocol._control.flag_address(rank, "exchange", epoch) for rank in range(2)]
        assert acquired[:2] == flags


def test_ranks_that_disagree_on_known_arguments():
    """The digest in the flags shows the mismatch, and the texts show the argument."""
    protocols = connect(3)
    for width in (1, 2):
        assert together(protocols, lambda c, w=width: exchange(c, width=w)) == [None] * 3
    for _ in range(3):
        errors = together(protocols, lambda c: exchange(c, width=2 if c.rank == 1 else 1))
        for rank, error in enumerate(errors):
            assert isinstance(error, ArgumentMismatchError)
            assert error.argument == "width"
            own, other = (2, 1) if rank == 1 else (1, 2)
            assert f"got {own} on this rank and {other} on rank" in str(error)
        assert together(protocols, lambda c: exchange(c, width=2)) == [None] * 3


@pytest.mark.parametrize("known", ["on no rank", "on the culprit", "on its peers"])
def test_ranks_that_disagree_on_new_arguments(known):
    protocols = connect(3)
    if known != "on no rank":
        width = 2 if known == "on the culprit" else 1
        assert together(protocols, lambda c: exchange(c, width=width)) == [None] * 3
    errors = together(protocols, lambda c: exchange(c, width=2 if c.rank == 1 else 1))
    for error in errors:
        assert isinstance(error, ArgumentMismatchError)
        assert error.argument == "width"
    for width in (1, 2):
        assert together(protocols, lambda c, w=width: exchange(c, width=w)) == [None] * 3


def test_an_argument_that_only_one_rank_gives():
    protocols = connect(2)
    errors = together(protocols, lambda c: exchange(c, **({"extra": 1} if c.rank else {})))
    assert [error.argument for error in errors] == ["extra", "extra"]
    assert "got None on this rank and 1 on rank 1" in str(errors[0])
    assert "got 1 on this rank and None on rank 0" in str(errors[1])


def test_a_long_reason_is_cut_and_long_arguments_fit():
    protocols = connect(2)
    protocols[0].abort_peers("exchange", OP, MoeError(OP, "é" * 5000))
    error = error_of(exchange, protocols[1])
    assert 400 < len(error.reason) < 5000
    assert set(error.reason[:400]) == {"é"}
    assert together(protocols, lambda c: exchange(c, text="x" * 2000)) == [None, None]


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of all ranks: some grow the windows, disagree, abort or are late."""

    kind: str = "exchange"
    slot_bytes: int = 0
    word: str = "a"
    aborting: frozenset[int] = frozenset()
    dissenting: frozenset[int] = frozenset()
    failing: frozenset[int] = frozenset()
    late: tuple[float, float, float] = (0, 0, 0)

    def wrong(self, rank: int) -> set[type]:
        """What a rank may raise; empty if the operation must succeed."""
        if rank in self.aborting:
            return {NoneType}
        culprits = self.aborting | self.failing | self.dissenting
        if rank in self.failing and not self.aborting and not self.dissenting:
            return {ZeroDivisionError}
        kinds: set[type] = set()
        if self.aborting or self.failing:
            kinds.add(PeerAbortError)
        if rank in self.failing:
            kinds.add(ZeroDivisionError)
        if self.dissenting:
            kinds.add(ArgumentMismatchError)
        return kinds if culprits else set()


NoneType = type(None)
some_ranks = st.sampled_from([(), (), (), (), (), (0,), (1,), (2,), (0, 2)]).map(frozenset)
delays = st.sampled_from([0, 0, 0, 0.001, 0.003])
steps = st.builds(
    Step,
    kind=st.sampled_from(["exchange", "combine"]),
    slot_bytes=st.sampled_from([0, 0, 0, 100, 1000, 5000]),
    word=st.sampled_from(["a", "a", "b", "c"]),
    aborting=some_ranks,
    dissenting=some_ranks,
    failing=some_ranks,
    late=st.tuples(delays, delays, delays),
)


def run_step(protocol: RingProtocol, number: int, step: Step) -> None:
    time.sleep(step.late[protocol.rank])
    if protocol.rank in step.aborting:
        protocol.abort_peers(step.kind, OP, MoeError(OP, f"aborted in {number}"))
        return
    word = step.word + "!" * (protocol.rank in step.dissenting)
    slot_bytes = max(step.slot_bytes, protocol.size * PAYLOAD)
    if protocol.rank not in step.failing:
        exchange(protocol, number, kind=step.kind, slot_bytes=slot_bytes, word=word)
        return
    epoch = protocol.acquire(step.kind, OP)
    try:
        handshake(protocol, step.kind, epoch, slot_bytes, word=word)
        _ = 1 / 0
    except BaseException as error:
        protocol.abort(step.kind, epoch, error)
        raise


@settings(suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=1, max_size=25), st.sampled_from([1, 1, 2, 3]))
def test_any_sequence_of_operations(sequence, in_flight):
    """Aborts, disagreements, failures, growth and delays in any order.

    A correct step delivers exactly; a faulty step raises on every rank, within the step.
    """
    protocols = connect(3, in_flight=in_flight, timeout=20)

    def run(protocol):
        outcomes = []
        for number, step in enumerate(sequence):
            try:
                run_step(protocol, number, step)
                outcomes.append(None)
            except Exception as error:
                outcomes.append(error.with_traceback(None))
        return outcomes

    for rank, outcomes in enumerate(together(protocols, run)):
        assert not isinstance(outcomes, Exception)
        for number, (step, error) in enumerate(zip(sequence, outcomes, strict=True)):
            allowed = step.wrong(rank) or {NoneType}
            assert type(error) in allowed, f"rank {rank}, step {number}: {error!r}, {step}"
            if isinstance(error, PeerAbortError) and error.rank in step.aborting:
                assert error.reason == f"aborted in {number}"
            elif isinstance(error, PeerAbortError) and error.rank in step.failing:
                assert "division" in error.reason

"""Channels between ranks of one process: what is agreed, aborted, owed and refused.

Most tests step through an interleaving by hand, all ranks in one thread: only waits for what has
not come need a thread of their own.
"""

from __future__ import annotations

import threading

import pytest
import torch

from moe_triton import MoeError
from moe_triton.comm.channel import Channel, control_bytes
from moe_triton.comm.groups import Group
from moe_triton.comm.local import LocalMemory

OP = "test_op"
PAYLOAD = 16  # bytes from each rank to each rank


def connect(world_size: int, *, in_flight: int = 1, timeout: float = 5.0) -> list[Channel]:
    """Channels of all ranks, as an endpoint would make them."""
    memory = LocalMemory()
    own = [memory.allocate(control_bytes(in_flight)) for _ in range(world_size)]
    return [
        Channel(
            Group("test", rank, world_size, None, in_process=True),
            memory,
            [memory.open(block.handle) for block in own],
            None,
            in_flight=in_flight,
            timeout=timeout,
        )
        for rank in range(world_size)
    ]


def payload(source: int, target: int, number: int) -> torch.Tensor:
    """What ``source`` sends to ``target`` in an operation; differs from all others."""
    return torch.tensor([source, target, number, ~number], dtype=torch.int32).view(torch.uint8)


def setup(channel: Channel, number: int = 0, *, kind="exchange", slot_bytes=None, **arguments):
    """Send ``payload(.., number)`` to all ranks, as the transports do; returns the epoch."""
    needed = channel.size * PAYLOAD
    epoch = channel.begin(kind, OP)
    try:
        arena = channel.agree(kind, epoch, OP, arguments, slot_bytes or needed)
        for target in range(channel.size):
            start = channel.rank * PAYLOAD
            data = arena.data(target, channel.slot(epoch))
            data[start : start + PAYLOAD] = payload(channel.rank, target, number)
    except BaseException as error:
        channel.abort(kind, epoch, error)
        raise
    channel.signal(kind, epoch)
    return epoch


def teardown(channel: Channel, epoch: int, number: int = 0, *, kind="exchange") -> None:
    """Wait, and assert that all payloads are there."""
    ring = channel._rings[kind]
    arena = ring.in_flight[epoch].arena if epoch in ring.in_flight else None
    channel.wait(kind, epoch, OP)
    data = arena.data(channel.rank, channel.slot(epoch))[: channel.size * PAYLOAD].clone()
    channel.finish(kind, epoch)
    expected = [payload(source, channel.rank, number) for source in range(channel.size)]
    assert torch.equal(data, torch.cat(expected))


def exchange(channel: Channel, number: int = 0, **options) -> None:
    """A whole operation."""
    kind = options.get("kind", "exchange")
    teardown(channel, setup(channel, number, **options), number, kind=kind)


def together(channels: list[Channel], fn) -> list:
    """``fn(channel)`` on all ranks at once: results in their order, exceptions as results."""
    results: list = [None] * len(channels)

    def run(index):
        try:
            results[index] = fn(channels[index])
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(channels))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "hung"
    return results


def agreed(world_size: int, **options) -> list[Channel]:
    """Connected ranks that have done one operation, so that no setup waits any more."""
    channels = connect(world_size, **options)
    assert together(channels, exchange) == [None] * world_size
    return channels


def error_of(call, *args, **options) -> Exception:
    """What a call raises; without its traceback, which would keep the call's memory alive."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the caller looks at it)
        call(*args, **options)
    return caught.value.with_traceback(None)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_no_more_setups_than_may_be_in_flight(in_flight):
    channels = agreed(2, in_flight=in_flight)
    epochs = [[setup(channel, i) for channel in channels] for i in range(in_flight)]
    for channel in channels:
        error = error_of(setup, channel)
        assert type(error) is MoeError
        assert f"at most {in_flight} exchange operations may be in flight" in str(error)
    # Refusing costs nothing: the operations in flight are complete, and the next one too.
    for i in range(in_flight):
        for channel, epoch in zip(channels, epochs[i], strict=True):
            teardown(channel, epoch, i)
    assert together(channels, lambda c: exchange(c, 9)) == [None, None]


def test_calls_that_ended_early_do_not_let_setups_run_ahead():
    """The ring holds f operations that are not torn down: the oldest counts, not their number.

    A rank that rejects a call beside one in flight is not a step ahead of its peers by that: its
    next setup would write into a slot that they may still have to read.
    """
    first, second = agreed(2, in_flight=2)
    one = [setup(channel, 1) for channel in (first, second)]
    two = setup(second, 2)
    first.reject("exchange", OP, MoeError(OP, "wrong"))
    assert "may be in flight" in str(error_of(setup, first, 3))
    first.reject("exchange", OP, MoeError(OP, "cannot be told now"))
    teardown(first, one[0], 1)
    teardown(second, one[1], 1)
    assert "wrong" in str(error_of(teardown, second, two, 2))
    assert together([first, second], lambda c: exchange(c, 3)) == [None, None]

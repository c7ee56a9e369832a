"""Windows as between devices: the host does not wait, kernels poll, and errors come in later calls.

Processes run the interpreted kernels over the stand-in for torch's symmetric memory. A look at a
flag costs the interpreter a core, so that figures and small time-outs mean nothing here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from symmetric_memory import asynchronous

from moe_triton import (
    ArgumentMismatchError,
    ArgumentTypeError,
    BrokenGroupError,
    ExpertParallel,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    comm,
    testing,
)
from moe_triton.comm import PackedReader
from moe_triton.comm.ring_protocol import RingProtocol
from moe_triton.layout.windows import EPOCH
from moe_triton.ops import steps_on

VICTIM = 1
SIZES = {"num_experts": 12, "top_k": 2, "hidden": 16, "max_tokens": 6}
TIMEOUT = 2.0  # seconds
CPU = torch.device("cpu")


def _connected(ctx, *, fn):
    """``fn(ctx)`` with a process group of torch's, which symmetric memory needs."""
    store = dist.PrefixStore("process group", ctx.store)
    dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=ctx.world_size)
    with asynchronous():
        return fn(ctx)


def make(**options) -> ExpertParallel:
    return ExpertParallel(None, **{**SIZES, "transport": "symmetric", "timeout": 120.0, **options})


def inputs(rank: int, seed: int, tokens: int | None = None):
    draw = random.Random(1000 * seed + rank)
    count = draw.randrange(SIZES["max_tokens"] + 1) if tokens is None else tokens
    number = 100 * seed + rank
    x = testing.tokens(count, SIZES["hidden"], torch.bfloat16, seed=number)
    ids = testing.routing_uniform(count, SIZES["num_experts"], SIZES["top_k"], seed=number)
    return x, ids, testing.weights(count, SIZES["top_k"], seed=number)


def expected(x, ids, weights) -> torch.Tensor:
    """Expert e adds e to its rows."""
    total = torch.zeros(x.shape)
    for slot in range(SIZES["top_k"]):
        y = (x.float() + ids[:, slot, None]).to(x.dtype)
        total = total + y.float() * weights[:, slot, None]
    return total.to(x.dtype)


def layer(ep: ExpertParallel, seed: int, *, in_place: bool = False, tokens: int | None = None):
    """A dispatch, the experts, a combine; the sum and what it should be."""
    batch = inputs(ep.rank, seed, tokens)
    received = ep.dispatch(*batch)
    numbers = torch.tensor(ep.local_experts).repeat_interleave(received.tokens_per_expert)
    rows = len(numbers)
    y = ep.output_rows(received.handle) if in_place else torch.full_like(received.x, 7)
    y[:rows] = (received.x[:rows].float() + numbers[:, None]).to(y.dtype)
    return ep.combine(y, received.handle), expected(*batch)


def rounds(ep: ExpertParallel, seeds) -> None:
    for seed in seeds:
        out, wanted = layer(ep, seed, in_place=seed % 3 == 0)
        assert torch.equal(out, wanted), f"wrong in round {seed}"


def bytes_for_all_ranks(ctx) -> None:
    """Gathers and all-to-alls have records of their own: a rank that is late is waited for."""
    world = ctx.world_size
    communicator = comm.default_communicator(comm.resolve("test", None))
    call = comm.exchange_call("test", world, steps_on(CPU), CPU)
    for late in range(2):
        if ctx.rank == late:
            time.sleep(0.3)
        mine = [rank + ctx.rank for rank in range(world)]
        x = torch.arange(sum(mine)) + 100 * ctx.rank
        received, counts = comm.all_to_all_v(x, mine)
        assert counts == [rank + ctx.rank for rank in range(world)]
        assert received.tolist() == [
            100 * rank + sum(range(rank, rank + ctx.rank)) + row
            for rank in range(world)
            for row in range(rank + ctx.rank)
        ]
        rows, counts = comm.all_to_all_v(x, torch.tensor(mine), capacity=2 * world + 3)
        assert counts.tolist() == [rank + ctx.rank for rank in range(world)]
        assert torch.equal(rows[: len(received)], received)
        if ctx.rank == late:
            time.sleep(0.3)
        part = torch.full((3,), ctx.rank + 10 * late)
        transport = communicator.transport("test")
        pending = transport.all_gather_send(call, [part], 64)
        found = transport.all_gather_recv(
            pending, lambda slots: [PackedReader(s).take((3,), torch.int64)[0] for s in slots]
        )
        assert [int(value) for value in found] == [rank + 10 * late for rank in range(world)]
    assert communicator.transport_name == "symm_mem"


def an_abort_comes_in_a_later_call(ctx, ep) -> None:
    """All ranks break, then recover together."""
    x, ids, weights = inputs(ctx.rank, 0)
    if ctx.rank == VICTIM:
        failure(lambda: ep.dispatch(x.double(), ids, weights), ArgumentTypeError)
        failure(ep.check, BrokenGroupError)
    else:
        received = ep.dispatch(x, ids, weights)
        assert not received.tokens_per_expert.any()
        assert not received.offsets.any()
        error = failure(ep.check, PeerAbortError)
        assert error.rank == VICTIM
        assert "x must be" in error.reason
    failure(ep.check, BrokenGroupError)
    ep.recover()
    rounds(ep, range(2))


def exact_sizes_raise_in_the_same_call(ctx) -> None:
    """The host waits for the counts, and so learns of the abort."""
    with make(exact=True) as ep:
        rounds(ep, range(1))
        x, ids, weights = inputs(ctx.rank, 0)
        if ctx.rank == 0:
            failure(lambda: ep.dispatch(x.double(), ids, weights), ArgumentTypeError)
        else:
            failure(lambda: ep.dispatch(x, ids, weights), PeerAbortError)


def ranks_disagree_on_known_arguments(ctx) -> None:
    """No handshake is read: the digests in the records differ."""
    with make(quant="int8") as ep:
        x, ids, weights = inputs(ctx.rank, 0, tokens=4)
        factors = torch.ones(SIZES["num_experts"], SIZES["hidden"])
        for scales in (None, factors, None):
            ep.dispatch(x, ids, weights, scales=scales)
        ep.dispatch(x, ids, weights, scales=factors if ctx.rank else None)
        error = failure(ep.check, ArgumentMismatchError)
        assert error.argument == "scales"


def a_late_rank_and_one_that_is_ahead(ctx) -> None:
    """Both break the group; recover() repairs it, as no process has ended."""
    dist.barrier()
    with make(timeout=TIMEOUT) as ep:
        rounds(ep, range(1))
        dist.barrier()
        if ctx.rank == VICTIM:
            ctx.store.wait(["named 0", "named 2"])
        else:
            error = failure(lambda: rounds_of_any_data(ep), PeerTimeoutError)
            assert error.ranks == (VICTIM,)
            ctx.store.set(f"named {ctx.rank}", "1")
        recover(ep)
        rounds(ep, range(1))
        dist.barrier()
        if ctx.rank == 0:
            forge(ep, ahead=2)
            error = failure(lambda: rounds_of_any_data(ep), BrokenGroupError)
            assert "rank 1 is at operation" in str(error)
        dist.barrier()


def everything(ctx) -> tuple[int, ...]:
    bytes_for_all_ranks(ctx)
    with make() as ep:
        assert ep.transport == "symm_mem"
        rounds(ep, range(4))
        an_abort_comes_in_a_later_call(ctx, ep)
    exact_sizes_raise_in_the_same_call(ctx)
    ranks_disagree_on_known_arguments(ctx)
    a_late_rank_and_one_that_is_ahead(ctx)
    return until_a_loss(ctx, point="after its record of combine")


def test_rounds_and_faults():
    """One start of the processes for all of them; the last one kills a rank."""
    with testing.start_processes(3, functools.partial(_connected, fn=everything)) as ranks:
        for rank in (0, 2):
            assert ranks.result(rank, 120.0) == (VICTIM,)


def soak(ctx, *, number: int) -> None:
    draw = random.Random(ctx.rank)
    with make() as ep:
        for seed in range(number):
            if draw.random() < 0.1:
                time.sleep(draw.random() * 0.05)
            rounds(ep, [seed])
        ep.check()


@pytest.mark.full
def test_two_hundred_rounds_of_four_ranks():
    """Every third in place; ranks are late at times."""
    work = functools.partial(_connected, fn=functools.partial(soak, number=200))
    with testing.start_processes(4, work) as ranks:
        ranks.results(900.0)


# Losses. A rank is lost where it would call a method for the first time from the third round on.

POINTS = {
    "before its handshake": (RingProtocol, "handshake", "dispatch"),
    "after its record of dispatch": (RingProtocol, "signal", "dispatch"),
    "before its rows are received": (RingProtocol, "wait", "dispatch"),
    "before combine": (RingProtocol, "acquire", "combine"),
    "after its record of combine": (RingProtocol, "signal", "combine"),
    "before its sums": (RingProtocol, "wait", "combine"),
}


def arm(owner, name: str, kind: str) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(self, *args, **options):
        if args[0] == kind:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **options)

    setattr(owner, name, wrapper)


def until_a_loss(ctx, *, point):
    dist.barrier()
    ep = make(timeout=TIMEOUT)
    rounds(ep, range(2))
    if ctx.rank == VICTIM:
        arm(*POINTS[point])
    error = failure(lambda: rounds_of_any_data(ep), PeerTimeoutError)
    with pytest.raises(BrokenGroupError, match="recover"):
        ep.check()
    with pytest.raises(BrokenGroupError, match="recover"):
        ep.dispatch(*inputs(ctx.rank, 0))
    return error.ranks


def rounds_of_any_data(ep: ExpertParallel) -> None:
    """After a loss the results are garbage until a call notices it."""
    for seed in range(100):
        layer(ep, seed)


def failure(call, kind: type[MoeError]) -> MoeError:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.with_traceback(None)


@pytest.mark.full
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_rank_is_named(point):
    """By all survivors, in the next call; nothing moves afterwards."""
    work = functools.partial(_connected, fn=functools.partial(until_a_loss, point=point))
    with testing.start_processes(3, work) as ranks:
        for rank in (0, 2):
            assert ranks.result(rank, 120.0) == (VICTIM,)


def recover(ep: ExpertParallel) -> None:
    for _ in range(20):
        with contextlib.suppress(PeerTimeoutError):
            return ep.recover()
    raise AssertionError("the ranks do not find each other")


def forge(ep: ExpertParallel, ahead: int) -> None:
    """Let rank 1 seem to be further than it may be."""
    windows = ep._exchange.communicator._connected._protocol._kinds["dispatch"].windows
    epoch = int(windows.steps.state[0]) + 1
    start = windows.ring.record(epoch, VICTIM)
    record = windows.blocks[0].data[start : start + 16].view(torch.int32)
    record[EPOCH] = epoch + ahead

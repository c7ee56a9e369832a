"""Do windows between processes work on this device? Checks for a machine that is lent for minutes.

    rendezvous  2 processes: windows open, and a round is right
    rounds      2 and 4 processes, random sizes and stragglers: every sum, bit by bit
    faults      an abort is heard by all, a killed rank is named, and the device works on
    graphs      2 processes replay a captured layer between eager calls
    streams     2 ranks of one process on streams of their own, at the same time

The processes share one device, which its driver slices in time: no figure means anything here. On a
CPU the same parts run over shared memory, and a replay is another call.

    moe-triton bench device [PART ...] [--device cuda] [--rounds 200] [--transport symmetric]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import random
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

from .. import (
    ArgumentTypeError,
    ExpertParallel,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    set_backend,
    testing,
)
from . import layer_cases, output
from .models import Shape

SHAPE = Shape("small", 256, 12, 4)  # divides over 2, 3 and 4 ranks
TOKENS = 12  # of a rank, at most
_START = 60.0  # seconds, for processes to start
_TIMEOUT = 20.0  # seconds; of the part that kills a rank, a tenth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of these checks."""
    add = parser.add_argument
    add("part", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--device", help="by default a GPU where PyTorch sees one")
    add("--backend", help="cpu, interpret, ...; by default that of the device")
    add("--rounds", type=int, default=200, help="of each part (default: 200)")
    add("--transport", default="symmetric", choices=("symmetric", "shm", "collective", "auto"))


def run(arguments: argparse.Namespace) -> int:
    """Run the parts; returns 1 if one fails."""
    unknown = set(arguments.part) - PARTS.keys()
    if unknown:
        arguments.error(f"PART must be in {[*PARTS]}, got {sorted(unknown)}")
    device = arguments.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    failed = 0
    if arguments.backend is not None:
        set_backend(arguments.backend)
    parts = arguments.part or [*PARTS]
    with output.progress(len(parts)) as announce:
        for name in parts:
            announce(name)
            options = {"device": device, "backend": arguments.backend}
            options |= {"rounds": arguments.rounds, "transport": arguments.transport}
            start = time.monotonic()
            try:
                said = PARTS[name](options)
            except Exception as error:  # noqa: BLE001 - the next part may say more
                failed = 1
                print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
            else:
                print(f"passed  {name} in {time.monotonic() - start:.1f} s: {said}", flush=True)
    return failed


Options = dict[str, Any]


def _layer(ctx: testing.RankContext, options: Options) -> ExpertParallel:
    return _layer_of(ctx, ctx.ep_group, options, _TIMEOUT)


def _layer_of(
    ctx: testing.RankContext, group: str | None, options: Options, timeout: float
) -> ExpertParallel:
    if options["backend"] is not None:
        set_backend(options["backend"])
    device = torch.device(options["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return ExpertParallel(
        group,
        rank=ctx.ep_rank,
        num_experts=SHAPE.experts,
        top_k=SHAPE.top_k,
        hidden=SHAPE.hidden,
        max_tokens=TOKENS,
        device=device,
        transport=cast("Any", options["transport"]),
        timeout=timeout,
    )


def _inputs(ep: ExpertParallel, tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    return layer_cases.drawn(SHAPE, tokens, torch.device(ep.device), seed)


def _round(ep: ExpertParallel, inputs: tuple[torch.Tensor, ...]) -> None:
    """Identity experts: each sum is the token times its weights."""
    received = ep.dispatch(*inputs)
    out = ep.combine(received.x, received.handle)
    _finish(ep)
    layer_cases.check_sums(out, inputs[0], inputs[2], None)


def _finish(ep: ExpertParallel) -> None:
    """Wait for the device, and raise what it has found."""
    if torch.device(ep.device).type != "cpu":
        torch.accelerator.synchronize(ep.device)
    ep.check()


def _rendezvous(options: Options) -> str:
    found = testing.run_processes(2, functools.partial(_one_round, options=options))
    return f"{len(found)} processes over {found[0]} on {options['device']}"


@torch.no_grad()
def _one_round(ctx: testing.RankContext, options: Options) -> str:
    with _layer(ctx, options) as ep:
        _round(ep, _inputs(ep, TOKENS, ctx.rank))
        return str(ep.transport)


def _rounds(options: Options) -> str:
    for world in (2, 4):
        testing.run_processes(world, functools.partial(_random_rounds, options=options))
    return f"{options['rounds']} rounds of 2 and of 4 processes"


@torch.no_grad()
def _random_rounds(ctx: testing.RankContext, options: Options) -> None:
    draw = random.Random(ctx.rank)
    with _layer(ctx, options) as ep:
        for number in range(options["rounds"]):
            if draw.random() < 0.05:
                time.sleep(draw.random() * 0.05)
            _round(ep, _inputs(ep, draw.randrange(TOKENS + 1), 1000 * number + ctx.rank))


def _faults(options: Options) -> str:
    testing.run_processes(2, functools.partial(_abort, options=options))
    timeout = _TIMEOUT / 10
    with testing.start_processes(3, _until_killed, args=(options, timeout)) as ranks:
        running = [f"running {rank}" for rank in range(3)]
        try:
            ranks.store.wait(running, dt.timedelta(seconds=_START))
        except RuntimeError:
            ranks.results(timeout=1.0)  # raises the cause
            raise
        ranks.kill(1)
        named = [ranks.result(rank, timeout=20 * timeout) for rank in (0, 2)]
    if any(1 not in culprits for culprits in named):
        raise AssertionError(f"rank 1 was killed, and its peers name {named}")
    return f"an abort is heard by all, and the peers of a killed rank name {named}"


@torch.no_grad()
def _abort(ctx: testing.RankContext, options: Options) -> None:
    """A rank rejects its arguments: the other hears of it, and the next round is right."""
    with _layer(ctx, options) as ep:
        x, ids, weights = _inputs(ep, TOKENS, ctx.rank)
        _round(ep, (x, ids, weights))
        heard: type[MoeError] | None = None
        try:
            ep.dispatch(x if ctx.rank else x.double(), ids, weights)
            _finish(ep)
        except MoeError as error:
            heard = type(error)
        if heard is not (PeerAbortError if ctx.rank else ArgumentTypeError):
            raise AssertionError(f"a dtype was wrong on rank 0, and rank {ctx.rank} had {heard}")
        ep.recover()  # where the host did not wait, an abort breaks the group
        _round(ep, (x, ids, weights))


@torch.no_grad()
def _until_killed(ctx: testing.RankContext, options: Options, timeout: float) -> tuple[int, ...]:
    """The ranks that the error names."""
    store = dist.PrefixStore("process group", ctx.store)  # symmetric memory needs a process group
    dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=ctx.world_size)
    ep = _layer_of(ctx, None, options, timeout)
    inputs = _inputs(ep, TOKENS, ctx.rank)
    _round(ep, inputs)
    ctx.store.set(f"running {ctx.rank}", "1")
    end = time.monotonic() + 15 * timeout
    while time.monotonic() < end:
        try:
            _round(ep, inputs)
        except PeerTimeoutError as error:
            # The device still computes.
            if float(torch.ones(4, device=ep.device).sum()) != 4:
                raise AssertionError("the device is lost") from error
            return error.ranks
    return ()


def _graphs(options: Options) -> str:
    testing.run_processes(2, functools.partial(_replays, options=options))
    return f"{options['rounds']} replays between eager calls"


@torch.no_grad()
def _replays(ctx: testing.RankContext, options: Options) -> None:
    with _layer(ctx, options) as ep:
        x, ids, weights = static = _inputs(ep, TOKENS, ctx.rank)
        _round(ep, static)

        def call() -> torch.Tensor:
            received = ep.dispatch(x, ids, weights)
            return ep.combine(received.x, received.handle)

        replay, out = _captured(call) if x.is_cuda else (None, torch.empty(0))
        for number in range(options["rounds"]):
            fresh = _inputs(ep, TOKENS, 1000 * number + ctx.rank)
            for target, source in zip(static, fresh, strict=True):
                target.copy_(source)
            if replay is None:
                out = call()
            else:
                replay()
            layer_cases.check_sums(out, x, weights, None)
            if number % 10 == 0:
                _round(ep, fresh)


def _captured(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):  # every slot of the ring
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def _streams(options: Options) -> str:
    local = options | {"transport": "auto"}
    work = functools.partial(_on_a_stream, options=local)
    testing.run_local(2, work, device=options["device"])
    return f"{options['rounds']} rounds of 2 ranks"


@torch.no_grad()
def _on_a_stream(ctx: testing.RankContext, options: Options) -> None:
    with contextlib.ExitStack() as scope:
        if ctx.device.type == "cuda":
            scope.enter_context(torch.cuda.stream(torch.cuda.Stream(ctx.device)))
        ep = scope.enter_context(_layer(ctx, options))
        for number in range(options["rounds"]):
            _round(ep, _inputs(ep, TOKENS, 1000 * number + ctx.rank))


PARTS: dict[str, Callable[[Options], str]] = {
    "rendezvous": _rendezvous,
    "rounds": _rounds,
    "faults": _faults,
    "graphs": _graphs,
    "streams": _streams,
}

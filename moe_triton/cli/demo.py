"""``moe-triton demo``: an MoE layer over many processes, compared with the dense layer in one."""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist

from .. import ref
from ..errors import MoeError
from ..expert_parallel import Dispatched, ExpertParallel
from ..testing import RankContext, WorkerDiedError, run_processes
from . import demo_report
from .demo_layer import Dense, Layer, dense, rank_experts, replicated_expert
from .demo_report import PHASES, RankResult, Verdict
from .terminal import Terminal, plural, positive

_FORMATS: dict[str, str | None] = {"bf16": None, "int8": "int8"}
_ROUNDS = 5
_TIMEOUT = 300.0  # seconds; many ranks may share few cores
# Rounding to 254 steps per row adds 0.8 % of noise (root mean square) to normal values, and SwiGLU
# at most doubles it.
_NOISE_LIMIT = 0.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("--world-size", type=positive, default=8, metavar="W", help="processes (default: 8)")
    add("--tokens", type=positive, default=128, metavar="T", help="of each rank (default: 128)")
    add("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    add(
        "--transport",
        choices=("auto", "shm", "collective"),
        default="shm",
        help="shm: shared memory (default); collective: torch.distributed over gloo",
    )


# On the ranks.


def make_experts(layer: Layer, ctx: RankContext) -> None:
    """Create the experts of a rank, which the rounds take from the cache."""
    rank_experts(layer, ctx.rank)
    if not layer.shared_ranks:
        replicated_expert(layer)


def run_rounds(layer: Layer, quant: str | None, rounds: int, ctx: RankContext) -> RankResult:
    """Run the layer once to warm up, then time ``rounds`` rounds."""
    x = layer.tokens(ctx.rank)
    ids, weights = layer.gate(x)
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    outs = []
    with ExpertParallel(
        ctx.ep_group,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        hidden=layer.hidden,
        max_tokens=layer.num_tokens,
        quant=cast("Any", quant),
        shared_experts=layer.topology.num_shared_experts,
        shared_ranks=layer.shared_ranks,
        exact=True,
        timeout=_TIMEOUT,
    ) as ep:
        for _ in range(1 + rounds):
            with _clock(seconds["dispatch"]):
                recv = ep.dispatch(x, ids, weights)
            with _clock(seconds["experts"]):
                y = _run_experts(layer, ctx.rank, recv)
                local = None
                if not layer.shared_ranks:
                    local = replicated_expert(layer)(x.float()).bfloat16()
            with _clock(seconds["combine"]):
                outs.append(ep.combine(y, recv.handle, shared_expert_x=local))
        assert ep.traffic is not None
        assert ep.transport is not None
        return RankResult(
            outs[0],
            all(torch.equal(out, outs[0]) for out in outs),
            recv.tokens_per_expert.tolist(),
            {phase: values[1:] for phase, values in seconds.items()},
            ep.traffic,
            ep.window_bytes.total,
            ep.transport,
        )


def _run_experts(layer: Layer, rank: int, recv: Dispatched) -> torch.Tensor:
    """[n, H] bf16: the output of each row's expert."""
    y = torch.empty(recv.x.shape, dtype=torch.bfloat16)
    ends = recv.tokens_per_expert.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    for expert, start, end in zip(rank_experts(layer, rank), starts, ends, strict=True):
        rows = recv.x[start:end].float()
        if recv.scales is not None:
            rows *= recv.scales[start:end, None]
        y[start:end] = expert(rows)
    return y


@contextlib.contextmanager
def _clock(seconds: list[float]) -> Iterator[None]:
    """Append the seconds that this rank takes after a barrier."""
    dist.barrier()
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


# In the parent.


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 0 if all results are right, else 1."""
    layer = Layer(arguments.world_size, arguments.tokens, arguments.seed)
    terminal = Terminal()
    start = time.monotonic()

    def progress(text: str) -> None:
        clock = terminal.styled(f"[{time.monotonic() - start:4.1f} s]", "dim")
        terminal.line(f"{clock} {text}")

    def wrong(text: str) -> int:
        terminal.line(f"{terminal.styled('WRONG', 'bad')}  {text}")
        return 1

    demo_report.describe(terminal, layer, arguments.transport)
    try:
        results, verdicts, loads = _compute(layer, arguments.transport, progress)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 (the verdict must be the last line)
        if not isinstance(error, (MoeError, WorkerDiedError)):
            traceback.print_exc()
        rank = getattr(error, "failed_rank", None)
        where = "" if rank is None else f" on rank {rank}"
        text = str(error).removesuffix(f" (on rank {rank})")
        return wrong(f"{type(error).__name__}{where}: {text}".replace("\n", " "))
    terminal.line()
    demo_report.show_loads(terminal, layer, loads)
    terminal.line()
    demo_report.show_table(terminal, results, verdicts)
    terminal.line()
    problems = [f"{name}: {text}" for name, v in verdicts.items() for text in v.problems]
    for problem in problems:
        terminal.wrapped("", problem, indent=0)
    seconds = f"{time.monotonic() - start:.1f} s"
    ranks = plural(layer.world_size, "rank")
    if problems:
        bad = " and ".join(name for name, verdict in verdicts.items() if verdict.problems)
        return wrong(f"{bad} on {ranks}, see above; {seconds}")
    good = terminal.styled("OK", "good")
    terminal.line(
        f"{good}  {' and '.join(verdicts)} on {ranks} agree with the dense layer; {seconds}"
    )
    return 0


def _compute(
    layer: Layer, transport: str, progress: Callable[[str], None]
) -> tuple[dict[str, list[RankResult]], dict[str, Verdict], list[list[int]]]:
    """Run everything.

    Returns:
        The ranks' results by format, the verdicts by format, and for each rank the rows that its
        experts should receive.
    """
    world = layer.world_size
    progress("the dense layer in this process, as reference")
    x = torch.cat([layer.tokens(rank) for rank in range(world)])
    ids, weights = layer.gate(x)
    full = x.float()
    codes, scales = ref.quantize_rows(x)
    rounded = codes.float() * scales[:, None]
    # A shared expert on every rank gets the tokens unquantised.
    shared = [full, rounded if layer.shared_ranks else full]
    with _one_thread():
        both = dense(layer, [full, rounded], shared, ids, weights)
    references = dict(zip(_FORMATS, both, strict=True))
    loads = _expected_loads(layer, ids)
    progress(f"{plural(world, 'process', 'processes')}, each creating its experts")
    run_processes(world, functools.partial(make_experts, layer), transport=transport)
    results, verdicts = {}, {}
    for name, quant in _FORMATS.items():
        progress(f"{name}: gate, dispatch, experts, combine; {1 + _ROUNDS} rounds")
        results[name] = run_processes(
            world, functools.partial(run_rounds, layer, quant, _ROUNDS), transport=transport
        )
        verdicts[name] = _judge(results[name], references[name], references["bf16"].out, loads)
    return results, verdicts, loads


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread; on a busy machine more threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _expected_loads(layer: Layer, ids: torch.Tensor) -> list[list[int]]:
    """Rows for each expert of each rank, counted independently of the library."""
    topology = layer.topology
    counts = ids.flatten().bincount(minlength=layer.num_experts).tolist()
    loads = []
    for rank in range(layer.world_size):
        if topology.is_shared_rank(rank):
            sources = sum(topology.serves(rank, source) for source in range(layer.world_size))
            loads.append([sources * layer.num_tokens])
        else:
            loads.append([counts[number] for number in topology.local_experts(rank)])
    return loads


def _judge(
    results: list[RankResult], reference: Dense, unquantised: torch.Tensor, loads: list[list[int]]
) -> Verdict:
    """Compare the ranks' results with the dense layer."""
    out = torch.cat([result.out for result in results]).float()
    error = (out - reference.out).abs()
    noise = float((out - unquantised).norm() / unquantised.norm())
    problems = []
    # Not `error > tolerance`, which is False for NaN.
    wrong = (~(error <= reference.tolerance)).nonzero()
    if len(wrong):
        num_tokens = len(results[0].out)
        rank, token = divmod(int(wrong[0, 0]), num_tokens)
        problems.append(
            f"{len(wrong[:, 0].unique())} of {len(out)} tokens differ from the dense layer by "
            f"more than rounding, first token {token} of rank {rank}"
        )
    if not noise <= _NOISE_LIMIT:
        problems.append(f"{noise:.1%} from the unquantised layer, limit {_NOISE_LIMIT:.0%}")
    for rank, (result, load) in enumerate(zip(results, loads, strict=True)):
        if result.tokens_per_expert != load:
            pairs = enumerate(zip(result.tokens_per_expert, load, strict=True))
            expert, (received, expected) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
            problems.append(
                f"rank {rank} received {received} rows for its expert {expert}, expected {expected}"
            )
    unstable = [str(rank) for rank, result in enumerate(results) if not result.repeats]
    if unstable:
        problems.append(f"other bits in a later round on rank {', '.join(unstable)}")
    share = float((error / reference.tolerance).max())
    return Verdict(float(error.max()), share, noise, _NOISE_LIMIT, problems)

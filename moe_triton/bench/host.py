"""How much host time do dispatch and combine take, launches apart?

Every launch of a kernel is replaced by nothing, and the ranks, driven by one thread, take the path
of a device: fixed shapes, and no host read. So a machine without a GPU can tell what Python costs;
what Triton's launches cost comes on top, on each machine. Times are those of the thread's CPU
clock, in microseconds of a rank: the median over samples of the mean of a few calls, and the
least, which other processes disturb least. Below stand the five functions with the most time of
their own.

``--scale`` shows how that time grows with the ranks: 8 tokens a rank, top-8, hidden 64, on the
reference, whose copies of that few bytes hardly count. Results are checked first.

    moe-triton bench host [--ranks 1 8] [--tokens 8]
    moe-triton bench host --scale [--ranks 8 64 256 768]
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import functools
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from .. import testing
from . import extras, models, output, tables
from .models import Shape

HALVES = ("dispatch", "combine")
RANKS, SCALE = (1, 8), (8, 64, 256, 768)
# Small rows: at 768 ranks a host has to hold all windows.
SCALE_SHAPE = Shape("scale", 64, 768, 8)
_CPU = torch.device("cpu")
_TIMEOUT = 300.0
_CAUSES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    models.add_arguments(parser)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", metavar="W", help="1 and 8; with --scale 8 to 768")
    add("--tokens", type=int, default=8, metavar="T", help="of a rank (default: 8)")
    add("--quant", default="int8", choices=("bf16", "int8"), help="rows (default: int8)")
    add("--samples", type=int, default=15, help="of each case (default: 15)")
    add("--rounds", type=int, default=20, help="of a sample (default: 20)")
    add("--scale", action="store_true", help="the time of a rank over the number of ranks")
    output.add_arguments(parser, plot="the time of a rank over the ranks")


@dataclasses.dataclass(frozen=True)
class Cause:
    """A function with time of its own.

    Attributes:
        name: file and function.
        share: of all time that the profiler saw.
        calls: of a rank's dispatch and combine.
    """

    name: str
    share: float
    calls: float


def run(arguments: argparse.Namespace) -> int:
    """Run the bench; returns the exit code."""
    output.check_arguments(arguments)
    ranks = arguments.ranks or (SCALE if arguments.scale else RANKS)
    shape = SCALE_SHAPE if arguments.scale else models.chosen(arguments)[0]
    rows, causes = [], {}
    with output.progress(len(ranks)) as announce:
        for world in ranks:
            announce(f"{world} ranks")
            if arguments.scale:
                shape = shape._replace(experts=_divisible(SCALE_SHAPE.experts, world))
            case = functools.partial(
                _lockstep if arguments.scale else _without_launches,
                shape,
                arguments.tokens,
                world,
                None if arguments.quant == "bf16" else arguments.quant,
            )
            with case() as call:
                row, causes[world] = measured(call, world, arguments.samples, arguments.rounds)
            sizes = shape._asdict() | {"tokens": arguments.tokens, "ranks": world}
            rows.append({"bench": "host", **sizes, "quant": arguments.quant, **row})
    output.show(rows, COLUMNS, "host time of a rank, in microseconds")
    for world, largest in causes.items():
        output.show(largest, CAUSES, f"{world} ranks: functions with the most time of their own")
    output.finish(arguments, rows, plot)
    return 0


def _divisible(experts: int, ranks: int) -> int:
    """The least multiple of ``ranks`` from ``experts`` on."""
    return -(-experts // ranks) * ranks


def _value(value: Any, *_: Any, **__: Any) -> Any:
    return value


Halves = tuple[Callable[[], Any], Callable[[Any], Any]]


@contextlib.contextmanager
def _lockstep(shape: Shape, tokens: int, world: int, quant: str | None) -> Iterator[Halves]:
    """Dispatch and combine of all ranks, whose sums are right."""
    with _ranks(shape, tokens, world, quant) as (ranks, inputs):
        from . import layer_cases

        layer_cases.check(ranks, inputs, quant)
        yield _halves(ranks, inputs)


@contextlib.contextmanager
def _without_launches(shape: Shape, tokens: int, world: int, quant: str | None) -> Iterator[Halves]:
    """The same on the path of devices, with nothing in the place of launches."""
    from .. import kernels
    from . import launches

    package = __package__.partition(".")[0]
    with (
        launches.counted(replaced=True),
        mock.patch(f"{package}.expert_parallel.layer.steps_on", functools.partial(_value, kernels)),
        mock.patch(f"{package}.comm.transport.fixed_shapes", functools.partial(_value, True)),
        # On devices these look at no value.
        mock.patch(f"{package}.ops.checks.indices", functools.partial(_value, None)),
        mock.patch(f"{package}.ops.checks.expert_ids", functools.partial(_value, None)),
        _ranks(shape, tokens, world, quant) as (ranks, inputs),
    ):
        yield _halves(ranks, inputs)


@contextlib.contextmanager
def _ranks(
    shape: Shape, tokens: int, world: int, quant: str | None
) -> Iterator[tuple[list[Any], list[Any]]]:
    from .. import ExpertParallel
    from . import layer_cases

    def make(ctx: testing.RankContext) -> ExpertParallel:
        return ExpertParallel(
            ctx.ep_group,
            rank=ctx.ep_rank,
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            max_tokens=tokens,
            quant=cast("Any", quant),
            timeout=_TIMEOUT,
        )

    inputs = [layer_cases.drawn(shape, tokens, _CPU, rank) for rank in range(world)]
    with testing.lockstep(world, make) as ranks:
        yield ranks, inputs


def _halves(ranks: list[Any], inputs: list[Any]) -> Halves:
    from . import layer_cases

    return (
        functools.partial(layer_cases.dispatch, ranks, inputs),
        lambda received: layer_cases.combine(ranks, received, None),
    )


def measured(
    halves: Halves, world: int, samples: int, rounds: int
) -> tuple[dict[str, float], list[Cause]]:
    """Medians of a rank's microseconds, and the largest causes."""
    torch.set_num_threads(1)
    dispatch, combine = halves
    rounds = max(1, rounds // world)
    seconds: dict[str, list[float]] = {half: [] for half in HALVES}
    with torch.inference_mode():
        for _ in range(2):
            combine(dispatch())
        for _ in range(samples):
            spent = dict.fromkeys(HALVES, 0.0)
            for _ in range(rounds):
                start = time.thread_time()
                received = dispatch()
                middle = time.thread_time()
                combine(received)
                spent["dispatch"] += middle - start
                spent["combine"] += time.thread_time() - middle
            for half, value in spent.items():
                seconds[half].append(value / rounds / world * 1e6)
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(rounds):
            combine(dispatch())
        profiler.disable()
    row = {f"{half}_us": statistics.median(values) for half, values in seconds.items()}
    both = [sum(values) for values in zip(*seconds.values(), strict=True)]
    quartiles = statistics.quantiles(both, n=4)
    row |= {"round_us": statistics.median(both), "round_iqr_us": quartiles[2] - quartiles[0]}
    row["least_round_us"] = min(both)
    return row, _largest(profiler, rounds * world)


def _largest(profiler: cProfile.Profile, calls_of_a_rank: int) -> list[Cause]:
    statistics_of: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    total = sum(entry[2] for entry in statistics_of.values())
    ordered = sorted(statistics_of.items(), key=lambda item: -item[1][2])
    return [
        Cause(_name(*where), entry[2] / total, entry[1] / calls_of_a_rank)
        for where, entry in ordered[:_CAUSES]
    ]


def _name(file: str, line: int, function: str) -> str:
    if file == "~":  # built in
        return function.strip("<>")
    parts = Path(file).parts[-2:]
    return f"{'/'.join(parts)}:{line} {function}"


COLUMNS: tables.Columns = {
    "model": lambda row: row["model"],
    "tokens": lambda row: row["tokens"],
    "ranks": lambda row: row["ranks"],
    "rows": lambda row: row["quant"],
    "dispatch": lambda row: f"{row['dispatch_us']:.0f}",
    "combine": lambda row: f"{row['combine_us']:.0f}",
    "both": lambda row: f"{row['round_us']:.0f} ± {row['round_iqr_us']:.0f}",
    "at least": lambda row: f"{row['least_round_us']:.0f}",
}
CAUSES: tables.Columns = {
    "function": lambda cause: cause.name,
    "of the time": lambda cause: f"{cause.share:.0%}",
    "calls": lambda cause: f"{cause.calls:.3g}",
}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the time of a rank over the ranks."""
    figure = extras.require("matplotlib.figure", "--plot").Figure((6, 3.5), layout="constrained")
    axis = figure.subplots()
    worlds = [row["ranks"] for row in rows]
    for half in HALVES:
        axis.plot(worlds, [row[f"{half}_us"] for row in rows], "o-", label=half)
    axis.set_xscale("log", base=2)
    axis.set_xticks(worlds, map(str, worlds))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("ranks")
    axis.set_ylabel("microseconds of a rank")
    axis.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)

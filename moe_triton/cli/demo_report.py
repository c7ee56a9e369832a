"""The demo's output: rows per rank and expert, times, traffic, memory and errors."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable

import torch

from ..comm import Traffic
from .demo_layer import Layer
from .terminal import WIDTH, Terminal, milliseconds, plural, size

PHASES = ("dispatch", "experts", "combine")
_MAX_COLUMNS = 32  # of a picture of experts; several share a column when there are more
_OVER = {
    "shm": "shared memory",
    "collective": "torch.distributed",
    "auto": "the best available transport",
}


@dataclasses.dataclass(frozen=True)
class RankResult:
    """Result of a rank.

    Attributes:
        out: [T, H] bf16 of the first round.
        repeats: whether all later rounds gave the same bits.
        tokens_per_expert: rows received by each of its experts.
        seconds: of each timed round, for each phase.
        traffic: of one dispatch.
        window_bytes: of this rank.
        transport: chosen by ExpertParallel.
    """

    out: torch.Tensor
    repeats: bool
    tokens_per_expert: list[int]
    seconds: dict[str, list[float]]
    traffic: Traffic
    window_bytes: int
    transport: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Comparison of one format with the dense layer.

    Attributes:
        error: largest difference from the dense layer on the same rows.
        share: the same relative to the rounding tolerance; above 1 is wrong.
        noise: root mean square of the relative difference from the unquantised dense layer.
        noise_limit: noise above it is wrong.
        problems: descriptions of errors; empty if all is right.
    """

    error: float
    share: float
    noise: float
    noise_limit: float
    problems: list[str]


def describe(terminal: Terminal, layer: Layer, transport: str) -> None:
    """Print the configuration of the run."""
    world, shared = layer.world_size, layer.shared_ranks
    title = terminal.styled("moe-triton demo", "bold")
    terminal.line(
        f"{title}: {plural(world, 'process', 'processes')} on "
        f"{plural(len(os.sched_getaffinity(0)), 'core')}, over {_OVER[transport]}"
    )
    terminal.line(
        f"DeepSeek-V3's MoE layer at one eighth: hidden {layer.hidden}, expert width "
        f"{layer.width}, top {layer.top_k}"
    )
    where = "everywhere"
    if shared:
        where = f"on {'ranks' if shared > 1 else 'rank'} {span(range(shared))}"
    terminal.line(
        f"{layer.num_experts} experts, {layer.topology.experts_per_rank} a rank; the shared expert "
        f"{where}; {plural(layer.num_tokens, 'token')} a rank"
    )
    terminal.line()


def show_loads(terminal: Terminal, layer: Layer, loads: list[list[int]]) -> None:
    """Draw the rows received by each rank and each of its experts.

    Args:
        terminal: output.
        layer: maps experts to ranks.
        loads: rows for each expert of each rank.
    """
    shared = layer.shared_ranks
    routed = list(itertools.chain.from_iterable(loads[shared:]))
    busiest, mean = max(routed), sum(routed) / len(routed)
    per_column = -(-layer.topology.experts_per_rank // _MAX_COLUMNS)
    columns = [
        [sum(load[start : start + per_column]) for start in range(0, len(load), per_column)]
        for load in loads
    ]
    most = max(itertools.chain.from_iterable(columns[shared:]))
    most_of_rank = max(map(sum, loads))
    width, digits = len(columns[-1]), len(str(most_of_rank))
    title = terminal.styled("tokens per expert and rank", "bold")
    merged = f"; {per_column} experts a column" if per_column > 1 else ""
    terminal.line(f"{title}  at most {busiest}, {busiest / mean:.1f} times the mean{merged}")
    for rank, load in enumerate(loads):
        experts = "shared" if rank < shared else span(layer.topology.local_experts(rank))
        picture = " " * width if rank < shared else terminal.columns(columns[rank], most)
        bar = terminal.bar(sum(load), most_of_rank, WIDTH - (15 + width + 2 + digits + 1))
        terminal.line(f"{rank:>4}  {experts:<9}{picture}  {sum(load):>{digits}} {bar}")


def show_table(
    terminal: Terminal, results: dict[str, list[RankResult]], verdicts: dict[str, Verdict]
) -> None:
    """Print a column per format.

    Args:
        terminal: output.
        results: of all ranks, by format.
        verdicts: by format.
    """
    ranks = list(results.values())

    def row(label: str, cells: list[str], note: str = "") -> None:
        values = "".join(f"{cell:>12}" for cell in cells)
        terminal.line(
            f"{label:<13}{values}" + (f"   {terminal.styled(note, 'dim')}" if note else "")
        )

    def total(count: Callable[[Traffic], int]) -> list[int]:
        return [sum(count(result.traffic) for result in every) for every in ranks]

    terminal.line(terminal.styled(" " * 13 + "".join(f"{name:>12}" for name in results), "bold"))
    for phase in PHASES:
        first = phase == PHASES[0]
        note = f"slowest rank, median of {len(ranks[0][0].seconds[phase])} rounds" if first else ""
        row(phase, [milliseconds(_median(every, phase)) for every in ranks], note)
    sent, saved = total(lambda t: t.bytes_sent), total(lambda t: t.bytes_saved)
    share = saved[0] / (sent[0] + saved[0])
    row(
        "bytes sent",
        [size(b) for b in sent],
        f"{total(lambda t: t.rows_sent)[0]} rows, one per token and rank",
    )
    row("bytes saved", [size(b) for b in saved], f"{share:.0%} of one row per slot")
    windows = [max(result.window_bytes for result in every) for every in ranks]
    transport = f"of each rank, {ranks[0][0].transport} transport"
    row("window", [size(b) for b in windows], transport)
    judged = verdicts.values()
    row("max error", [f"{v.error:.2g}" for v in judged], "from the dense layer on the same rows")
    row("of its limit", [f"{v.share:.0%}" for v in judged], "limit: rows and sums rounded to bf16")
    limit = max(v.noise_limit for v in judged)
    note = f"from unquantised dense, limit {limit:.0%}"
    row("rms error", [f"{v.noise:.2%}" for v in judged], note)


def _median(ranks: list[RankResult], phase: str) -> float:
    """Median over the rounds of the slowest rank's time."""
    rounds = zip(*(result.seconds[phase] for result in ranks), strict=True)
    return statistics.median(map(max, rounds))


def span(numbers: range) -> str:
    """Format a range as first-last."""
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])

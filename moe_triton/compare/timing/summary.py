"""Measured times beside results of this library and of others, workload by workload.

The time of a call on a rank includes its waiting for the others. With the files of several ranks,
"fastest rank" is the median over the calls of the shortest time of any rank, which waited least,
and "slowest rank" that of the longest; with one rank both are its median.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...bench.published import PublishedRow, published
from ...errors import ArgumentValueError
from ...record.calls import FileError
from .files import Times, find, read, read_bench

VERSION = 1
_MOST_OTHERS = 8  # published rows of other workloads that are shown, one of each system
_BYTES = {"int8": 1, "fp8": 1, "hif8": 1, "bf16": 2, "fp16": 2}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One operator and workload in the files.

    Attributes:
        phase: dispatch or combine, with its split phase.
        type: of the operator.
        tokens: BS, None if unknown.
        hidden: H, likewise.
        top_k: K, likewise.
        format: of the rows that are sent, likewise.
        calls: of the rank with the most.
        by_rank: median microseconds by rank; the mean, where a file has a summary alone.
        fastest: microseconds of the fastest rank.
        slowest: microseconds of the slowest rank.
        lowest: shortest of all calls.
        highest: longest of all calls.
        summary: whether the figures come from op_statistic alone.
        files: they come from.
    """

    phase: str
    type: str
    tokens: int | None
    hidden: int | None
    top_k: int | None
    format: str | None
    calls: int
    by_rank: Mapping[str, float]
    fastest: float
    slowest: float
    lowest: float
    highest: float
    summary: bool
    files: tuple[str, ...]

    def gb_s(self) -> float | None:
        """Logical bytes of all copies, local ones too, over the time of the fastest rank."""
        width = _BYTES.get(self.format or "")
        if None in (self.tokens, self.hidden, self.top_k) or width is None or not self.fastest:
            return None
        assert self.tokens is not None
        assert self.hidden is not None
        assert self.top_k is not None
        scale = 4 if width == 1 else 0
        row = self.hidden * width + scale
        return self.tokens * self.top_k * row / self.fastest / 1000


@dataclasses.dataclass(frozen=True)
class Beside:
    """A result of another system, or of this library.

    Attributes:
        system: its name.
        hardware: it ran on.
        sizes: of its workload, "?" for what is not said.
        format: of dispatched and combined rows.
        dispatch_us: microseconds, or None.
        combine_us: microseconds, or None.
        differs: where the workload differs; empty for the same one.
        unknown: sizes that are not said, on either side.
        source: where it is published.
        note: what is special.
    """

    system: str
    hardware: str
    sizes: str
    format: str
    dispatch_us: float | None
    combine_us: float | None
    differs: tuple[str, ...]
    unknown: tuple[str, ...]
    source: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class TimingReport:
    """What the files say, and what stands beside it.

    Attributes:
        measured: from the files.
        workloads: (BS, H, K) -> results of others, nearest first.
        ranks: W, None if unknown.
        experts: E, likewise.
        problems: (place, text) of what could not be used, or is worth knowing.
    """

    measured: tuple[Measured, ...]
    workloads: Mapping[tuple[int, int, int], tuple[Beside, ...]]
    ranks: int | None
    experts: int | None
    problems: tuple[tuple[str, str], ...]

    @property
    def exit_code(self) -> int:
        """0, or 2 if no file has a time of the family."""
        return 0 if self.measured else 2

    def as_json(self) -> dict[str, Any]:
        """An object of JSON's types."""
        return {
            "version": VERSION,
            "exit_code": self.exit_code,
            "ranks": self.ranks,
            "experts": self.experts,
            "measured": [
                dataclasses.asdict(m) | {"by_rank": dict(m.by_rank), "gb_s": m.gb_s()}
                for m in self.measured
            ],
            "workloads": [
                {
                    "tokens": tokens,
                    "hidden": hidden,
                    "top_k": top_k,
                    "beside": [dataclasses.asdict(row) for row in rows],
                }
                for (tokens, hidden, top_k), rows in self.workloads.items()
            ],
            "problems": [{"place": place, "problem": text} for place, text in self.problems],
        }


def compare_times(
    paths: Sequence[str | Path],
    *,
    ranks: int | None = None,
    experts: int | None = None,
    bench: Sequence[str | Path] = (),
) -> TimingReport:
    """Read profiler files and lay them beside results of the same workload.

    Args:
        paths: files, or folders with them.
        ranks: W, which no profiler file says.
        experts: E, likewise.
        bench: files of ``moe-triton bench layer --json``.

    Returns:
        The times, and of each workload the results of others. What cannot be used is among its
        problems.

    Raises:
        ArgumentValueError: a size that is not positive.
    """
    for name, value in (("ranks", ranks), ("experts", experts)):
        if value is not None and value < 1:
            raise ArgumentValueError("compare", name, "be positive", value)
    problems: list[tuple[str, str]] = []

    def report(place: str, problem: str) -> None:
        problems.append((place, problem))

    times: list[Times] = []
    for file in find(map(Path, paths), report):
        try:
            times += read(file, report)
        except FileError as error:
            report(file.name, str(error))
    cases = []
    for file in map(Path, bench):
        try:
            cases += read_bench(file)
        except FileError as error:
            report(file.name, str(error))
    measured = _measured(times)
    workloads = {}
    for m in measured:
        if m.tokens and m.hidden and m.top_k and (m.tokens, m.hidden, m.top_k) not in workloads:
            sizes = {"tokens": m.tokens, "hidden": m.hidden, "top_k": m.top_k}
            sizes |= {"experts": experts or 0, "ranks": ranks or 0}
            known = {name: value for name, value in sizes.items() if value}
            workloads[m.tokens, m.hidden, m.top_k] = _beside(known, cases)
    return TimingReport(tuple(measured), workloads, ranks, experts, tuple(problems))


def _measured(times: list[Times]) -> list[Measured]:
    detailed = {(t.type, t.rank) for t in times if not t.summary}
    groups: dict[Any, dict[str, Times]] = defaultdict(dict)
    for t in times:
        # A summary repeats what the calls of the same rank say.
        if t.summary and any(kind == t.type for kind, _ in detailed):
            continue
        group = groups[t.phase, t.type, t.workload, t.format, t.summary]
        # kernel_details and op_summary of one run hold the same calls: keep the larger set.
        if t.rank not in group or t.count > group[t.rank].count:
            group[t.rank] = t
    sized = {(phase, kind) for phase, kind, sizes, *_ in groups if None not in sizes}
    result = []
    for (phase, kind, (tokens, hidden, top_k), form, summary), by_rank in groups.items():
        if None in (tokens, hidden, top_k) and (phase, kind) in sized:
            continue  # a trace beside a file with shapes
        ranks = [*by_rank.values()]
        if summary:
            middle = {t.rank: t.micros[1] for t in ranks}
            fastest, slowest = min(middle.values()), max(middle.values())
        else:
            middle = {t.rank: statistics.median(t.micros) for t in ranks}
            calls = [*zip(*(t.micros for t in ranks), strict=False)]
            fastest = statistics.median(map(min, calls))
            slowest = statistics.median(map(max, calls))
        result.append(
            Measured(
                phase,
                kind,
                tokens,
                hidden,
                top_k,
                form,
                max(t.count for t in ranks),
                middle,
                fastest,
                slowest,
                min(min(t.micros) for t in ranks),
                max(max(t.micros) for t in ranks),
                summary,
                tuple(sorted({Path(t.file).name for t in ranks})),
            )
        )
    return result


def _beside(sizes: Mapping[str, int], cases: list[dict[str, Any]]) -> tuple[Beside, ...]:
    """This library's results, then published ones, the same workload first."""
    own = [_own(case, sizes) for case in cases]
    rows = [row for row in published() if row.mode in ("low_latency", "normal")]
    near = [row for row in rows if row.hidden == sizes["hidden"] and row.top_k == sizes["top_k"]]
    others = [_published(row, sizes) for row in near if row.dispatch_us or row.combine_us]
    same = [row for row in others if not row.differs]
    different: dict[tuple[str, str], Beside] = {}  # the nearest row of each system
    for row in sorted(others, key=lambda row: len(row.differs)):
        if row.differs:
            different.setdefault((row.system, row.hardware), row)
    return (
        *sorted(own, key=lambda row: len(row.differs)),
        *same,
        *[*different.values()][:_MOST_OTHERS],
    )


def _published(row: PublishedRow, sizes: Mapping[str, int]) -> Beside:
    unknown = [*row.unknown(**sizes)]
    unknown += [n for n in ("ranks", "experts") if n not in sizes and getattr(row, n) is not None]
    return Beside(
        row.system,
        row.hardware,
        _sizes_text({name: getattr(row, name) for name in _SIZES}),
        "/".join(f for f in (row.dispatch_format, row.combine_format) if f) or "?",
        row.dispatch_us,
        row.combine_us,
        row.differences(**sizes),
        tuple(unknown),
        row.source,
        row.note,
    )


_SIZES = ("tokens", "hidden", "top_k", "experts", "ranks")


def _sizes_text(values: Mapping[str, Any]) -> str:
    return "/".join("?" if values.get(name) is None else str(values[name]) for name in _SIZES)


def _own(case: Mapping[str, Any], sizes: Mapping[str, int]) -> Beside:
    differs = tuple(
        f"{name} {case[name]}, not {sizes[name]}"
        for name in _SIZES
        if name in sizes and case.get(name) is not None and case[name] != sizes[name]
    )
    unknown = tuple(name for name in _SIZES if name in sizes and case.get(name) is None)
    quant = case.get("quant") or "bf16"
    times = [case.get(f"{half}_us") for half in ("dispatch", "combine")]
    dispatch, combine = (t if isinstance(t, (int, float)) else None for t in times)
    words = (case.get("backend"), case.get("transport"))
    return Beside(
        "moe_triton bench",
        ", ".join(str(w) for w in (case.get("device", "?"), *words) if w),
        _sizes_text(case),
        f"{quant}/bf16",
        dispatch,
        combine,
        differs,
        unknown,
    )

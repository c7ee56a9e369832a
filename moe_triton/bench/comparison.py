"""Two runs of a bench side by side: two revisions, or two machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from . import tables

Row = Mapping[str, Any]

# What makes a case; rows have those of their bench.
CASE = (
    "bench",
    "kernel",
    "implementation",
    "operation",
    "model",
    "payload",
    "hidden",
    "experts",
    "top_k",
    "tokens",
    "ranks",
    "world_size",
    "slots",
    "exponent",
    "late_ms",
    "batch",
    "quant",
    "transport",
    "backend",
)
_MACHINE = ("device", "cores", "revision", "moe_triton", "torch", "triton", "date")
_HIDDEN = ("bench", "hidden", "experts", "top_k")


class Pair(NamedTuple):
    """A measure of a case in both runs.

    Attributes:
        case: its sizes and names.
        measure: the name of the value, in microseconds or milliseconds.
        this: of this run.
        other: of the other run.
    """

    case: Mapping[str, Any]
    measure: str
    this: float
    other: float


COLUMNS: tables.Columns = {
    "case": lambda pair: ", ".join(
        f"{name} {value}" for name, value in pair.case.items() if name not in _HIDDEN
    ),
    "measure": lambda pair: pair.measure,
    "this run": lambda pair: f"{pair.this:.4g}",
    "other": lambda pair: f"{pair.other:.4g}",
    "this / other": lambda pair: f"{pair.this / pair.other:.2f}" if pair.other else "",
}


def _case(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in CASE if row.get(name) is not None}


def _measures(row: Row) -> Iterator[str]:
    """Names of times, without their spreads and the case's own."""
    for name, value in row.items():
        timed = name.endswith(("_us", "_ms")) and not name.endswith(("iqr_us", "iqr_ms"))
        if timed and name not in CASE and isinstance(value, (int, float)):
            yield name


def compared(this: Sequence[Row], other: Sequence[Row]) -> list[Pair]:
    """Every time of the cases that both runs have, in the order of this run."""
    others = {tuple(_case(row).items()): row for row in other}
    pairs = []
    for row in this:
        case = _case(row)
        beside = others.get(tuple(case.items()))
        if beside is not None:
            pairs += [
                Pair(case, name, row[name], beside[name])
                for name in _measures(row)
                if isinstance(beside.get(name), (int, float))
            ]
    return pairs


def machines(this: Sequence[Row], other: Sequence[Row]) -> Iterator[str]:
    """A line for each fact of the machine or the versions that differs."""
    if not this or not other:
        return
    for name in _MACHINE:
        values = [rows[0].get(name, "unknown") for rows in (this, other)]
        if values[0] != values[1]:
            yield f"{name}: {values[0]} here, {values[1]} there"

"""The picture of benches that compare a few ways over a few cases: bars side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import extras


def draw(
    path: Path,
    cases: Sequence[str],
    ways: Mapping[str, Sequence[float]],
    measure: str,
    title: str,
) -> None:
    """Write a figure with a group of bars for each case; the suffix of ``path`` is the format.

    Args:
        path: to write.
        cases: names, from left to right.
        ways: a value for each case, by what the bar stands for.
        measure: what the values are, with their unit.
        title: above the figure.
    """
    figure = extras.require("matplotlib.figure", "--plot").Figure(
        figsize=(max(6.0, 0.75 * len(cases) + 2), 4.2), layout="constrained"
    )
    axis = figure.subplots()
    width = 0.8 / len(ways)
    for number, (way, values) in enumerate(ways.items()):
        left = [case - 0.4 + (number + 0.5) * width for case in range(len(cases))]
        axis.bar(left, values, width, label=way)
    axis.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel(measure)
    axis.set_ylim(bottom=0)
    axis.grid(visible=True, axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=min(len(ways), 4), fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)

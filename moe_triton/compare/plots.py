"""Bar charts of a report, as SVG that suits a light and a dark page."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnavailableError
from .report import Report, bin_names
from .rules import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY = "#7f7f7f"
_COLOURS: Any = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY
)
_GOOD, _BAD = "#4c78a8", "#e4572e"
_MOST_BARS = 64


def _figure(width: float, height: float) -> tuple[Any, Axes]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        problem = f"plots need matplotlib: pip install 'moe_triton[compare]' ({error})"
        raise UnavailableError("compare", problem) from error
    with mpl.rc_context(_COLOURS):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, name: str) -> bytes:
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context({**_COLOURS, "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], bad: Sequence[bool], label: str
) -> None:
    colours = [_BAD if b else _GOOD for b in bad]
    axes.bar(range(len(values)), values, 0.8, color=colours)
    step = max(len(labels) // 16, 1)
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    axes.set_ylabel(label)


def draw(report: Report) -> dict[str, bytes]:
    """The charts by name: "steps", "experts" and "ranks", where there is something to show.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    charts = {"steps": _steps(report), "experts": _experts(report), "ranks": _ranks(report)}
    return {name: svg for name, svg in charts.items() if svg is not None}


def _steps(report: Report) -> bytes | None:
    """Elements by their distance in codes or ULP, of outputs that may differ at all."""
    rows: dict[str, list[int]] = {}
    for output in report.outputs:
        if output.rule != "binary consistency":
            bins = rows.setdefault(output.name, [0] * len(bin_names()))
            for i, n in enumerate(output.errors.histogram):
                bins[i] += n
    if not rows:
        return None
    figure, axes = _figure(7, 2.8)
    width = 0.8 / len(rows)
    for i, (name, bins) in enumerate(rows.items()):
        positions = [x - 0.4 + width * (i + 0.5) for x in range(len(bins))]
        axes.bar(positions, bins, width, label=name)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(bin_names())), bin_names(), fontsize=8)
    axes.set_xlabel("distance from the expected value, in codes (int8) or ULP (floats)")
    axes.set_ylabel("elements")
    axes.legend(frameon=False, labelcolor=_GREY)
    return _svg(figure, "steps")


def _experts(report: Report) -> bytes | None:
    """Share of the rows of each expert that differ."""
    rows: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for output in report.outputs:
        for rank in output.ranks:
            for expert, (all_rows, differing) in rank.by_expert.items():
                rows[expert][0] += all_rows
                rows[expert][1] += differing
    if not rows:
        return None
    order = sorted(rows)
    names = [str(e) if e >= 0 else f"S{-1 - e}" for e in order]
    shares = [100 * rows[e][1] / rows[e][0] for e in order]
    # Neighbours share a bar where there are more experts than bars.
    size = -(-len(order) // _MOST_BARS)
    names = names[::size]
    shares = [max(shares[i : i + size]) for i in range(0, len(shares), size)]
    figure, axes = _figure(7, 2.4)
    _bars(axes, names, shares, [s > 0 for s in shares], "rows that differ, %")
    axes.set_ylim(0, max(*shares, 1.0) * 1.05)
    axes.set_xlabel(
        "expert (S: shared)" + (f", {size} a bar, the worst of them" if size > 1 else "")
    )
    return _svg(figure, "experts")


def _ranks(report: Report) -> bytes | None:
    """Share of the elements of each rank that differ."""
    elements: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    wrong: set[int] = set()
    for output in report.outputs:
        for rank in output.ranks:
            if rank.errors is not None:
                elements[rank.rank][0] += rank.errors.elements
                elements[rank.rank][1] += rank.errors.elements - rank.errors.exact
            if rank.verdict >= Verdict.KNOWN:
                wrong.add(rank.rank)
    if not elements:
        return None
    order = sorted(elements)
    shares = [100 * elements[r][1] / max(elements[r][0], 1) for r in order]
    figure, axes = _figure(7, 2.4)
    _bars(
        axes,
        [str(r) for r in order],
        shares,
        [r in wrong for r in order],
        "elements that differ, %",
    )
    axes.set_ylim(0, max(*shares, 1.0) * 1.05)
    axes.set_xlabel("rank (red: with an output out of rule)")
    return _svg(figure, "ranks")


def time_bars(rows: Sequence[tuple[str, float | None, float | None, bool]]) -> bytes | None:
    """Bars of dispatch and combine, in microseconds.

    Args:
        rows: name, dispatch, combine, and whether the workload is that of the first row.
    """
    rows = [row for row in rows if row[1] or row[2]]
    if not rows:
        return None
    figure, axes = _figure(8, 0.9 + 0.42 * len(rows))
    for half, colour, offset in ((1, _GOOD, -0.2), (2, _BAD, 0.2)):
        for i, row in enumerate(rows):
            value = row[1] if half == 1 else row[2]
            if value is not None:
                axes.barh(i + offset, value, 0.38, color=colour, alpha=1.0 if row[3] else 0.4)
                axes.text(value, i + offset, f" {value:g}", va="center", fontsize=8, color=_GREY)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("us: dispatch above (blue), combine below (red); pale: another workload")
    return _svg(figure, "times")

"""A report of times for the terminal and as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import html, plots
from .summary import Beside, Measured, TimingReport

SHARE = (
    "Times include the waiting for other ranks: with files of several ranks, the fastest rank of a "
    "call waited least."
)


def render(report: TimingReport, console: Console) -> None:
    """Print the report."""
    for place, problem in report.problems:
        console.print(Text(f"{place}: {problem}", style="yellow"))
    if not report.measured:
        console.print(Text("NOTHING COMPARED  no time of a dispatch or combine", "bold red"))
        return
    console.print(_measured(report, console.width))
    console.print(Text(SHARE, style="dim"))
    if report.ranks is None or report.experts is None:
        console.print(
            Text(
                "Profiler files do not say the ranks and experts: give --ranks and --experts, or "
                "the dump of the run.",
                style="yellow",
            )
        )
    for (tokens, hidden, top_k), rows in report.workloads.items():
        console.print()
        title = f"Beside {tokens} tokens a rank, hidden {hidden}, top-{top_k}"
        title += f", {report.ranks} ranks" if report.ranks else ""
        title += f", {report.experts} experts" if report.experts else ""
        console.print(Text(title, style="bold"))
        if not rows:
            console.print("  no published or measured result has this hidden size and top-k")
        else:
            console.print(_beside(rows, console.width))
    if not report.workloads:
        console.print("The files have no shapes, so that no workload can be told from them.")


def _workload(m: Measured) -> str:
    return "/".join("?" if v is None else str(v) for v in (m.tokens, m.hidden, m.top_k))


def _measured(report: TimingReport, width: int) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("measured", no_wrap=True)
    table.add_column("BS/H/K", no_wrap=True)
    table.add_column("rows", no_wrap=True)
    for name in ("calls", "ranks", "fastest", "slowest", "min-max us"):
        table.add_column(name, justify="right", no_wrap=True)
    if width >= 90:
        table.add_column("GB/s", justify="right")
    for m in report.measured:
        speed = m.gb_s()
        cells = [
            m.type.removeprefix("MoeDistribute"),
            _workload(m),
            m.format or "?",
            str(m.calls),
            str(len(m.by_rank)),
            f"{m.fastest:.1f}{' (mean)' if m.summary else ''}",
            f"{m.slowest:.1f}",
            f"{m.lowest:.1f}-{m.highest:.1f}",
        ]
        if width >= 90:
            cells.append("" if speed is None else f"{speed:.0f}")
        table.add_row(*cells)
    return table


def _differs(row: Beside) -> str:
    parts = [*row.differs, *(f"{name} not known" for name in row.unknown)]
    parts += [row.note] if row.note and not parts[2:] else []
    return "; ".join(parts) if parts else "same workload"


def _beside(rows: Iterable[Beside], width: int) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("system")
    if width >= 100:
        table.add_column("hardware")
    table.add_column("rows", no_wrap=True)
    table.add_column("dispatch us", justify="right", no_wrap=True)
    table.add_column("combine us", justify="right", no_wrap=True)
    table.add_column("workload")
    for row in rows:
        cells = [row.system, *([row.hardware] if width >= 100 else []), row.format]
        cells += ["-" if t is None else f"{t:g}" for t in (row.dispatch_us, row.combine_us)]
        style = "" if not row.differs else "dim"
        table.add_row(*map(Text, cells), Text(_differs(row)), style=style)
    return table


def body(report: TimingReport) -> list[str]:
    """The body of the page of a report."""
    parts = ["<h1>Times of dispatch and combine</h1>"]
    if report.problems:
        items = (f"<li><b>{escape(p)}</b>: {escape(t)}</li>" for p, t in report.problems)
        parts.append(f"<ul>{''.join(items)}</ul>")
    header = ["operator", "BS/H/K", "rows", "calls", "fastest rank, us", "slowest rank, us"]
    header += ["min, us", "max, us", "logical GB/s", "files"]
    rows = []
    for m in report.measured:
        speed = m.gb_s()
        times = [f"{value:.1f}" for value in (m.fastest, m.slowest, m.lowest, m.highest)]
        cells = [escape(m.type), _workload(m), m.format or "?", str(m.calls), *times]
        rows.append([*cells, "" if speed is None else f"{speed:.0f}", escape(", ".join(m.files))])
    parts += [html.table(header, rows, text=(0, 1, 2, 9)), f"<p class=dim>{escape(SHARE)}</p>"]
    for (tokens, hidden, top_k), beside in report.workloads.items():
        parts.append(f"<h2>{tokens} tokens a rank, hidden {hidden}, top-{top_k}</h2>")
        chart = times_chart(report, (tokens, hidden, top_k))
        if chart is not None:
            parts.append(html.picture("times", chart))
        header = ["system", "hardware", "BS/H/K/E/W", "rows", "dispatch, us", "combine, us"]
        header += ["workload", "source", "note"]
        parts.append(
            html.table(
                header,
                [
                    [
                        *(escape(c) for c in (row.system, row.hardware, row.sizes, row.format)),
                        *(
                            "-" if t is None else f"{t:g}"
                            for t in (row.dispatch_us, row.combine_us)
                        ),
                        *(escape(c) for c in (_differs(row), row.source, row.note)),
                    ]
                    for row in beside
                ],
                text=(0, 1, 2, 3, 6, 7, 8),
            )
        )
    return parts


def charts(report: TimingReport) -> dict[str, bytes]:
    """The charts by name: "times", and "times-2" and so on for further workloads."""
    found: dict[str, bytes] = {}
    for workload in report.workloads:
        chart = times_chart(report, workload)
        if chart is not None:
            found[f"times-{len(found) + 1}" if found else "times"] = chart
    return found


def times_chart(report: TimingReport, workload: tuple[int, int, int]) -> bytes | None:
    """Bars of a workload: measured, then the others, by the name of the system."""
    bars: list[tuple[str, float | None, float | None, bool]] = []
    mine = [m for m in report.measured if (m.tokens, m.hidden, m.top_k) == workload]
    halves = {m.phase: m.fastest for m in mine}
    bars.append(("measured", halves.get("dispatch"), halves.get("combine"), True))
    for row in report.workloads[workload]:
        special = "; ".join([*row.differs, *filter(None, [row.note])])
        name = f"{row.system} ({special})" if special else row.system
        bars.append((name, row.dispatch_us, row.combine_us, not row.differs))
    return plots.time_bars(bars)

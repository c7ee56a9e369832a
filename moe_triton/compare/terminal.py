"""A report for the terminal, as rich renders it."""

from __future__ import annotations

import math
from collections import defaultdict

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .report import CallResult, OutputResult, Report, count
from .rules import Verdict

STYLES = {
    Verdict.UNDEFINED: "dim",
    Verdict.IN_RULE: "green",
    Verdict.WARNING: "yellow",
    Verdict.KNOWN: "magenta",
    Verdict.OUT_OF_RULE: "bold red",
}
_MOST_CALLS = 12  # that are shown whole although all is in rule
_MOST_LINES = 6  # of differences of an output
_WIDE = 118  # columns for all numbers


def render(report: Report, console: Console, *, everything: bool = False) -> None:
    """Print a report.

    Args:
        report: of a comparison.
        console: to print to.
        everything: show calls in rule one by one even where there are many.
    """
    console.print(Text(f"{report.path}: {report.source}", style="bold"))
    console.print(f"Calls run here on {report.where}; rules of the standard {report.standard}.")
    brief = len(report.calls) > _MOST_CALLS and not everything
    for call in report.calls:
        if call.problem or call.verdict > Verdict.IN_RULE or not brief:
            console.print()
            console.print(_call(call, console.width))
    if brief:
        console.print()
        console.print(_by_operator(report))
    if report.problems:
        console.print()
        console.print(Text("Not usable", style="bold"))
        for place, problem in report.problems:
            console.print(_item(f"{place}: {problem}", "red"))
    console.print()
    console.print(conclusion(report))


def conclusion(report: Report) -> Text:
    """The last line: OK, OUT OF RULE, or NOTHING COMPARED."""
    outputs = report.outputs
    if not outputs:
        return Text("NOTHING COMPARED  no output of this family could be compared", "bold red")
    calls = sum(any(o.verdict > Verdict.UNDEFINED for o in call.outputs) for call in report.calls)
    words = f"{_number(len(outputs), 'output')} of {_number(calls, 'call')}"
    words += f": {count(o.verdict for o in outputs)}"
    lost = len(report.problems) + sum(bool(call.problem) for call in report.calls)
    if lost:
        words += f"; {lost} {'part' if lost == 1 else 'parts'} of the dump could not be used"
    if report.exit_code == 0:
        return Text(f"OK  {words}", "bold green")
    bad = any(output.verdict >= Verdict.KNOWN for output in outputs)
    return Text(f"{'OUT OF RULE' if bad else 'INCOMPLETE'}  {words}", "bold red")


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def _item(text: str, style: str = "") -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    grid.add_row("-", Text(text, style=style))
    return Padding(grid, (0, 0, 0, 2))


def _call(call: CallResult, width: int) -> RenderableType:
    title = Text(call.place, style="bold")
    about = ", ".join(filter(None, [call.world, call.sizes]))
    parts: list[RenderableType] = [title, Text(f"  {about}", style="dim")]
    if call.problem:
        parts.append(_item(f"not compared: {call.problem}", "red"))
    compared = [o for o in call.outputs if o.verdict is not Verdict.UNDEFINED]
    if compared:
        parts.append(_table(compared, width))
    for output in compared:
        lines = output.lines
        # What has a name is explained below, once.
        most = 1 if output.verdict is Verdict.KNOWN else _MOST_LINES
        style = STYLES[output.verdict] if output.verdict > Verdict.IN_RULE else ""
        parts += [_item(f"{output.name}: {line}", style) for line in lines[:most]]
        if len(lines) > most:
            parts.append(_item(f"{output.name}: and on {len(lines) - most} more ranks"))
        if output.verdict in (Verdict.WARNING, Verdict.OUT_OF_RULE) and output.rule:
            parts.append(_item(f"{output.name}: the rule is {output.rule}", "dim"))
    left_out: dict[str, list[str]] = defaultdict(list)
    for output in call.outputs:
        if output.note:
            left_out[output.note].append(output.name)
    parts += [_item(f"{', '.join(names)}: {note}", "dim") for note, names in left_out.items()]
    parts += [_item(note) for note in call.notes]
    return Group(*parts)


def _table(outputs: list[OutputResult], width: int) -> Table:
    wide = width >= _WIDE
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("  output", no_wrap=True)
    columns = ["values", "equal"]
    columns += ["1 apart", "max step"] if wide else []
    columns += ["Cosine", "MaxAbsErr"]
    columns += ["MaxRelErr"] if width >= 90 else []
    columns += ["<0.001", "<0.005"] if wide else ["<0.001"] if width >= 90 else []
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for output in outputs:
        errors = output.errors
        cells = {
            "values": str(errors.elements),
            "equal": percent(errors.exact, errors.elements),
            "1 apart": str(errors.off_by_one),
            "max step": str(errors.max_step),
            "Cosine": number(errors.cosine, errors.elements),
            "MaxAbsErr": number(errors.max_abs, errors.elements),
            "MaxRelErr": number(errors.max_relative, errors.elements),
            "<0.001": percent(errors.below_thousandth, errors.elements),
            "<0.005": percent(errors.below_five_thousandths, errors.elements),
        }
        style = STYLES[output.verdict]
        verdict = f"[{style}]{output.verdict.words}[/]"
        table.add_row(f"  {escape(output.name)}", *(cells[name] for name in columns), verdict)
    return table


def _by_operator(report: Report) -> Table:
    groups: dict[tuple[str, str], list[OutputResult]] = defaultdict(list)
    for call in report.calls:
        for output in call.outputs:
            if output.verdict is not Verdict.UNDEFINED:
                groups[call.op, output.name].append(output)
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("all calls", no_wrap=True)
    table.add_column("output", no_wrap=True)
    for name in ("calls", "values", "equal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdicts")
    before = ""
    for (op, name), outputs in groups.items():
        errors = [output.errors for output in outputs]
        elements, exact = (sum(getattr(e, n) for e in errors) for n in ("elements", "exact"))
        table.add_row(
            "" if op == before else op.removeprefix("npu_moe_"),
            name,
            str(len(outputs)),
            str(elements),
            percent(exact, elements),
            count(output.verdict for output in outputs),
        )
        before = op
    return table


def percent(part: int, whole: int) -> str:
    """A share in percent, which is 100 only if all are; a dash of nothing."""
    if whole == 0:
        return "-"
    if part == whole:
        return "100 %"
    share = 100 * part / whole
    return f"{min(share, 99.99):.2f} %"


def number(value: float, elements: int = 1) -> str:
    """A number with up to 6 digits, as msprobe prints it, or NaN; a dash of no elements."""
    if elements == 0:
        return "-"
    if math.isnan(value):
        return "NaN"
    return f"{value:.6g}"

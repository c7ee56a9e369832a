"""What every bench shows and writes: progress, tables, JSON lines, and another run beside it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import comparison, extras, results, tables


def add_arguments(
    parser: argparse.ArgumentParser, *, plot: str | None, record: bool = False
) -> None:
    """Add the options of the output.

    Args:
        parser: of the bench.
        plot: what its picture shows, or None without one.
        record: a checkout keeps results of this bench.
    """
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="write one JSON object a case and line")
    if plot is not None:
        add("--plot", type=Path, metavar="FILE", help=f"draw {plot}: .svg, .png or .pdf")
    if record:
        add("--record", action="store_true", help="write them into bench/results of a checkout")
    add(
        "--compare",
        type=Path,
        metavar="FILE",
        help="show an earlier --json beside this run, of another revision or machine",
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse, before anything is measured, what could not be shown afterwards.

    Raises:
        MissingPackageError: a plot without matplotlib.
        ResultsError: a file to compare with that holds no results.
    """
    if getattr(arguments, "plot", None) is not None:
        extras.require("matplotlib", "--plot")
    if arguments.compare is not None:
        results.read(arguments.compare)
    if getattr(arguments, "record", False):
        results.recorded("any")


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that announces the next of ``total`` cases, on standard error.

    On a terminal with rich it is a bar; else a line each.
    """
    rich = None
    if sys.stderr.isatty():
        with contextlib.suppress(extras.MissingPackageError):
            rich = extras.require("rich.progress", "progress")
    if rich is None:
        number = 0

        def line(what: str) -> None:
            nonlocal number
            number += 1
            print(f"[{number}/{total}] {what}", file=sys.stderr, flush=True)

        yield line
        return
    console = extras.require("rich.console", "progress").Console(stderr=True)
    columns = ("{task.completed}/{task.total}", rich.BarColumn(), "{task.description}")
    with rich.Progress(*columns, rich.TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        started = False

        def announce(what: str) -> None:
            nonlocal started
            bar.update(task, advance=int(started), description=what)
            started = True

        yield announce


def show(rows: Sequence[Any], columns: tables.Columns, title: str = "") -> None:
    """Print a table: drawn on a terminal with rich, else in Markdown."""
    rich = None
    if sys.stdout.isatty():
        with contextlib.suppress(extras.MissingPackageError):
            rich = extras.require("rich.table", "a table")
    if rich is None:
        print(f"{title}\n" if title else "", tables.table(rows, columns), sep="\n", flush=True)
        return
    table = rich.Table(title=title or None, title_justify="left", header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell(row)) for cell in columns.values()))
    extras.require("rich.console", "a table").Console().print(table)


def finish(
    arguments: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    draw: Callable[[Sequence[Mapping[str, Any]], Path], None] | None = None,
    record: str = "",
) -> None:
    """Write, draw and compare the rows as the options say; ``record`` names the recorded file."""
    facts = results.machine()
    rows = [{**row, **facts} for row in rows]
    paths = [arguments.json] if arguments.json is not None else []
    if getattr(arguments, "record", False):
        paths.append(results.recorded(record))
    for path in paths:
        results.write(path, rows)
        print(f"results: {path}")
    if draw is not None and arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, arguments.plot)
        print(f"plot: {arguments.plot}")
    if arguments.compare is not None:
        other = results.read(arguments.compare)
        for line in comparison.machines(rows, other):
            print(line)
        pairs = comparison.compared(rows, other)
        if pairs:
            show(pairs, comparison.COLUMNS, f"this run beside {arguments.compare}")
        else:
            print(f"{arguments.compare} and this run have no case in common")

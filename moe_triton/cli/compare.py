"""``moe-triton compare``: results from Ascend beside those of the same calls here."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import backend, profile
from ..compare import DEVIATIONS, STANDARDS, Report, Where, compare
from ..compare.timing import TimingReport, compare_times
from ..errors import MoeError
from ..record.calls import FileError
from .terminal import positive

if TYPE_CHECKING:
    from rich.console import Console

_NOT_COMPARED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        help="msprobe dump, record, folder of converted kernel dumps, or YAML file",
    )
    parser.add_argument(
        "--standard",
        choices=STANDARDS,
        default="cann",
        help="rules of the verdicts (default: cann)",
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=[*DEVIATIONS],
        metavar="NAME",
        help=f"count a known deviation as in rule: {', '.join(DEVIATIONS)}",
    )
    parser.add_argument(
        "--backend",
        choices=backend.BACKENDS,
        help="back end that runs the calls here (default: the definitions on the CPU)",
    )
    parser.add_argument(
        "--product",
        choices=[name for name in profile.PROFILES if name != "portable"],
        help="say which calls the limits of a product forbid",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument that kernel dumps do not hold, such as moe_expert_num=256; may be repeated",
    )
    parser.add_argument(
        "--timing",
        nargs="+",
        metavar="FILE",
        help="lay the times in files of Ascend's profilers, or in folders of them, beside those of "
        "other systems: kernel_details.csv, op_summary_*.csv, op_statistic.csv, "
        "communication.json, trace_view.json; PATH may be left out, or be the dump of the same run",
    )
    parser.add_argument("--ranks", type=positive, metavar="W", help="of the run of --timing")
    parser.add_argument("--experts", type=positive, metavar="E", help="of the run of --timing")
    parser.add_argument(
        "--bench",
        action="append",
        default=[],
        metavar="FILE",
        help="results of moe-triton bench layer --json to show beside --timing; may be repeated",
    )
    parser.add_argument(
        "--all", action="store_true", help="show every call, also where many are in rule"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="write a report with plots")
    parser.add_argument("--plots", metavar="DIR", help="write the plots as SVG files")


def run(arguments: argparse.Namespace) -> int:
    """Compare; returns 0 in rule, 1 if something is out of its rule, 2 if nothing was compared."""
    absent = [name for name in ("rich", "yaml", "safetensors") if find_spec(name) is None]
    if absent:
        problem = f"{', '.join(absent)} must be installed: pip install 'moe_triton[compare]'"
        print(f"moe-triton compare: {problem}", file=sys.stderr)
        return _NOT_COMPARED
    from rich.console import Console

    try:
        return _run(arguments, Console(highlight=False, soft_wrap=False))
    except MoeError as error:
        print(f"moe-triton {error}", file=sys.stderr)
        return _NOT_COMPARED


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.path is None and not arguments.timing:
        arguments.error("PATH or --timing must be given")
    report = times = None
    if arguments.path is not None:
        with _progress(arguments) as progress:
            report = compare(
                arguments.path,
                standard=arguments.standard,
                where=_where(arguments),
                accept=arguments.accept,
                settings=_settings(arguments.set),
                progress=progress,
            )
    if arguments.timing:
        times = compare_times(
            arguments.timing,
            ranks=arguments.ranks or (None if report is None else report.ranks),
            experts=arguments.experts or (None if report is None else report.experts),
            bench=arguments.bench,
        )
    if arguments.json:
        value = {} if report is None else report.as_json()
        value |= {} if times is None else {"timing": times.as_json()}
        print(json.dumps(value, indent=1, allow_nan=False))
    else:
        from ..compare.terminal import render
        from ..compare.timing import tables

        with console.capture() as captured:
            if report is not None:
                render(report, console, everything=arguments.all)
            if times is not None:
                tables.render(times, console)
        text = captured.get()
        if not console.is_terminal:
            # rich fills cells with spaces, which a file need not hold.
            text = "\n".join(line.rstrip() for line in text.split("\n"))
        print(text, end="")
    _write(report, times, arguments)
    codes = [part.exit_code for part in (report, times) if part is not None]
    return max(codes, key=lambda code: (code == 1, code))


def _where(arguments: argparse.Namespace) -> Where:
    name = arguments.backend
    device = {"cuda": "cuda", "rocm": "cuda", "npu": "npu"}.get(name, "cpu")
    if name is not None:
        cause = backend.unavailable_because(name)
        if cause is not None:
            raise FileError("compare", "--backend", "be one that runs here", f"{name}: {cause}")
    if name == "interpret":
        backend.enable_interpreter()
    return Where(torch.device(device), name, arguments.product)


def _settings(texts: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise FileError("compare", "--set", "be NAME=VALUE", text)
        try:
            settings[name] = int(value)
        except ValueError:
            settings[name] = value
    return settings


def _write(
    report: Report | None, times: TimingReport | None, arguments: argparse.Namespace
) -> None:
    """Write the HTML page and the plots."""
    if not arguments.html and not arguments.plots:
        return
    from ..compare import html, plots
    from ..compare.timing import tables

    charts = {} if report is None else plots.draw(report)
    body = [] if report is None else html.body(report, charts)
    if times is not None:
        body += tables.body(times)
        charts |= tables.charts(times)
    try:
        if arguments.plots:
            folder = Path(arguments.plots)
            folder.mkdir(parents=True, exist_ok=True)
            for name, svg in charts.items():
                (folder / f"{name}.svg").write_bytes(svg)
        if arguments.html:
            Path(arguments.html).write_text(html.page("moe-triton compare", body), encoding="utf-8")
    except OSError as error:
        path = error.filename or arguments.html or arguments.plots
        contract = "be a file that can be written"
        raise FileError("compare", str(path), contract, error.strerror or str(error)) from error


@contextlib.contextmanager
def _progress(arguments: argparse.Namespace) -> Iterator[Any]:
    """A bar on standard error while calls are run, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal or arguments.json:
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def update(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield update

"""``moe-triton compare``: results from Ascend beside those of the same calls here."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import backend, profile
from ..compare import DEVIATIONS, STANDARDS, Report, Where, compare
from ..errors import MoeError
from ..record.calls import FileError

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
        "--all", action="store_true", help="show every call, also where many are in rule"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="write a report with plots")
    parser.add_argument("--plots", metavar="DIR", help="write the plots as SVG files")


def run(arguments: argparse.Namespace) -> int:
    """Compare; returns 0 in rule, 1 if something is out of its rule, 2 if nothing was compared."""
    try:
        from rich.console import Console
    except ImportError:
        print(
            "moe-triton compare: rich is not installed: pip install 'moe_triton[compare]'",
            file=sys.stderr,
        )
        return _NOT_COMPARED
    try:
        return _run(arguments, Console(highlight=False, soft_wrap=False))
    except MoeError as error:
        print(f"moe-triton {error}", file=sys.stderr)
        return _NOT_COMPARED


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.path is None:
        arguments.error("PATH must be given")
    with _progress(arguments) as progress:
        report = compare(
            arguments.path,
            standard=arguments.standard,
            where=_where(arguments),
            accept=arguments.accept,
            settings=_settings(arguments.set),
            progress=progress,
        )
    _write(report, arguments)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=1, allow_nan=False))
    else:
        from ..compare.terminal import render

        render(report, console, everything=arguments.all)
    return report.exit_code


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


def _write(report: Report, arguments: argparse.Namespace) -> None:
    """Write the HTML page and the plots."""
    if not arguments.html and not arguments.plots:
        return
    from ..compare import html, plots

    charts = plots.draw(report)
    try:
        if arguments.plots:
            folder = Path(arguments.plots)
            folder.mkdir(parents=True, exist_ok=True)
            for name, svg in charts.items():
                (folder / f"{name}.svg").write_bytes(svg)
        if arguments.html:
            Path(arguments.html).write_text(html.write(report, charts), encoding="utf-8")
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

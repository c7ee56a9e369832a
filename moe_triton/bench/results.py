"""Lines of results: facts of the machine, JSON lines, statistics, and where they go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import moe_triton

# Of a checkout; the folder around the package where it is installed.
ROOT = Path(__file__).resolve().parents[2]


class ResultsError(Exception):
    """A file that should hold results and does not."""


def machine() -> dict[str, Any]:
    """Device, versions and revision, part of every line of results."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "moe_triton": moe_triton.__version__,
        "revision": _revision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _revision() -> str:
    """The revision from ``MOE_TRITON_REVISION``, for copies without git, or of the checkout."""
    if revision := os.environ.get("MOE_TRITON_REVISION"):
        return revision
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def recorded(bench: str) -> Path:
    """The file of a checkout that holds the results of a bench.

    Raises:
        ResultsError: the package is not that of a checkout.
    """
    folder = ROOT / "bench/results"
    if not folder.is_dir():
        raise ResultsError(f"--record must be used in a checkout, got the package in {ROOT}")
    return folder / f"{bench}.jsonl"


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Raises:
        ResultsError: there is no such file, or it holds something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path} must hold JSON lines of a bench: {error}") from error
    if not rows or not all(isinstance(row, dict) and "bench" in row for row in rows):
        raise ResultsError(f"{path} must hold JSON lines of a bench, got other JSON or none")
    return rows


def slowest(seconds_of_ranks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Median and interquartile range, in ms over samples, of the slowest rank."""
    slowest = [max(sample) * 1e3 for sample in zip(*seconds_of_ranks, strict=True)]
    quartiles = statistics.quantiles(slowest, n=4)
    return statistics.median(slowest), quartiles[2] - quartiles[0]

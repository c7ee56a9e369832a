"""Provenance of results for evidence pages: versions, machine, revision."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def environment() -> list[str]:
    """Versions of the tests' dependencies, the machine, and the revision if known."""
    packages = ("torch", "triton", "numpy", "pytest", "hypothesis")
    versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    listed = ", ".join(f"{name} {versions.get(name, 'absent')}" for name in packages)
    actual = [f"Python {platform.python_version()}, {listed}", _cpu()]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return [*actual, f"revision {git.stdout.strip()}"] if git.returncode == 0 else actual


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {platform.system()}"

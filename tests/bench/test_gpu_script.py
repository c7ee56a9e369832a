"""bench/gpu.sh without a GPU fails with a message; with a GPU it is tested on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PARTS = ("rendezvous", "rounds", "faults", "graphs", "streams", "layers", "kernels")
SCRIPT = Path(__file__).resolve().parents[2] / "bench/gpu.sh"


def run(tmp_path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    return subprocess.run(
        ["bash", SCRIPT, *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_fails(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1
    assert "PyTorch sees no GPU" in done.stdout
    assert "PyTorch sees no GPU" in (tmp_path / "out/summary.txt").read_text(encoding="utf-8")


def test_unknown_options_are_refused(tmp_path):
    done = run(tmp_path, "--dry")
    assert done.returncode == 2
    assert "no option --dry" in done.stderr


@pytest.mark.full
def test_dry_run(tmp_path):
    done = run(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout
    for name in PARTS:
        assert f"passed  {name} in " in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    logs = {f"{name}.log" for name in PARTS}
    assert {"summary.txt", "kernels.jsonl", "layers.jsonl", *logs} <= names

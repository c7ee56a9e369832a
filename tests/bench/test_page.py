"""The commands of docs/benchmarking.md run as they stand there, in order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/benchmarking.md"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
MOE_TRITON = [sys.executable, "-m", "moe_triton"]


def commands() -> list[list[str]]:
    """Those of the page, installing left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    words = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [command for command in words if command[0] != "pip"]


@pytest.mark.full
def test_the_session(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    ran = commands()
    assert len(ran) >= 6
    for name, *arguments in ran:
        program = {"torchrun": TORCHRUN, "moe-triton": MOE_TRITON}[name]
        done = subprocess.run(
            [*program, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, f"{name} {arguments}: {done.stderr}"
    names = {path.name for path in tmp_path.iterdir()}
    assert {"before.jsonl", "layer.svg", "host.svg"} <= names

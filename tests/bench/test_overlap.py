"""``bench overlap`` runs, with results that do not depend on the load of the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_setups_do_not_wait_for_a_late_rank(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    out, late, picture = tmp_path / "overlap.jsonl", 500, tmp_path / "overlap.png"
    command = [sys.executable, BENCH / "bench_overlap.py", "--json", out, "--world-size", "2"]
    done = subprocess.run(
        [*command, "--late", str(late), "--samples", "2", "--plot", picture],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["operation"] for row in rows] == ["dispatch", "combine"]
    for row in rows:
        assert row["setup_ms"] < late / 2
        # Teardowns wait; ranks leave the barrier at about the same time.
        assert min(row["sequence_ms"], row["overlap_ms"]) >= 0.9 * late
        assert f"| {row['operation']} | {late} ms |" in done.stdout

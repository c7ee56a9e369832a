"""The tables in the pages match bench/results."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPORT = runpy.run_path(str(ROOT / "bench/report.py"))


@pytest.mark.parametrize("page", REPORT["sections"]())
def test_the_results_are_current(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    written = REPORT["filled"](text, REPORT["sections"]()[page])
    assert written == text, "run `python bench/report.py`"


def test_benches_write_into_the_repository_only_to_record():
    destination = REPORT["destination"]
    assert destination("load", record=True) == ROOT / "bench/results/load.jsonl"
    assert destination("load", record=False) == ROOT / "build/bench/load.jsonl"
    assert "build/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for bench in (ROOT / "bench").glob("bench_*.py"):
        text = bench.read_text(encoding="utf-8")
        assert "report.destination(" in text, bench
        assert '"--record"' in text, bench
        assert "ROOT / " not in text, f"{bench}: leave the place to report.destination"

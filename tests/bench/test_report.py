"""The tables in the pages match bench/results."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from moe_triton.bench import results

ROOT = Path(__file__).resolve().parents[2]
REPORT = runpy.run_path(str(ROOT / "bench/report.py"))


@pytest.mark.parametrize("page", REPORT["sections"]())
def test_the_results_are_current(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    written = REPORT["filled"](text, REPORT["sections"]()[page])
    assert written == text, "run `python bench/report.py`"


def test_results_are_recorded_in_a_checkout_only(monkeypatch, tmp_path):
    assert results.recorded("load") == ROOT / "bench/results/load.jsonl"
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(results.ResultsError, match="--record must be used in a checkout"):
        results.recorded("load")


@pytest.mark.parametrize("door", sorted((ROOT / "bench").glob("bench_*.py")), ids=lambda p: p.stem)
def test_doors_open_their_command(door):
    command = f'main(["bench", "{door.stem.removeprefix("bench_")}", *sys.argv[1:]])'
    assert command in door.read_text(encoding="utf-8")

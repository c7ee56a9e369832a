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


def test_benches_write_into_the_checkout_only_to_record():
    destination = results.destination
    assert destination("load", record=True) == ROOT / "bench/results/load.jsonl"
    assert destination("load", record=False) == Path("build/bench/load.jsonl")
    assert "build/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("door", sorted((ROOT / "bench").glob("bench_*.py")), ids=lambda p: p.stem)
def test_doors_open_their_command(door):
    command = f'main(["bench", "{door.stem.removeprefix("bench_")}", *sys.argv[1:]])'
    assert command in door.read_text(encoding="utf-8")

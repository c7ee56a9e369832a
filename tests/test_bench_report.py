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

"""Shared fixtures: poisoned memory, the evidence page, a lost device, optional dependencies."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

PACKAGE = Path(importlib.util.find_spec("moe_triton").submodule_search_locations[0])


def run_as(path: Path, code: str) -> torch.Tensor:
    """Run ``code`` as the file ``path``; returns its ``out``."""
    names = {"torch": torch}
    exec(compile(code, str(path), "exec"), names)
    return names["out"]


@pytest.mark.parametrize(
    "call",
    [
        "torch.empty(3, 4, dtype={})",
        "torch.empty_strided((3, 4), (8, 1), dtype={})",
        "torch.empty_like(torch.zeros(3, 4, dtype={}))",
        "torch.zeros(1).new_empty((3, 4), dtype={})",
    ],
)
def test_memory_for_the_package_is_poisoned(call):
    path = PACKAGE / "comm" / "anything.py"
    for dtype in ("torch.float32", "torch.bfloat16", "torch.float8_e4m3fn"):
        assert run_as(path, f"out = {call.format(dtype)}").isnan().all()
    for dtype in ("uint8", "int8", "int16", "int32", "int64"):
        out = run_as(path, f"out = {call.format('torch.' + dtype)}")
        assert (out.contiguous().view(torch.uint8) == 0xAA).all()


def test_memory_for_threads_of_the_package_is_poisoned():
    results = []
    path, code = PACKAGE / "ops.py", "out = torch.empty(8)"
    threads = [
        threading.Thread(target=lambda: results.append(run_as(path, code))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result.isnan().all() for result in results)


def test_memory_for_others_is_not_poisoned(tmp_path):
    # Poison fills all of it; memory of earlier tests may hold a few NaNs.
    out = run_as(tmp_path / "test_x.py", "out = torch.empty(2**24)")
    assert not out.isnan().all()


TESTS = Path(__file__).parent
HELPERS = os.pathsep.join([str(TESTS), str(TESTS / "support")])
# A run of its own, whoever runs this file.
ALONE = {**os.environ, "PYTHONPATH": HELPERS}
ALONE.pop("PYTEST_XDIST_WORKER", None)

_PAGE_TEST = """
import os, pytest

def test_good(record_evidence):
    record_evidence("rounds", "2000 rounds were exact")

def test_skipped():
    pytest.skip("no device")

def test_sometimes():
    assert "BAD" not in os.environ
"""


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.full), "2"])
def test_evidence_page(tmp_path, workers):
    """Written by green runs only: a run that failed is repeated."""
    (tmp_path / "test_page.py").write_text(_PAGE_TEST, encoding="utf-8")
    path = tmp_path / "sub" / "page.md"
    page_args = ["--evidence", "sub/page.md", "-n", workers]

    def run(**environment):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "conftest", *page_args],
            cwd=tmp_path,
            env={**ALONE, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    failed = run(BAD="1")
    assert failed.returncode == 1
    assert "page.md is not written: the run failed" in failed.stdout
    assert not path.exists()
    run()
    page = path.read_text(encoding="utf-8")
    assert "- 2 passed, 1 skipped in " in page
    assert "\n| test_page.py | 2 | 1 | " in page
    assert "- `test_page.py::test_skipped`: Skipped: no device" in page
    assert "\n## rounds\n\n2000 rounds were exact\n" in page
    assert f"torch {torch.__version__}" in page


_LOST_TEST = """
import torch

def test_wrong():
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")

    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

def test_after_it():
    raise ValueError
"""


def test_a_lost_device_ends_the_run(tmp_path):
    (tmp_path / "test_lost.py").write_text(_LOST_TEST, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest"],
        cwd=tmp_path,
        env=ALONE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    lost = "test_lost.py::test_wrong: the device is lost to this process: an illegal memory access"
    assert lost in done.stdout + done.stderr
    assert "ValueError" not in done.stdout


_WITHOUT = """
import sys, pytest

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("hypothesis", "cloudpickle"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_kernels_are_tested_without_hypothesis_and_cloudpickle():
    """As on a GPU machine that has pytest, but not these."""
    chosen = ["tests/kernels", "-k", "test_recv_permutation.py and (example or any_size)"]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, "-rs", "-p", "no:cacheprovider", *chosen],
        cwd=Path(__file__).parents[1],
        # Otherwise pytest imports hypothesis for its plugin.
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 skipped" in done.stdout
    assert "hypothesis is not installed" in done.stdout

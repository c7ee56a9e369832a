"""``bench layer`` on the CPU: checks, columns, files, comparison and published rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_triton.bench import comparison, extras, layer, layer_cases, results
from moe_triton.cli import main

SMALL = ["--hidden", "64", "--experts", "8", "--top-k", "2", "--quick", "--samples", "2"]


def bench(*options: str) -> int:
    return main(["bench", "layer", *SMALL, *options])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_processes_and_every_format(tmp_path, capsys):
    path = tmp_path / "layer.jsonl"
    formats = ["bf16", "int8", "group_e4m3"]
    assert bench("--tokens", "1", "3", "--quant", *formats, "--json", str(path)) == 0
    rows = rows_of(path)
    assert [(row["quant"] or "bf16", row["tokens"]) for row in rows] == [
        (quant, tokens) for quant in formats for tokens in (1, 3)
    ]
    for row in rows:
        assert (row["ranks"], row["backend"], row["transport"]) == (2, "cpu", "shm")
        assert row["combine_bytes"] == row["tokens"] * 2 * 64 * 2
        assert row["dispatch_us"] > 0 and row["copy_combine_us"] > 0
        assert row["dispatch_gb_s"] == pytest.approx(
            row["dispatch_bytes"] / row["dispatch_us"] / 1e3
        )
        assert row["dispatch_launches"] is None
    # All tokens arrive somewhere, one row for each of their experts.
    assert [row["dispatch_bytes"] for row in rows[:2]] == [1 * 2 * 64 * 2, 3 * 2 * 64 * 2]
    printed = capsys.readouterr().out
    assert "published: no row has the workload of custom 1 tokens, custom 3 tokens" in printed
    assert "clocks and power: none" in printed


def test_a_plot_and_another_run_beside_it(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    before, picture = tmp_path / "before.jsonl", tmp_path / "layer.svg"
    one = ["--ranks", "1", "--tokens", "3"]
    assert bench(*one, "--json", str(before)) == 0
    rows = [row | {"revision": "another", "dispatch_us": 1.0} for row in rows_of(before)]
    results.write(before, rows)
    capsys.readouterr()
    assert bench(*one, "--compare", str(before), "--plot", str(picture)) == 0
    printed = capsys.readouterr().out
    assert "another there" in printed
    assert "dispatch_us" in printed
    assert picture.read_text(encoding="utf-8").startswith("<?xml")


def test_published_rows_of_the_same_workload_stand_beside(capsys):
    row = {"model": "DeepSeek-V3", "hidden": 7168, "experts": 256, "top_k": 8, "tokens": 128}
    row |= {"ranks": 8, "quant": None, "dispatch_us": 900.0, "combine_us": 1e6, "backend": "cpu"}
    layer._show_published([row])
    printed = capsys.readouterr().out
    assert "published, the same workload (128 tokens, 7168, top-8, 8 ranks)" in printed
    assert "| moe_triton, this run |" in printed and "| 900.0 us | 1000.00 ms |" in printed
    assert "DeepEP V1 low latency" in printed
    assert "| 16 |" not in printed, "rows of 16 ranks are another workload"


def test_wrong_sums_are_not_timed(monkeypatch):
    def wrong(out, x, weights, quant):
        check(out + 1, x, weights, quant)

    check = layer_cases.check_sums
    monkeypatch.setattr(layer_cases, "check_sums", wrong)
    with pytest.raises(AssertionError, match="sums of combine differ"):
        bench("--ranks", "1", "--tokens", "3")


def test_a_missing_package_names_its_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--plot", str(tmp_path / "layer.svg")) == 2
    assert "pip install 'moe_triton[bench]'" in capsys.readouterr().err
    with pytest.raises(extras.MissingPackageError, match=r"moe_triton\[transformers\]"):
        extras.require("no_such_package", "this", "transformers")


@pytest.mark.parametrize("text", ["", "no JSON", "[1, 2]", '{"a": 1}', "[" * 100_000])
def test_a_file_without_results_is_refused_before_measuring(text, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text(text, encoding="utf-8")
    assert bench("--compare", str(path)) == 2
    assert f"{path} must hold JSON lines of a bench" in capsys.readouterr().err
    assert bench("--compare", str(tmp_path / "absent")) == 2


def test_compared_pairs_the_cases_of_both_runs():
    row = {"bench": "layer", "tokens": 1, "dispatch_us": 2.0, "dispatch_iqr_us": 1.0, "samples": 3}
    (pair,) = comparison.compared(
        [row, row | {"tokens": 2}], [row | {"dispatch_us": 4.0}, row | {"tokens": 3}]
    )
    assert (pair.measure, pair.this, pair.other) == ("dispatch_us", 2.0, 4.0)
    cells = [cell(pair) for cell in comparison.COLUMNS.values()]
    assert cells == ["tokens 1", "dispatch_us", "2", "4", "0.50"]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.full
def test_torchrun(tmp_path):
    path = tmp_path / "layer.jsonl"
    command = [sys.executable, *TORCHRUN, "-m", "moe_triton", "bench", "layer", *SMALL]
    done = subprocess.run(
        [*command, "--tokens", "3", "--json", path],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dispatch and combine: back end cpu") == 1, "only rank 0 prints"
    (row,) = rows_of(path)
    assert (row["ranks"], row["tokens"]) == (2, 3)


COUNT = """
import torch
import moe_triton
from moe_triton.bench import launches, models, layer, ranks
moe_triton.set_backend("interpret")
case = layer.Case(models.Shape("tiny", 32, 4, 2), 2, 1, None, "interpret", "auto", 2, 0.01)
measured = layer.measure(ranks.Rank(0, 1, None, torch.device("cpu")), case)
print(measured.backend, measured.launches)
with launches.counted(replaced=True) as count:
    from moe_triton import kernels
    x = torch.full((2, 4), 7.0)
    kernels.zero_padding(x, torch.tensor([-1, 0]))
assert count.value == 1 and (x == 7).all(), "the launch was not replaced"
"""


def test_launches_are_counted():
    done = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    backend, counts = done.stdout.strip().split(" ", 1)
    assert backend == "interpret"
    assert counts == "{'dispatch': 2, 'combine': 1}"

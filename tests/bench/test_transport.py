"""``bench transport``: checked sums, chosen shapes, files, and the ranks of torchrun."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_triton.bench import transport
from moe_triton.cli import main

RESULTS = Path(__file__).resolve().parents[2] / "bench/results"
SMALL = ["--hidden", "64", "--experts", "8", "--top-k", "2", "--tokens", "3", "--samples", "2"]


def cases(*options: str):
    parser = argparse.ArgumentParser()
    transport.add_arguments(parser)
    return [*transport._cases(parser.parse_args(options))]


def test_options_choose_shapes():
    assert [(quant, shape["tokens"]) for quant, shape in cases()] == [
        (quant, tokens) for quant, tokens, _ in transport.CASES
    ]
    deepseek = {"hidden": 7168, "top_k": 8, "experts": 256}
    assert cases("--preset", "deepseek-v3", "--quant", "bf16", "int8", "--tokens", "8") == [
        (None, {"tokens": 8, **deepseek}),
        ("int8", {"tokens": 8, **deepseek}),
    ]
    assert [shape["tokens"] for _, shape in cases("--preset", "mixtral")] == [1, 8, 64]
    assert cases("--tokens", "5") == [(None, {"tokens": 5, **transport.DECODE})]


def test_a_run_with_a_plot_and_another_beside_it(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    path, picture = tmp_path / "transport.jsonl", tmp_path / "transport.svg"
    recorded = {file: file.read_bytes() for file in RESULTS.rglob("*") if file.is_file()}
    command = ["bench", "transport", "--world-size", "2", *SMALL]
    assert main([*command, "--json", str(path), "--plot", str(picture)]) == 0
    (row,) = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert (row["world_size"], row["tokens"], row["payload"]) == (2, 3, "bf16")
    assert min(row[f"{name}_ms"] for name in ("by_hand", "shm", "collective", "copy")) > 0
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    capsys.readouterr()
    assert main([*command, "--compare", str(path)]) == 0
    assert "shm_ms" in capsys.readouterr().out
    # Without --record the results that are committed stay.
    assert recorded == {file: file.read_bytes() for file in RESULTS.rglob("*") if file.is_file()}


def test_wrong_sums_are_not_timed():
    x, weights = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 2)
    transport.check(2 * x, x, weights, None)
    with pytest.raises(AssertionError):
        transport.check(x, x, weights, None)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.full
def test_torchrun(tmp_path):
    path = tmp_path / "transport.jsonl"
    done = subprocess.run(
        [
            sys.executable,
            *TORCHRUN,
            "-m",
            "moe_triton",
            "bench",
            "transport",
            *SMALL,
            "--json",
            path,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W 2, 3 tokens, hidden 64") == 1, "only rank 0 prints"
    (row,) = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert row["world_size"] == 2


@pytest.mark.parametrize("bench", ["kernels", "host", "load", "device", "overlap"])
def test_benches_of_one_process_refuse_torchrun(monkeypatch, capsys, bench):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as stopped:
        main(["bench", bench])
    assert stopped.value.code == 2
    assert "must run without torchrun, got WORLD_SIZE=4" in capsys.readouterr().err

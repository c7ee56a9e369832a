"""``bench kernels`` without a GPU: dry run, byte counts, tables."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import moe_triton
from moe_triton.bench import (
    gpu_timing,
    kernel_cases,
    kernel_peers,
    kernel_plot,
    kernels,
    layer_cases,
    models,
    results,
    tables,
)
from moe_triton.kernels import launch_config
from moe_triton.layout import RowFormat


@pytest.fixture(autouse=True)
def backend():
    yield
    moe_triton.set_backend(None)  # a dry run chose one


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(arguments)


def test_dry_run(tmp_path):
    out = tmp_path / "kernels.jsonl"
    command = [sys.executable, "-m", "moe_triton", "bench", "kernels", "--dry-run"]
    done = subprocess.run(
        [*command, "--tokens", "5", "--json", out],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no times" in done.stdout
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    kernels = {row["kernel"].split()[0] for row in rows}
    steps = {
        "routing_plan",
        "gather_quant",
        "weighted_sum",
        "gather_rows",
        "top_k_gating",
    }
    assert kernels == steps | {"dispatch", "combine"}
    assert {row["world_size"] for row in rows} == {1, 2}
    assert {row["implementation"] for row in rows} == {"moe_triton", "pytorch"}
    assert all(row["dry_run"] for row in rows)
    assert not any(name.endswith(("_us", "gb_s", "share_of_copy")) for row in rows for name in row)


def test_a_wrong_kernel_has_no_results(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def short(x, index, fmt, smooth_scales, ids, out, scales=None):
        out.view(torch.uint8)[:-1] = 0

    monkeypatch.setattr(kernel_cases.kernels, "gather_quant", short)
    status = kernels.run(parsed("--dry-run", "--only", "gather_quant bf16", "--tokens", "5"))
    printed = capsys.readouterr().out
    assert status == 1
    assert "WRONG: gather_quant bf16, tiny, 5 tokens, moe_triton" in printed
    assert "0 checks passed" in printed


def test_formulas_are_those_of_the_docstrings():
    for kernel, formula in kernel_cases.FORMULAS.items():
        name = "gating" if kernel == "top_k_gating" else kernel
        source = importlib.import_module(f"moe_triton.kernels.{name}").__doc__
        assert formula in " ".join(source.split()), kernel


def test_bytes_of_deepseek():
    """4096 tokens of 7168, top-8 of 256, by hand."""
    shape, tokens = models.PRESETS["deepseek-v3"], 4096
    rows, token_bytes = 4096 * 8, 4096 * 7168 * 2

    def fmt(quant):
        return RowFormat.quantized(quant, torch.bfloat16, 7168)

    for quant, row in (
        (None, 14336),
        ("int8", 7168 + 4),
        ("group_e4m3", 7168 + 56 * 4),
        ("mx_e4m3", 7168 + 224),
    ):
        assert (
            kernel_cases.gather_quant_bytes(shape, tokens, fmt(quant)) == token_bytes + rows * row
        )
    assert kernel_cases.weighted_sum_bytes(shape, tokens, normalised=False) == 9 * token_bytes
    assert kernel_cases.weighted_sum_bytes(shape, tokens, normalised=True) == 11 * token_bytes
    how = launch_config.PlanLaunch(False, 256, 16, 16, 1056, 4)
    assert kernel_cases.routing_plan_bytes(shape, tokens, how) == rows * 16 + 128 * 256 * 12
    few = launch_config.PlanLaunch(True, 16, 128, 16, 1056, 4)
    assert kernel_cases.routing_plan_bytes(shape, 128, few) == 1024 * 4 * 64


def test_bytes_of_whole_layers():
    shape, tokens, row = models.PRESETS["deepseek-v3"], 128, 7168 * 2
    assert layer_cases.layer_bytes(shape, tokens, 1, None) == (9 * tokens * row, 9 * tokens * row)
    pushed = tokens * (row + 7184) + tokens * 8 * 16 + 4 * (16 + 4 * 257)
    packed = 2 * tokens * 8 * (7168 + 4)
    assert layer_cases.layer_bytes(shape, tokens, 4, "int8") == (
        4 * (pushed + packed),
        4 * (9 + 2 * 8) * tokens * row,
    )


@pytest.mark.parametrize(
    "facts, printed",
    [
        ({"target_share": 0.85, "share_of_copy": 0.9}, "met: {}: 90% of the"),
        ({"target_share": 0.85, "share_of_copy": 0.8}, "MISSED: {}: 80% of"),
        ({"target_us": 9, "graph_us": 8.8, "eager_us": 20}, "met: {}: 8.8 us"),
        ({"target_us": 9, "eager_us": 20}, "MISSED: {}: 20.0 us"),
    ],
)
def test_targets(facts, printed):
    (line,) = kernels.targets({"kernel": "weighted_sum", "tokens": 8, "model": "M"} | facts)
    assert line.startswith("target " + printed.format("weighted_sum, 8 tokens of M"))


class Event:
    """A clock that advances 2 microseconds per recorded event."""

    ticks = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.ticks += 2
        self.at = Event.ticks

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e3


class Graph:
    """Counts replays."""

    replays = 0

    def replay(self):
        Graph.replays += 1


class Scope:
    """A context and a stream that do nothing."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *caught):
        return False

    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda():
    """The part of torch.cuda that a timer uses."""
    return SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1000),
        Event=Event,
        CUDAGraph=Graph,
        Stream=Scope,
        current_stream=Scope,
        stream=Scope,
        graph=Scope,
        synchronize=lambda: None,
    )


def test_timer(cuda, monkeypatch):
    monkeypatch.setattr(gpu_timing, "OTHER_BYTES", 64)
    timer = gpu_timing.Timer(torch.device("cpu"), cuda, seconds=0.01)
    assert [timer.num_sets(n) for n in (1, 300, 10**9, 2**34)] == [32, 10, 2, 2]
    seen = []
    calls = [lambda number=number: seen.append(number) for number in range(4)]
    eager = timer.eager(calls)
    assert eager.median == pytest.approx(2)
    assert eager.spread == pytest.approx(0)
    assert eager.samples >= gpu_timing.FEWEST
    assert set(seen) == set(range(4)), "all sets take their turn"
    replays = Graph.replays
    graph = timer.graph(calls)
    assert graph.median == pytest.approx(0.5), "the time of one call of four"
    assert Graph.replays - replays > graph.samples
    assert timer.copy(10**4).median == pytest.approx(1), "two sets"
    assert timer.host(calls) > 0


def test_figures_become_tables_and_a_plot(cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_timing, "OTHER_BYTES", 64)
    timer = gpu_timing.Timer(torch.device("cpu"), cuda, seconds=0.01)
    facts = kernels.figures(timer, 6000, [lambda: None] * 2)
    assert facts["graph_us"] == pytest.approx(1)
    assert facts["gb_s"] == pytest.approx(6)
    assert facts["share_of_copy"] == pytest.approx(1)
    rows = [
        {
            "kernel": "weighted_sum",
            "model": model,
            "tokens": tokens,
            "implementation": name,
            **facts,
        }
        | {"device": "a GPU", "world_size": 1}
        for model in ("one", "other")
        for tokens in (8, 128, 4096)
        for name in ("moe_triton", "pytorch")
        if name == "moe_triton" or (model, tokens) == ("one", 4096)
    ]
    markdown = tables.kernels(rows)
    assert "| weighted_sum | 1 | 4096 | 1.0, 100% | 1.0, 100% |" in markdown
    assert "| kernel | ranks | tokens | ours | pytorch | torch.compile |" in markdown
    assert "| weighted_sum | 1 | 4096 | 1.0 | 1.0 |  |" in markdown
    assert "| 8 |" not in markdown
    pytest.importorskip("matplotlib", reason="plots are an extra")
    path = tmp_path / "kernels.png"
    kernel_plot.plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_with_times(cuda, monkeypatch, tmp_path, capsys):
    """With a fake device: order of cases, timing, cases left out, and printed tables."""
    moe_triton.set_backend("interpret")
    monkeypatch.setattr(gpu_timing, "OTHER_BYTES", 64)
    monkeypatch.setattr(gpu_timing, "MOST_SETS", 2)
    monkeypatch.setattr(gpu_timing, "FEWEST", 2)
    timer = functools.partial(gpu_timing.Timer, cuda=cuda, seconds=0.0)
    monkeypatch.setattr(gpu_timing, "Timer", timer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(kernels, "device_uuid", lambda device: None)
    monkeypatch.setattr(kernels, "RANKS", 2)
    monkeypatch.setattr(kernels, "FIRST_TOKENS", (3,))
    kind = "gather_quant bf16"
    monkeypatch.setattr(kernel_cases, "KINDS", {kind: kernel_cases.KINDS[kind]})
    shapes = [kernel_cases.TINY._replace(model=model) for model in (kernels.FIRST_MODEL, "other")]
    monkeypatch.setattr(models, "chosen", lambda _: shapes)
    out = tmp_path / "kernels.jsonl"
    options = parsed("--tokens", "1", "3", "--only", "quant bf16", "--json", str(out))
    options.device = torch.device("cpu")
    monkeypatch.setattr(kernel_peers, "NAMES", ("pytorch",))
    run = kernels.Run(options)
    run.all()
    run.summary()
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert not run.wrong
    assert len(rows) == len(run.rows)
    assert rows[0]["tokens"] == 3, "the most telling first"
    assert all(row["graph_us"] > 0 and row["share_of_copy"] > 0 for row in rows)
    of_peers = {(row["model"], row["tokens"]) for row in rows if row["implementation"] == "pytorch"}
    assert of_peers == {(kernels.FIRST_MODEL, 3)}
    printed = capsys.readouterr().out
    assert f"| kernel | ranks | tokens | {kernels.FIRST_MODEL} | other |" in printed
    options.only = "combine bf16"
    whole = kernels.Run(options)
    whole.layer("a layer", shapes[0], 2, 2, "int8")
    assert {row["kernel"] for row in whole.rows} == {"dispatch int8", "combine int8"}
    options.seconds = 0
    whole.all()
    assert len(whole.rows) == 2
    assert whole.left_out == 2 * 3


def test_a_call_that_cannot_be_captured_has_its_eager_time(cuda, monkeypatch):
    monkeypatch.setattr(gpu_timing, "OTHER_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = gpu_timing.Timer(torch.device("cpu"), cuda, seconds=0.01)
    timer.copy(6000)

    def refuse(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    timer.graph = refuse
    facts = kernels.figures(timer, 6000, [lambda: None] * 2)
    assert "not permitted" in facts["no_graph"]
    assert facts["gb_s"] == pytest.approx(3)


def test_clocks_without_a_gpu_are_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", "")
    assert gpu_timing.Clocks().read() == {"clocks_from": "unknown"}


def test_results_need_neither_git_nor_an_installation(monkeypatch):
    monkeypatch.delenv("MOE_TRITON_REVISION", raising=False)
    monkeypatch.setenv("PATH", "")
    facts = results.machine()
    assert facts["revision"] == "unknown"
    assert facts["moe_triton"] == moe_triton.__version__
    monkeypatch.setenv("MOE_TRITON_REVISION", "abc")
    assert results.machine()["revision"] == "abc"


def test_transformer_engine_is_loaded_from_two_files(tmp_path):
    """No other file of the package runs."""
    for name in ("common", "pytorch"):
        folder = tmp_path / f"transformer_engine/{name}/triton"
        folder.mkdir(parents=True)
        (tmp_path / f"transformer_engine/{name}/__init__.py").write_text("raise ImportError")
    (tmp_path / "transformer_engine/common/triton/permutation.py").write_text("kernel = 5\n")
    (tmp_path / "transformer_engine/pytorch/triton/permutation.py").write_text(
        "from transformer_engine.common.triton.permutation import kernel\n"
    )
    try:
        names = kernel_peers.Peers(tmp_path, ("transformer_engine", "triton_kernels"))
        assert names.missing.keys() == {"triton_kernels"}
        assert sys.modules["transformer_engine.pytorch.triton.permutation"].kernel == 5
    finally:
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]

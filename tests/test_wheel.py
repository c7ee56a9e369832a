"""The wheel, installed where there is no checkout: what it holds, and the commands from it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DUMP = ROOT / "tests/compare/data/msprobe_dump"

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", folder, tree], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_the_package_only(wheel):
    """The links at the root must not become top-level packages of whoever installs this."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"moe_triton"}
    package = ROOT / "moe_triton"
    files = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    assert "moe_triton/record/startup/sitecustomize.py" in files
    missing = {*files, "moe_triton/py.typed", "moe_triton/bench/published.jsonl"} - set(names)
    assert not missing


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The scripts of an environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    # The folders of packages alone: not the checkout, to which this environment may have a link.
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    assert sysconfig.get_path("purelib") in packages
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(packages) + "\n", encoding="utf-8")
    return folder / "venv/bin"


@pytest.fixture
def run(installed, tmp_path):
    """Run a command of the installation in another folder; returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def command(name: str, *arguments: object) -> str:
        done = subprocess.run(
            [installed / name, *map(str, arguments)],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = command("python", "-c", "import moe_triton; print(moe_triton.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)
    return command


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_bench_layer(run, tmp_path):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    before = cpu_seconds()
    options = ["--preset", "deepseek-v3", "--tokens", 1, 8, 64, "--quick"]
    printed = run("moe-triton", "bench", "layer", *options, "--plot", "layer.svg")
    # Two minutes of two cores, whatever else runs on them.
    assert cpu_seconds() - before < 2 * 120
    assert printed.count("| DeepSeek-V3 |") == 3
    assert (tmp_path / "layer.svg").read_text(encoding="utf-8").startswith("<?xml")
    printed = run("moe-triton", "bench", "--published")
    assert "DeepEP V1 low latency" in printed


SMALL = ["--hidden", 64, "--experts", 8, "--top-k", 2, "--samples", 3]


@pytest.mark.parametrize(
    "bench, options",
    [("host", [*SMALL, "--rounds", 2]), ("transport", [*SMALL, "--tokens", 3, "--world-size", 2])],
)
def test_benches_with_a_plot_and_another_run_beside(run, tmp_path, bench, options):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    command = ["moe-triton", "bench", bench, *options]
    run(*command, "--json", "first.jsonl", "--plot", "plot.svg")
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert "this run beside first.jsonl" in run(*command, "--compare", "first.jsonl")


def test_bench_kernels(run):
    options = ["--dry-run", "--tokens", 5, "--only", "weighted_sum"]
    assert "checks passed on a CPU" in run("moe-triton", "bench", "kernels", *options)


def test_compare(run, tmp_path):
    shutil.copytree(DUMP, tmp_path / "dump")
    printed = run("moe-triton", "compare", "dump", "--html", "report.html")
    assert "OK  6 outputs of 2 calls: 6 in rule" in printed
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


SCRIPT = """
import torch
from torch.multiprocessing import spawn


def run(rank, name):
    import torch.distributed as dist
    from moe_triton.compat import torch_npu

    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{name}")
    x = torch.full((3, 32), rank + 1.0, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]], dtype=torch.int32)
    torch_npu.npu_moe_distribute_dispatch_v2(x, ids, dist.group.WORLD, 2, rank, 4)
    dist.destroy_process_group()


if __name__ == "__main__":
    import os

    spawn(run, (os.path.abspath("store"),), nprocs=2)
"""


@pytest.mark.parametrize(
    "command", [("moe-triton", "record"), ("python", "-m", "moe_triton.record")]
)
def test_record_of_processes_that_a_script_starts(run, tmp_path, command):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    run(*command, "-o", "record", "script.py")
    printed = run("moe-triton", "compare", "record")
    assert "2 ranks, BS 3, H 32, K 2, E 4" in printed
    assert "OK  4 outputs of 1 call: 4 in rule" in printed

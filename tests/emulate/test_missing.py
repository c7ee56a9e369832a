"""``npu-run --list-missing``: it runs on, and lists what was asked for, with the lines."""

from __future__ import annotations

import pytest

_SCRIPT = """\
import torch, torch_npu
from torch_npu import npu_first; from torch_npu.contrib import transfer_to_npu
import torch_npu.deep.inside
from torch_npu.elsewhere import thing

x = torch.ones(2).npu()
y, scale = torch_npu.npu_second(x, k=1)
z = torch.cat([2 * y[0] + 1, x]).float() * scale
print(hasattr(torch_npu, "npu_third"), getattr(torch_npu, "npu_fourth", "default"))
torch.ops.npu.npu_fifth(z)
graph = torch.npu.NPUGraph()
with torch.npu.graph(graph):
    torch.npu.sixth()
npu_first(x)
print("end of", z)
if len(__import__("sys").argv) > 1:
    print(bool(z))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(_SCRIPT)
    return path


def missing(run):
    """The names that a run lists, with their places."""
    lines = run.err.splitlines()
    start = next(i for i, line in enumerate(lines) if "names were asked for" in line)
    count = int(lines[start].split()[2])
    assert len(lines) == start + 1 + count
    return dict(line.strip().split(": ") for line in lines[start + 1 :])


def test_runs_on_and_lists_names_with_their_lines(npu_run, script):
    run = npu_run("--list-missing", script)
    assert run.status == 0, run.err
    assert run.out == "False default\nend of <torch_npu.npu_second, which is not emulated>\n"
    lines = {
        "torch_npu.npu_first": 2,
        "torch_npu.deep": 3,
        "torch_npu.deep.inside": 3,
        "torch_npu.elsewhere": 4,
        "torch_npu.elsewhere.thing": 4,
        "torch_npu.npu_second": 7,
        "torch_npu.npu_third": 9,
        "torch_npu.npu_fourth": 9,
        "torch.ops.npu.npu_fifth": 10,
        "torch.npu.NPUGraph": 11,
        "torch.npu.graph": 12,
        "torch.npu.sixth": 13,
    }
    assert missing(run) == {name: f"{script}:{line}" for name, line in lines.items()}


def test_a_value_that_is_needed_ends_the_script_and_the_list_is_printed(npu_run, script):
    run = npu_run("--list-missing", script, "bool")
    assert run.status == 1
    assert "NotEmulatedError: torch_npu.npu_second: is not emulated" in run.err
    assert len(missing(run)) == 12


_MANY = """
import multiprocessing, torch_npu

def ask(_):
    torch_npu.npu_absent

if __name__ == "__main__":
    for _ in range(2):
        torch_npu.npu_absent
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(ask, range(4))
"""


def test_each_place_is_listed_once_over_all_processes(npu_run, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(_MANY)
    run = npu_run("--list-missing", path)
    assert missing(run) == {"torch_npu.npu_absent": f"{path}:9, {path}:5"}


def test_without_the_option_the_first_name_ends_the_script(npu_run, script):
    run = npu_run(script)
    assert run.status == 1
    assert "cannot import name 'npu_first' from 'torch_npu'" in run.err
    assert "names were asked for" not in run.err


def test_nothing_missing(npu_run, tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import torch_npu")
    assert missing(npu_run("--list-missing", path)) == {}

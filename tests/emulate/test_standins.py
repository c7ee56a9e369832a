"""Scripts written for Ascend run under npu-run."""

from __future__ import annotations

import re

import pytest


@pytest.fixture(autouse=True)
def _rendezvous_port(port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(port))


@pytest.mark.parametrize(
    "script, ranks",
    [
        ("fork.py", 4),
        ("spawn.py", 2),
        ("graph.py", 2),
        ("v2.py", 2),
        ("split_phase.py", 2),
        ("local_ops.py", 1),
        ("all_to_all_layer.py", 2),
        ("cuda_program.py", 1),
    ],
    ids=lambda value: value,
)
def test_script(npu_run, port, script, ranks):
    run = npu_run(script, str(port))
    assert run.status == 0, run.err
    assert run.out.count("npu finished!") == ranks
    assert "Traceback" not in run.err
    assert run.err.count("stand-ins") == 1


@pytest.mark.parametrize(
    "script, outcome",
    [
        pytest.param("unittest_operator.py", r"Ran 3 tests .* OK \(skipped=1\)", id="operator"),
        pytest.param("unittest_device.py", r"Ran \d\d tests .* OK\n$", id="device"),
        pytest.param("unittest_standins.py", r"Ran \d\d tests .* OK\n$", id="standins"),
    ],
)
def test_unittest(npu_run, script, outcome):
    run = npu_run(script)
    assert run.status == 0, run.err
    text = " ".join(run.err.split()) + "\n"
    assert re.search(outcome, text), run.err


_IMPORTS = """
import accelerate
import transformers
from transformers import Qwen3MoeForCausalLM, Trainer
print(transformers.utils.is_torch_npu_available(), accelerate.utils.is_npu_available())
"""


def test_libraries_that_look_for_torch_npu_can_be_imported(npu_run, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = tmp_path / "script.py"
    path.write_text(_IMPORTS)
    run = npu_run("--list-missing", path)
    assert (run.status, run.out) == (0, "True True\n"), run.err
    assert "0 names were asked for" in run.err

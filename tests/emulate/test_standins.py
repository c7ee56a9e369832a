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
    ],
)
def test_unittest(npu_run, script, outcome):
    run = npu_run(script)
    assert run.status == 0, run.err
    text = " ".join(run.err.split()) + "\n"
    assert re.search(outcome, text), run.err

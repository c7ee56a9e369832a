"""DeepEP's own test scripts, unmodified, over this interface.

They need a checkout of DeepEP 2.1 (commit dd758caf) or, for ``ep``, 2.5 (1a1ffbac), and take
minutes each; tests of scripts that the checkout does not have are skipped:

    MOE_TRITON_DEEPEP_SUITE=<checkout> pytest tests/compat/deep_ep/test_suite.py
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from moe_triton.cli import main

CHECKOUT = os.environ.get("MOE_TRITON_DEEPEP_SUITE")
HARNESS = Path(__file__).parents[2] / "support" / "deep_ep_suite.py"

pytestmark = pytest.mark.skipif(
    CHECKOUT is None, reason="MOE_TRITON_DEEPEP_SUITE does not name a checkout of DeepEP"
)

LOW_LATENCY = ("legacy/test_low_latency.py", "--num-tokens", "16", "--hidden", "1024")
INTRANODE = ("legacy/test_intranode.py", "--num-tokens", "64", "--hidden", "256")
EP = ("ep/test_ep.py", "--num-tokens", "16", "--hidden", "128", "--skip-perf-test")
ELASTIC = ("elastic/test_ep.py", "--num-tokens", "16", "--hidden", "128", "--skip-perf-test")


def run(capfd, ranks, script, *arguments):
    assert CHECKOUT is not None
    path = Path(CHECKOUT) / "tests" / script
    if not path.exists():
        pytest.skip(f"the checkout has no {script}")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(port))
        sizes = ["--num-processes", str(ranks), "--num-experts", str(max(8, 2 * ranks))]
        command = ["deep-ep-run", str(HARNESS), CHECKOUT, str(path), *sizes, "--num-topk", "3"]
        status = main([*command, *arguments])
    out, err = capfd.readouterr()
    assert status == 0, err[-3000:]
    return out


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_low_latency(capfd, ranks):
    out = run(capfd, ranks, *LOW_LATENCY)
    assert out.count("Dispatch send/recv time") == ranks


def test_low_latency_with_logfmt(capfd):
    run(capfd, 2, *LOW_LATENCY, "--use-logfmt")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_intranode(capfd, ranks):
    assert run(capfd, ranks, *INTRANODE).count("passed") == 24


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_elastic(capfd, ranks):
    out = run(capfd, ranks, *ELASTIC, "--masked-ratio", "0.2", "--deterministic")
    assert out.count("> Testing with") == 144


@pytest.mark.parametrize("option", ["--do-cpu-sync", "--allow-multiple-reduction"])
def test_elastic_without(capfd, option):
    assert run(capfd, 2, *ELASTIC, option, "0").count("> Testing with") == 144


@pytest.mark.parametrize("deferred, cases", [("1", 36), ("0", 72)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ep(capfd, ranks, deferred, cases):
    options = ("--masked-ratio", "0.2", "--deterministic", "--defer-epilogue", deferred)
    assert run(capfd, ranks, *EP, *options).count("> Testing with") == cases

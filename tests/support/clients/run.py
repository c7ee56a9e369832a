"""Run the suites of Ascend programs through npu-run, and print a table of what passed.

    python tests/support/clients/run.py CHECKOUTS [SUITE ...] [--vllm-python PATH]

CHECKOUTS is a folder with a checkout of each client under its repository's name. A suite whose
checkout, or whose Python with vLLM, is not there is reported as skipped. docs/ascend_suites.md has
the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
_RANKS = ("--num-processes", "4", "--num-tokens", "16", "--hidden", "512")
_EXPERTS = ("--num-topk", "4", "--num-experts", "16")
_LIMIT = 3600  # seconds for one suite


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of a client.

    Attributes:
        name: for the command line and the table.
        client: the repository's name.
        command: what npu-run runs.
        folder: where, below the checkout.
        path: what PYTHONPATH gets, below the checkout.
        environment: further variables.
        needs_vllm: whether it runs in the Python that has vLLM.
    """

    name: str
    client: str
    command: tuple[str, ...]
    folder: str = "."
    path: tuple[str, ...] = (".",)
    environment: tuple[tuple[str, str], ...] = ()
    needs_vllm: bool = False


_OP_PLUGIN = "test/test_custom_ops"


def _op_plugin(test: str) -> Suite:
    return Suite(f"op-plugin {test}", "op-plugin", (f"{test}.py",), _OP_PLUGIN, ())


def _version_1(test: str, case: str) -> Suite:
    """The one case of a file for A2 that does not look into version 2's assist_info_for_combine.

    The documents leave the words of that tensor open.
    """
    return Suite(f"op-plugin {test}, v1", "op-plugin", (f"{test}.py", case), _OP_PLUGIN, ())


def _unskipped(test: str) -> Suite:
    command = (str(HERE / "unskipped.py"), f"{test}.py")
    return Suite(f"op-plugin {test}, no skips", "op-plugin", command, _OP_PLUGIN, ())


def _deep_ep(name: str, mode: str, *command: str) -> Suite:
    return Suite(
        f"sgl-kernel-npu {name}",
        "sgl-kernel-npu",
        (*command[:1], *_RANKS, *_EXPERTS, *command[1:]),
        "tests/python/deepep",
        ("python/deep_ep", "tests/python/deepep"),
        (("DEEP_USE_MODE", mode),),
    )


_OPS = ("test_low_latency.py", "--low-latency-strategy", "ops")
_PYTEST_OPTIONS = ("-p", "no:cacheprovider", "--noconftest", "-p", "vllm_ascend_unit")
_UNIT_TESTS = (
    *("tests/ut/ops/a2/test_token_dispatcher.py", "tests/ut/ops/test_moe_comm_method.py"),
    *("tests/ut/ops/test_eplb.py", "tests/ut/eplb", "tests/ut/distributed/test_eplb_state.py"),
    "tests/ut/distributed/test_eplb_communicator.py",
)

SUITES = (
    *map(
        _op_plugin,
        (
            "test_moe_distribute_dispatch",
            "test_moe_distribute_combine",
            "test_moe_update_expert",
            "test_npu_moe_compute_tokens",
            "test_npu_moe_finalize_routing_v2",
            "test_npu_moe_gating_top_k_softmax",
            "test_npu_moe_gating_top_k_softmax_v2",
            "test_npu_moe_gating_topk",
            "test_npu_moe_gating_top_k_backward",
            "test_npu_moe_init_routing",
            "test_npu_moe_init_routing_quant",
            "test_npu_moe_init_routing_v2",
            "test_npu_moe_token_permute_and_unpermute",
            "test_npu_moe_token_permute_and_unpermute_backward",
            "test_npu_moe_token_permute_with_routing_map",
            "test_npu_moe_token_unpermute_with_routing_map",
        ),
    ),
    _version_1(
        "test_moe_distribute_dispatchA2",
        "TestMoeDistributeDispatch.test_npu_moe_distribute_dispatch",
    ),
    _version_1(
        "test_moe_distribute_combineA2", "TestMoeDistributeCombine.test_npu_moe_distribute_combine"
    ),
    *map(
        _unskipped,
        (
            "test_npu_moe_gating_top_k_backward",
            "test_npu_moe_token_permute_with_routing_map",
            "test_npu_moe_token_unpermute_with_routing_map",
        ),
    ),
    _deep_ep("test_low_latency bf16", "ops", *_OPS),
    _deep_ep("test_low_latency int8", "ops", *_OPS, "--quant-type", "int8"),
    _deep_ep("test_low_latency dynamic", "ops", *_OPS, "--enable-dynamic-tokens"),
    _deep_ep("test_ll_alltoall bf16", "alltoall", "test_ll_alltoall.py"),
    _deep_ep("test_ll_alltoall int8", "alltoall", "test_ll_alltoall.py", "--quant-type", "int8"),
    _deep_ep("test_normal_alltoall bf16", "alltoall", "test_normal_alltoall.py"),
    _deep_ep(
        "test_normal_alltoall int8", "alltoall", "test_normal_alltoall.py", "--quant-type", "int8"
    ),
    Suite("MindSpeed", "MindSpeed", (str(HERE / "mindspeed_layers.py"),)),
    *(
        Suite(
            f"vllm-ascend layers {product}",
            "vllm-ascend",
            (str(HERE / "vllm_ascend_layers.py"), product),
            needs_vllm=True,
        )
        for product in ("A2", "A3", "A5")
    ),
    Suite(
        "vllm-ascend unit tests",
        "vllm-ascend",
        ("-m", "pytest", "-q", *_PYTEST_OPTIONS, *_UNIT_TESTS),
        needs_vllm=True,
    ),
)


def count(output: str, status: int) -> tuple[int, int, int]:
    """Tests that passed, failed and were skipped, from what unittest, pytest or our suites print.

    A program that prints no counts is one test, by its exit status.
    """
    lines = re.findall(r"^(PASS|FAIL) ", output, re.MULTILINE)
    if lines:
        return lines.count("PASS"), lines.count("FAIL"), 0
    if match := re.search(r"^Ran (\d+) tests?", output, re.MULTILINE):
        summary = re.search(r"^(?:OK|FAILED)(?: \((.*)\))?$", output, re.MULTILINE)
        counts = dict(re.findall(r"(\w+)=(\d+)", summary[1] or "" if summary else ""))
        failed = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
        skipped = int(counts.get("skipped", 0))
        return max(0, int(match[1]) - failed - skipped), failed, skipped
    if summary := re.search(r"^.*\d+ (?:passed|failed|errors?)\b.* in .*$", output, re.MULTILINE):
        passed, failed, skipped = (
            sum(int(n) for n in re.findall(rf"(\d+) (?:{words})\b", summary[0]))
            for words in ("passed", "failed|errors?", "skipped")
        )
        return passed, failed, skipped
    return int(status == 0), int(status != 0), 0


def run(suite: Suite, checkouts: Path, vllm_python: str | None, logs: Path) -> str:
    """Run a suite; returns its row of the table."""
    checkout = checkouts / suite.client
    if not (checkout / suite.folder).is_dir():
        return f"| {suite.name} | skipped: no checkout {checkout} | | | |"
    if suite.needs_vllm and vllm_python is None:
        return f"| {suite.name} | skipped: needs --vllm-python | | | |"
    revision = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short=8", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    path = [str(checkout / part) for part in suite.path]
    environment = {
        **os.environ,
        **dict(suite.environment),
        "PYTHONPATH": os.pathsep.join([str(HERE / "stubs"), *path, str(ROOT)]),
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    python = vllm_python if suite.needs_vllm and vllm_python else sys.executable
    start = "import sys; from moe_triton.cli import main; sys.exit(main(sys.argv[1:]))"
    log = logs / f"{suite.name.replace(' ', '_')}.log"
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [python, "-c", start, "npu-run", "--list-missing", *suite.command],
            cwd=checkout / suite.folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            status = process.wait(_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"| {suite.name} | {revision} | stopped after {_LIMIT} s | | |"
    counts = " | ".join(map(str, count(log.read_text(encoding="utf-8"), status)))
    return f"| {suite.name} | {revision} | {counts} |"


def main() -> None:
    """Run the suites whose names begin with one of the arguments, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("suites", nargs="*", metavar="SUITE")
    parser.add_argument("--vllm-python", metavar="PATH", help="a Python with vLLM and this package")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "clients")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    print("| suite | revision | passed | failed | skipped |", flush=True)
    print("| --- | --- | --- | --- | --- |", flush=True)
    for suite in SUITES:
        if not arguments.suites or suite.name.startswith(tuple(arguments.suites)):
            row = run(suite, arguments.checkouts.resolve(), arguments.vllm_python, arguments.logs)
            print(row, flush=True)


if __name__ == "__main__":
    main()

"""Launches of an NPU compile, and fit its buffers, as far as that goes without CANN.

The quick run compiles the largest launch of each class, the long run all.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import page
import pytest
import recording
import triton_ascend_env
from lowering import TARGETS, loops_of, planned_bytes
from selection import class_of, largest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]

compiles = pytest.mark.skipif(
    triton_ascend_env.python("ascendnpuir") is None,
    reason="triton-ascend and ascendnpu-ir are not installed; `make test` tries to",
)


def compiled(launches: list[dict], targets: list[str]) -> list[dict]:
    """Facts of launches on some chips, from the compilers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [triton_ascend_env.python(), FOLDER / "lowering.py", ",".join(targets)],
        input="".join(f"{json.dumps(launch)}\n" for launch in launches),
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def launch_of(result: dict) -> dict:
    """The launch that a result is of."""
    return {key: result[key] for key in ("module", "kernel", "signature", "constants")}


def probe(kernel: str, *names: str) -> dict:
    """A launch of a kernel of ``probe_kernels``."""
    kinds = {name: "*i64" if name == "bases_ptr" else "*i32" for name in names}
    constants = {} if kernel == "exchange_kernel" else {"BLOCK": 16}
    return {"module": "probe_kernels", "kernel": kernel, "signature": kinds, "constants": constants}


def check(results: list[dict], targets: list[str]) -> None:
    """Every launch compiles and fits, with its buffers doubled."""
    for result in results:
        for name in targets:
            facts = result[name]
            launch = launch_of(result)
            assert not facts["error"], f"{name}: {launch}:\n{facts['error']}"
            assert not facts["rewritten"], f"{name}: {launch}: stores more than its mask"
            assert 0 < facts["bytes"] <= TARGETS[name].ub_bytes, f"{name}: {launch}: {facts}"
            # One expert of over 512 sources fills the buffer: the next one has to wait.
            wide = launch["kernel"] == "_groups_kernel" and launch["constants"]["EXPERTS"] == 1
            doubled = "auto-multi-buffer" not in facts["given_up"]
            assert doubled or wide, f"{name}: {launch}: {facts}"


@compiles
def test_the_largest_launch_of_each_class_fits():
    launches = page.launches()
    assert {launch["kernel"] for launch in launches} >= {"_encode_kernel", "_weighted_sum_kernel"}
    check(compiled(launches, ["Ascend910B3"]), ["Ascend910B3"])


@compiles
def test_the_largest_launch_of_each_kernel_fits_all_chips():
    """An A3 has the compiler, the instructions and the UB of a 910B."""
    results = compiled(largest(recording.read(), lambda launch: launch["kernel"]), [*TARGETS])
    check(results, [*TARGETS])
    for result in results:
        assert result["Ascend910B3"]["bytes"] == result["Ascend910_9392"]["bytes"]


@compiles
def test_what_compilers_refuse_or_make_other_than_it_says():
    """Parts of steps over windows, and a store. Once this fails, kernels may use them on NPUs."""
    launches = [
        probe("addresses_kernel", "bases_ptr", "out_ptr"),
        probe("word_kernel", "bases_ptr", "out_ptr"),
        probe("gather_numbers_kernel", "x_ptr", "index_ptr", "out_ptr"),
        probe("exchange_kernel", "out_ptr"),
        probe("masked_kernel", "out_ptr"),
    ]
    results = compiled(launches, ["Ascend910B3"])
    *refused, exchange, masked = (result["Ascend910B3"] for result in results)
    said = ("incorrect number of indices", "expected result type with offset = 0", "but got int32")
    for facts, words in zip(refused, said, strict=True):
        assert words in facts["error"]
    # No step of HIVM is left of the exchange, which sends a record.
    assert not exchange["error"]
    assert exchange["bytes"] == 0
    assert masked["rewritten"] == 1


@compiles
@pytest.mark.full
def test_all_launches_fit():
    """Also the page that says how much of the UB the largest take."""
    results = compiled(recording.read(), [*TARGETS])
    check(results, [*TARGETS])
    chosen = {json.dumps(launch) for launch in page.launches()}
    facts = [result for result in results if json.dumps(launch_of(result)) in chosen]
    written = page.PAGE.read_text(encoding="utf-8")
    assert page.text(facts, num_launches=len(results)) == written, "run page.py"


def test_the_list_fits_the_kernels():
    stale = [launch for launch in recording.read() if not recording.fits(launch)]
    assert not stale, f"run recording.py: {stale[0]}"


def test_the_list_has_the_launches_of_layers():
    recorded = {json.dumps(launch) for launch in recording.read()}
    missing = recording.of_cores(recording.CORES[0]) - recorded
    assert not missing, f"run recording.py: {next(iter(missing))}"


@pytest.mark.full
def test_the_list_has_the_launches_of_tests():
    recorded = {json.dumps(launch) for launch in recording.read()}
    found = set().union(*map(recording.of_file, recording.files()))
    found |= set().union(*map(recording.of_cores, recording.CORES))
    assert found == recorded, "run recording.py"


HIVM = """
    %c0_i64 = arith.constant 0 : i64
    %c4096_i64 = arith.constant 4096 : i64
    %c16 = arith.constant 16 : index
    %c0 = arith.constant 0 : index
    %c1 = arith.constant 1 : index
    %0 = hivm.hir.pointer_cast(%c0_i64) : memref<1x2048xbf16, #hivm.address_space<ub>>
    %1 = hivm.hir.pointer_cast(%c4096_i64) : memref<4x8xi32, strided<[16, 1]>, #hivm.address_space<ub>>
    %2 = hivm.hir.pointer_cast(%c4096_i64) : memref<9999xi32, #hivm.address_space<gm>>
    scf.for %arg0 = %arg1 to %arg2 step %c16 : i32 {
      scf.for %arg3 = %c0 to %c16 step %c1 {
        %3 = memref.load %1[%c0, %arg3] : memref<4x8xi32, strided<[16, 1]>, #hivm.address_space<ub>>
        %4 = arith.cmpi slt, %3, %3 : i32
      }
      scf.for %arg3 = %c0 to %c16 step %c1 {
        func.call @vadd() : () -> ()
      }
    }
"""  # noqa: E501 - as the compiler writes it


def test_the_largest_tile_of_each_class_is_chosen():
    kinds = {"x_ptr": "*bf16", "num": "i32"}
    sizes = [
        ("a", 16, True),
        ("a", 2048, True),
        ("a", 64, False),
        ("b", 2048, True),
        ("b", 64, True),
    ]
    constants = [dict(zip(("S", "B", "ADJACENT"), size, strict=True)) for size in sizes]
    launches = [{"kernel": "_k", "signature": kinds, "constants": these} for these in constants]
    chosen = [launch["constants"] for launch in largest(launches, class_of)]
    assert sorted(tuple(one.values()) for one in chosen) == [
        ("a", 64, False),
        ("a", 2048, True),
        ("b", 2048, True),
    ]


def test_the_planned_size_is_where_the_last_buffer_ends():
    assert planned_bytes(HIVM) == 4096 + (3 * 16 + 7 + 1) * 4


def test_loops_over_elements_are_counted():
    assert loops_of(HIVM) == {"16: cmpi, load": 1}

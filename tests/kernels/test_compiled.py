"""Every launch compiles for GPUs without having one, and its assembly keeps its promises.

The quick run compiles every case for two targets, and only the wide rows for the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import triton_ascend_env

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
WIDE_ACCESSES = ("v4.b32", "v2.b64", "v8.b32", "v4.b64", "dwordx4")  # 16 bytes, or 32
# Sums of squares and exponentials: no bits are promised.
MAY_CONTRACT = ("norm", "gating")
# A few registers: how many depends on the version of ptxas. More is a kernel that needs too many.
FEW_BYTES = 64
# Kernels that move rows, in accesses of 16 bytes.
ROW_KERNELS = {
    "_add_rows_kernel",
    "_affine_kernel",
    "_encode_kernel",
    "_finalize_kernel",
    "_gather_rows_kernel",
    "_weighted_sum_kernel",
}


def run(program: str, *arguments: str, interpreter=sys.executable, stdin: str = "") -> str:
    """Output of a program of this folder, without the interpreter of kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [interpreter, FOLDER / program, *arguments],
        input=stdin,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def lines(text: str) -> list[dict]:
    actual = [json.loads(line) for line in text.splitlines()]
    assert actual
    return actual


def width(access: str) -> bool:
    return any(access.endswith(wide) for wide in WIDE_ACCESSES)


@pytest.mark.parametrize(
    "target, cases",
    [
        ("sm_90", ""),
        ("gfx942", ""),
        ("sm_80", "wide"),
        ("sm_100", "wide"),
        ("gfx950", "wide"),
        *(
            pytest.param(target, "", marks=pytest.mark.full)
            for target in ("sm_80", "sm_100", "gfx950")
        ),
    ],
)
def test_every_launch_compiles(target, cases):
    """Few spills; each operation rounded where bits are promised; rows in accesses of 16 bytes."""
    for launch in lines(run("compiling.py", target, cases)):
        case = launch["case"]
        assert launch["spills"] <= FEW_BYTES, launch
        if launch["spills"]:
            note = f"{launch['spills']} bytes spilt by {launch['kernel']} in {case!r} on {target}"
            warnings.warn(note, stacklevel=1)
        if not any(word in case for word in MAY_CONTRACT):
            assert launch["fma"] == 0, launch
            assert not launch["approximate"], launch
        # A lane of block8 loads the 8 codes that share a scale.
        if "wide" in case and launch["kernel"] in ROW_KERNELS and "weighted_sum block8" not in case:
            kinds = {"load": ("ld.", "load"), "store": ("st.", "store")}
            for kind, words in kinds.items():
                of_kind = [
                    access for access in launch["accesses"] if any(w in access for w in words)
                ]
                assert any(map(width, of_kind)), f"no wide {kind}: {launch}"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_flags_order_memory_between_devices(target):
    """All threads write before the flag is released; reads after it is acquired are not older."""
    write, wait = lines(run("compiling.py", target, "flags"))
    if target == "sm_90":
        *words, barrier, flag = write["order"]
        assert words
        assert all(word.startswith("st.global") for word in words), words
        assert barrier == "bar.sync"
        assert "release" in flag and "sys" in flag
        polls = [word for word in wait["order"] if not word.startswith(("bar.", "st."))]
        # One thread polls one number: a block would write to flags that others poll.
        assert len(polls) == 2, "one poll, then a loop of polls"
        assert all(word.startswith("ld.global.sys.acquire") for word in polls), polls
    else:
        # The program is one wave there, which needs no barrier.
        assert any(word.startswith("buffer_wbl2") and "sc1" in word for word in write["order"])
        assert any(word.startswith("buffer_inv") and "sc1" in word for word in wait["order"])


@pytest.mark.skipif(
    triton_ascend_env.python() is None,
    reason="triton-ascend is not installed; `make test` tries to",
)
def test_every_launch_is_lowered_for_ascend():
    """The stages of triton-ascend that need no CANN: to Linalg, not to a binary."""
    launches = run("lowering.py", "record", "")
    lowered = lines(
        run("lowering.py", "lower", interpreter=triton_ascend_env.python(), stdin=launches)
    )
    assert len(lowered) == len(launches.splitlines())
    for launch in lowered:
        assert not launch["error"], f"{launch['case']}, {launch['kernel']}:\n{launch['error']}"
        assert launch["length"] > 500

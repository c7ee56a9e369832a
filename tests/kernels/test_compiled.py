"""Every launch compiles for GPUs without having one, and its assembly keeps its promises.

The quick run compiles every case for sm_90, all but odd rows for gfx942, and the hot launches for
the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import triton

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
WIDE_ACCESSES = ("v4.b32", "v2.b64", "v8.b32", "v4.b64", "dwordx4")  # 16 bytes, or 32
# Sums of squares and exponentials: no bits are promised.
MAY_CONTRACT = ("norm", "gating")
# Quotients are corrected with fma.
DIVIDED = ("per_row_div", "encode block8", "combine_send block8")
# A few registers: how many depends on the version of ptxas. More is a kernel that needs too many.
FEW_BYTES = 16
# Kernels whose programs wait or count each other: their launchers make a grid that runs at a time,
# with this many registers a lane.
REGISTERS = {
    "combine_recv bf16 and norm": 128,
    "combine_recv block8": 64,
    "combine_recv bf16, wide": 64,
    "dispatch_send int8": 64,
    "dispatch_send group e4m3 with factors": 128,
    "combine_send bf16": 64,
    "combine_send block8": 80,
    "dispatch_recv int8, wide": 96,
}
# Kernels that move rows, in accesses of 16 bytes.
ROW_KERNELS = {
    "_add_rows_kernel",
    "_affine_kernel",
    "_combine_recv_kernel",
    "_combine_send_kernel",
    "_dispatch_recv_kernel",
    "_dispatch_send_kernel",
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


QUICK = {
    "sm_90": (),
    "gfx942": ("--without", "odd"),
    **dict.fromkeys(("sm_80", "sm_100", "gfx950"), ("--hot",)),
}


@pytest.mark.parametrize(
    "target, options",
    [
        *(pytest.param(target, options, id=target) for target, options in QUICK.items()),
        *(
            pytest.param(target, (), id=f"{target} all", marks=pytest.mark.full)
            for target, options in QUICK.items()
            if options
        ),
    ],
)
def test_every_launch_compiles(target, options):
    """All that the assembly of a target promises: it is compiled once."""
    launches = lines(run("compiling.py", target, *options))
    for launch in launches:
        check_launch(target, launch)
    if "--hot" not in options:
        of_case = {launch["case"]: launch["order"] for launch in launches}
        for case in ("windows record", "windows dispatch_send int8, wide"):
            check_records(target, case, of_case[case])
        for case in ("windows wait", "windows combine_recv bf16, wide"):
            check_waits(target, of_case[case])
    check_budgets(target, launches)


def check_launch(target, launch):
    """Few spills; each operation rounded where bits are promised; rows in accesses of 16 bytes."""
    case = launch["case"]
    assert launch["spills"] <= FEW_BYTES, launch
    if launch["spills"]:
        note = f"{launch['spills']} bytes spilt by {launch['kernel']} in {case!r} on {target}"
        warnings.warn(note, stacklevel=1)
    if not any(word in case for word in MAY_CONTRACT):
        if not any(word in case for word in DIVIDED):
            assert launch["fma"] == 0, launch
        allowed = {"rcp.approx.ftz.f32"} if "block8" in case else set()
        assert {*launch["approximate"]} <= allowed, launch
    if target.startswith("sm"):
        for words, most in REGISTERS.items():
            assert words not in case or launch["registers"] <= most, launch
    # A lane of block8 loads the 8 codes that share a scale.
    if "wide" in case and launch["kernel"] in ROW_KERNELS and "weighted_sum block8" not in case:
        kinds = {"load": ("ld.", "load"), "store": ("st.", "store")}
        for kind, words in kinds.items():
            of_kind = [access for access in launch["accesses"] if any(w in access for w in words)]
            assert any(map(width, of_kind)), f"no wide {kind}: {launch}"


def check_records(target, case, order):
    """All threads write before the epoch is released."""
    if target.startswith("sm"):
        flag = order.index(next(word for word in order if "release" in word and "sys" in word))
        assert "bar.sync" in order[:flag]
        last = max(i for i, word in enumerate(order[:flag]) if word == "bar.sync")
        assert not any(word.startswith("st.global") for word in order[last:flag]), order
        assert any(word.startswith("st.global") for word in order[:last])
        if "record" not in case:
            # The programs of the grid release their rows to the one that writes the records.
            assert any("acq_rel" in word and "gpu" in word for word in order[:last]), order
    else:
        assert any(word.startswith("buffer_wbl2") and "sc1" in word for word in order)
        # The program that only writes records is one wave there, which needs no barrier.
        assert "s_barrier" in order or "record" in case


def check_waits(target, order):
    """Looks without an order, then one acquire from the system, before anything is read."""
    if target.startswith("sm"):
        acquired = [i for i, word in enumerate(order) if "acquire" in word and "sys" in word]
        assert acquired, order
        assert "bar.sync" in order[acquired[-1] :]
    else:
        assert any(word.startswith("buffer_inv") and "sc1" in word for word in order)


def check_budgets(target, launches):
    """Hot launches take no more than ``budgets.py --write`` found."""
    budgets = json.loads((FOLDER / "budgets.json").read_text(encoding="utf-8"))
    if budgets["triton"] != triton.__version__:
        warnings.warn(f"budgets are of triton {budgets['triton']}: not compared", stacklevel=1)
        return
    found = {launch["case"]: launch["figures"] for launch in launches if "figures" in launch}
    for case, budget in budgets.get(target, {}).items():
        figures = found[case]
        where = f"{case} on {target}: {figures}, and the budget is {budget}"
        for name in ("instructions", "registers", "spills"):
            assert figures[name] <= 1.02 * budget[name], f"more {name}: {where}"
        for name in ("load", "store", "in_flight"):
            assert figures[name] >= budget[name], f"fewer bytes, {name}: {where}"

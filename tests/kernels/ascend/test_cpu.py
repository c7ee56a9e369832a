"""The kernels' tests pass over Ascend's own IR, compiled for this CPU.

Left out are tests that need what triton-ascend lacks: device_assert, which it drops, and float64;
and those of tiles that no NPU has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cpu
import probe_kernels
import pytest
import recording
import torch
import triton_ascend_env
from executor import LEVELS, Executor

FOLDER = Path(__file__).parent
LEFT_OUT = {
    "triton-ascend drops device_assert",
    "triton-ascend takes no float64",
    "tiles that no NPU has",
}

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        triton_ascend_env.python("ascendnpuir") is None or not cpu.available(),
        reason="no triton-ascend with ascendnpu-ir, or no LLVM 19 (mlir-19-tools, llvm-19) and cc",
    ),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", recording.files())
def test_kernels(name, level, record_evidence):
    paths = f"{FOLDER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-rs", "-p", "executor", f"--level={level}",
            "-p", "no:cacheprovider", FOLDER.parent / name,
        ],
        env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-8000:]}{done.stderr[-1000:]}"
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, flags=re.MULTILINE)
    assert set(reasons) <= LEFT_OUT
    last = done.stdout.strip().splitlines()[-1]
    record_evidence("Kernels over Ascend's IR", f"`{name}`, {level}: {last}")


@pytest.fixture(params=LEVELS)
def executor(request):
    executor = Executor(request.param)
    yield executor
    executor.libraries.close()


def test_divide_is_exact_where_the_compiler_divides_in_fp32(executor):
    """Numbers around multiples of the divisor, up to the largest."""
    kernel = recording.as_compiled(probe_kernels.divide_kernel)
    wrong = 0
    for divisor in (1, 3, 7, 8, 9, 1000, 12345):
        most = (2**31 - 1) // divisor
        quotients = torch.cat(
            [torch.arange(4), torch.logspace(1, 30, 80, 2).long(), torch.tensor([most])]
        )
        quotients = quotients[quotients <= most]
        x = (quotients[:, None] * divisor + torch.tensor([-1, 0, 1])).flatten()
        x = torch.nn.functional.pad(x[(x >= 0) & (x < 2**31)], (0, 512))[:512].int()
        plain, exact = torch.full((2, 512), -7, dtype=torch.int32).unbind()
        executor.run(kernel, (x, plain, exact, divisor), (1,), {"BLOCK": 512})
        assert torch.equal(exact, x // divisor)
        wrong += int((plain != x // divisor).sum())
    if executor.libraries.level == "hfusion":
        assert wrong, "plain quotients are right, too: is divide still needed?"


def test_a_masked_lane_outside_its_argument_is_noticed(executor):
    """Ascend's IR reads where a mask is false: launches must give such lanes an address."""
    kernel = recording.as_compiled(probe_kernels.gather_kernel)
    x, out = torch.arange(16.0), torch.zeros(16)
    inside = torch.arange(15, -1, -1, dtype=torch.int32)
    executor.run(kernel, (x, inside, out), (1,), {"BLOCK": 16})
    assert torch.equal(out, x.flip(0))
    with pytest.raises(OSError, match="outside"):
        executor.run(kernel, (x, inside - 2**20, out), (1,), {"BLOCK": 16})

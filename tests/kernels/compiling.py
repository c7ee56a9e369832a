"""Compile every launch for a GPU without having one. A program: tests run in the interpreter.

A fake driver names the device, launchers get their policy for it, and launches are compiled but not
run. Prints a JSON line for each kernel of each case.

    python tests/kernels/compiling.py TARGET [CASE]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from launches import launches
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_triton.kernels import launch_config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
PROCESSORS = 132


class Device:
    """The driver that Triton asks while it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def is_active(self) -> bool:
        return True


def facts(compiled) -> dict:
    """Facts of the assembly.

    ``order`` lists stores, barriers and memory fences in their order; ``approximate`` lists
    operations that are not rounded as in IEEE 754.
    """
    if "ptx" in compiled.asm:
        text = compiled.asm["ptx"]
        return {
            "accesses": sorted(set(re.findall(r"\b(?:ld|st)\.global[.\w]*", text))),
            "fma": len(re.findall(r"\bfma\.", text)),
            "spills": spills_of_ptx(text, compiled.metadata.arch),
            "approximate": re.findall(r"\b(?:div|rcp|sqrt|rsqrt)\.(?:full|approx)\S*", text),
            "order": re.findall(
                r"bar\.sync|st\.global\S*|\S*(?:acquire|release|acq_rel|relaxed)\S*", text
            ),
            "text": text,
        }
    text = compiled.asm["amdgcn"]
    return {
        "accesses": sorted(set(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", text))),
        # A rounded division has five fma, and ends in one v_div_fixup.
        "fma": len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad)_f32", text))
        - 5 * len(re.findall(r"\bv_div_fixup_f32", text)),
        # Registers of 4 bytes. Scalar registers spill to lanes of vector registers, not to memory.
        "spills": 4 * sum(map(int, re.findall(r"vgpr_spill_count: *(\d+)", text))),
        "approximate": [],  # unknown: a rounded division begins with an approximate one
        "order": re.findall(r"s_barrier|buffer_wbl2.*|buffer_inv.*", text),
        "text": text,
    }


def spills_of_ptx(text: str, arch: str) -> int:
    """Bytes that ptxas spills."""
    name = "ptxas-blackwell" if arch.startswith("sm_1") or arch == "sm100" else "ptxas"
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    assembler = folder / name if (folder / name).exists() else folder / "ptxas"
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(text)
        source.flush()
        assembled = subprocess.run(
            [assembler, "-v", f"--gpu-name={target}", source.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        )
    return sum(map(int, re.findall(r"(\d+) bytes spill", assembled.stderr)))


def main() -> None:
    target = TARGETS[sys.argv[1]]
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    driver.set_active(Device(target))
    policy = launch_config.gpu_policy(PROCESSORS, target.warp_size)
    clock = "globaltimer" if target.backend == "cuda" else "memrealtime"
    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self, compiled))
        return compiled

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch_config, "policy", return_value=policy),
        mock.patch("moe_triton.kernels._windows.clock_of", return_value=clock),
    ):
        for case, call in launches():
            if wanted not in case:
                continue
            launched.clear()
            call()
            for kernel, compiled in launched:
                actual = facts(compiled)
                text = actual.pop("text")
                if wanted:
                    sys.stderr.write(text)
                line = json.dumps({"case": case, "kernel": kernel.__name__, **actual})
                sys.stdout.write(line + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

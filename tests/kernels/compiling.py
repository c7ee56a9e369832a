"""Compile every launch for a GPU without having one. A program: tests run in the interpreter.

A fake driver names the device, launchers get their policy for it, and launches are compiled but not
run. Prints a JSON line for each kernel of each case, in the order of ``launches.py``.

    python tests/kernels/compiling.py TARGET [--hot] [--only WORD ...] [--without WORD ...] [--text]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import assembly
import torch
from launches import HIDDEN, HOT, launches
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


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch that was compiled.

    Attributes:
        kernel: name.
        compiled: by Triton.
        arguments: those given by name: constants and options.
        num_programs: size of the grid.
    """

    kernel: str
    compiled: Any
    arguments: dict[str, Any]
    num_programs: int


@contextlib.contextmanager
def compiler(name: str) -> Iterator[Callable[[Callable[[], object]], list[Launch]]]:
    """A function that returns the launches of a call, compiled for a target."""
    target = TARGETS[name]
    driver.set_active(Device(target))
    arithmetic = "fma"
    if target.backend == "cuda":
        arithmetic = launch_config.cuda_arithmetic(target.arch)
    policy = launch_config.gpu_policy(PROCESSORS, target.warp_size, arithmetic)
    clock = "globaltimer" if target.backend == "cuda" else "memrealtime"
    launched: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append(Launch(self.__name__, compiled, kwargs, grid[0]))
        return compiled

    def of_call(call):
        launched.clear()
        call()
        return [*launched]

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch_config, "policy", return_value=policy),
        mock.patch("moe_triton.kernels._windows.clock_of", return_value=clock),
    ):
        yield of_call


def begin(target: str, cases: list[tuple[str, Callable[[], object]]], text: bool) -> None:
    """What a process of the pool works on."""
    _work.extend((target, cases, text))


_work: list[Any] = []


def lines_of(number: int) -> list[str]:
    """JSON of each kernel of a case."""
    target, cases, text = _work
    case, call = cases[number]
    lines = []
    with compiler(target) as compiled:
        for launch in compiled(call):
            if text:
                sys.stderr.write(assembly.text(launch.compiled))
            facts = {"case": case, "kernel": launch.kernel, **assembly.facts(launch.compiled)}
            if case in HOT:
                facts["figures"] = assembly.figures(launch, HIDDEN)
            lines.append(json.dumps(facts))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--hot", action="store_true", help="the hot launches")
    parser.add_argument("--only", nargs="+", default=[""], help="cases with one of these words")
    parser.add_argument("--without", nargs="+", default=[], help="cases with none of them")
    parser.add_argument("--text", action="store_true", help="assembly to stderr")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        (case, call)
        for case, call in launches()
        if any(word in case for word in options.only)
        and not any(word in case for word in options.without)
        and (case in HOT or not options.hot)
    ]
    # Forked: the cases are functions, which cannot be sent.
    pool = multiprocessing.get_context("fork").Pool(
        len(os.sched_getaffinity(0)), begin, (options.target, cases, options.text)
    )
    with pool:
        for lines in pool.imap(lines_of, range(len(cases))):
            for line in lines:
                sys.stdout.write(line + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

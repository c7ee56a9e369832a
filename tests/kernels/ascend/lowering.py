"""Compile launches with Ascend's compilers, in all stages that need neither an NPU nor CANN.

triton-ascend lowers a kernel to Linalg (ttadapter), and bishengir-compile that to HIVM, in which
every buffer has its place in the unified buffer (UB) and every step its synchronisation. The last
step, hivmc of CANN, would make an object of it: ``hivmc`` beside this file stands in for it.

A program, for an environment where triton is triton-ascend. It reads the launches of
``recording.py`` and prints a line for each:

    ascend/bin/python lowering.py TARGET,... < launches.jsonl

    {"kernel": ..., "Ascend910B3": {"error": "", "rewritten": 0, "bytes": 98304, "given_up": [],
        "loops": {...}}}

``rewritten`` counts the stores of ``rewritten_stores``, ``bytes`` is the planned size of the UB,
``given_up`` what the compiler gave up to make it fit, and ``loops`` counts the loops of
``loops_of``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

FOLDER = Path(__file__).parent
SHORT = 16  # steps of a loop that is not worth a mention
SECONDS = 600  # for a compiler


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip: its cores, the bytes of its UB, and whether it is of the family 950."""

    cores: int
    ub_bytes: int
    is_950: bool = False

    @property
    def lowering(self) -> dict[str, object]:
        """Options of triton-ascend, which takes no chip to be a 950 by itself."""
        return {"compile_on_910_95": True, "enable_select_analysis": True} if self.is_950 else {}

    @property
    def compiler(self) -> list[str]:
        """Name and flags of the compiler, as triton-ascend gives them; buffers are doubled."""
        binary = "bishengir-compile-a5" if self.is_950 else "bishengir-compile"
        flags = ["hfusion-compile", "triton-kernel-compile", "auto-multi-buffer"]
        if self.is_950:
            flags.append("print-memory-allocated-size")
        else:
            flags += ["auto-bind-sub-block", "hivm-compile"]
        return [binary, *(f"--enable-{flag}=true" for flag in flags)]


TARGETS = {
    "Ascend910B3": Target(40, 196_608),
    "Ascend910_9392": Target(48, 196_608),
    "Ascend950PR_9589": Target(64, 253_952, is_950=True),
}


@functools.cache
def _backend():
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("npu", "Ascend910B3", 0)
    return target, backends["ascend"].compiler(target)


def linalg(launch: dict, options: dict[str, object]) -> str:
    """The ttadapter text of a launch."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    constants = {
        name: getattr(tl, value["dtype"], None) or tl.dtype(value["dtype"])
        if isinstance(value, dict)
        else value
        for name, value in launch["constants"].items()
    }
    target, backend = _backend()
    source = ASTSource(kernel, signature=launch["signature"], constants=constants)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(), backend.get_module_map()
    module = source.make_ir(parsed, codegen, modules, context)
    metadata = {"target": target, **parsed.__dict__}
    stages: dict = {}
    backend.add_stages(stages, parsed)
    for name in ("ttir", "ttadapter"):
        module = stages[name](module, metadata)
    # As triton-ascend does before it calls the compiler.
    return re.sub(r', mix_mode\s*=\s*"[^"]*"', "", str(module))


def rewritten_stores(text: str) -> int:
    """How many masked stores of Linalg load a whole tile, select, and store all of it.

    triton-ascend does that for a mask that is not a range along each axis. Elements outside the
    mask may be those of another program, whose store may be lost.
    """
    copied = re.findall(r"memref\.copy (%reinterpret_cast\w*),", text)
    store = r"materialize_in_destination %\S+ in writable (%reinterpret_cast\w*) "
    return len({*copied} & {*re.findall(store, text)})


def binaries() -> Path:
    """The folder of ascendnpu-ir's programs."""
    return Path(importlib.util.find_spec("ascendnpuir").origin).parent / "bin"


def hivm(text: str, name: str) -> tuple[str, str]:
    """HIVM of ttadapter text for a chip, or "" if the compiler fails; and what it says."""
    with tempfile.TemporaryDirectory() as folder:
        source, kept = Path(folder) / "kernel.mlir", Path(folder) / "kept.mlir"
        source.write_text(text)
        stand_in = Path(folder) / "bin"
        stand_in.mkdir()
        for command in ("hivmc", "hivmc-a5"):
            (stand_in / command).symlink_to(FOLDER / "hivmc")
        binary, *flags = TARGETS[name].compiler
        done = subprocess.run(
            [binaries() / binary, source, f"--target={name}", *flags, "-o", f"{folder}/kernel"],
            env=os.environ | {"PATH": f"{stand_in}:{os.environ['PATH']}", "HIVMC_KEEP": str(kept)},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        said = f"{done.stdout}{done.stderr}"
        if done.returncode or not kept.exists():
            return "", said
        return kept.read_text(), said


_WIDTHS = {"i1": 1, "i8": 8, "i16": 16, "f16": 16, "bf16": 16, "i32": 32, "f32": 32, "i64": 64}
_PLACE = re.compile(
    r"hivm\.hir\.pointer_cast\((.*?)\).*? : memref<((?:\d+x)*)(\w+)(?:, strided<\[([\d, ]*)\])?"
    r".*#hivm\.address_space<ub>>"
)


def planned_bytes(text: str) -> int:
    """Bytes of the UB in HIVM: where the last buffer ends."""
    numbers = dict(re.findall(r"(%\S+) = arith\.constant (\d+) : i64", text))
    end = 0
    for addresses, sizes, dtype, strides in _PLACE.findall(text):
        shape = [int(size) for size in sizes.split("x") if size]
        if strides:
            steps = map(int, strides.split(","))
            elements = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        else:
            elements = functools.reduce(int.__mul__, shape, 1)
        for address in addresses.split(","):
            end = max(end, int(numbers[address.strip()]) + elements * _WIDTHS[dtype] // 8)
    return end


def loops_of(text: str) -> dict[str, int]:
    """Loops of HIVM that move or compute one element a step: how many of each number of steps.

    The number stands for itself, or is "n" where it is an argument.
    """
    numbers = dict(re.findall(r"(%\S+) = arith\.constant (-?\d+) : (?:index|i32|i64)", text))
    found: collections.Counter[str] = collections.Counter()
    open_loops: list[tuple[int, int | None, set[str]]] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        loop = re.match(r"\s*(?:%\S+ = )?scf\.for %\S+ = (\S+) to (\S+) step (\S+)", line)
        if loop:
            first, last, step = (numbers.get(word) for word in loop.groups())
            known = None not in (first, last, step)
            steps = (int(last) - int(first)) // int(step) if known else None
            open_loops.append((indent, steps, set()))
        elif open_loops and line.lstrip().startswith("}") and indent == open_loops[-1][0]:
            _, steps, scalars = open_loops.pop()
            # Loops whose length is an argument walk the work in tiles.
            if scalars and steps is not None and steps >= SHORT:
                found[f"{steps}: {', '.join(sorted(scalars))}"] += 1
        elif open_loops:
            scalar = re.search(r"\b(memref\.load|memref\.store|arith\.(?:cmp|div|rem)\w+)\b", line)
            if scalar:
                kind = scalar[1].removeprefix("arith.").removeprefix("memref.")
                open_loops[-1][2].add(kind)
    return dict(found)


def compiled(launch: dict, names: list[str]) -> dict:
    """Facts of a launch on each chip."""
    result: dict = {key: launch[key] for key in ("module", "kernel", "signature", "constants")}
    texts: dict[bool, str] = {}
    for name in names:
        target = TARGETS[name]
        facts: dict = {"error": "", "rewritten": 0, "bytes": 0, "given_up": [], "loops": {}}
        result[name] = facts
        try:
            if target.is_950 not in texts:
                texts[target.is_950] = linalg(launch, target.lowering)
            facts["rewritten"] = rewritten_stores(texts[target.is_950])
            text, said = hivm(texts[target.is_950], name)
        except BaseException as error:
            stderr = (getattr(error, "stderr", None) or b"")[-2000:].decode(errors="replace")
            facts["error"] = f"{traceback.format_exc()[-2000:]}{stderr}"
            continue
        if not text:
            errors = [line for line in said.splitlines() if "error" in line.lower()]
            facts["error"] = "\n".join(errors[:8]) or said[-2000:]
            continue
        size = re.search(r'"UB_SIZE", (\d+)', text)
        cores = re.search(r'"VECTOR_CORE_COUNT", (\d+)', text)
        assert size and int(size[1]) == 8 * target.ub_bytes, name
        assert cores and int(cores[1]) == target.cores, name
        # The compiler for a 950 prints the size.
        printed = re.findall(r"Allocated UB size = (\d+) bits", said)
        facts["bytes"] = int(printed[-1]) // 8 if printed else planned_bytes(text)
        facts["given_up"] = sorted(set(re.findall(r"set enable-([\w-]+) to false", said)))
        facts["loops"] = loops_of(text)
    return result


def main() -> None:
    names = sys.argv[1].split(",")
    launches = [json.loads(line) for line in sys.stdin]
    # Kernels are imported once, before the processes part.
    for module in sorted({launch["module"] for launch in launches}):
        importlib.import_module(module)
    _backend()
    work = functools.partial(compiled, names=names)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for result in pool.imap(work, launches):
            sys.stdout.write(f"{json.dumps(result)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

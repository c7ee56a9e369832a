"""Compile Ascend's own IR of a kernel for this CPU, as a library that runs its programs.

A program, for an environment where triton is triton-ascend. It reads lines of JSON and answers
each by a line, the error or "":

    {"launch": ..., "level": "linalg" | "hfusion", "into": "kernel.so"}

"linalg" is what triton-ascend makes, "hfusion" what bishengir-compile makes of that for a 910B3
before it turns to HIVM, the instructions of the chip. From there on the passes of MLIR that
bishengir-opt has and LLVM's take the place of Ascend's.

A library has one function, ``entry(words, x, y, z)``: the arguments, 8 bytes each, and the size of
the grid. It returns 0, or the odd address next to memory that the kernel touched and is not there.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import lowering

LLVM = Path("/usr/lib/llvm-19/bin")  # of Debian and Ubuntu; the version of MLIR in ascendnpu-ir
BUFFERS = (
    "allow-return-allocs-from-loops=true",
    "bufferize-function-boundaries=true",
    "function-boundary-type-conversion=identity-layout-map",
    "allow-unknown-ops=true",
)
TO_LOOPS = (
    "--convert-elementwise-to-linalg",
    "--execution-engine-convert-hfusion-to-upstream",
    "--symbol-dce",
    "--canonicalize",
    "--cse",
    "--convert-elementwise-to-linalg",
    "--empty-tensor-to-alloc-tensor",
    f"--one-shot-bufferize={' '.join(BUFFERS)}",
    "--canonicalize",
)
TO_LLVM = (
    "--convert-linalg-to-loops",
    "--lower-affine",
    "--expand-strided-metadata",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--arith-expand",
    "--memref-expand",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--convert-arith-to-llvm",
    "--convert-vector-to-llvm",
    "--convert-index-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--convert-cf-to-llvm",
    "--lower-affine",
    "--convert-arith-to-llvm",
    "--reconcile-unrealized-casts",
)
# As much as makes programs fast enough: most run once or twice.
PASSES = ("early-cse", "instcombine<no-verify-fixpoint>", "simplifycfg", "loop-mssa(licm)")


def tool(name: str) -> str:
    """A program of LLVM 19."""
    return shutil.which(f"{name}-19") or str(LLVM / name)


def available() -> bool:
    """Whether LLVM's programs and a C compiler are there."""
    tools = (tool("mlir-translate"), tool("opt"), tool("llc"), "cc")
    return all(shutil.which(path) for path in tools)


def filtered(*command: str | Path, text: str) -> str:
    """What a program makes of its standard input."""
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=lowering.SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr[:2000]}")
    return done.stdout


def hfusion(text: str) -> str:
    """HFusion of ttadapter text."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.mlir"
        source.write_text(text)
        binary, *flags = lowering.TARGETS["Ascend910B3"].compiler
        command = [
            lowering.binaries() / binary, source, "--target=Ascend910B3", *flags,
            "--mlir-disable-threading", "--mlir-print-ir-module-scope",
            "--mlir-print-ir-before=convert-hfusion-to-hivm", "-o", f"{folder}/kernel",
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as compiler:
            lines = iter(compiler.stderr)
            said = [*itertools.takewhile(lambda line: "// IR Dump Before" not in line, lines)]
            dump = "".join(itertools.takewhile(lambda line: line != "}\n", lines))
            # The steps after the dump take most of the time.
            compiler.kill()
    if not dump:
        raise RuntimeError(f"bishengir-compile: {''.join(said)[:2000]}")
    return f"{dump}}}\n"


def with_not(text: str) -> str:
    """Name what vnot does: the region that ascendnpu-ir 1.2.0 gives it is the identity."""

    def spelt(match: re.Match[str]) -> str:
        result, source, target, kind = match.groups()
        element = re.match(r"tensor<(?:\d+x)*(\w+)>", kind)[1]
        ones = "true" if element == "i1" else f"-1 : {element}"
        return (
            f"    {result} = linalg.map ins({source} : {kind}) outs({target} : {kind}) "
            f"(%not_in: {element}) {{\n      %ones = arith.constant {ones}\n"
            f"      %not = arith.xori %not_in, %ones : {element}\n"
            f"      linalg.yield %not : {element}\n    }}"
        )

    return re.sub(
        r"^\s*(%\S+) = hfusion\.elemwise_unary \{fun = #hfusion\.unary_fn<vnot>\} "
        r"ins\((%\S+) : tensor<[^>]*>\) outs\((%\S+) : (tensor<[^>]*>)\) -> tensor<[^>]*>[^\n]*$",
        spelt,
        text,
        flags=re.MULTILINE,
    )


def with_called_sums(text: str) -> str:
    """Call a function for each running sum of HFusion, as Linalg of triton-ascend does."""
    declared: list[str] = []

    def called(match: re.Match[str]) -> str:
        result, source, kind, axis = match.groups()
        name = f"triton_cumsum_{len(declared)}"
        declared.append(f"  func.func private @{name}({kind}, i32, i1) -> {kind}\n")
        return (
            f"    %axis_{name} = arith.constant {axis} : i32\n"
            f"    %reverse_{name} = arith.constant false\n"
            f"    {result} = func.call @{name}({source}, %axis_{name}, %reverse_{name}) : "
            f"({kind}, i32, i1) -> {kind}"
        )

    text = re.sub(
        r"^\s*(%\S+) = hfusion\.cumsum (%\S+) : (tensor<[^>]*>) cum_dims = \[(\d+)\][^\n]*$",
        called,
        text,
        flags=re.MULTILINE,
    )
    head = re.search(r"^module[^\n]*\{\n", text, flags=re.MULTILINE)
    return f"{text[: head.end()]}{''.join(declared)}{text[head.end() :]}"


def _running_sum(name: str, sizes: str, element: str) -> str:
    """A function of MLIR that sums along an axis: x[i] += x[i - 1] for each i but the first."""
    shape = [int(size) for size in sizes.rstrip("x").split("x")]
    kind = f"tensor<{sizes}{element}>"
    add = "arith.addf" if element.startswith(("f", "b")) else "arith.addi"
    axes = range(len(shape))
    lines = [f"  func.func private @{name}(%x: {kind}, %axis: i32, %reverse: i1) -> {kind} {{"]
    lines += ["    %zero = arith.constant 0 : index", "    %one = arith.constant 1 : index"]
    lines += ["    %along = arith.index_cast %axis : i32 to index"]
    for k in axes:
        lines += [
            f"    %n{k} = arith.constant {shape[k]} : index",
            f"    %k{k} = arith.constant {k} : index",
            f"    %is{k} = arith.cmpi eq, %along, %k{k} : index",
        ]
    carried = "%x"
    for k in axes:
        lines.append(
            f"    %r{k} = scf.for %i{k} = %zero to %n{k} step %one iter_args(%c{k} = {carried}) "
            f"-> ({kind}) {{"
        )
        carried = f"%c{k}"
    here = ", ".join(f"%i{k}" for k in axes)
    lines += [
        f"    %own = tensor.extract {carried}[{here}] : {kind}",
        "    %e = arith.constant false",
    ]
    any_earlier = "%e"
    for k in axes:
        lines += [
            f"    %before{k} = arith.subi %i{k}, %one : index",
            f"    %later{k} = arith.cmpi sgt, %i{k}, %zero : index",
            f"    %move{k} = arith.andi %later{k}, %is{k} : i1",
            f"    %at{k} = arith.select %move{k}, %before{k}, %i{k} : index",
            f"    %e{k} = arith.ori {any_earlier}, %move{k} : i1",
        ]
        any_earlier = f"%e{k}"
    before = ", ".join(f"%at{k}" for k in axes)
    nothing = "0.0" if add == "arith.addf" else "0"
    lines += [
        f"    %earlier = tensor.extract {carried}[{before}] : {kind}",
        f"    %nothing = arith.constant {nothing} : {element}",
        f"    %term = arith.select {any_earlier}, %earlier, %nothing : {element}",
        f"    %sum = {add} %own, %term : {element}",
        f"    %new = tensor.insert %sum into {carried}[{here}] : {kind}",
    ]
    result = "%new"
    for k in reversed(axes):
        lines += [f"    scf.yield {result} : {kind}", "    }"]
        result = f"%r{k}"
    return "\n".join([*lines, f"    return {result} : {kind}", "  }"])


def with_running_sums(text: str) -> str:
    """Define the functions of running sums, which Ascend's library has."""
    return re.sub(
        r"^  func\.func private @(triton_cumsum_\d+)\(tensor<((?:\d+x)+)(\w+)>, i32, i1\)"
        r" -> tensor<[^>]*>\s*$",
        lambda match: _running_sum(*match.groups()),
        text,
        flags=re.MULTILINE,
    )


def without_attributes(text: str) -> str:
    """Drop the attributes of Ascend's dialects, which mlir-translate does not know."""
    text = re.sub(r"^module attributes \{.*?\} \{$", "module {", text, flags=re.MULTILINE)
    lines = []
    for line in text.splitlines():
        kept = line
        if line.startswith("  llvm.func @"):
            kept = re.sub(r" attributes \{.*\}( \{)?$", lambda match: match[1] or "", kept)
            kept = re.sub(r"\{[^{}]*#hacc[^{}]*\}", "", kept)
            kept = re.sub(r" \{(?:tt|hacc)\.[^{}]*\}", "", kept)
        lines.append(kept)
    dialects = r"(hacc|hivm|tt)\.[\w.]+ = #?[\w.]+(<[^>]*>)?( : \w+)?"
    return re.sub(dialects, "dropped", "\n".join(lines))


def llvm(text: str) -> str:
    """LLVM IR of Linalg or HFusion text."""
    opt = lowering.binaries() / "bishengir-opt"
    text = filtered(opt, "-", *TO_LOOPS, text=with_running_sums(text))
    text = filtered(opt, "-", *TO_LLVM, text=text)
    return filtered(tool("mlir-translate"), "--mlir-to-llvmir", text=without_attributes(text))


RUNTIME = r"""
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

/* Copy a tensor: rank and descriptor (two pointers, offset, sizes, strides), twice. */
typedef struct { int64_t rank; void *descriptor; } View;
void memrefCopy(int64_t bytes, View *from, View *to) {
  int64_t rank = from->rank, index[16] = {0};
  char **source = from->descriptor, **target = to->descriptor;
  int64_t *of_source = (int64_t *)(source + 2), *of_target = (int64_t *)(target + 2);
  char *read = source[1] + of_source[0] * bytes, *write = target[1] + of_target[0] * bytes;
  int64_t *size = of_source + 1, *step = size + rank, *pace = of_target + 1 + rank;
  for (int k = 0; k < rank; k++) if (size[k] <= 0) return;
  for (;;) {
    int64_t a = 0, b = 0;
    for (int k = 0; k < rank; k++) { a += index[k] * step[k]; b += index[k] * pace[k]; }
    memcpy(write + b * bytes, read + a * bytes, bytes);
    int64_t k = rank - 1;
    while (k >= 0 && ++index[k] == size[k]) index[k--] = 0;
    if (k < 0) return;
  }
}

static sigjmp_buf back;
static long touched;
static void caught(int number, siginfo_t *info, void *context) {
  (void)number, (void)context;
  touched = (long)info->si_addr | 1;
  siglongjmp(back, 1);
}
static float single(int64_t word) { float x; memcpy(&x, &word, 4); return x; }
extern void KERNEL(PARAMETERS);
long entry(const int64_t *w, int X, int Y, int Z) {
  struct sigaction new = {.sa_sigaction = caught, .sa_flags = SA_NODEFER | SA_SIGINFO}, old;
  sigaction(SIGSEGV, &new, &old);
  touched = 0;
  if (!sigsetjmp(back, 1))
    for (int z = 0; z < Z; z++) for (int y = 0; y < Y; y++) for (int x = 0; x < X; x++)
      KERNEL(ARGUMENTS);
  sigaction(SIGSEGV, &old, 0);
  return touched;
}
"""
_SCALARS = {
    "i1": "_Bool", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "u32": "uint32_t",
    "i64": "int64_t", "u64": "uint64_t", "fp32": "float",
}  # fmt: skip


def runtime(launch: dict, level: str) -> str:
    """C that runs all programs of a launch."""
    kinds: list[str] = []
    values: list[str] = []

    def memory(word: str) -> None:
        kinds.extend(["void *", "void *", "int64_t", "int64_t", "int64_t"])
        values.extend([f"(void *){word}", f"(void *){word}", "0", "1099511627776", "1"])

    if level == "hfusion":  # the address by which the cores synchronise
        kinds.append("int64_t")
        values.append("0")
    memory("0")  # locks and workspace, which no kernel here uses
    memory("0")
    for number, kind in enumerate(launch["signature"].values()):
        word = f"w[{number}]"
        if kind.startswith("*"):
            memory(word)
        else:
            kinds.append(_SCALARS[kind])
            values.append(f"single({word})" if kind == "fp32" else word)
    kinds += ["int32_t"] * 6
    values += ["X", "Y", "Z", "x", "y", "z"]
    return (
        RUNTIME.replace("KERNEL", launch["kernel"])
        .replace("PARAMETERS", ", ".join(kinds))
        .replace("ARGUMENTS", ", ".join(values))
    )


@functools.cache
def compiled(source: str) -> bytes:
    """The object of a C source; launches of the same types share it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runtime.c"
        path.write_text(source)
        command = ("cc", "-O2", "-fPIC", "-c", path, "-o", path.with_suffix(".o"))
        subprocess.run(command, check=True, capture_output=True)
        return path.with_suffix(".o").read_bytes()


def build(launch: dict, level: str, into: Path) -> None:
    """Write the library of a launch."""
    text = lowering.linalg(launch, {})
    if level == "hfusion":
        text = with_called_sums(with_not(hfusion(text)))
    code = llvm(text)
    parameters = re.search(rf"define void @{launch['kernel']}\((.*?)\)", code)
    source = runtime(launch, level)
    declared = re.search(r"extern void \w+\((.*?)\);", source)[1]
    if parameters is None or parameters[1].count(",") != declared.count(","):
        raise RuntimeError(f"other parameters than {declared}: {parameters and parameters[1]}")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "kernel.ll").write_text(code)
        (base / "runtime.o").write_bytes(compiled(source))
        passes = f"-passes=function({','.join(PASSES)})"
        generated = ("-O2", "-mcpu=native", "-relocation-model=pic", "-filetype=obj")
        for command in (
            (tool("opt"), passes, base / "kernel.ll", "-o", base / "kernel.bc"),
            (tool("llc"), *generated, base / "kernel.bc", "-o", base / "kernel.o"),
            ("cc", "-shared", base / "kernel.o", base / "runtime.o", "-lm", "-o", base / "k.so"),
        ):
            subprocess.run(command, check=True, capture_output=True)
        shutil.move(base / "k.so", into)


def main() -> None:
    # What compilers print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        said = ""
        try:
            build(job["launch"], job["level"], Path(job["into"]))
        except BaseException as error:
            stderr = (getattr(error, "stderr", None) or b"")[-2000:].decode(errors="replace")
            said = f"{traceback.format_exc()[-2000:]}{stderr}"
        answers.write(f"{json.dumps(said)}\n")
        answers.flush()


if __name__ == "__main__":
    main()

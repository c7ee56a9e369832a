"""The page of what launches take of an NPU's unified buffer, and of the loops left in them.

    python tests/kernels/ascend/page.py [RESULTS]

compiles the largest launch of each class and writes the page. With RESULTS, lines that
``lowering.py`` has printed for them, it takes those.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import recording
from lowering import TARGETS
from selection import class_of, largest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
PAGE = ROOT / "docs/evidence/ascend.md"
# An A3 has the plans of a 910B, as a test shows.
COLUMNS = {"Ascend910B3": "910B3, A3", "Ascend950PR_9589": "950PR"}
HEAD = """# What Ascend's compilers make of the kernels

Written by `python tests/kernels/ascend/page.py`; `make test-full` checks it. triton-ascend {triton}
lowers the launches of the kernels' tests and of layers to Linalg, ascendnpu-ir {npuir} these to
HIVM: buffers have their places in the unified buffer (UB), steps their synchronisation. CANN's
`hivmc`, which makes an object of that, is not there: a script stands in for it. Buffers are
doubled, so that the next tile is loaded while one is worked on.

It shows that these launches fit the UB, and that the compiler can lower each of their operations.
It does not show that the object is right or fast, how the chip rounds, nor that the synchronisation
holds: no kernel has run on an NPU. CANN has a bishengir-compile of its own, which may plan memory
differently.

`make test-full` also compiles two of these texts for the CPU, Linalg and HFusion, which HIVM is
made from, and runs the kernels' tests over them. No access leaves the memory of its arguments, and
all results are those of the definition, but for one sign: ascendnpu-ir takes 0.0 + x for x, so that
a sum of nothing but -0.0 is -0.0.

Left out: steps over windows, which [GPUs](../gpu.md#steps-over-windows) have to themselves, and
float64, which triton-ascend refuses.
"""
LOOPS = """
## Loops over elements

Launches of a 910B3 in which a loop of at least 16 steps loads, stores or compares one element a
step, by kernel and the longest loop of each kind. Scattered accesses are such loops on a 910B, and
so are comparisons of int64 ids. A division that stands in one is scalar, and exact.

| kernel | ids | loops of a launch |
| --- | --- | --- |
"""
BEFORE = """
A 910B divides vectors of int32 in fp32, which is wrong from 2**24 on. `divide` in
`kernels/_common.py` is exact; plain `//` is left for counts of ranks and lanes, which are small.

Before that, at revision abb684c, the index kernels with other loops than now, counted in the same
launches of `launches.py`:

| kernel | steps | before | now |
| --- | ---: | --- | --- |
| `aligned_permutation_kernel` | 512 | 7, one with `//` and one with `%` | 6 |
| `block_starts_kernel` | | did not fit the UB | none |
| `combine_row_index_kernel` | 512 | 2 | 1 |
| `eplb_map_kernel` | 512 | 2, one with `//` and `%` | 2, one with `//` |
| `recv_permutation_kernel` | 1024 | 4, one with `//` and one with `%` | 3 |
| `recv_row_index_kernel` | 1024 | 7, two with `//` and one with `%` | 6, one with `//` |
"""


def launches() -> list[dict]:
    """The launches of the page: the largest of each class."""
    return largest(recording.read(), class_of)


def memory(results: Iterable[dict]) -> Iterator[str]:
    """Rows of the table of memory."""
    for result in sorted(results, key=class_of):
        kernel, words = class_of(result)
        facts = [result[name] for name in COLUMNS]
        given_up = sorted({word for fact in facts for word in fact["given_up"]})
        cells = [f"`{kernel.strip('_')}`", words, *(f"{fact['bytes']:,}" for fact in facts)]
        yield f"| {' | '.join([*cells, ', '.join(given_up)])} |"


def loops(results: Iterable[dict]) -> Iterator[str]:
    """Rows of the table of loops."""
    found: dict = collections.defaultdict(dict)
    for result in results:
        ids = {
            kind.removeprefix("*i")
            for name, kind in result["signature"].items()
            if name.endswith("ids_ptr") and kind in ("*i32", "*i64")
        }
        key = result["kernel"].strip("_"), "int64" if "64" in ids else "int32" if ids else ""
        for loop, count in result["Ascend910B3"]["loops"].items():
            steps, _, kinds = loop.partition(": ")
            most = max(found[key].get(kinds, (0, 0)), (int(steps), count))
            found[key][kinds] = most
    for (kernel, ids), kinds in sorted(found.items()):
        said = "; ".join(
            f"{count} of {steps} ({words})" for words, (steps, count) in sorted(kinds.items())
        )
        yield f"| `{kernel}` | {ids} | {said} |"


def text(results: list[dict], num_launches: int) -> str:
    """The page."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints-ascend.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    head = HEAD.format(triton=pins["triton-ascend"], npuir=pins["ascendnpu-ir"])
    titles = [f"{title} ({TARGETS[name].ub_bytes:,})" for name, title in COLUMNS.items()]
    lines = [
        head,
        "## Bytes of the unified buffer",
        "",
        f"Of {num_launches} distinct launches the one with the largest tile for each kernel and",
        "for the constants that choose code. The head has the bytes that there are.",
        "",
        f"| kernel | constants | {' | '.join(titles)} | given up to fit |",
        "| --- | --- | ---: | ---: | --- |",
        *memory(results),
        *LOOPS.splitlines(),
        *loops(results),
        *BEFORE.rstrip().splitlines(),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) > 1:
        printed = Path(sys.argv[1]).read_text(encoding="utf-8")
    else:
        import triton_ascend_env

        printed = subprocess.run(
            [triton_ascend_env.python(), FOLDER / "lowering.py", ",".join(COLUMNS)],
            input="".join(f"{json.dumps(launch)}\n" for launch in launches()),
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    results = [json.loads(line) for line in printed.splitlines()]
    PAGE.write_text(text(results, len(recording.read())), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests/support"))
    main()

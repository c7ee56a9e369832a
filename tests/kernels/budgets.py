"""What the hot launches cost a GPU, read from their machine code: no GPU is needed.

    python tests/kernels/budgets.py            # a table of the launches as they compile now
    python tests/kernels/budgets.py --write    # and make it the budget, and the table of the page

Instructions are those of the loop over tiles, each once, times warps and tiles, for a row of 7168.
Their share is of the time in which an H200 moves the bytes of the row at 4.8 TB/s, with one
instruction a cycle from each of its 4 x 132 schedulers at 1.755 GHz. Registers are of a thread,
accesses and loads in flight of a lane.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path

import assembly
import torch
import triton
from compiling import compiler
from launches import HIDDEN, HOT, TOP_K, launches

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs/kernels.md"
BEGIN, END = "<!-- budgets -->\n", "<!-- end of budgets -->\n"
TARGETS = ("sm_90", "gfx942")

ROW_OF_INT8 = HIDDEN * 2 + HIDDEN + 4
# case -> bytes of a row or, where rows are summed, of a token.
BYTES = {
    "encode bf16, many": HIDDEN * 4,
    "encode int8, many": ROW_OF_INT8,
    "encode per_row_div, many": ROW_OF_INT8,
    "encode e4m3, many": ROW_OF_INT8,
    "encode e5m2, many": ROW_OF_INT8,
    "encode group e4m3, many": HIDDEN * 3 + HIDDEN // 128 * 4,
    "encode group_pow2 e4m3, many": HIDDEN * 3 + HIDDEN // 128 * 4,
    "encode mx e4m3, many": HIDDEN * 3 + HIDDEN // 32,
    "encode block8 torch.bfloat16, many": HIDDEN * 3 + HIDDEN // 8 * 2,
    "weighted_sum, wide": (TOP_K + 1) * HIDDEN * 2,
    "weighted_sum block8 torch.bfloat16, wide": TOP_K * (HIDDEN + HIDDEN // 4) + HIDDEN * 2,
    "weighted_sum and norm, wide": (TOP_K + 3) * HIDDEN * 2,
    "gather_rows bf16, wide": HIDDEN * 4,
    "windows dispatch_send int8, wide": ROW_OF_INT8,
    "windows combine_recv bf16, wide": (TOP_K + 1) * HIDDEN * 2,
    "windows combine_recv bf16 and norm, aligned": (TOP_K + 3) * HIDDEN * 2,
}
HEAD = (
    "| launch | bytes of a row | floor, ns | instructions | share | registers | spills "
    "| load / store | in flight | gfx942 |"
)
BYTES_PER_SECOND = 4.8e12
INSTRUCTIONS_PER_SECOND = 4 * 132 * 1.755e9


def share(case: str, instructions: int) -> float:
    """Of the time in which the row is moved."""
    return instructions / INSTRUCTIONS_PER_SECOND / (BYTES[case] / BYTES_PER_SECOND)


def of_target(target: str) -> dict[str, dict[str, int]]:
    """Figures of each hot case."""
    torch.set_num_threads(1)
    with compiler(target) as compiled:
        return {
            case: assembly.figures(compiled(call)[-1], HIDDEN)
            for case, call in launches()
            if case in HOT
        }


def measured() -> dict[str, dict[str, dict[str, int]]]:
    """Figures of each target."""
    processes = min(len(os.sched_getaffinity(0)), len(TARGETS))
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return dict(zip(TARGETS, pool.map(of_target, TARGETS), strict=True))


def table(figures: dict[str, dict[str, dict[str, int]]]) -> str:
    """Markdown of the figures, floors beside them."""
    lines = [
        HEAD,
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in HOT:
        of_90, of_942 = (figures[target][case] for target in TARGETS)
        count, warps = of_90["instructions"], of_90["warps"]
        lines.append(
            f"| {case.rsplit(',', 1)[0].replace('torch.', '')} | {BYTES[case]} "
            f"| {BYTES[case] / BYTES_PER_SECOND * 1e9:.2f} | {count // warps} x {warps} "
            f"| {share(case, count):.2f} | {of_90['registers']} | {of_90['spills']} "
            f"| {of_90['load']} / {of_90['store']} | {of_90['in_flight']} "
            f"| {of_942['instructions'] // of_942['warps']} x {of_942['warps']}, "
            f"{of_942['registers']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="the budget and the page")
    write = parser.parse_args().write
    figures = measured()
    sys.stdout.write(table(figures))
    if write:
        budgets = {"triton": triton.__version__, **figures}
        BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n", encoding="utf-8")
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        tail = rest.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{table(figures)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()

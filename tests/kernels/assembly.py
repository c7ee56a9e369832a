"""What the assembly of a compiled kernel says: accesses, registers, spills, instructions."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from moe_triton import kernels

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def text(compiled: Any) -> str:
    """PTX or GCN assembly."""
    return compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]


def facts(compiled: Any) -> dict[str, Any]:
    """Facts of a kernel.

    ``spills`` counts bytes, ``order`` lists stores, barriers and memory fences in their order, and
    ``approximate`` operations that are not rounded as in IEEE 754.
    """
    assembly = text(compiled)
    registers, spills = resources(compiled)
    if "ptx" in compiled.asm:
        return {
            "accesses": sorted(set(re.findall(r"\b(?:ld|st)\.global[.\w]*", assembly))),
            "fma": len(re.findall(r"\bfma\.", assembly)),
            "registers": registers,
            "spills": spills,
            "approximate": re.findall(r"\b(?:div|rcp|sqrt|rsqrt)\.(?:full|approx)\S*", assembly),
            "order": re.findall(
                r"bar\.sync|st\.global\S*|\S*(?:acquire|release|acq_rel|relaxed)\S*", assembly
            ),
        }
    return {
        "accesses": sorted(set(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", assembly))),
        # A rounded division has five fma, and ends in one v_div_fixup.
        "fma": len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad)_f32", assembly))
        - 5 * len(re.findall(r"\bv_div_fixup_f32", assembly)),
        "registers": registers,
        "spills": spills,
        "approximate": [],  # unknown: a rounded division begins with an approximate one
        "order": re.findall(r"s_barrier|buffer_wbl2.*|buffer_inv.*", assembly),
    }


def resources(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    if "ptx" in compiled.asm:
        usage = _of_cubin("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return int(registers), int(stack)
    # Scalar registers spill to lanes of vector registers, not to memory.
    assembly = text(compiled)
    registers = max(map(int, re.findall(r"\.vgpr_count: *(\d+)", assembly)))
    return registers, 4 * sum(map(int, re.findall(r"vgpr_spill_count: *(\d+)", assembly)))


def figures(launch: Any, width: int) -> dict[str, int]:
    """What a launch of ``compiling`` costs for a row of ``width`` elements.

    ``load``, ``store`` and ``in_flight`` are bytes of a lane.
    """
    body = tile_loop(launch.compiled)
    registers, spills = resources(launch.compiled)
    constants, warps = launch.arguments, launch.compiled.metadata.num_warps
    block = constants.get("BLOCK_H") or constants.get("BLOCK")
    block = block or constants["GROUPS"] * constants["LANES"]
    rows = constants.get("BLOCK_T") or constants["ROWS"]
    return {
        "instructions": len(body) * warps * -(-width // block) // rows,
        "warps": warps,
        "registers": registers,
        "spills": spills,
        "load": widest_access(body, "load"),
        "store": widest_access(body, "store"),
        "in_flight": bytes_in_flight(body),
    }


def tile_loop(compiled: Any) -> list[str]:
    """Instructions of the loop over tiles; all of the kernel's if it has no loop.

    The shortest loop with all of the widest accesses: subroutines of divisions lie outside. Left
    out are functions whose names begin with ``_rare``. Those of an inner loop count once.
    """
    listing, labels, rare, unusual = [], {}, False, set()
    for line in _listing(compiled):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(listing)
        elif place := re.match(r"@(\w+\.py):(\d+)", line):
            rare = (place[1], int(place[2])) in _rare_lines()
        else:
            if rare:
                unusual.add(len(listing))
            listing.append(line)
    loops = []
    for end, line in enumerate(listing):
        jump = re.search(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)", line)
        if jump and labels.get(jump[1], end) < end:
            loops.append((labels[jump[1]], end))
    bodies = [
        [listing[at] for at in range(start, end + 1) if at not in unusual]
        for start, end in loops or [(0, len(listing) - 1)]
    ]
    # Rare blocks behind the loop jump back into it: the shortest loop with all accesses has none.
    widest = max(map(access_bytes, listing))
    return max(bodies, key=lambda body: ([*map(access_bytes, body)].count(widest), -len(body)))


def access_bytes(instruction: str) -> int:
    """Bytes a lane of an access of global memory, 0 for other instructions."""
    if found := re.search(r"\b(?:LDG|STG)\.E(\S*)", instruction):
        bits = re.search(r"\.(?:[US])?(8|16|64|128)\b", found[1])
        return int(bits[1]) // 8 if bits else 4
    if found := re.match(r"(?:global|flat|buffer)_(?:load|store)_(\w+)", instruction):
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16}
        return sizes.get(found[1], 2 if "short" in found[1] or "b16" in found[1] else 1)
    return 0


def widest_access(body: list[str], kind: str) -> int:
    """Bytes of the widest "load" or "store"."""
    word = {"load": r"\bLDG|_load_", "store": r"\bSTG|_store_"}[kind]
    return max((access_bytes(line) for line in body if re.search(word, line)), default=0)


def bytes_in_flight(body: list[str]) -> int:
    """Most bytes of wide loads that a lane waits for at a time."""
    most, pending = 0, []  # (bytes, registers)
    for line in body:
        if wait := re.search(r"\bvmcnt\((\d+)\)", line):
            pending = pending[len(pending) - int(wait[1]) :] if int(wait[1]) else []
            continue
        if line.startswith(("global_", "flat_", "buffer_")):
            pending.append((access_bytes(line) if "_load_" in line else 0, set()))
        elif re.search(r"\bLDG", line):
            first = int(re.search(r"\bR(\d+)", line)[1])
            num_bytes = access_bytes(line)
            pending.append((num_bytes, set(range(first, first + max(num_bytes // 4, 1)))))
        else:
            used = set(map(int, re.findall(r"\bR(\d+)", line)))
            for number in reversed(range(len(pending))):
                if pending[number][1] & used:
                    # Loads return in order.
                    pending = pending[number + 1 :]
                    break
        most = max(most, sum(size for size, _ in pending if size >= 8))
    return most


@functools.cache
def _rare_lines() -> set[tuple[str, int]]:
    """File and line of what only rare rows need."""
    return {
        (path.name, line)
        for path in Path(kernels.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_rare")
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def _listing(compiled: Any) -> list[str]:
    """Labels, places as @FILE:LINE, and instructions of a kernel."""
    if "ptx" in compiled.asm:
        listing = _of_cubin("nvdisasm", "--print-line-info", compiled.asm["cubin"])
        found = re.findall(
            r'^(\.L\w+:)|^\s*//## File "[^"]*?([^/"]+)", line (\d+)|/\*[0-9a-f]{4,}\*/\s+(.*?) *;',
            listing, re.MULTILINE,
        )  # fmt: skip
        lines = [
            label or (f"@{name}:{number}" if name else line) for label, name, number, line in found
        ]
        # After the last instruction come a branch to itself and padding.
        while lines[-1] == "NOP":
            lines.pop()
        return lines
    listing = text(compiled)
    files = dict(re.findall(r'^\t\.file\t(\d+) (?:"[^"]*" )?"([^"]+)"', listing, re.MULTILINE))
    body = listing.split("-- Begin function", 1)[1].split(".Lfunc_end", 1)[0]
    found = re.findall(
        r"^(\.L\w+:)|^\t\.loc\t(\d+) (\d+)|^\t([a-z]\w+(?: [^;\n]*)?)", body, re.MULTILINE
    )
    return [
        label or (f"@{Path(files[file]).name}:{number}" if file else line.strip())
        for label, file, number, line in found
    ]


def _of_cubin(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""Read times of dispatch and combine from files of Ascend's profilers.

    kernel_details.csv            torch_npu.profiler: a row per kernel
    op_summary_*.csv              msprof: a row per task
    op_statistic*.csv             both: count, shortest, mean and longest per type
    communication.json            both: collectives of hcom, by step
    trace_view.json, msprof_*.json   both: a Chrome trace

Files are told apart by what is in them. An operator of the family is one row for each call, since
it communicates inside its kernel; what communication.json lists beside it are other collectives.
Source: the user guides of Ascend/pytorch and Ascend/msprof.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ...record.calls import FileError
from ..readers.safe_files import read_json, read_text

_MOST_COLUMNS = 1000
_NAME = re.compile(
    r"MoeDistribute(Dispatch|Combine)(V\d)?(Setup|Teardown|AddRmsNorm)?|Cam\w*MoeDistribute"
    r"(Dispatch|Combine)|Moe(Dispatch|Combine)Normal"
)
_FILES = (
    "kernel_details*.csv",
    "op_summary*.csv",
    "op_statistic*.csv",
    "communication*.json",
    "trace_view*.json",
    "msprof_*.json",
)
_QUANT = {"INT8": "int8", "FLOAT8_E4M3FN": "fp8", "FLOAT8_E5M2": "fp8", "HIFLOAT8": "hif8"}
_SIXTEEN = {"BF16": "bf16", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
_KINDS = (
    "be kernel_details, op_summary or op_statistic (CSV), communication or a trace (JSON) of "
    "Ascend's profilers"
)

Report = Callable[[str, str], None]


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of one operator on one rank.

    Attributes:
        file: they come from.
        rank: of the file, by its folder and device.
        type: of the operator, such as MoeDistributeDispatchV2.
        phase: "dispatch" or "combine", with "setup" or "teardown" behind it.
        micros: of each call in the order of their start; of a summary its shortest, mean, longest.
        count: of the calls.
        summary: whether the calls themselves are not in the file.
        tokens: BS, None where the file has no shapes.
        hidden: H, likewise.
        top_k: K, likewise.
        format: of the rows that are sent, likewise.
    """

    file: str
    rank: str
    type: str
    phase: str
    micros: tuple[float, ...]
    count: int
    summary: bool = False
    tokens: int | None = None
    hidden: int | None = None
    top_k: int | None = None
    format: str | None = None

    @property
    def workload(self) -> tuple[int | None, int | None, int | None]:
        """BS, H, K."""
        return self.tokens, self.hidden, self.top_k


@dataclasses.dataclass
class _Row:
    """One call."""

    rank: str
    type: str
    start: Decimal
    micros: float
    sizes: tuple[int | None, int | None, int | None, str | None]


def find(paths: Iterable[Path], report: Report) -> list[Path]:
    """The files of ``paths``; of a folder those with the names that profilers give."""
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted({file for name in _FILES for file in path.rglob(name)})
            if not found:
                report(str(path), f"a folder must hold one of {', '.join(_FILES)}, it has none")
            files += found
        else:
            files.append(path)
    return files


def read(path: Path, report: Report) -> list[Times]:
    """The times in a file; what is of no use goes to ``report``.

    Raises:
        FileError: it is none of the files above.
    """
    if path.suffix.lower() == ".json":
        return _read_json(path, report)
    header, rows = _table(path, report)
    names = set(header)
    if {"OP Type", "Avg Time(us)", "Count"} <= names:
        return _statistic(path, rows, report)
    for type_, name, start, duration in (
        ("Type", "Name", "Start Time(us)", "Duration(us)"),
        ("OP Type", "Op Name", "Task Start Time(us)", "Task Duration(us)"),
    ):
        if {type_, duration} <= names:
            return _calls(path, rows, report, (type_, name, start, duration))
    got = ", ".join(header[:8]) + (", ..." if len(header) > 8 else "")
    raise FileError("compare", str(path), _KINDS, f"the columns {got}")


def _table(path: Path, report: Report) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV file; a last row that was cut off is left out."""
    text = read_text(path, _KINDS)
    contract = f"be a CSV file of at most {_MOST_COLUMNS} columns"
    first = text.partition("\n")[0]
    if first.count(",") >= _MOST_COLUMNS:
        raise FileError("compare", str(path), contract, f"{first.count(',') + 1} columns")
    lines = csv.reader(io.StringIO(text, newline=""), strict=False)
    rows: list[dict[str, str]] = []
    cut = 0
    try:
        header = [cell.strip().lstrip("\ufeff") for cell in next(lines)]
        for cells in lines:
            if not any(cells):
                continue
            cut += len(cells) != len(header)
            if len(cells) == len(header):
                rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    except (csv.Error, StopIteration, ValueError) as error:
        raise FileError("compare", str(path), contract, str(error) or "no header") from None
    if cut:
        words = "1 row was" if cut == 1 else f"{cut} rows were"
        report(path.name, f"{words} cut off or too long, and left out")
    return header, rows


def _number(text: str | None) -> float | None:
    """A number, None for N/A and what is none."""
    value = _decimal(text)
    return None if value is None else float(value)


def _decimal(text: object) -> Decimal | None:
    """Start times have more digits than a float, and a tab behind them."""
    try:
        value = Decimal(str(text).strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() and abs(value) < Decimal(10) ** 30 else None


def phase_of(name: str) -> str | None:
    """Dispatch or combine, with its split phase, from a type or a name of an operator."""
    match = _NAME.search(name)
    if match is None:
        return None
    kind = (match[1] or match[4] or match[5]).lower()
    part = match[3] or ""
    return f"{kind} {part.lower()}" if part in ("Setup", "Teardown") else kind


def _shapes(text: str) -> list[tuple[int, ...]]:
    """The shapes of "64,7168;;64,8": an input without elements is empty."""
    shapes = []
    for part in text.strip().strip('"').split(";"):
        sizes = [size.strip() for size in part.split(",") if size.strip()]
        shapes.append(tuple(int(size) for size in sizes) if all(map(str.isdigit, sizes)) else ())
    return shapes


def _sizes(row: Mapping[str, str]) -> tuple[int | None, int | None, int | None, str | None]:
    """BS, H, K and format of a call, from its shapes and dtypes."""
    shapes = _shapes(row.get("Input Shapes", ""))
    inputs = [t.strip() for t in row.get("Input Data Types", "").split(";")]
    name = row.get("Type") or row.get("OP Type") or ""
    if re.search(r"V3", name) and len(shapes) > 1 and len(shapes[0]) == 1:
        shapes, inputs = shapes[1:], inputs[1:]  # the context of the communication
    if len(shapes) < 2 or len(shapes[0]) != 2 or len(shapes[1]) != 2:
        return None, None, None, None
    (_, hidden), (tokens, top_k) = shapes[:2]
    sent = inputs[0] if inputs else ""
    if "Dispatch" in name:
        sent = row.get("Output Data Types", "").split(";")[0].strip()
    sent = sent.removeprefix("DT_").upper()
    return tokens, hidden, top_k, _QUANT.get(sent) or _SIXTEEN.get(sent)


def _rank(path: Path, device: str) -> str:
    """Name of the rank of a file: from its folders, and the device where it has several."""
    for folder in path.resolve().parents[:4]:
        match = re.search(r"rank[_-]?(\d+)", folder.name, re.IGNORECASE)
        if match:
            return f"rank {int(match[1])}"
        for file in sorted(folder.glob("profiler_info_*.json"))[:1]:
            number = file.stem.rpartition("_")[2]
            if number.isdigit():
                return f"rank {int(number)}"
    return f"{path.parent.name}, device {device}" if device else path.parent.name


def _calls(
    path: Path, rows: list[dict[str, str]], report: Report, columns: tuple[str, str, str, str]
) -> list[Times]:
    type_, name, start, duration = columns
    calls = []
    for row in rows:
        kind = row.get(type_, "")
        if phase_of(kind) is None:
            kind = row.get(name, "")
        if phase_of(kind) is None:
            continue
        micros = _number(row.get(duration))
        if micros is None or micros < 0:
            report(
                path.name, f"{kind[:60]}: a duration must be a number, got {row.get(duration)!r}"
            )
            continue
        begin = _decimal(row.get(start)) or Decimal(0)
        match = _NAME.search(kind)
        assert match is not None
        rank = _rank(path, row.get("Device_id", ""))
        calls.append(_Row(rank, match[0], begin, micros, _sizes({**row, "Type": kind})))
    if not calls:
        report(path.name, "no row is of a dispatch or combine")
    return _grouped(path, calls)


def _grouped(path: Path, calls: list[_Row]) -> list[Times]:
    groups: dict[Any, list[_Row]] = {}
    for call in sorted(calls, key=lambda call: call.start):
        groups.setdefault((call.rank, call.type, call.sizes), []).append(call)
    result = []
    for (rank, kind, sizes), members in groups.items():
        micros = tuple(call.micros for call in members)
        phase = phase_of(kind) or ""
        result.append(Times(str(path), rank, kind, phase, micros, len(micros), False, *sizes))
    return result


def _statistic(path: Path, rows: list[dict[str, str]], report: Report) -> list[Times]:
    result = []
    for row in rows:
        phase = phase_of(row["OP Type"])
        if phase is None:
            continue
        values = [_number(row.get(f"{word} Time(us)")) for word in ("Min", "Avg", "Max")]
        count = _number(row["Count"])
        known = [value for value in values if value is not None]
        if len(known) < 3 or count is None:
            report(path.name, f"{row['OP Type']}: Count, Min, Avg and Max must be numbers")
            continue
        rank = _rank(path, row.get("Device_id", ""))
        result.append(
            Times(str(path), rank, row["OP Type"], phase, tuple(known), int(count), summary=True)
        )
    if not result:
        report(path.name, "no row is of a dispatch or combine")
    return result


def _read_json(path: Path, report: Report) -> list[Times]:
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("traceEvents"), list):
        value = value["traceEvents"]
    if isinstance(value, list):
        return _trace(path, value, report)
    if isinstance(value, dict) and any(str(key).startswith("step") for key in value):
        return _communication(path, value, report)
    got = f"keys {[*map(str, value)][:5]}" if isinstance(value, dict) else type(value).__name__
    raise FileError("compare", str(path), _KINDS, got)


def _trace(path: Path, events: list[Any], report: Report) -> list[Times]:
    calls = []
    for event in events:
        if not isinstance(event, dict) or event.get("ph") != "X":
            continue
        arguments = event.get("args")
        name = str(event.get("name", ""))
        # The host's call has the same name, and no task.
        if phase_of(name) is None or not isinstance(arguments, dict):
            continue
        if "Task Type" not in arguments:
            continue
        micros, start = _number(str(event.get("dur"))), _decimal(event.get("ts"))
        if micros is None:
            report(path.name, f"{name[:60]}: dur must be a number, got {event.get('dur')!r}")
            continue
        match = [*_NAME.finditer(name)][-1]
        none = (None, None, None, None)
        calls.append(_Row(_rank(path, ""), match[0], start or Decimal(0), micros, none))
    if not calls:
        report(path.name, "no task is of a dispatch or combine")
    return _grouped(path, calls)


def _communication(path: Path, steps: Mapping[str, Any], report: Report) -> list[Times]:
    calls, others, milliseconds = [], 0, 0.0
    for step in steps.values():
        groups = step.values() if isinstance(step, dict) else ()
        for group in groups:
            for name, entry in group.items() if isinstance(group, dict) else ():
                if name == "Total Op Info" or not isinstance(entry, dict):
                    continue
                info = entry.get("Communication Time Info")
                info = info if isinstance(info, dict) else {}
                elapsed = _number(str(info.get("Elapse Time(ms)")))
                if elapsed is None:
                    report(path.name, f"{name[:60]}: Elapse Time(ms) must be a number")
                    continue
                if phase_of(name) is None:
                    others += 1
                    milliseconds += elapsed
                    continue
                match = _NAME.search(name)
                assert match is not None
                start = _decimal(info.get("Start Timestamp(us)")) or Decimal(0)
                none = (None, None, None, None)
                calls.append(_Row(_rank(path, ""), match[0], start, 1000 * elapsed, none))
    if others:
        words = "operation" if others == 1 else "operations"
        report(
            path.name, f"{others} hcom {words} of {milliseconds:.3f} ms are no dispatch or combine"
        )
    if not calls:
        report(path.name, "holds no dispatch or combine: they communicate inside their kernel")
    return _grouped(path, calls)


def read_bench(path: Path) -> list[dict[str, Any]]:
    """The cases of ``moe-triton bench layer --json``: JSON lines, or one JSON list.

    Raises:
        FileError: it is neither.
    """
    contract = "hold results of moe-triton bench layer --json"
    text = read_text(path, contract)
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
        cases = value if value is not None else [json.loads(line) for line in text.splitlines()]
    except (ValueError, RecursionError) as error:
        raise FileError("compare", str(path), contract, str(error)) from None
    cases = [c for c in cases if isinstance(c, dict) and ("dispatch_us" in c or "combine_us" in c)]
    if not cases:
        raise FileError("compare", str(path), contract, "no case with dispatch_us or combine_us")
    return cases

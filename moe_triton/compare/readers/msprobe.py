"""Dumps of msprobe (mindstudio-probe): ``step{N}/rank{R}/dump.json`` and a ``.pt`` per tensor.

The tensors of a call are those that dump.json names, in the folder ``dump_tensor_data`` beside it
(``tensor_data`` in graph mode). Without a process group the folder of a rank is ``proc{pid}``.
Source: the dump instructions of Ascend/msprobe, and dumps that version 26.2.0 wrote.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...record.calls import FileError, RankCall, StoredTensor
from ...record.operators import OUTPUTS, bind, missing
from .safe_files import dtype_named, inside, read_json, read_torch

DESCRIPTION = "dump.json"
_RANK = re.compile(r"(rank|proc|pid)\d*")
_STEP = re.compile(r"step\d+")
_CALL = re.compile(r"[A-Za-z_]\w*\.(?:\w+\.)*?(npu_moe_\w+)(?:\.default)?\.(\d+)(\.forward)?")
_DATA_FOLDERS = ("dump_tensor_data", "tensor_data")


def rank_folders(path: Path) -> list[Path]:
    """The folders with a dump.json at or below ``path``, at most two levels down, in order."""
    for pattern in ("", "*/", "*/*/"):
        found = [file.parent for file in path.glob(pattern + DESCRIPTION)]
        if found:
            return sorted(found, key=_natural)
    return []


def _natural(path: Path) -> list[tuple[int, object]]:
    """Sort key that puts rank10 after rank9."""
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts]


def read(path: Path, report: Callable[[str, str], None]) -> list[RankCall]:
    """The calls of the family in a dump.

    Args:
        path: the folder of a dump, of a step or of a rank.
        report: called with a place and a problem, for parts that cannot be read.
    """
    calls = []
    for folder in rank_folders(path):
        step = folder.parent.name if _STEP.fullmatch(folder.parent.name) else ""
        place = f"{step}/{folder.name}".lstrip("/")
        try:
            calls += _read_rank(folder, step)
        except FileError as error:
            report(place, str(error))
    return calls


def _read_rank(folder: Path, step: str) -> list[RankCall]:
    file = folder / DESCRIPTION
    description = read_json(file)
    data = description.get("data") if isinstance(description, dict) else None
    if not isinstance(data, dict):
        raise FileError(
            "compare", str(file), "hold an object with the calls under 'data'", type(data).__name__
        )
    task = description.get("task")
    tensors = next((folder / n for n in _DATA_FOLDERS if (folder / n).is_dir()), folder)
    calls = []
    for name, entry in data.items():
        match = _CALL.fullmatch(name)
        if match is None or match[1] not in OUTPUTS:
            continue
        call = RankCall(match[1], name, step, folder.name, {}, {}, index=int(match[2][:9]))
        if isinstance(entry, dict):
            calls.append(_read_call(call, entry, folder, tensors, task))
        else:
            problem = f"the call must be an object, got {type(entry).__name__}"
            calls.append(dataclasses.replace(call, problem=problem))
    return calls


def _read_call(
    call: RankCall, entry: dict[str, Any], folder: Path, tensors: Path, task: object
) -> RankCall:
    op = call.op
    notes: list[str] = []
    value = _Values(folder, tensors, task)
    args, kwargs = entry.get("input_args") or [], entry.get("input_kwargs") or {}
    outputs = entry.get("output")
    problem, statistics_only = "", False
    arguments: dict[str, Any] = {}
    results: dict[str, StoredTensor | None] = {}
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        problem = "input_args must be a list and input_kwargs an object"
    else:
        arguments, unknown = bind(
            op, [value(a) for a in args], {k: value(v) for k, v in kwargs.items()}
        )
        notes += [f"argument {k} is not known here" for k, v in unknown.items() if v is not None]
        statistics_only = value.statistics_only
        lacking = missing(op, arguments)
        if lacking:
            problem = f"the arguments {', '.join(lacking)} are missing"
    if outputs is None or outputs == []:
        notes.append("no outputs: the dump holds the inputs of this call alone")
        outputs = []
    if not isinstance(outputs, list):
        outputs = [outputs]
    if len(outputs) == 1 and isinstance(outputs[0], list):  # a tuple in graph mode
        outputs = outputs[0]
    names = OUTPUTS[op]
    if len(outputs) > len(names):
        notes.append(f"{len(outputs)} outputs fit no documented variant of {len(names)}")
    for output, description in zip(names, outputs, strict=False):
        stored = value(description)
        if stored is None or isinstance(stored, StoredTensor):
            results[output] = stored
        else:
            notes.append(f"output {output} is no tensor")
    if statistics_only and not problem:
        problem = (
            "the dump holds statistics only, no tensors; dump again with "
            '"task": "tensor" in the configuration of msprobe'
        )
    return dataclasses.replace(
        call, arguments=arguments, outputs=results, notes=tuple(notes), problem=problem
    )


class _Values:
    """Turns entries of dump.json into values and stored tensors."""

    def __init__(self, folder: Path, tensors: Path, task: object) -> None:
        self._folder = folder
        self._tensors = tensors
        self._task = task
        self.statistics_only = False

    def __call__(self, entry: Any) -> Any:
        if isinstance(entry, list):
            return [self(item) for item in entry]
        if not isinstance(entry, dict):
            return entry
        kind = entry.get("type")
        if kind == "torch.Tensor":
            return self._tensor(entry)
        if kind == "torch.ProcessGroup":
            ranks = entry.get("group_ranks")
            ranks = tuple(map(str, ranks)) if isinstance(ranks, list) else ()
            return f"ranks {','.join(ranks)} ({entry.get('group_id')})"
        if kind in ("torch.dtype", "torch.device"):
            return dtype_named(entry.get("value"))
        return entry.get("value")

    def _tensor(self, entry: dict[str, Any]) -> StoredTensor | None:
        shape = entry.get("shape")
        shape = shape if isinstance(shape, list) else []
        sizes = "shape" in entry and all(isinstance(size, int) and size >= 0 for size in shape)
        name = entry.get("data_name")
        where = f"{self._folder.name}/{name}"
        dtype = dtype_named(entry.get("dtype"))
        if not name or name == "-1":
            name = None
            self.statistics_only |= not (sizes and 0 in shape)

        def read() -> torch.Tensor:
            if name is None and sizes and 0 in shape:
                return torch.empty(shape, dtype=dtype)  # msprobe writes no file of no elements
            if name is None:
                contract = "be dumped with its data"
                raise FileError("compare", self._folder.name, contract, "statistics only")
            return read_torch(inside(self._tensors, name, where))

        return StoredTensor(
            where,
            read,
            dtype,
            tuple(shape) if sizes else None,
        )

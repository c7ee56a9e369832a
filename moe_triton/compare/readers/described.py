"""Plain ``torch.save`` or ``.npy`` files, named by a YAML file beside them.

    defaults:                             # arguments of all calls
      ep_world_size: 4
      moe_expert_num: 8
    calls:
      - op: npu_moe_distribute_dispatch_v2
        ranks: 4                          # or a list of them
        arguments: {quant_mode: 2}
        inputs: {x: "rank{rank}/x.pt", expert_ids: "rank{rank}/inputs.pt:ids"}
        outputs: {expand_x: "rank{rank}/expand_x.pt"}

``{rank}`` stands for the number of the rank, ``file.pt:key`` for a tensor of a saved dictionary.
Files lie below the folder of the YAML file. ``ep_rank_id`` is the rank unless ``arguments`` gives
it, ``group_ep`` may be left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...record.calls import FileError, RankCall, StoredTensor
from ...record.operators import OUTPUTS, missing, signature
from .safe_files import dtype_named, inside, read_tensor, read_yaml

_MOST_RANKS = 4096
_KEYS = {"op", "ranks", "arguments", "inputs", "outputs", "name", "step"}


def read(path: Path, report: Callable[[str, str], None]) -> list[RankCall]:
    """The calls that a YAML file describes.

    Raises:
        FileError: it is no YAML file, or has no list of calls.
    """
    value = read_yaml(path)
    calls = value.get("calls") if isinstance(value, dict) else None
    if not isinstance(calls, list):
        got = type(value).__name__ if not isinstance(value, dict) else f"keys {[*value][:9]}"
        raise FileError("compare", str(path), "have a list under 'calls'", got)
    defaults = value.get("defaults") or {}
    result = []
    numbers: dict[str, int] = {}
    for index, entry in enumerate(calls):
        place = f"{path.name}, call {index}"
        try:
            op = _op(place, entry)
            number = numbers[op] = numbers.get(op, -1) + 1
            result += [
                _call(place, path.parent, entry, defaults, op, number, rank)
                for rank in _ranks(place, entry)
            ]
        except FileError as error:
            report(place, str(error))
    return result


def _op(place: str, entry: Any) -> str:
    if not isinstance(entry, dict):
        raise FileError("compare", place, "be a mapping", type(entry).__name__)
    unknown = {str(key) for key in entry} - _KEYS
    if unknown:
        raise FileError("compare", place, f"have keys of {sorted(_KEYS)}", sorted(unknown))
    op = entry.get("op")
    if not isinstance(op, str) or op not in OUTPUTS:
        raise FileError("compare", f"{place}: op", f"be one of {[*OUTPUTS]}", repr(op))
    return op


def _ranks(place: str, entry: dict[str, Any]) -> list[int]:
    ranks = entry.get("ranks", 1)
    numbers = [*range(min(ranks, _MOST_RANKS + 1))] if isinstance(ranks, int) else ranks
    if (
        not isinstance(numbers, list)
        or not 1 <= len(numbers) <= _MOST_RANKS
        or not all(isinstance(rank, int) for rank in numbers)
    ):
        contract = f"be a number of ranks up to {_MOST_RANKS}, or a list of them"
        raise FileError("compare", f"{place}: ranks", contract, repr(ranks)[:100])
    return numbers


def _call(
    place: str, folder: Path, entry: dict[str, Any], defaults: Any, op: str, number: int, rank: int
) -> RankCall:
    parameters = signature(op).parameters
    given = entry.get("arguments") or {}
    files, outputs = entry.get("inputs") or {}, entry.get("outputs") or {}
    for name, section in (
        ("defaults", defaults),
        ("arguments", given),
        ("inputs", files),
        ("outputs", outputs),
    ):
        if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
            raise FileError("compare", f"{place}: {name}", "be a mapping by names", repr(section))
    wrong = sorted((set(given) | set(files)) - set(parameters))
    if wrong:
        raise FileError("compare", f"{place}: arguments", f"be those of {op}", ", ".join(wrong))
    wrong = sorted(set(outputs) - set(OUTPUTS[op]))
    if wrong:
        contract = f"be of {[*OUTPUTS[op]]}"
        raise FileError("compare", f"{place}: outputs", contract, ", ".join(wrong))
    arguments: dict[str, Any] = {"group_ep": "described"} if "group_ep" in parameters else {}
    if "ep_rank_id" in parameters:
        arguments["ep_rank_id"] = rank
    plain = {k: v for k, v in {**defaults, **given}.items() if k in parameters}
    arguments |= {name: _plain(place, name, value) for name, value in plain.items()}
    arguments |= {name: _file(place, folder, value, rank) for name, value in files.items()}
    results = {name: _file(place, folder, value, rank) for name, value in outputs.items()}
    lacking = missing(op, arguments)
    problem = f"the arguments {', '.join(lacking)} are missing" if lacking else ""
    name, step = entry.get("name", f"{op}.{number}"), entry.get("step", "")
    return RankCall(
        op, str(name), str(step), f"rank{rank}", arguments, results, problem=problem, index=number
    )


def _plain(place: str, name: str, value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return value
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise FileError("compare", f"{place}: {name}", "be a number or a text", repr(value)[:100])
    return dtype_named(value) or value


def _file(place: str, folder: Path, value: Any, rank: int) -> StoredTensor | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise FileError("compare", place, "name files by text", repr(value)[:100])
    name, _, key = value.replace("{rank}", str(rank)).partition(":")
    path = inside(folder, name, place)
    return StoredTensor(name, lambda: read_tensor(path, key or None))

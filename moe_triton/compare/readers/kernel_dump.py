"""Converted kernel dumps of acl ("adump"): ``{type}.{name}.{numbers}.{input|output}.{i}.npy``.

``msaccucmp convert`` and ``msprobe parse`` write one file for each tensor, in a folder for each
device. They hold no attributes: sizes are taken from the tensors, and what these do not say from
``settings``. bfloat16 comes as float32.
Source: the reader of Ascend/msprobe (msaccucmp), whose pattern of names this follows.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...ascend import op_names
from ...record.calls import FileError, RankCall, StoredTensor
from ...record.operators import OUTPUTS, is_dispatch, missing, signature
from .safe_files import read_tensor

_FILE = re.compile(
    r"(?P<type>MoeDistribute\w+)\.(?P<call>[\w-]+(?:\.\d+)+)\.(?P<side>input|output)\.(?P<i>\d+)"
    r"\.(?:npy|pt)"
)
_TYPES = {
    "MoeDistributeDispatch": op_names.DISPATCH,
    "MoeDistributeDispatchV2": op_names.DISPATCH_V2,
    "MoeDistributeDispatchV3": op_names.DISPATCH_V2,  # the fused form of 950 in graph mode
    "MoeDistributeCombine": op_names.COMBINE,
    "MoeDistributeCombineV2": op_names.COMBINE_V2,
    "MoeDistributeCombineV3": op_names.COMBINE_V2,
    "MoeDistributeCombineAddRmsNorm": op_names.COMBINE_ADD_RMS_NORM,
}
_REQUIRED = {
    op_names.DISPATCH: 2,
    op_names.DISPATCH_V2: 2,
    op_names.COMBINE: 5,
    op_names.COMBINE_V2: 5,
    op_names.COMBINE_ADD_RMS_NORM: 7,
}


def rank_folders(path: Path) -> list[Path]:
    """The folders with files of the family at or below ``path``, at most four levels down."""
    for pattern in ("", "*/", "*/*/", "*/*/*/", "*/*/*/*/"):
        folders = {
            file.parent
            for kind in ("npy", "pt")
            for file in path.glob(f"{pattern}MoeDistribute*.{kind}")
            if _FILE.fullmatch(file.name)
        }
        if folders:
            return sorted(folders, key=_natural)
    return []


def _natural(path: Path) -> list[tuple[int, object]]:
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts]


def read(
    path: Path, report: Callable[[str, str], None], settings: Mapping[str, Any]
) -> list[RankCall]:
    """The calls in the folders of the devices; a device is a rank, in the order of their numbers.

    Args:
        path: folder at or above those of the devices.
        report: called with a place and a problem.
        settings: arguments by name, such as moe_expert_num.
    """
    folders = rank_folders(path)
    calls = []
    for rank, folder in enumerate(folders):
        groups: dict[tuple[str, str], dict[tuple[str, int], Path]] = defaultdict(dict)
        for file in sorted(folder.iterdir(), key=_natural):
            match = _FILE.fullmatch(file.name)
            if match is None:
                continue
            if match["type"] not in _TYPES:
                report(f"{folder.name}/{file.name}", f"{match['type']} is not read")
                continue
            groups[match["type"], match["call"]][match["side"], int(match["i"])] = file
        for (kind, name), files in sorted(groups.items(), key=lambda item: _order(item[0][1])):
            calls.append(_read_call(kind, name, files, folder, rank, len(folders), settings))
    return _with_batches(calls, settings)


def _order(name: str) -> list[int]:
    """By time stamp, then task."""
    numbers = [int(part) for part in name.split(".")[1:]]
    stamps = [n for n in numbers if n > 10**14]
    return [*stamps, *numbers]


def _read_call(
    kind: str,
    name: str,
    files: Mapping[tuple[str, int], Path],
    folder: Path,
    rank: int,
    ranks: int,
    settings: Mapping[str, Any],
) -> RankCall:
    op = _TYPES[kind]
    call_name = f"{kind}.{name}"
    try:
        shapes = {key: read_tensor(file) for key, file in files.items()}
    except FileError as error:
        return RankCall(op, call_name, "", folder.name, {}, {}, problem=str(error))
    inputs = {i: tensor for (side, i), tensor in shapes.items() if side == "input"}
    outputs = {i: tensor for (side, i), tensor in shapes.items() if side == "output"}
    names = _input_names(op, kind, inputs)
    arguments: dict[str, Any] = {}
    for i, argument in names.items():
        arguments[argument] = _stored(
            files["input", i],
            inputs[i],
            argument == "x" or (inputs[i].dtype == torch.float32 and argument in _IN_TOKEN_DTYPE),
        )
    results = {
        OUTPUTS[op][i]: _stored(files["output", i], tensor, widened=True)
        for i, tensor in outputs.items()
        if i < len(OUTPUTS[op])
    }
    by_name = {argument: inputs[i] for i, argument in names.items()}
    found = {OUTPUTS[op][i]: tensor for i, tensor in outputs.items() if i < len(OUTPUTS[op])}
    guessed = _guess(op, by_name, found, rank, ranks, settings)
    notes = [f"{k} = {v} is taken from the shapes" for k, v in guessed.items() if k in _GUESSES]
    arguments |= guessed | {k: v for k, v in settings.items() if k in signature(op).parameters}
    arguments |= {"group_ep": "kernel dump", "ep_rank_id": rank}
    lacking = missing(op, arguments)
    problem = ""
    if lacking:
        problem = f"{', '.join(lacking)} must be given with --set, the files do not say"
    return RankCall(op, call_name, "", folder.name, arguments, results, tuple(notes), problem)


_IN_TOKEN_DTYPE = ("expand_x", "shared_expert_x", "ori_x", "residual_x", "gamma")
_GUESSES = ("moe_expert_num", "quant_mode", "ep_world_size")


def _stored(file: Path, tensor: torch.Tensor, widened: bool) -> StoredTensor:
    narrow = widened and tensor.dtype == torch.float32 and file.suffix == ".npy"

    def read() -> torch.Tensor:
        value = read_tensor(file)
        # Tokens are float16 or bfloat16: float32 is what the conversion made of bfloat16.
        return value.bfloat16() if narrow and ".input." in file.name else value

    return StoredTensor(f"{file.parent.name}/{file.name}", read, widened=narrow)


def _input_names(op: str, kind: str, inputs: Mapping[int, torch.Tensor]) -> dict[int, str]:
    """Names of the inputs: the required ones by position, the optional ones by dtype and shape."""
    order = sorted(i for i, tensor in inputs.items() if tensor.numel())
    if kind == "MoeDistributeDispatchV3" and order and inputs[order[0]].dim() == 1:
        order = order[1:]  # the context of the communication
    parameters = [*signature(op).parameters]
    first = {order[i]: parameters[i] for i in range(min(_REQUIRED[op], len(order)))}
    ids = next((inputs[i] for i, name in first.items() if name == "expert_ids"), None)
    for i in order[_REQUIRED[op] :]:
        tensor = inputs[i]
        if tensor.dtype == torch.bool:
            name = "x_active_mask"
        elif tensor.dtype == torch.int64:
            name = "performance_info"
        elif tensor.dtype == torch.int32:
            name = "elastic_info" if is_dispatch(op) else "tp_send_counts"
        elif is_dispatch(op):
            same = ids is not None and tensor.shape == ids.shape
            name = "expert_scales" if same else "scales"
        else:
            name = "expand_scales" if tensor.dim() == 1 else "shared_expert_x"
        first[i] = name
    return first


def _guess(
    op: str,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    rank: int,
    ranks: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Attributes that shapes and dtypes say, where settings do not."""
    shared = int(settings.get("shared_expert_rank_num", 0))
    values: dict[str, Any] = {"ep_world_size": ranks}
    counts = outputs.get("ep_recv_counts", inputs.get("ep_send_counts"))
    if counts is not None and rank >= shared and ranks > shared:
        values["moe_expert_num"] = counts.numel() // ranks * (ranks - shared)
    rows, scales = outputs.get("expand_x"), outputs.get("dynamic_scales")
    if is_dispatch(op) and rows is not None and rows.dtype == torch.int8:
        values["quant_mode"] = 2 if scales is not None and len(scales) == len(rows) else 1
    return {k: v for k, v in values.items() if k not in settings}


def _with_batches(calls: list[RankCall], settings: Mapping[str, Any]) -> list[RankCall]:
    """Set global_bs where ranks have different numbers of tokens, and E on shared ranks."""
    sizes = [len(c.arguments["expert_ids"].load()) for c in calls if "expert_ids" in c.arguments]
    experts = max((c.number("moe_expert_num") for c in calls), default=0)
    result = []
    for call in calls:
        arguments = dict(call.arguments)
        if len(set(sizes)) > 1 and "global_bs" not in settings:
            arguments["global_bs"] = max(sizes) * call.number("ep_world_size")
        problem = call.problem
        if "moe_expert_num" not in arguments and experts and not problem.startswith("compare"):
            arguments["moe_expert_num"] = experts
            problem = ""
        result.append(dataclasses.replace(call, arguments=arguments, problem=problem))
    return result

"""The files of a record: a folder per rank, and per call a JSON file and one of safetensors.

    PATH/rank{R}/environment.json                  versions, device, settings
    PATH/rank{R}/{number}.{op}.json                the call, written last
    PATH/rank{R}/{number}.{op}.safetensors         its tensors, as input.{name} and output.{name}

Rows that were not received are not stored: the JSON file has the shape of the whole tensor, and
they are read as zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UnavailableError
from .calls import FileError, RankCall, StoredTensor
from .operators import OUTPUTS, missing, signature

VERSION = 1
ENVIRONMENT = "environment.json"
_KIND = "moe_triton record"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
# Formats that safetensors does not have in all versions travel as bytes.
_AS_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


def _library() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise UnavailableError(
            "record", "safetensors is not installed: pip install 'moe_triton[record]'"
        ) from None
    return safetensors


def write_environment(folder: Path, environment: Mapping[str, Any]) -> None:
    """Begin the record of a rank: what it runs on, in place of an earlier record in the folder."""
    _library()
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("[0-9]*.npu_moe_*"):
        file.unlink()
    value = {"kind": _KIND, "version": VERSION, **environment}
    (folder / ENVIRONMENT).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_call(
    folder: Path,
    number: int,
    op: str,
    arguments: Mapping[str, Any],
    outputs: Mapping[str, torch.Tensor | None],
    rows: Mapping[str, int],
    index: int,
) -> int:
    """Write one call.

    Args:
        folder: of the rank.
        number: of the call on this rank, from 0.
        op: the operator.
        arguments: by name, tensors and plain values.
        outputs: by name.
        rows: how many leading rows of "input.x" or "output.x" to keep, by that name.
        index: of the call among those of its operator on the rank, recorded or not.

    Returns:
        The bytes of the tensors.
    """
    library = _library()
    tensors: dict[str, torch.Tensor] = {}
    description: dict[str, Any] = {"version": VERSION, "op": op, "index": index}
    description |= {"arguments": {}, "outputs": {}}
    for kind, section, values in (
        ("input", "arguments", arguments),
        ("output", "outputs", outputs),
    ):
        for name, value in values.items():
            key = f"{kind}.{name}"
            if not isinstance(value, torch.Tensor):
                description[section][name] = _plain(value)
                continue
            entry: dict[str, Any] = {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": [*value.shape],
            }
            kept = value[: rows[key]] if key in rows and value.dim() else value
            entry["rows"] = len(kept) if kept.dim() else 1
            kept = kept.detach().cpu().contiguous()
            tensors[key] = kept.view(torch.uint8) if kept.dtype in _AS_BYTES else kept
            description[section][name] = {"tensor": key, **entry}
    stem = folder / f"{number:06d}.{op}"
    # Tensors that share memory are refused by the library.
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    library.torch.save_file(tensors, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return {"text": str(value)}


def is_record(folder: Path) -> bool:
    """Whether a folder holds the calls of a rank."""
    file = folder / ENVIRONMENT
    try:
        return file.is_file() and _KIND in file.read_text(encoding="utf-8", errors="replace")[:100]
    except OSError:
        return False


def rank_folders(path: Path) -> list[Path]:
    """The folders of the ranks at or below ``path``, one or two levels down."""
    for pattern in ("", "*/", "*/*/"):
        folders = [f.parent for f in path.glob(pattern + ENVIRONMENT) if is_record(f.parent)]
        if folders:
            return sorted(folders, key=lambda f: (len(f.name), f.name))
    return []


def read_calls(
    folder: Path, read_json: Callable[[Path], Any], report: Callable[[str, str], None]
) -> list[RankCall]:
    """The calls of a rank.

    Args:
        folder: of the rank.
        read_json: reads a JSON file that may be hostile.
        report: called with a place and a problem, for calls that cannot be read.
    """
    calls = []
    for file in sorted(folder.glob("*.npu_moe_*.json")):
        place = f"{folder.name}/{file.name}"
        try:
            calls.append(_read_call(folder, file, read_json(file)))
        except FileError as error:
            report(place, str(error))
    return calls


def _read_call(folder: Path, file: Path, value: Any) -> RankCall:
    contract = "describe a call as moe-triton record writes it"
    op = value.get("op") if isinstance(value, dict) else None
    if not isinstance(op, str) or op not in OUTPUTS:
        raise FileError("compare", str(file), contract, f"op {op!r}")
    if value.get("version") != VERSION:
        raise FileError("compare", str(file), f"have version {VERSION}", value.get("version"))
    sections = [value.get(name) for name in ("arguments", "outputs")]
    if not all(isinstance(section, dict) for section in sections):
        raise FileError("compare", str(file), contract, "no arguments or outputs")
    data = file.with_suffix(".safetensors")
    arguments, outputs = (
        {name: _value(data, file, entry) for name, entry in section.items()} for section in sections
    )
    lacking = missing(op, arguments)
    arguments = {name: a for name, a in arguments.items() if name in signature(op).parameters}
    problem = f"the arguments {', '.join(lacking)} are missing" if lacking else ""
    index = value.get("index")
    return RankCall(
        op,
        file.stem,
        "",
        folder.name,
        arguments,
        outputs,
        problem=problem,
        index=index if isinstance(index, int) else None,
    )


def _value(data: Path, file: Path, entry: Any) -> Any:
    if isinstance(entry, list):
        return [_value(data, file, item) for item in entry]
    if not isinstance(entry, dict):
        return entry
    if "text" in entry:
        return entry["text"]
    dtype = entry.get("dtype")
    dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if "tensor" not in entry:
        return dtype
    shape, rows, key = entry.get("shape"), entry.get("rows"), entry["tensor"]
    sizes = isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
    if dtype is None or not sizes or not isinstance(rows, int) or not isinstance(key, str):
        raise FileError("compare", str(file), "give dtype, shape and rows of tensors", str(entry))
    assert isinstance(shape, list)
    return StoredTensor(
        f"{data.parent.name}/{data.name}:{key}",
        lambda: _read_tensor(data, key, dtype, tuple(shape), rows),
        dtype,
        tuple(shape),
    )


def _read_tensor(
    data: Path, key: str, dtype: torch.dtype, shape: tuple[int, ...], rows: int
) -> torch.Tensor:
    """A tensor of the file, with zeros for the rows that are not stored."""
    contract = f"be a safetensors file with {key}"
    try:
        with _library().safe_open(data, framework="pt") as file:
            stored = file.get_tensor(key)
    except Exception as error:
        if isinstance(error, UnavailableError):
            raise
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError("compare", str(data), contract, text[:200]) from None
    stored_shape = (rows, *shape[1:]) if shape else ()
    num_bytes = math.prod(stored_shape) * dtype.itemsize
    if stored.numel() * stored.element_size() != num_bytes or (shape and rows > shape[0]):
        contract = f"hold {rows} rows of {dtype} {list(shape)} as {key}"
        raise FileError("compare", str(data), contract, f"{stored.dtype} {list(stored.shape)}")
    if shape and math.prod(shape) * dtype.itemsize > max(1024 * num_bytes, 2**30):
        raise FileError("compare", str(data), "hold a good part of each tensor", str(shape))
    stored = stored.reshape(-1).view(torch.uint8).view(dtype).reshape(stored_shape)
    if not shape or rows == shape[0]:
        return stored
    whole = torch.zeros(shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype)
    whole[:rows] = stored
    return whole

"""Read files that somebody else wrote: no code in them runs, and their sizes are bounded.

Every function raises ``FileError`` and nothing else, whatever the file holds.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...record.calls import FileError

MAX_TEXT = 512 * 2**20  # bytes of a JSON or CSV file
MAX_YAML = 4 * 2**20
_MOST_NESTING = 50
MAX_TENSOR = 16 * 2**30  # bytes of a tensor
# A tensor may be larger than its file where its strides are 0.
_SMALL = 64 * 2**20

_DTYPES = {
    str(dtype): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not dtype.is_complex
}


def dtype_named(name: object) -> torch.dtype | None:
    """The dtype that ``str(dtype)`` gives, or None."""
    return _DTYPES.get(name) if isinstance(name, str) else None


def inside(folder: Path, name: object, what: str) -> Path:
    """The file ``name`` below ``folder``; no other file may be named."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise FileError("compare", what, "name a file", repr(name)[:100])
    path = folder / name
    try:
        path.resolve().relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):
        raise FileError("compare", what, f"name a file below {folder}", repr(name)[:100]) from None
    return path


def _size(path: Path, most: int, contract: str) -> int:
    try:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "no file of this name"
            raise FileError("compare", str(path), contract, got)
        size = path.stat().st_size
    except OSError as error:
        raise FileError("compare", str(path), contract, error.strerror or str(error)) from error
    if size == 0:
        raise FileError("compare", str(path), contract, "an empty file")
    if size > most:
        raise FileError("compare", str(path), f"{contract} of at most {most} bytes", f"{size}")
    return size


def read_text(path: Path, contract: str) -> str:
    """The text of a UTF-8 file."""
    _size(path, MAX_TEXT, contract)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError("compare", str(path), contract, f"bytes that are not UTF-8: {error}") from (
            error
        )
    except OSError as error:
        raise FileError("compare", str(path), contract, error.strerror or str(error)) from error


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    text = read_text(path, "be a JSON file")
    try:
        return json.loads(text)
    except RecursionError:
        raise FileError("compare", str(path), "be a JSON file", "too deep a nesting") from None
    except ValueError as error:
        raise FileError("compare", str(path), "be a JSON file", str(error)) from error


def read_yaml(path: Path) -> Any:
    """The value of a YAML file without anchors, tags of Python or duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Without aliases, by which a small file can stand for an endless one."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("aliases are not read")
            return super().compose_node(parent, index)

    _size(path, MAX_YAML, "be a YAML file")
    text = read_text(path, "be a YAML file")
    if _nesting(text) > _MOST_NESTING:
        raise FileError("compare", str(path), "be a YAML file", "too deep a nesting")
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise FileError("compare", str(path), "be a YAML file", "too deep a nesting") from None
    except (yaml.YAMLError, ValueError) as error:
        text = " ".join(str(error).split())
        raise FileError("compare", str(path), "be a YAML file", text) from error


def _nesting(text: str) -> int:
    """An upper bound of the nesting of YAML, whose parser takes long for a deep one."""
    depth = deepest = 0
    for char in text:
        depth += char in "[{"
        depth -= char in "]}" and depth > 0
        deepest = max(deepest, depth)
    return max([deepest, *(line.count("- ") for line in text.splitlines())])


def _checked(path: Path, value: Any, size: int) -> torch.Tensor:
    contract = "hold one dense tensor"
    if not isinstance(value, torch.Tensor):
        raise FileError("compare", str(path), contract, type(value).__name__)
    if value.layout != torch.strided or str(value.dtype) not in _DTYPES:
        raise FileError("compare", str(path), contract, f"{value.layout} {value.dtype}")
    num_bytes = value.numel() * value.element_size()
    if num_bytes > max(size, _SMALL):
        raise FileError(
            "compare", str(path), f"{contract} of its {size} bytes", f"shape {tuple(value.shape)}"
        )
    return value.detach()


def _brief(error: Exception) -> str:
    """The first sentence of an error of a library."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.partition(". ")[0][:200]


def read_torch(path: Path, key: str | None = None) -> torch.Tensor:
    """The tensor of a ``torch.save`` file, or the one under ``key`` of the dictionary in it."""
    contract = "be a torch.save file with tensors only"
    size = _size(path, MAX_TENSOR, contract)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols that are refused anyway
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a hostile file can raise anything
        raise FileError("compare", str(path), contract, _brief(error)) from None
    if key is not None:
        if not isinstance(value, dict) or key not in value:
            keys = [str(name)[:40] for name in value][:20] if isinstance(value, dict) else value
            got = f"keys {keys}" if isinstance(value, dict) else type(value).__name__
            raise FileError("compare", str(path), f"hold a dictionary with {key!r}", got)
        value = value[key]
    return _checked(path, value, size)


def read_numpy(path: Path) -> torch.Tensor:
    """The tensor of a ``.npy`` file without Python objects."""
    contract = "be a .npy file with numbers only"
    size = _size(path, MAX_TENSOR, contract)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about text that is no header
            major, _ = np.lib.format.read_magic(file)
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, _, dtype = read[major](file)
        fits = not dtype.hasobject and math.prod(shape) * dtype.itemsize <= size
        value = torch.from_numpy(np.load(path, allow_pickle=False)) if fits else None
    except Exception as error:  # noqa: BLE001 - a hostile file can raise anything
        raise FileError("compare", str(path), contract, _brief(error)) from None
    if value is None:
        raise FileError("compare", str(path), contract, f"{dtype} of shape {shape} in {size} bytes")
    return _checked(path, value, size)


def read_tensor(path: Path, key: str | None = None) -> torch.Tensor:
    """The tensor of a ``.pt`` or ``.npy`` file."""
    return read_numpy(path) if path.suffix == ".npy" else read_torch(path, key)

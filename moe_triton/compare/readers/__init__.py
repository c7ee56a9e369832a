"""Readers of the files that people have, one module for each format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...record.calls import FileError, RankCall
from ...record.files import rank_folders as record_folders
from ...record.files import read_calls
from . import described, kernel_dump, msprobe
from .safe_files import read_json

Report = Callable[[str, str], None]

_CONTRACT = (
    "be an msprobe dump (step*/rank*/dump.json), a record (rank*/environment.json), converted "
    "kernel dumps (*.input.0.npy) or a YAML file that describes calls"
)


def read(path: Path, report: Report, settings: Mapping[str, Any]) -> tuple[str, list[RankCall]]:
    """The kind of the files at ``path``, and their calls of the family.

    Args:
        path: a file or a folder.
        report: called with a place and a problem, for parts that cannot be read.
        settings: arguments that the files do not hold; they replace those that kernel dumps guess.

    Raises:
        FileError: no reader knows what is there.
    """
    try:
        return _read(path, report, settings)
    except OSError as error:
        raise FileError("compare", str(path), _CONTRACT, error.strerror or str(error)) from error


def _read(path: Path, report: Report, settings: Mapping[str, Any]) -> tuple[str, list[RankCall]]:
    if path.is_file() and path.name == msprobe.DESCRIPTION:
        path = path.parent
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise FileError("compare", str(path), _CONTRACT, f"a file named *{path.suffix}")
        return "files described by YAML", described.read(path, report)
    if not path.is_dir():
        raise FileError("compare", str(path), _CONTRACT, "no file or folder of this name")
    folders = record_folders(path)
    if folders:
        calls = [call for folder in folders for call in read_calls(folder, read_json, report)]
        return "record of moe-triton", calls
    if msprobe.rank_folders(path):
        return "msprobe dump", msprobe.read(path, report)
    if kernel_dump.rank_folders(path):
        return "converted kernel dumps", kernel_dump.read(path, report, settings)
    descriptions = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    if len(descriptions) == 1:
        return "files described by YAML", described.read(descriptions[0], report)
    names = sorted(entry.name for entry in path.iterdir())
    got = f"a folder with {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
    raise FileError("compare", str(path), _CONTRACT, got if names else "an empty folder")

"""Readers of the files that people have, one module for each format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ...record.calls import FileError, RankCall
from . import msprobe

Report = Callable[[str, str], None]


def read(
    path: Path, report: Report, settings: Mapping[str, object]
) -> tuple[str, list[RankCall]]:
    """The kind of the files at ``path``, and their calls of the family.

    Args:
        path: a file or a folder.
        report: called with a place and a problem, for parts that cannot be read.
        settings: arguments that the files do not hold.

    Raises:
        FileError: no reader knows what is there.
    """
    if msprobe.rank_folders(path):
        return "msprobe dump", msprobe.read(path, report)
    raise FileError("compare", str(path), "x", "y")

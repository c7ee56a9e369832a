"""Which of the recorded launches are compiled where compiling all takes too long."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable


def class_of(launch: dict) -> tuple[str, str]:
    """The class of a launch: its kernel, and the constants that choose code."""
    constants = launch["constants"]
    words = [str(value) for value in constants.values() if isinstance(value, str)]
    if constants.get("MANTISSA"):
        words.append("e4m3" if constants["MANTISSA"] == 3 else "e5m2")
    return launch["kernel"], ", ".join(words)


def size(launch: dict) -> tuple[int, int]:
    """Elements of a launch's tile, or a multiple of them, and the width of its types."""
    numbers = [value for value in launch["constants"].values() if type(value) is int]
    widths = sum(int(kind.strip("*bfiup")) for kind in launch["signature"].values())
    return math.prod(max(number, 1) for number in numbers), widths


def largest(launches: Iterable[dict], key: Callable[[dict], Hashable]) -> list[dict]:
    """The largest launch of each key."""
    return [*{key(launch): launch for launch in sorted(launches, key=size)}.values()]


def covering(launches: Iterable[dict], *, coarse: bool = False) -> list[dict]:
    """Some of the launches that cover what all of them do, large ones first.

    That is each type of the arguments of each kernel, and each value of its constants, where sizes
    are 1 or more; or if ``coarse`` each kernel and each string.
    """
    chosen: list[dict] = []
    seen: set[tuple] = set()
    for launch in sorted(launches, key=size, reverse=True):
        new = _pieces(launch, coarse=coarse) - seen
        if new:
            seen |= new
            chosen.append(launch)
    return chosen


def _pieces(launch: dict, *, coarse: bool) -> set[tuple]:
    kernel, constants = launch["kernel"], launch["constants"]
    if coarse:
        strings = {(kernel, value) for value in constants.values() if isinstance(value, str)}
        return strings | {(kernel,)}
    values = {
        name: min(value, 2) if type(value) is int else json.dumps(value)
        for name, value in constants.items()
    }
    return {
        *((kernel, name, value) for name, value in values.items()),
        *((kernel, name, kind) for name, kind in launch["signature"].items()),
    }

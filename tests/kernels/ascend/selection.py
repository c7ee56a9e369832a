"""Which of the recorded launches are compiled where compiling all takes too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable


def class_of(launch: dict) -> tuple[str, str]:
    """The class of a launch: its kernel, and the constants that choose code."""
    constants = launch["constants"]
    words = [str(value) for value in constants.values() if isinstance(value, str)]
    if constants.get("MANTISSA"):
        words.append("e4m3" if constants["MANTISSA"] == 3 else "e5m2")
    if constants.get("ADJACENT") is False:
        words.append("idle lanes")
    return launch["kernel"], ", ".join(words)


def size(launch: dict) -> tuple[int, int]:
    """Elements of a launch's tile, or a multiple of them, and the width of its types."""
    numbers = [value for value in launch["constants"].values() if type(value) is int]
    widths = sum(int(kind.strip("*bfiup")) for kind in launch["signature"].values())
    return math.prod(max(number, 1) for number in numbers), widths


def largest(launches: Iterable[dict], key: Callable[[dict], Hashable]) -> list[dict]:
    """The largest launch of each key."""
    return [*{key(launch): launch for launch in sorted(launches, key=size)}.values()]

"""Plain text for a terminal: bars, sizes and emphasis, with an ASCII fallback."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

WIDTH = 80

_BLOCKS = "▏▎▍▌▋▊▉█"  # eighths of a cell, from the left
_LEVELS = "▁▂▃▄▅▆▇█"  # eighths of a cell, from the bottom
_ASCII_LEVELS = ".:-=+*#@"
_STYLES = {"bold": "1", "dim": "2", "good": "1;32", "bad": "1;31", "bar": "36"}


class Terminal:
    """Prints to standard output, flushing each line."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        self._styled = self._stream.isatty() and "NO_COLOR" not in os.environ
        try:
            (_BLOCKS + _LEVELS).encode(self._stream.encoding or "ascii")
            self._unicode = True
        except UnicodeEncodeError:
            self._unicode = False

    def line(self, text: str = "") -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def wrapped(self, first: str, text: str, indent: int) -> None:
        """Print ``text`` wrapped and indented; ``first`` replaces the indent of the first line."""
        for index, part in enumerate(textwrap.wrap(text, WIDTH - indent) or [""]):
            self.line(((" " * indent if index else first) + part).rstrip())

    def styled(self, text: str, style: str) -> str:
        """``text`` in style "bold", "dim", "good", "bad" or "bar"; unchanged outside a terminal."""
        return f"\033[{_STYLES[style]}m{text}\033[0m" if self._styled else text

    def bar(self, value: float, most: float, width: int) -> str:
        """A bar, ``width`` cells long for ``most``; a value above 0 gets at least an eighth."""
        eighths = max(round(8 * width * value / most), 1) if value > 0 else 0
        if not self._unicode:
            return self.styled("#" * max(round(eighths / 8), min(eighths, 1)), "bar")
        full, part = divmod(eighths, 8)
        return self.styled("█" * full + (_BLOCKS[part - 1] if part else ""), "bar")

    def columns(self, values: Sequence[float], most: float) -> str:
        """A cell per value, its height proportional to ``value / most``; blank for 0."""
        levels = _LEVELS if self._unicode else _ASCII_LEVELS
        cells = (levels[min(int(8 * value / most), 7)] if value > 0 else " " for value in values)
        return self.styled("".join(cells), "bar")


def size(num_bytes: float) -> str:
    """Format bytes in powers of 1024 with about three digits."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    units = ["KiB", "MiB", "GiB", "TiB"]
    value = num_bytes / 1024
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.{_digits(value)}f} {units[0]}"


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with about three digits."""
    value = 1000 * seconds
    return f"{value:.{_digits(value)}f} ms"


def _digits(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0


def positive(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def plural(count: int, singular: str, plural: str = "") -> str:
    """``count`` and its noun, whose plural is by default the singular with an s."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"

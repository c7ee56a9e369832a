"""``moe-triton record``: run a script and record its calls of the operators."""

from __future__ import annotations

from ..record.command import add_arguments, run

__all__ = ["add_arguments", "run"]

"""``torch_npu._C``, as far as Python programs use it."""

from __future__ import annotations

from typing import Any

from moe_triton.emulate import missing

from . import _distributed_c10d

__all__ = ["_distributed_c10d"]


def __getattr__(name: str) -> Any:
    return missing.not_emulated("torch_npu._C", name)

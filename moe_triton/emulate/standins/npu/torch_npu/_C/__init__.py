"""``torch_npu._C``, as far as Python programs use it."""

from __future__ import annotations

from moe_triton.emulate import missing

from . import _distributed_c10d

__all__ = ["_distributed_c10d"]
__getattr__ = missing.module_getattr("torch_npu._C")

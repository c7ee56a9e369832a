"""``torch_npu.contrib``, of which ``transfer_to_npu`` is emulated."""

from __future__ import annotations

from moe_triton.emulate import missing

__getattr__ = missing.module_getattr("torch_npu.contrib")

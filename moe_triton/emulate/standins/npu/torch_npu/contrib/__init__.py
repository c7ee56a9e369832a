"""``torch_npu.contrib``, of which ``transfer_to_npu`` is emulated."""

from __future__ import annotations

from typing import Any

from moe_triton.emulate import missing


def __getattr__(name: str) -> Any:
    return missing.not_emulated("torch_npu.contrib", name)

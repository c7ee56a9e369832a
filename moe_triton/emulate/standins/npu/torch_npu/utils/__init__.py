"""``torch_npu.utils``, as far as training frameworks call it on import."""

from __future__ import annotations

from typing import Any

from moe_triton.emulate import missing


def register_asd_hook(x: Any, weight: Any) -> None:
    """Do nothing: the hook looks for faults of an NPU."""


def set_thread_affinity(core_range: Any = None) -> None:
    """Do nothing: the cores are those next to an NPU."""


def reset_thread_affinity() -> None:
    """Do nothing."""


__getattr__ = missing.module_getattr("torch_npu.utils")

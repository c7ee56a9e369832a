"""``torch_npu.utils.collect_env``."""

from __future__ import annotations

import torch_npu
from moe_triton.emulate import missing


def get_cann_version() -> str:
    """What torch_npu says where it finds no CANN."""
    return "not known"


def get_torch_npu_version() -> str:
    """The version of the stand-in, which is that of torch."""
    return torch_npu.__version__


__getattr__ = missing.module_getattr("torch_npu.utils.collect_env")

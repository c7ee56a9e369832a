"""``torch_npu._C._distributed_c10d``: options of groups."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch._C import _distributed_c10d as c10d

from moe_triton.emulate import missing


class ProcessGroupHCCL:
    """The back end's name; groups here are those of gloo, or NCCL on CUDA."""

    class Options(c10d.Backend.Options):
        """Options of a group, which change nothing but its time-out."""

        def __init__(self, is_high_priority_stream: bool = False) -> None:
            super().__init__("hccl", timedelta(minutes=30))
            self.is_high_priority_stream = is_high_priority_stream
            self.hccl_config: dict[str, Any] = {}


__getattr__ = missing.module_getattr("torch_npu._C._distributed_c10d")

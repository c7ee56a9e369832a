"""``torch_npu.profiler``: ``torch.profiler``, writing traces in torch_npu's layout.

Times are those of this machine, so they say what was called and in which order, not how long an
NPU takes. Counters of the hardware are not emulated.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction

from moe_triton.emulate import missing, trace
from moe_triton.emulate.device import HOST

__all__ = [
    "AiCMetrics",
    "ExportType",
    "HostSystem",
    "ProfilerAction",
    "ProfilerActivity",
    "ProfilerLevel",
    "_ExperimentalConfig",
    "_KinetoProfile",
    "profile",
    "schedule",
    "supported_activities",
    "tensorboard_trace_handler",
]
__getattr__ = missing.module_getattr("torch_npu.profiler")


class ProfilerActivity(Enum):
    """What to record."""

    CPU = 0
    NPU = 1


class ProfilerLevel:
    """How much of the hardware to record; no effect."""

    Level0 = "Level0"
    Level1 = "Level1"
    Level2 = "Level2"
    Level_none = "Level_none"


class AiCMetrics:
    """Counters of the hardware; no effect."""

    PipeUtilization = "ACL_AICORE_PIPE_UTILIZATION"
    ArithmeticUtilization = "ACL_AICORE_ARITHMETIC_UTILIZATION"
    Memory = "ACL_AICORE_MEMORY_BANDWIDTH"
    MemoryL0 = "ACL_AICORE_L0B_AND_WIDTH"
    MemoryUB = "ACL_AICORE_MEMORY_UB"
    ResourceConflictRatio = "ACL_AICORE_RESOURCE_CONFLICT_RATIO"
    L2Cache = "ACL_AICORE_L2_CACHE"
    MemoryAccess = "ACL_AICORE_MEMORY_ACCESS"
    AiCoreNone = "ACL_AICORE_NONE"


class ExportType:
    """Kinds of files; only text is written."""

    Text = "text"
    Db = "db"


class HostSystem:
    """What to record of the host; no effect."""

    CPU = "cpu"
    MEM = "mem"
    DISK = "disk"
    NETWORK = "network"
    OSRT = "osrt"
    NUMA = "numa"


class _ExperimentalConfig:
    """Settings of the hardware's counters, which have no effect."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


def supported_activities() -> set[ProfilerActivity]:
    """What can be recorded."""
    return set(ProfilerActivity)


def schedule(
    wait: int,
    active: int,
    warmup: int = 0,
    repeat: int = 0,
    skip_first: int = 0,
    skip_first_wait: int = 0,
) -> Callable[[int], ProfilerAction]:
    """``torch.profiler.schedule``, with torch_npu's order of arguments."""
    return torch.profiler.schedule(
        wait=wait,
        warmup=warmup,
        active=active,
        repeat=repeat,
        skip_first=skip_first,
        skip_first_wait=skip_first_wait,
    )


class profile(torch.profiler.profile):
    """``torch.profiler.profile``, whose traces have a track of the NPU."""

    def __init__(
        self,
        *,
        activities: Iterable[Any] | None = None,  # noqa: ARG002 - all activities are on the host
        experimental_config: _ExperimentalConfig | None = None,  # noqa: ARG002 - no effect
        custom_trace_id_callback: Any = None,  # noqa: ARG002 - likewise
        use_cuda: bool | None = None,  # noqa: ARG002 - likewise
        **options: Any,
    ) -> None:
        recorded = {torch.profiler.ProfilerActivity.CPU}
        if HOST.type == "cuda":
            recorded.add(torch.profiler.ProfilerActivity.CUDA)
        super().__init__(activities=recorded, **options)

    def _events(self) -> list[trace.Event]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            super().export_chrome_trace(str(path))
            return trace.convert(path)

    def export_chrome_trace(self, output_path: str | Path) -> None:  # type: ignore[override]
        """Write the trace as JSON, a list of events."""
        Path(output_path).write_text(json.dumps(self._events()), encoding="utf-8")


_KinetoProfile = profile


def tensorboard_trace_handler(
    dir_name: str | None = None,
    worker_name: str | None = None,
    analyse_flag: bool = True,
    async_mode: bool = False,  # noqa: ARG001 - files are complete on return
) -> Callable[[profile], None]:
    """A handler for ``on_trace_ready`` that writes files under a folder for this process.

    Args:
        dir_name: where, by default the current folder.
        worker_name: beginning of the folder's name, by default host and process.
        analyse_flag: False for no files.
        async_mode: ignored.
    """

    def write(profiler: profile) -> None:
        if analyse_flag:
            worker = worker_name or f"{socket.gethostname()}_{os.getpid()}"
            folder = f"{worker}_{time.strftime('%Y%m%d%H%M%S')}_ascend_pt"
            path = Path(dir_name or ".") / folder / "ASCEND_PROFILER_OUTPUT"
            trace.write_folder(path, profiler._events())

    return write

"""Stand-in for torch_npu under ``moe-triton npu-run``."""

from __future__ import annotations

import torch

from moe_triton.emulate import children, device, hccl, missing, settings, torch_npu_ops

settings.check_started_by("npu-run", __name__)

from . import npu  # noqa: E402 - not before the check

__all__ = ["_C", "contrib", "npu", "profiler", "utils"]

__version__ = torch.__version__.partition("+")[0] + "+moe_triton"

device.install(npu)
hccl.install()
torch_npu_ops.install()
children.install()
missing.install()
globals().update(torch_npu_ops.NAMES)

from . import _C, contrib, profiler, utils  # noqa: E402 - they need the names above

__getattr__ = missing.module_getattr("torch_npu")

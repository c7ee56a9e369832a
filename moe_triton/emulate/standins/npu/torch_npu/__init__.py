"""Stand-in for torch_npu under ``moe-triton npu-run``."""

from __future__ import annotations

from typing import NoReturn

import torch

from moe_triton.emulate import children, device, hccl, settings, torch_npu_ops

settings.check_started_by("npu-run", __name__)

from . import npu  # noqa: E402 - not before the check

__version__ = torch.__version__.partition("+")[0] + "+moe_triton"

device.install(npu)
hccl.install()
torch_npu_ops.install()
children.install()
globals().update(torch_npu_ops.DTYPES | torch_npu_ops.OPERATORS)


def __getattr__(name: str) -> NoReturn:
    torch_npu_ops.not_emulated("torch_npu", name)

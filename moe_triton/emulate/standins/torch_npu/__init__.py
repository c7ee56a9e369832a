"""A stand-in for torch_npu, where there is none: see ``moe-triton npu-run``."""

from __future__ import annotations

from typing import NoReturn

import torch

from moe_triton.emulate import children, device, hccl, operators, settings

settings.check_started_by_npu_run(__name__)

from . import npu  # noqa: E402 - not before the check

__version__ = torch.__version__.partition("+")[0] + "+moe_triton"

device.install(npu)
hccl.install()
operators.install()
children.install()
globals().update(operators.OPERATORS)


def __getattr__(name: str) -> NoReturn:
    operators.not_emulated("torch_npu", name)

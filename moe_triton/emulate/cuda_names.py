"""CUDA's names for NPUs, as ``torch_npu.contrib.transfer_to_npu`` makes them.

Afterwards the device cuda, the functions of ``torch.cuda`` and the back end nccl are those of npu.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import device


def _with_hccl(function: Any) -> Any:
    """``function`` with hccl for nccl among its arguments."""

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("nccl", "hccl").replace("cuda", "npu")
        return value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "backend" in kwargs:
            kwargs["backend"] = renamed(kwargs["backend"])
        return function(*[renamed(argument) for argument in args], **kwargs)

    return call


def install() -> None:
    """Give NPUs the names of CUDA, for the rest of this process."""
    device.NAMES.add("cuda")
    npu: Any = torch.npu  # type: ignore[attr-defined]
    for name in npu.__all__:
        # torch.compile looks into torch.cuda.amp, which gets its two names below.
        if not name.startswith("_") and name != "amp":
            setattr(torch.cuda, name, getattr(npu, name))
    torch.cuda.amp.autocast = npu.amp.autocast  # type: ignore[misc]
    torch.cuda.amp.GradScaler = npu.amp.GradScaler  # type: ignore[misc]
    Tensor.cuda = Tensor.npu  # type: ignore[attr-defined,method-assign]
    Tensor.is_cuda = Tensor.is_npu  # type: ignore[attr-defined]
    torch.nn.Module.cuda = torch.nn.Module.npu  # type: ignore[attr-defined,method-assign]
    for name in ("init_process_group", "new_group"):
        wrapped = _with_hccl(getattr(dist, name))
        setattr(dist, name, wrapped)
        setattr(dist.distributed_c10d, name, wrapped)

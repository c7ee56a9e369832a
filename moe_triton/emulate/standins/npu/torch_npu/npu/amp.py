"""``torch_npu.npu.amp``: autocast and gradient scaling on the host device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler as _GradScaler

from moe_triton.emulate import missing
from moe_triton.emulate.device import HOST

__all__ = ["GradScaler", "autocast"]

autocast: Any = functools.partial(torch.autocast, "npu")
GradScaler: Any = functools.partial(_GradScaler, HOST.type)


__getattr__ = missing.module_getattr("torch.npu.amp")

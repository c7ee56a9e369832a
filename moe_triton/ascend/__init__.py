"""Ascend's MoE operators: their arguments, checks and results, over the core of this library.

    group_arguments, op_names, quant_modes, buffer_size    shared by several operators
    distributed/                                           dispatch and combine between ranks
    local/                                                 operators of one device

``compat.torch_npu`` and ``compat.aclnn`` are facades over this package. The core (``ops``,
``expert_parallel``) never imports it.
"""

from __future__ import annotations

from ..ops import checks
from .buffer_size import required_buffsize_mb
from .distributed.combine import distribute_combine
from .distributed.dispatch import distribute_dispatch
from .group_arguments import GroupArguments

__all__ = [
    "GroupArguments",
    "checks",
    "distribute_combine",
    "distribute_dispatch",
    "required_buffsize_mb",
]

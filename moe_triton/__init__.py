"""MoE token dispatch and combine, with the semantics of Ascend's npu_moe_distribute_* operators."""

from __future__ import annotations

from .ascend import required_buffsize_mb
from .backend import get_backend, set_backend
from .comm import Traffic, WindowBytes, recover
from .errors import (
    ArgumentError,
    ArgumentMismatchError,
    ArgumentNameError,
    ArgumentTypeError,
    ArgumentValueError,
    BrokenGroupError,
    MissingArgumentError,
    MoeError,
    PeerAbortError,
    PeerTimeoutError,
    ReceiveOverflowError,
    RoutingMismatchError,
    SequenceError,
    UnavailableError,
)
from .expert_parallel import CombinePending, Dispatched, DispatchPending, ExpertParallel, Handle
from .ops import window_bytes
from .profile import get_profile, set_profile

__version__ = "0.2.0.dev0"

__all__ = [
    "ArgumentError",
    "ArgumentMismatchError",
    "ArgumentNameError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BrokenGroupError",
    "CombinePending",
    "DispatchPending",
    "Dispatched",
    "ExpertParallel",
    "Handle",
    "MissingArgumentError",
    "MoeError",
    "PeerAbortError",
    "PeerTimeoutError",
    "ReceiveOverflowError",
    "RoutingMismatchError",
    "SequenceError",
    "Traffic",
    "UnavailableError",
    "WindowBytes",
    "get_backend",
    "get_profile",
    "recover",
    "required_buffsize_mb",
    "set_backend",
    "set_profile",
    "window_bytes",
]

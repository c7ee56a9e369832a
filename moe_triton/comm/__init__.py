"""Communication between the ranks of a group: windows, flags, transports.

Knows nothing of back ends: the device steps come in as a table with each call.
"""

from __future__ import annotations

if __name__ != "moe_triton.comm":
    raise ImportError(
        f"this package is not {__name__}: the link at the top of the repository is for reading; "
        "write import moe_triton.comm"
    )

from .all_to_all import all_to_all_v
from .endpoint import Endpoint
from .groups import TRANSPORTS, Group, bind_rank, resolve, set_transport
from .groups import register as register_group
from .registry import (
    abandon_endpoint,
    close_all,
    close_endpoint,
    default_endpoint,
    open_endpoint,
    recover,
    refuse_endpoint,
    unregister_group,
)
from .transport import (
    Call,
    DeviceSteps,
    Outputs,
    Pending,
    Received,
    Tokens,
    Traffic,
    Transport,
    traffic,
)
from .window import MoeConfig, WindowBytes, window_bytes

__all__ = [
    "TRANSPORTS",
    "Call",
    "DeviceSteps",
    "Endpoint",
    "Group",
    "MoeConfig",
    "Outputs",
    "Pending",
    "Received",
    "Tokens",
    "Traffic",
    "Transport",
    "WindowBytes",
    "abandon_endpoint",
    "all_to_all_v",
    "bind_rank",
    "close_all",
    "close_endpoint",
    "default_endpoint",
    "open_endpoint",
    "recover",
    "refuse_endpoint",
    "register_group",
    "resolve",
    "set_transport",
    "traffic",
    "unregister_group",
    "window_bytes",
]

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
from .collective import only_on_device
from .communicator import Endpoint
from .groups import TRANSPORTS, Group, bind_rank, resolve, set_transport, subgroup
from .groups import register as register_group
from .packing import PartsReader, parts_bytes
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
from .row_exchange import traffic
from .transport import (
    Call,
    DeviceSteps,
    Finish,
    Outputs,
    Pending,
    Received,
    Tokens,
    Traffic,
    Transport,
)
from .window import RETURN_BLOCK, MoeConfig, WindowBytes, window_bytes

__all__ = [
    "RETURN_BLOCK",
    "TRANSPORTS",
    "Call",
    "DeviceSteps",
    "Endpoint",
    "Finish",
    "Group",
    "MoeConfig",
    "Outputs",
    "PartsReader",
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
    "only_on_device",
    "open_endpoint",
    "parts_bytes",
    "recover",
    "refuse_endpoint",
    "register_group",
    "resolve",
    "set_transport",
    "subgroup",
    "traffic",
    "unregister_group",
    "window_bytes",
]

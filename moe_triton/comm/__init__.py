"""Communication between the ranks of a group: windows, flags, transports.

Knows nothing of back ends: the device steps come in as a table with each call.
"""

from __future__ import annotations

if __name__ == "moe_triton.comm":
    from .all_to_all import all_to_all_v, exchange_call
    from .collective import only_on_device
    from .communicator import Communicator
    from .groups import (
        TRANSPORTS,
        Group,
        TransportName,
        bind_rank,
        resolve,
        set_transport,
        subgroup,
    )
    from .groups import register as register_group
    from .packing import PackedReader, packed_bytes
    from .registry import (
        abandon_communicator,
        abort_communicator,
        close_all,
        close_communicator,
        default_communicator,
        open_communicator,
        recover,
        unregister_group,
    )
    from .row_exchange import traffic
    from .transport import (
        Call,
        CombineEpilogue,
        CombineInput,
        DeviceSteps,
        DispatchInput,
        Pending,
        Plan,
        Received,
        Traffic,
        Transport,
        fixed_shapes,
    )
    from .window import RETURN_BLOCK, MoeConfig, WindowBytes, window_bytes

    __all__ = [
        "RETURN_BLOCK",
        "TRANSPORTS",
        "Call",
        "CombineEpilogue",
        "CombineInput",
        "Communicator",
        "DeviceSteps",
        "DispatchInput",
        "Group",
        "MoeConfig",
        "PackedReader",
        "Pending",
        "Plan",
        "Received",
        "Traffic",
        "Transport",
        "TransportName",
        "WindowBytes",
        "abandon_communicator",
        "abort_communicator",
        "all_to_all_v",
        "bind_rank",
        "close_all",
        "close_communicator",
        "default_communicator",
        "exchange_call",
        "fixed_shapes",
        "only_on_device",
        "open_communicator",
        "packed_bytes",
        "recover",
        "register_group",
        "resolve",
        "set_transport",
        "subgroup",
        "traffic",
        "unregister_group",
        "window_bytes",
    ]
else:
    # Reached through the link in the root of the repository, which is for readers.
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).resolve().parents[1] / "root_links.py"))["load_other"](
        __name__
    )

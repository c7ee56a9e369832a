"""The ops: arguments are checked once, at this door, then a transport runs the device steps."""

from __future__ import annotations

from .arguments import GroupArguments
from .buffsize import required_buffsize_mb
from .combine import distribute_combine
from .dispatch import distribute_dispatch
from .sizes import layer_config, window_bytes
from .steps import device_steps

__all__ = [
    "GroupArguments",
    "device_steps",
    "distribute_combine",
    "distribute_dispatch",
    "layer_config",
    "required_buffsize_mb",
    "window_bytes",
]

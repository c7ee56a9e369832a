"""The ops: arguments are checked once, at this door, then a transport runs the device steps."""

from __future__ import annotations

from .distribute import distribute_combine, distribute_dispatch
from .sizes import window_bytes
from .steps import device_steps

__all__ = ["device_steps", "distribute_combine", "distribute_dispatch", "window_bytes"]

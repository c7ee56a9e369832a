"""Record the calls of the operators with their inputs and outputs, on an NPU or here."""

from __future__ import annotations

from .hooks import Options, record
from .launch import launch

__all__ = ["Options", "launch", "record"]

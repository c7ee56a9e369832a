"""Data of the device steps: row formats, routing, and the memory of windows."""

from __future__ import annotations

from .routing import (
    NOWHERE,
    LocalPermutation,
    Norm,
    RecvPermutation,
    RecvRowIndex,
    RoutingCopies,
    RoutingPlan,
    ZeroComputationExperts,
)
from .row_format import FLOAT8, QUANTS, Quant, RowFormat, align
from .windows import (
    ExchangeLayout,
    ReceivedRows,
    Ring,
    SlotPositions,
    Windows,
    WindowsSignature,
)

__all__ = [
    "FLOAT8",
    "NOWHERE",
    "QUANTS",
    "ExchangeLayout",
    "LocalPermutation",
    "Norm",
    "Quant",
    "ReceivedRows",
    "RecvPermutation",
    "RecvRowIndex",
    "Ring",
    "RoutingCopies",
    "RoutingPlan",
    "RowFormat",
    "SlotPositions",
    "Windows",
    "WindowsSignature",
    "ZeroComputationExperts",
    "align",
]

"""Compare results from Ascend, or from another machine, with the same calls run here."""

from __future__ import annotations

from .deviations import DEVIATIONS
from .replay import Where
from .report import Report
from .rules import STANDARDS, Verdict
from .session import compare

__all__ = ["DEVIATIONS", "STANDARDS", "Report", "Verdict", "Where", "compare"]

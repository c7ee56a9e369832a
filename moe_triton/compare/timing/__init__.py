"""Times of dispatch and combine from Ascend's profilers, beside those of other systems."""

from __future__ import annotations

from .summary import TimingReport, compare_times

__all__ = ["TimingReport", "compare_times"]

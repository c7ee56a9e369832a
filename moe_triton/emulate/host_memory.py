"""Memory of this machine and of this process, in bytes."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def free_and_total() -> tuple[int, int]:
    """Bytes of this machine's memory, free and in all."""
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


def resident_and_peak() -> tuple[int, int]:
    """Bytes of this process that are resident, and the most that have been since ``reset_peak``."""
    try:
        text = _STATUS.read_text()
    except OSError:  # no Linux: the peak alone is known
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return peak, peak
    resident, peak = (
        int(match[1]) << 10 if (match := re.search(rf"{name}:\s+(\d+) kB", text)) else 0
        for name in ("VmRSS", "VmHWM")
    )
    return resident, peak


def reset_peak() -> None:
    """Let the peak begin at what is resident now, where the system permits it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

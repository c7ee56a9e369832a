"""Names of blocks in /dev/shm; other test processes make some and remove them meanwhile."""

from __future__ import annotations

import time
from pathlib import Path


def names() -> set[str]:
    """Those of all processes."""
    return {path.name for path in Path("/dev/shm").glob("moe_triton-*")}


def left(before: set[str], seconds: float = 5.0) -> set[str]:
    """Names that are not among ``before`` and do not go: others are removed while ranks connect."""
    end = time.monotonic() + seconds
    found = names() - before
    while found and time.monotonic() < end:
        time.sleep(0.05)
        found &= names()
    return found

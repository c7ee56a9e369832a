"""What clients import from ``deep_ep.utils``."""

from __future__ import annotations

import torch.distributed as dist

from .events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap", "get_logical_domain_size", "get_physical_domain_size"]


def get_physical_domain_size(group: dist.ProcessGroup) -> tuple[int, int]:
    """(1, W): all ranks are one domain, on whatever hosts."""
    return 1, group.size()


def get_logical_domain_size(
    group: dist.ProcessGroup,
    allow_hybrid_mode: bool = True,  # noqa: ARG001
) -> tuple[int, int]:
    """(1, W)."""
    return 1, group.size()

"""What an argument that names a group may be."""

from __future__ import annotations

import torch.distributed as dist


def group_name(group: dist.ProcessGroup | str) -> str:
    """The name that an op takes, of a group that may be given itself."""
    return group.group_name if isinstance(group, dist.ProcessGroup) else group

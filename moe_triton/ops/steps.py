"""The table of device steps of each back end."""

from __future__ import annotations

import torch

from .. import ref
from ..backend import get_backend
from ..comm import DeviceSteps

_TABLES = {
    "cpu": DeviceSteps(
        plan=ref.plan,
        push=ref.push,
        sources=ref.sources,
        pack=ref.pack,
        encode=ref.encode,
        add_rows=ref.add_rows,
        reduce=ref.reduce,
    ),
}


def device_steps(device: torch.device) -> DeviceSteps:
    """The steps for tensors on ``device``; ``UnavailableError`` when its back end cannot run."""
    return _TABLES[get_backend(device)]

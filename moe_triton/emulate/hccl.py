"""The back end hccl of torch.distributed: gloo, or NCCL where each rank has a GPU of its own."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from ..errors import ArgumentNameError
from .device import HOST


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> object:
    # NCCL refuses two ranks on one device, and many ranks on few GPUs are what is emulated here.
    if HOST.type == "cuda" and size <= torch.cuda.device_count():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _backend_comm_name(backend: object, rank: int, *_: object) -> str:
    """The name of the group that ``backend`` serves, as the npu_moe functions take it.

    Args:
        backend: from ``group._get_backend(torch.device("npu"))``.
        rank: this process; HCCL needs it, and the name does not depend on it here.

    Raises:
        ArgumentNameError: no group of this process has the back end.
    """
    for group, name in _world.pg_names.items():
        if group._get_backend(torch.device("npu")) is backend:
            return name
    raise ArgumentNameError(
        "get_hccl_comm_name", "the back end", "belong to a live process group", f"rank {rank}"
    )


def _group_comm_name(group: dist.ProcessGroup, *_: object) -> str:
    """The name of the group, where scripts for old versions of torch look for it."""
    return group.group_name


def install() -> None:
    """Register hccl, for the rest of this process."""
    dist.Backend.register_backend("hccl", _create, devices=["npu", HOST.type])
    dist.ProcessGroup.get_hccl_comm_name = _group_comm_name  # type: ignore[attr-defined]
    torch._C._distributed_c10d.Backend.get_hccl_comm_name = (  # type: ignore[attr-defined]
        _backend_comm_name
    )

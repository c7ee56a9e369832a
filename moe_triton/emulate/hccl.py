"""The back end hccl of torch.distributed: gloo, or NCCL where each rank has a GPU of its own."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from ..errors import ArgumentNameError
from . import hccl_collectives
from .device import HOST


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> object:
    # NCCL refuses two ranks on one device, and many ranks on few GPUs are what is emulated here.
    if HOST.type == "cuda" and size <= torch.cuda.device_count():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _backend_comm_name(
    backend: object, rankid: int, *_: object, init_comm: bool = True, **__: object
) -> str:
    """The name of the group that ``backend`` serves, as the npu_moe functions take it.

    Args:
        backend: from ``group._get_backend(torch.device("npu"))``.
        rankid: this process; the name does not depend on it.
        init_comm: False for the empty string if the group has not communicated yet.

    Raises:
        ArgumentNameError: no group of this process has the back end.
    """
    for group, name in _world.pg_names.items():
        if group._get_backend(torch.device("npu")) is backend:
            if init_comm:
                hccl_collectives.mark_initialised(group)
            return name if hccl_collectives.initialised(group) else ""
    raise ArgumentNameError(
        "get_hccl_comm_name", "the back end", "belong to a live process group", f"rank {rankid}"
    )


def _group_comm_name(
    group: dist.ProcessGroup, rankid: int, *_: object, init_comm: bool = True, **__: object
) -> str:
    """The name from the group itself, as scripts for torch before 2.1 ask for it."""
    return _backend_comm_name(group._get_backend(torch.device("npu")), rankid, init_comm=init_comm)


def install() -> None:
    """Register hccl, for the rest of this process."""
    dist.Backend.register_backend("hccl", _create, devices=["npu", HOST.type])
    dist.ProcessGroup.get_hccl_comm_name = _group_comm_name  # type: ignore[attr-defined]
    torch._C._distributed_c10d.Backend.get_hccl_comm_name = (  # type: ignore[attr-defined]
        _backend_comm_name
    )
    hccl_collectives.install()

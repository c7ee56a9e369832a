"""``torch_npu._npu_distribute_barrier``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentValueError, UnavailableError
from ..ops.custom_op import Operator
from .device import HOST

_NAME = "_npu_distribute_barrier"


def _barrier(
    x_ref: Tensor,
    group: str,
    world_size: int,
    time_out: Tensor | None,
    elastic_info: Tensor | None,
) -> Tensor:
    if elastic_info is not None and elastic_info[0] and elastic_info[1] != world_size:
        problem = "moe-triton npu-run does not emulate elastic_info that leaves out ranks"
        raise UnavailableError(_NAME, problem, argument="elastic_info")
    process_group = dist.distributed_c10d._resolve_process_group(cast("Any", group))
    if world_size != process_group.size():
        contract = f"be the size of group {group!r}, {process_group.size()}"
        raise ArgumentValueError(_NAME, "world_size", contract, world_size)
    options = dist.BarrierOptions()
    options.device = torch.empty(0, device=HOST).device  # on CUDA with its number
    if time_out is not None:
        options.timeout = timedelta(microseconds=int(time_out))
    process_group.barrier(options).wait()
    return x_ref.clone()


_operator = Operator(
    _NAME,
    "Tensor x_ref, str group, int world_size, Tensor? time_out=None, Tensor? elastic_info=None",
    "Tensor",
    run=_barrier,
    outputs=lambda x_ref, **_: torch.empty_like(x_ref),
)


def npu_distribute_barrier(
    x_ref: Tensor,
    group: str,
    world_size: int,
    *,
    time_out: Tensor | None = None,
    elastic_info: Tensor | None = None,
) -> Tensor:
    """Wait until all ranks of a group call this.

    Args:
        x_ref: any tensor.
        group: name of the group, from ``get_hccl_comm_name``.
        world_size: its size.
        time_out: (1,) limit in microseconds, by default the group's time-out.
        elastic_info: (4 + 2 * world_size,) as in npu_moe_distribute_dispatch_v2; it must keep all
            ranks.

    Returns:
        A copy of x_ref.

    Raises:
        ArgumentValueError: world_size is not the size of the group.
        UnavailableError: elastic_info leaves out ranks.
        RuntimeError: time-out.
    """
    return _operator(
        x_ref=x_ref,
        group=group,
        world_size=world_size,
        time_out=time_out,
        elastic_info=elastic_info,
    )

"""Collectives of hccl that gloo lacks, by wrapping functions of ``torch.distributed``.

HCCL moves float8, int16 and unsigned integers, takes lists of unequal shapes, and compares only the
number of elements of gathered tensors. Not wrapped: functional collectives, and isend and irecv,
which ``P2POp`` recognises by identity.
Source: torch_npu, csrc/distributed/ProcessGroupHCCL.cpp and HCCLUtils.cpp.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MOVE = (
    *("all_gather", "all_gather_into_tensor", "all_to_all", "all_to_all_single", "broadcast"),
    *("gather", "recv", "scatter", "send"),
)
_REDUCE = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "barrier")
_NOT_IN_GLOO = (
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.int16, torch.uint16, torch.uint32, torch.uint64),
)
_initialised: set[str] = set()


def initialised(group: dist.ProcessGroup) -> bool:
    """Whether the group has communicated; HCCL creates its communicator then."""
    return group.group_name in _initialised


def mark_initialised(group: dist.ProcessGroup) -> None:
    """Note that the group has a communicator."""
    _initialised.add(group.group_name)


def _as_bytes(value: Any) -> Any:
    """Tensors, also in a list, as bytes in a new last dimension where gloo lacks the dtype."""
    if isinstance(value, list):
        return [_as_bytes(item) for item in value]
    if isinstance(value, Tensor) and value.dtype in _NOT_IN_GLOO:
        return value.unsqueeze(-1).view(torch.uint8)
    return value


def _finished(arguments: dict[str, Any]) -> dist.Work | None:
    """What an asynchronous call returns for work that is done."""
    if not arguments["async_op"]:
        return None
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result([])
    create: Any = torch._C._distributed_c10d._create_work_from_future  # type: ignore[attr-defined]
    return create(future)


def _all_gather_uneven(outputs: list[Tensor], tensor: Tensor, group: dist.ProcessGroup) -> None:
    outputs[group.rank()].copy_(tensor)
    for rank, output in enumerate(outputs):
        dist.broadcast(output, group=group, group_src=rank)


def _reduce_scatter_uneven(
    output: Tensor, inputs: list[Tensor], op: Any, group: dist.ProcessGroup
) -> None:
    for rank, tensor in enumerate(inputs):
        total = tensor.clone()
        dist.reduce(total, op=op, group=group, group_dst=rank)
        if rank == group.rank():
            output.copy_(total)


def _all_to_all(outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup) -> None:
    sizes, input_sizes = ([tensor.numel() for tensor in tensors] for tensors in (outputs, inputs))
    received = outputs[0].new_empty(sum(sizes))
    sent = torch.cat([tensor.reshape(-1) for tensor in inputs])
    dist.all_to_all_single(received, sent, sizes, input_sizes, group=group)
    for output, part in zip(outputs, received.split(sizes), strict=True):
        output.copy_(part.view_as(output))


def _uneven(tensors: list[Tensor]) -> bool:
    return any(tensor.shape != tensors[0].shape for tensor in tensors)


def _over_gloo(group: dist.ProcessGroup) -> bool:
    """Whether a group's back end hccl is gloo."""
    if "hccl" not in dist.get_backend_config(group):
        return False
    return isinstance(group._get_backend(torch.device("npu")), dist.ProcessGroupGloo)


def _wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        group = dist.group.WORLD if arguments["group"] is None else arguments["group"]
        if not isinstance(group, dist.ProcessGroup):  # this rank is no member
            return original(*args, **kwargs)
        mark_initialised(group)
        if not _over_gloo(group):
            return original(*args, **kwargs)
        if name in _MOVE:
            arguments.update({key: _as_bytes(value) for key, value in arguments.items()})
        if name == "all_gather" and _uneven(arguments["tensor_list"]):
            _all_gather_uneven(arguments["tensor_list"], arguments["tensor"], group)
            return _finished(arguments)
        if name == "all_to_all":
            _all_to_all(arguments["output_tensor_list"], arguments["input_tensor_list"], group)
            return _finished(arguments)
        if name == "reduce_scatter" and _uneven(arguments["input_list"]):
            _reduce_scatter_uneven(
                arguments["output"], arguments["input_list"], arguments["op"], group
            )
            return _finished(arguments)
        if name == "all_gather_into_tensor":
            arguments["output_tensor"] = arguments["output_tensor"].view(-1)
            arguments["input_tensor"] = arguments["input_tensor"].reshape(-1)
        return original(*bound.args, **bound.kwargs)

    return call


def install() -> None:
    """Wrap the collectives, for the rest of this process."""
    for name in (*_MOVE, *_REDUCE):
        wrapped = _wrap(name, getattr(dist, name))
        setattr(dist, name, wrapped)
        setattr(dist.distributed_c10d, name, wrapped)

"""The operators of torch_npu: those that ``moe_triton.compat`` has, and errors for all others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..compat import torch_npu
from ..errors import ArgumentValueError, UnavailableError


class NotEmulatedError(UnavailableError, AttributeError):
    """A name of torch_npu or torchair that has no stand-in.

    An ``AttributeError`` too, so that scripts which look with ``hasattr`` what their version of
    torch_npu offers take the way without it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "is not emulated by moe-triton npu-run")


def not_emulated(module: str, name: str) -> NoReturn:
    """What a module does about a name that it lacks.

    Raises:
        NotEmulatedError: with the full name.
        AttributeError: for names with two underscores, which Python itself asks for.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    raise NotEmulatedError(f"{module}.{name}")


@torch.compiler.disable
def _npu_distribute_barrier(
    x_ref: Tensor,
    group: str,
    world_size: int,
    *,
    time_out: Tensor | None = None,
    elastic_info: Tensor | None = None,
) -> Tensor:
    """Wait until all ranks of a group are here.

    Args:
        x_ref: any tensor; it orders this call among others in a graph.
        group: name of the group, from ``get_hccl_comm_name``.
        world_size: its size.
        time_out: (1,) microseconds to wait at most, by default the group's limit.
        elastic_info: (4 + 2 * world_size,) as in npu_moe_distribute_dispatch_v2; all ranks must
            remain.

    Returns:
        x_ref.

    Raises:
        ArgumentValueError: world_size is not the size of the group.
        UnavailableError: ranks are left out.
        RuntimeError: a rank did not come in time.
    """
    op = "torch_npu._npu_distribute_barrier"
    if elastic_info is not None and elastic_info[0] and elastic_info[1] != world_size:
        problem = "elastic_info that leaves out ranks is not emulated by moe-triton npu-run"
        raise UnavailableError(op, problem, argument="elastic_info")
    process_group = dist.distributed_c10d._resolve_process_group(cast("Any", group))
    if world_size != process_group.size():
        contract = f"be the size of group {group!r}, {process_group.size()}"
        raise ArgumentValueError(op, "world_size", contract, world_size)
    options = dist.BarrierOptions()
    options.device = torch.device("cpu")
    if time_out is not None:
        options.timeout = timedelta(microseconds=int(time_out))
    process_group.barrier(options).wait()
    return x_ref


OPERATORS: dict[str, Callable[..., Any]] = {
    "_npu_distribute_barrier": _npu_distribute_barrier,
    # Not to be compiled: these are no operators to torch.compile, but Python that waits for peers.
    **{
        name: torch.compiler.disable(getattr(torch_npu, name))
        for name in torch_npu.__all__
        if name.startswith("npu_")
    },
}


def _with_overload(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` in the form of an operator of torch.ops: it is its own overload ``default``."""

    @functools.wraps(function)
    def operator(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    operator.default = operator  # type: ignore[attr-defined]
    return operator


class _Namespace(torch._ops._OpNamespace):
    """``torch.ops.npu``; it finds operators that scripts register there themselves as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            not_emulated("torch.ops.npu", name)


def install() -> None:
    """Fill ``torch.ops.npu``, for the rest of this process."""
    namespace = _Namespace("npu")
    for name, function in OPERATORS.items():
        setattr(namespace, name, _with_overload(function))
    torch.ops.npu = namespace  # type: ignore[attr-defined]

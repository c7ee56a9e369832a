"""Running one function on every rank of a small world, and inputs that are hard to get right."""

from __future__ import annotations

import faulthandler
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import definition
import numpy as np
import torch
import torch.distributed as dist
from definition import Group, Tokens

from moe_triton import comm, testing
from moe_triton.compat.torch_npu import npu_moe_distribute_combine, npu_moe_distribute_dispatch

WORLDS = ("local", "symmetric", "collective")

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(definition)


def run_world(
    world: str, world_size: int, fn: Callable[[Any], Any], *, limit: float = 60.0
) -> list:
    """``fn(ctx)`` on every rank of a fresh group; its results in rank order.

    Args:
        world: "local" (threads), or the transport of a world of processes.
        world_size: number of ranks.
        fn: called once on each rank.
        limit: seconds after which the call counts as hung.
    """
    if world == "local":
        return within(limit, lambda: testing.run_local(world_size, fn))
    cloudpickle.register_pickle_by_value(sys.modules[fn.__module__])
    return within(limit, lambda: testing.run_processes(world_size, fn, transport=world))


def within(limit: float, call: Callable[[], Any]) -> Any:
    """The result of ``call()``, or an AssertionError if there is none after ``limit`` seconds."""
    result: list = []
    error: list[BaseException] = []

    def target() -> None:
        try:
            result.append(call())
        except BaseException as exception:
            error.append(exception)

    thread = threading.Thread(target=target, daemon=True, name="watched")
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        raise AssertionError(f"hung: no result after {limit} s")
    if error:
        raise error[0]
    return result[0]


def strided(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values under other strides, between elements that must never be used.

    Args:
        tensor: two-dimensional.
        kind: "plain", "columns" (every second column of a wider tensor), "rows" (every second row,
            with columns left and right) or "transposed".
    """
    if kind == "plain":
        return tensor
    rows, columns = tensor.shape
    poison = float("nan") if tensor.is_floating_point() else 10**9
    if kind == "columns":
        out = tensor.new_full((rows, 2 * columns + 1), poison)[:, 1::2]
    elif kind == "rows":
        out = tensor.new_full((2 * rows + 1, columns + 3), poison)[1::2, 2 : 2 + columns]
    else:
        out = tensor.new_full((columns, rows + 1), poison)[:, :rows].T
    out.copy_(tensor)
    return out


STRIDES = ("plain", "columns", "rows", "transposed")


def describe(error: BaseException | None) -> dict | None:
    """What a test wants to know about an exception; travels between processes."""
    if error is None:
        return None
    return {
        "types": [cls.__name__ for cls in type(error).__mro__],
        "text": str(error),
        "code": getattr(error, "code", None),
        "op": getattr(error, "op", None),
        "argument": getattr(error, "argument", None),
        "rank": getattr(error, "rank", None),
        "reason": getattr(error, "reason", None),
        "traceback": "".join(traceback.format_exception(error)),
    }


def make_calls(
    group: Group,
    tokens: list[Tokens],
    expert_rows: list[np.ndarray],
    *,
    weights_in_dispatch: bool = True,
    token_nums_type: int = 1,
    shared_x: list[np.ndarray | None] | None = None,
    shared_x_shape: tuple[int, ...] | None = None,
    strides: str = "plain",
    more_rows: int = 0,
) -> list[dict]:
    """What every rank passes to :func:`round_trip`, as tensors.

    Args:
        group: agreed arguments.
        tokens: every rank's inputs.
        expert_rows: per rank (n, H) uint16 bits for combine; further rows are filled with NaN.
        weights_in_dispatch: whether dispatch gets ``expert_scales``.
        token_nums_type: ``expert_token_nums_type``.
        shared_x: per rank (BS, H) uint16 bits of ``shared_expert_x``, or None.
        shared_x_shape: another shape for it, (a, b, H).
        strides: how the two-dimensional inputs lie in memory, see :func:`strided`.
        more_rows: rows of ``expand_x`` of combine above the capacity.
    """
    calls = []
    for rank, mine in enumerate(tokens):
        agreed = {
            "ep_world_size": group.world_size,
            "moe_expert_num": group.num_experts,
            "shared_expert_num": group.shared_experts,
            "shared_expert_rank_num": group.shared_ranks,
            "global_bs": group.global_bs,
        }
        ids = torch.from_numpy(mine.ids.astype(np.int32))
        weights = torch.from_numpy(mine.weights.astype(np.float32))
        smooth = None
        if mine.scales is not None:
            smooth = strided(torch.from_numpy(mine.scales), strides)
        dispatch = {
            "x": strided(definition.to_tensor(mine.x, group.dtype), strides),
            "expert_ids": strided(ids, strides),
            "scales": smooth,
            "expert_scales": strided(weights, strides) if weights_in_dispatch else None,
            "quant_mode": group.quant_mode,
            "expert_token_nums_type": token_nums_type,
            **agreed,
        }
        outputs = expert_rows[rank]
        height = group.capacity(rank, mine.batch) + more_rows
        rows = torch.full((height, group.hidden), float("nan")).to(
            definition.TORCH_DTYPES[group.dtype]
        )
        rows[: len(outputs)] = definition.to_tensor(outputs, group.dtype)
        shared = None
        if shared_x is not None and shared_x[rank] is not None:
            shared = strided(definition.to_tensor(shared_x[rank], group.dtype), strides)
            if shared_x_shape is not None:
                shared = shared.reshape(shared_x_shape)
        combine = {
            "expand_x": strided(rows, strides),
            "expert_ids": strided(ids, strides),
            "expert_scales": strided(weights, strides),
            "shared_expert_x": shared,
            **agreed,
        }
        calls.append({"dispatch": dispatch, "combine": combine})
    return calls


def call_dispatch(ctx: Any, call: dict, **changes: Any) -> tuple[torch.Tensor | None, ...]:
    """v1 dispatch of this rank's call."""
    named = {"group_ep": ctx.ep_group, "ep_rank_id": ctx.ep_rank}
    return npu_moe_distribute_dispatch(**{**named, **call["dispatch"], **changes})


def call_combine(ctx: Any, call: dict, outputs: tuple, **changes: Any) -> torch.Tensor:
    """v1 combine of this rank's call, after dispatch returned ``outputs``."""
    named = {
        "group_ep": ctx.ep_group,
        "ep_rank_id": ctx.ep_rank,
        "expand_idx": outputs[2],
        "ep_send_counts": outputs[4],
        "tp_send_counts": outputs[5],
        "expand_scales": outputs[6],
    }
    return npu_moe_distribute_combine(**{**named, **call["combine"], **changes})


def round_trip(ctx: Any, calls: list[dict]) -> tuple:
    """The seven outputs of dispatch and the result of combine on this rank."""
    call = calls[ctx.ep_rank]
    outputs = call_dispatch(ctx, call)
    return outputs, call_combine(ctx, call, outputs)


def own_group(ctx: Any) -> Any:
    """A group of all ranks for a test in which a wait times out.

    gloo then closes all connections of the group, so that it must not be one that others use.
    """
    if comm.resolve("test", ctx.ep_group, ctx.ep_rank).transport != "collective":
        return ctx.ep_group
    group = dist.new_group()
    comm.set_transport(group, "collective")
    return group

"""Run a function on every rank of a small world; inputs with unusual strides; calls of the ops."""

from __future__ import annotations

import faulthandler
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import definition
import definition_numbers
import numpy as np
import symmetric_memory
import torch
import torch.distributed as dist
from definition import Group, Tokens

from moe_triton import comm, testing
from moe_triton.compat import torch_npu

WORLDS: tuple[str, ...] = ("local", "symmetric", "collective")
if os.environ.get("MOE_TRITON_TEST_PROFILE") == "full":
    WORLDS += ("symm_mem",)  # over the stand-in; it takes as long as "symmetric"

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(definition)
cloudpickle.register_pickle_by_value(definition_numbers)
cloudpickle.register_pickle_by_value(symmetric_memory)


def run_world(
    world: str,
    world_size: int,
    fn: Callable[[Any], Any],
    *,
    tp_world_size: int = 1,
    limit: float = 60.0,
) -> list:
    """``fn(ctx)`` on every rank of a fresh group; its results in rank order.

    Args:
        world: "local" (threads), the transport of a world of processes, or "symm_mem": processes
            whose windows come from torch's symmetric memory, for which a stand-in works.
        world_size: number of ranks in all.
        fn: called once on each rank.
        tp_world_size: ranks of a tensor-parallel group; ``ctx`` names both groups.
        limit: seconds after which the call counts as hung.
    """
    if world == "local":
        return within(limit, lambda: testing.run_local(world_size, fn, tp_world_size=tp_world_size))
    cloudpickle.register_pickle_by_value(sys.modules[fn.__module__])
    if world == "symm_mem":
        world, fn = "symmetric", symmetric_memory.on_provider(fn)
    return within(
        limit,
        lambda: testing.run_processes(world_size, fn, tp_world_size=tp_world_size, transport=world),
    )


def run_example(example: Any, world: str, fn: Callable[[Any], Any]) -> list:
    """``fn(ctx)`` on every rank of a world as a worked example needs it."""
    planes = example.group.tp_world_size
    return run_world(world, len(example.tokens), fn, tp_world_size=planes)


def within(limit: float, call: Callable[[], Any]) -> Any:
    """The result of ``call()``, or an AssertionError after ``limit`` seconds."""
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
        tensor: two-dimensional, or a vector, for which every second element stands for each kind
            but "plain".
        kind: "plain", "columns" (every second column of a wider tensor), "rows" (every second row,
            with columns left and right) or "transposed".
    """
    if kind == "plain":
        return tensor
    if tensor.dim() == 1:
        return strided(tensor[None], "columns")[0]
    rows, columns = tensor.shape
    poison = float("nan") if tensor.is_floating_point() else 10**9
    if tensor.dtype.itemsize == 1 and not tensor.is_floating_point():
        poison = 0x55
    if kind == "columns":
        out = tensor.new_full((rows, 2 * columns + 1), poison)[:, 1::2]
    elif kind == "rows":
        out = tensor.new_full((2 * rows + 1, columns + 3), poison)[1::2, 2 : 2 + columns]
    else:
        out = tensor.new_full((columns, rows + 1), poison)[:, :rows].T
    out.copy_(tensor)
    return out


STRIDES = ("plain", "columns", "rows", "transposed")


def signature_of(fn: Callable) -> str:
    """Names and defaults of the parameters, with "*" before the first keyword-only one."""
    words: list[str] = []
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        required = parameter.default is parameter.empty
        words.append(name if required else f"{name}={parameter.default!r}")
    return " ".join(words)


def describe(error: BaseException | None) -> dict | None:
    """An exception as data that can be sent between processes."""
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


def elastic_info(group: Group) -> torch.Tensor:
    """``elastic_info`` for the remaining ranks of ``group``."""
    left = group.remaining
    old_ranks = [*left.ranks] + [-1] * (group.world_size - len(left.ranks))
    new_ranks = [
        left.ranks.index(old) if old in left.ranks else -1 for old in range(group.world_size)
    ]
    head = [1, len(left.ranks), left.shared_ranks, left.num_experts]
    return torch.tensor([*head, *new_ranks, *old_ranks], dtype=torch.int32)


def make_calls(
    group: Group,
    tokens: list[Tokens],
    expert_rows: list[np.ndarray | None],
    *,
    version: int = 1,
    weights_in_dispatch: bool = True,
    token_nums_type: int = 1,
    shared_x: list[np.ndarray | None] | None = None,
    shared_x_shape: tuple[int, ...] | None = None,
    strides: str = "plain",
    more_rows: int = 0,
    comm_alg: str = "",
) -> list[dict | None]:
    """The arguments of every rank for :func:`round_trip`, as tensors.

    Args:
        group: agreed arguments.
        tokens: every rank's inputs.
        expert_rows: per rank (n, H) uint16 bits for combine; further rows are filled with NaN.
        version: of the functions to call; only 2 has zero-computation experts and remaining ranks.
        weights_in_dispatch: whether dispatch gets ``expert_scales``.
        token_nums_type: ``expert_token_nums_type``.
        shared_x: per rank (BS, H) uint16 bits of ``shared_expert_x``, or None.
        shared_x_shape: another shape for it, (a, b, H).
        strides: how the inputs lie in memory, see :func:`strided`.
        more_rows: rows of ``expand_x`` of combine above the capacity.
        comm_alg: of version 2.

    Returns:
        A call for every world rank; None for a rank that the group was scaled down by.
    """

    def floats(bits: np.ndarray | None) -> torch.Tensor | None:
        return None if bits is None else strided(definition.to_tensor(bits, group.dtype), strides)

    def factors(values: np.ndarray | None) -> torch.Tensor | None:
        if values is not None and values.dtype == np.uint8:
            return torch.from_numpy(values).view(torch.float8_e8m0fnu)
        return plain(values)

    def plain(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else strided(torch.from_numpy(values), strides)

    def codes(values: np.ndarray) -> torch.Tensor:
        kind = definition_numbers.ROW_DTYPES[group.given]
        return strided(torch.from_numpy(values), strides).view(kind)

    agreed = {
        "ep_world_size": group.world_size,
        "moe_expert_num": group.num_experts,
        "tp_world_size": group.tp_world_size,
        "shared_expert_num": group.shared_experts,
        "shared_expert_rank_num": group.shared_ranks,
        "global_bs": group.global_bs,
    }
    if version == 2:
        agreed |= {
            "comm_alg": comm_alg,
            "zero_expert_num": group.zero_experts,
            "copy_expert_num": group.copy_experts,
            "const_expert_num": group.const_experts,
            "elastic_info": None if group.remaining is None else elastic_info(group),
        }
    calls: list[dict | None] = []
    for rank, mine in enumerate(tokens):
        if group.remaining is not None and rank not in group.remaining.ranks:
            calls.append(None)
            continue
        routing = {
            "expert_ids": plain(mine.ids.astype(np.int32)),
            "x_active_mask": plain(mine.mask),
            **agreed,
        }
        weights = plain(mine.weights.astype(np.float32))
        dispatch = {
            "x": floats(mine.x) if group.given is None else codes(mine.x),
            "scales": factors(mine.scales),
            "expert_scales": weights if weights_in_dispatch else None,
            "quant_mode": group.quant_mode,
            "expert_token_nums_type": token_nums_type,
            **routing,
        }
        if version == 2 and group.quant_mode:
            dispatch["y_dtype"] = definition_numbers.ROW_DTYPES[group.rows]
        outputs = expert_rows[rank]
        capacity = group.capacity(rank // group.tp_world_size, mine.batch)
        height = group.tp_world_size * capacity + more_rows
        rows = torch.full((height, group.hidden), float("nan")).to(
            definition.TORCH_DTYPES[group.dtype]
        )
        rows[: len(outputs)] = definition.to_tensor(outputs, group.dtype)
        shared = None if shared_x is None else floats(shared_x[rank])
        if shared is not None and shared_x_shape is not None:
            shared = shared.reshape(shared_x_shape)
        combine = {
            "expand_x": strided(rows, strides),
            "expert_scales": weights,
            "shared_expert_x": shared,
            "comm_quant_mode": group.comm_quant_mode,
            **routing,
        }
        if version == 2:
            combine |= {
                "ori_x": floats(mine.ori_x),
                "const_expert_alpha_1": floats(mine.alpha_1),
                "const_expert_alpha_2": floats(mine.alpha_2),
                "const_expert_v": floats(mine.const_v),
            }
        calls.append({"dispatch": dispatch, "combine": combine})
    return calls


def groups_of(ctx: Any) -> dict:
    """The arguments that name the groups of a rank and its places in them."""
    return {
        "group_ep": ctx.ep_group,
        "ep_rank_id": ctx.ep_rank,
        "group_tp": ctx.tp_group,
        "tp_rank_id": ctx.tp_rank,
    }


def call_dispatch(
    ctx: Any, call: dict, *, version: int = 1, **changes: Any
) -> tuple[torch.Tensor, ...]:
    """Dispatch of this rank's call."""
    dispatch = (
        torch_npu.npu_moe_distribute_dispatch
        if version == 1
        else torch_npu.npu_moe_distribute_dispatch_v2
    )
    return dispatch(**{**groups_of(ctx), **call["dispatch"], **changes})


def combine_arguments(ctx: Any, call: dict, outputs: tuple, *, version: int = 1) -> dict:
    """The arguments of this rank's combine, after dispatch returned ``outputs``."""
    return {
        **groups_of(ctx),
        "expand_idx" if version == 1 else "assist_info_for_combine": outputs[2],
        "ep_send_counts": outputs[4],
        "tp_send_counts": outputs[5],
        "expand_scales": outputs[6],
        **call["combine"],
    }


def call_combine(
    ctx: Any, call: dict, outputs: tuple, *, version: int = 1, **changes: Any
) -> torch.Tensor:
    """Combine of this rank's call, after dispatch returned ``outputs``."""
    combine = (
        torch_npu.npu_moe_distribute_combine
        if version == 1
        else torch_npu.npu_moe_distribute_combine_v2
    )
    return combine(**combine_arguments(ctx, call, outputs, version=version) | changes)


def round_trip(ctx: Any, calls: list[dict | None], *, version: int = 1) -> tuple | None:
    """The seven outputs of dispatch and the result of combine on this rank; None without a call."""
    call = calls[ctx.rank]
    if call is None:
        return None
    outputs = call_dispatch(ctx, call, version=version)
    return outputs, call_combine(ctx, call, outputs, version=version)


def own_group(ctx: Any) -> Any:
    """A group of all ranks for a test in which a wait times out.

    gloo then closes all connections of the group, so that it must not be one that others use.
    """
    if comm.resolve("test", ctx.ep_group, ctx.ep_rank).transport != "collective":
        return ctx.ep_group
    group = dist.new_group()
    comm.set_transport(group, "collective")
    return group

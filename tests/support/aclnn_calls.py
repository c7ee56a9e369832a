"""Calls of torch_npu's functions, made through the two phases of the aclnn interface."""

from __future__ import annotations

import inspect
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import torch
from harness import combine_arguments, groups_of

from moe_triton import get_profile
from moe_triton.compat import aclnn, torch_npu

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

POISON = 0xA5  # every byte of a tensor for an output
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
E8M0 = torch.float8_e8m0fnu
ROWS = {1: torch.int8, 2: torch.int8, 3: torch.float8_e4m3fn, 4: torch.float8_e4m3fn}

# The function of torch_npu for each of C.
SAME_OP = {
    **{
        f"aclnnMoeDistribute{op}": f"npu_moe_distribute_{op.lower()}"
        for op in ("Dispatch", "Combine")
    },
    **{
        f"aclnnMoeDistribute{op}V{version}": f"npu_moe_distribute_{op.lower()}_v2"
        for op in ("Dispatch", "Combine")
        for version in (2, 3, 4)
    },
    "aclnnMoeDistributeCombineAddRmsNorm": "npu_moe_distribute_combine_add_rms_norm",
    "aclnnMoeDistributeCombineAddRmsNormV2": "npu_moe_distribute_combine_add_rms_norm",
    "aclnnMoeDistributeDispatchSetup": "npu_moe_distribute_dispatch_setup",
    "aclnnMoeDistributeDispatchTeardown": "npu_moe_distribute_dispatch_teardown",
    "aclnnMoeDistributeCombineSetup": "npu_moe_distribute_combine_setup",
    "aclnnMoeDistributeCombineTeardown": "npu_moe_distribute_combine_teardown",
    "aclnnMoeEPLBUpdateExpert": "npu_moe_update_expert",
    "aclnnMoeUpdateExpert": "npu_moe_update_expert",
}


def parameters(function: str) -> dict[str, inspect.Parameter]:
    """The parameters of the first phase."""
    return dict(inspect.signature(getattr(aclnn, f"{function}GetWorkspaceSize")).parameters)


def keyword(function: str, parameter: str) -> str:
    """The name of a parameter in torch_npu."""
    if parameter == "assistInfoForCombine" and "RmsNorm" in function:
        return "expand_idx"
    name = parameter.removesuffix("Optional").replace("BS", "Bs")
    return re.sub(r"([A-Z]|\d)", lambda actual: f"_{actual[1].lower()}", name)


def place(call: dict) -> tuple[int, int]:
    """A and L of a correct call, by the documents' formulas."""
    world, ranks = call["ep_world_size"], call.get("shared_expert_rank_num", 0)
    batch, top_k = call["expert_ids"].shape
    most = call.get("global_bs", 0) // world or batch
    if call["ep_rank_id"] < ranks:
        return most * math.ceil(world / (ranks // call.get("shared_expert_num", 1))), 1
    local = call["moe_expert_num"] // (world - ranks)
    return most * world * min(local, top_k), local


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory whose bytes all have one value."""
    size = math.prod(shape) * dtype.itemsize
    return torch.full((size,), POISON, dtype=torch.uint8).view(dtype).view(shape)


def dispatch_outputs(call: dict, *, more: int = 0) -> list[torch.Tensor]:
    """Tensors for the outputs of a dispatch, ``more`` rows larger where they may be.

    As torch_npu does, also for those that the call does not compute.
    """
    (rows, local), world = place(call), call["ep_world_size"]
    ranks = call.get("tp_world_size", 0)
    pair = max(ranks, 1)
    (batch, top_k), hidden = call["expert_ids"].shape, call["x"].shape[1]
    mode = call.get("quant_mode", 0)
    given = call.get("scales") if call["x"].dtype.itemsize == 1 else None
    scales = {
        2: ((), torch.float32),
        3: ((math.ceil(hidden / 128),), torch.float32),
        4: ((math.ceil(hidden / 64) * 2,), E8M0),
    }.get(mode if given is None else None, ((), torch.float32))
    if given is not None:
        scales = (tuple(given.shape[1:]), given.dtype)
    kind = call.get("y_dtype") or ROWS.get(mode, call["x"].dtype)
    third = (batch * top_k,) if "comm_alg" not in call else (128 * rows + more,)
    # A2 has words for its servers behind the counts.
    spare = 2 * batch * world * top_k * (world // 8) if get_profile() == "a2" else 0
    return [
        poisoned((pair * rows + more, hidden), kind),
        poisoned((pair * rows + more, *scales[0]), scales[1]),
        poisoned(third, torch.int32),
        poisoned((local,), torch.int64),
        poisoned((pair * world * local + spare,), torch.int32),
        poisoned((ranks,), torch.int32),
        poisoned((rows + more,), torch.float32),
    ]


def combine_outputs(call: dict) -> list[torch.Tensor | None]:
    """A tensor for the output of a combine."""
    shape = (len(call["expert_ids"]), call["expand_x"].shape[1])
    return [poisoned(shape, call["expand_x"].dtype)]


def norm_outputs(call: dict) -> list[torch.Tensor | None]:
    """Tensors for the outputs of a combine with RMSNorm."""
    tokens, hidden = len(call["expert_ids"]), call["expand_x"].shape[1]
    y, x = (poisoned((tokens, 1, hidden), call["expand_x"].dtype) for _ in range(2))
    return [y, poisoned((tokens, 1, 1), torch.float32), x]


def plan(function: str, call: dict, outputs: list) -> tuple:
    """The first phase of a call with torch_npu's arguments, and defaults for missing ones."""
    names = parameters(function)
    inputs, targets = list(names)[: -len(outputs)], list(names)[-len(outputs) :]
    defaults = inspect.signature(getattr(torch_npu, SAME_OP[function])).parameters
    known = {keyword(function, name): name for name in inputs}
    unknown = {
        name for name, value in call.items() if name not in known and value not in (None, "", 0)
    }
    assert not unknown - {"y_dtype"}, f"{function} has no {unknown}"
    values = {}
    for name, parameter in known.items():
        reserved = 0 if "int" in str(names[parameter].annotation) else None
        default = defaults[name].default if name in defaults else reserved
        values[parameter] = call.get(name, default)
    values |= dict(zip(targets, outputs, strict=True))
    return getattr(aclnn, f"{function}GetWorkspaceSize")(*values.values())


def launch(function: str, planned: tuple) -> int:
    """The second phase of what ``plan`` returned."""
    status, size, executor = planned
    assert (status, size) == (0, 0), aclnn.aclnn_last_error()
    return getattr(aclnn, function)(None, size, executor, None)


def run(function: str, call: dict, outputs: list) -> list:
    """Both phases of a correct call; the outputs."""
    assert launch(function, plan(function, call, outputs)) == 0, aclnn.aclnn_last_error()
    return outputs


def ending(function: str, call: dict, outputs: list) -> dict:
    """How a call ends: the phase that ended it, its status, why, and after how long."""
    start, phase = time.monotonic(), 1
    planned = plan(function, call, outputs)
    status = planned[0]
    if status == 0:
        phase, status = 2, launch(function, planned)
    elif planned[1:] != (0, None):
        raise AssertionError(f"{planned} after an error")
    sentence = aclnn.aclnn_last_error() if status else None
    seconds = time.monotonic() - start
    return {"phase": phase, "status": status, "sentence": sentence, "seconds": seconds}


def dispatch_call(ctx: Any, call: dict) -> dict:
    """The arguments of this rank's dispatch, of ``harness.make_calls``."""
    return {**groups_of(ctx), **call["dispatch"]}


def combine_call(ctx: Any, call: dict, outputs: list) -> dict:
    """Those of its combine, after dispatch."""
    version = 2 if "comm_alg" in call["combine"] else 1
    return combine_arguments(ctx, call, outputs, version=version)


def round_trip(ctx: Any, call: dict, dispatch: str, combine: str) -> tuple[list, torch.Tensor]:
    """The seven outputs of dispatch and the one of combine on this rank."""
    sent = dispatch_call(ctx, call)
    outputs = run(dispatch, sent, dispatch_outputs(sent))
    returned = combine_call(ctx, call, outputs)
    (x,) = run(combine, returned, combine_outputs(returned))
    return outputs, x


Change = Callable[[dict], None]


def bad_call(ctx: Any, call: dict, op: str, change: Change, dispatch: str, combine: str) -> dict:
    """How an edited call of ``op`` ends; a dispatch before a combine is correct."""
    mine = dispatch_call(ctx, call)
    outputs = dispatch_outputs(mine)
    if op == "combine":
        mine = combine_call(ctx, call, run(dispatch, mine, outputs))
        outputs = combine_outputs(mine)
    right = dict(mine)
    change(mine)
    x, mode = mine.get("x"), mine.get("quant_mode")
    if mode in ROWS or getattr(x, "dtype", None) in FLOAT8:  # else expandX would be wrong as well
        outputs = dispatch_outputs({**right, "quant_mode": mode, "x": x})
    return ending(dispatch if op == "dispatch" else combine, mine, outputs)

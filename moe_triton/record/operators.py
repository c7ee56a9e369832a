"""The operators that are recorded and compared: the names of their arguments and outputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ascend import op_names
from ..compat import torch_npu

_DISPATCH_COUNTS = ("expert_token_nums", "ep_recv_counts", "tp_recv_counts", "expand_scales")

# In the order in which torch_npu returns them.
OUTPUTS: dict[str, tuple[str, ...]] = {
    op_names.DISPATCH: ("expand_x", "dynamic_scales", "expand_idx", *_DISPATCH_COUNTS),
    op_names.DISPATCH_V2: (
        "expand_x",
        "dynamic_scales",
        "assist_info_for_combine",
        *_DISPATCH_COUNTS,
    ),
    op_names.COMBINE: ("x",),
    op_names.COMBINE_V2: ("x",),
    op_names.COMBINE_ADD_RMS_NORM: ("y", "rstd_out", "x"),
    op_names.DISPATCH_SETUP: ("y", "expand_idx", "comm_cmd_info"),
    op_names.DISPATCH_TEARDOWN: (
        "expand_x",
        "dynamic_scales",
        "assist_info_for_combine",
        "expert_token_nums",
    ),
    op_names.COMBINE_SETUP: ("quant_expand_x", "comm_cmd_info"),
    op_names.COMBINE_TEARDOWN: ("x",),
    op_names.UPDATE_EXPERT: ("balanced_expert_ids", "balanced_active_mask"),
    op_names.GATING_TOP_K: ("y", "expert_idx", "out"),
    op_names.GATING_TOP_K_SOFTMAX: ("y", "expert_idx", "row_idx"),
    op_names.GATING_TOP_K_SOFTMAX_V2: ("y", "expert_idx", "softmax_result"),
    op_names.INIT_ROUTING_V2: (
        "expanded_x",
        "expanded_row_idx",
        "expert_token_cumsum_or_count",
        "expanded_scale",
    ),
    op_names.RE_ROUTING: (
        "permute_tokens",
        "permute_per_token_scales",
        "permute_token_idx",
        "expert_token_num",
    ),
    op_names.FINALIZE_ROUTING: ("out",),
    op_names.COMPUTE_EXPERT_TOKENS: ("out",),
    op_names.TOKEN_PERMUTE: ("permuted_tokens", "sorted_indices"),
    op_names.TOKEN_UNPERMUTE: ("out",),
    op_names.TOKEN_PERMUTE_MAP: ("permuted_tokens", "permuted_probs", "sorted_indices"),
    op_names.TOKEN_UNPERMUTE_MAP: ("out",),
}


def is_collective(op: str) -> bool:
    """Whether the ranks of a group take part in ``op`` together."""
    return op.startswith("npu_moe_distribute")


def is_dispatch(op: str) -> bool:
    """Whether ``op`` returns the rows that a rank received."""
    return op in (op_names.DISPATCH, op_names.DISPATCH_V2, op_names.DISPATCH_TEARDOWN)


@functools.cache
def signature(op: str) -> inspect.Signature:
    """The parameters of ``op`` in torch_npu's order."""
    return inspect.signature(getattr(torch_npu, op))


def bind(
    op: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call by name, without defaults, and those that ``op`` does not have here.

    torch_npu adds optional arguments from version to version; the second dictionary is for the
    caller to judge.
    """
    parameters = [*signature(op).parameters]
    known = dict(zip(parameters, args, strict=False))
    known |= {name: value for name, value in kwargs.items() if name in parameters}
    unknown = {name: value for name, value in kwargs.items() if name not in parameters}
    unknown |= {f"argument {i}": args[i] for i in range(len(parameters), len(args))}
    return known, unknown


def missing(op: str, arguments: Mapping[str, Any]) -> list[str]:
    """The required arguments that a call lacks."""
    required = (p for p in signature(op).parameters.values() if p.default is p.empty)
    return [p.name for p in required if p.name not in arguments]


def received_rows(op: str, tensors: Mapping[str, Any], arguments: Mapping[str, Any]) -> int | None:
    """How many leading rows of ``expand_x`` were received, from the counts of a rank's call.

    Args:
        op: a dispatch or a combine.
        tensors: of a dispatch its outputs, of a combine its inputs.
        arguments: of the call.

    Returns:
        The rows, with those of the TP peer; None if the call does not hold the counts, or if they
        cannot be right.
    """
    world = int(arguments.get("ep_world_size") or 0)
    name = {
        op_names.DISPATCH_TEARDOWN: "assist_info_for_combine",
        op_names.COMBINE_SETUP: "assist_info_for_combine",
    }.get(op, "ep_recv_counts" if is_dispatch(op) else "ep_send_counts")
    counts, rows = tensors.get(name), tensors.get("expand_x")
    if not isinstance(counts, torch.Tensor) or not isinstance(rows, torch.Tensor) or not world:
        return None
    shared = int(arguments.get("shared_expert_rank_num") or 0)
    local = 1
    if int(arguments.get("ep_rank_id") or 0) >= shared and world > shared:
        local = int(arguments.get("moe_expert_num") or 0) // (world - shared)
    last = world * local - 1
    if not 0 <= last < counts.numel():
        return None
    received = int(counts.reshape(-1)[last])
    if arguments.get("tp_world_size") == 2:
        pair = tensors.get("tp_recv_counts" if is_dispatch(op) else "tp_send_counts")
        received = int(pair.sum()) if isinstance(pair, torch.Tensor) else len(rows)
    return received if 0 <= received <= len(rows) else None

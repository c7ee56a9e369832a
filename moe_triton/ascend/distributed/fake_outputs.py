"""Outputs of dispatch and combine without values: shapes and dtypes for a compiler.

Only ``check_sizes`` raises: a wrong argument gives an arbitrary size, often 0, and the op raises
when it runs. Each function takes all arguments of its op, also those without effect on shapes.
Source: the output tables of aclnnMoeDistributeDispatch and aclnnMoeDistributeCombine, V1 to V4.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import MoeError
from ...ops import checks
from ...profile import active_profile
from ...topology import Topology
from .. import quant_modes
from ..group_arguments import GroupArguments
from ..op_names import DISPATCH_V2
from .dispatch import DispatchOutput
from .dispatch_metadata import ASSIST_WORDS
from .split_phase import RECORD, message_format, quant_row_bytes


def dispatch_outputs(
    op: str,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    scales: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    quant_mode: int = 0,
    y_dtype: object = None,
    x_dtype: object = None,
    scales_dtype: object = None,
    **_others: object,
) -> DispatchOutput:
    """The outputs of ``distribute_dispatch``."""
    num_tokens, top_k = _sizes(expert_ids)
    _, hidden = _sizes(x)
    rows_quant = _row_quantization(op, x, scales, quant_mode, y_dtype, x_dtype, scales_dtype)
    rows, local = _capacity(arguments, num_tokens, top_k)
    world, tp = max(arguments.ep_world_size, 1), max(arguments.tp_world_size, 1)
    int32, assist, profile = torch.int32, None, active_profile()
    max_tokens = _max_tokens(arguments, num_tokens)
    counts = tp * world * local + profile.spare_counts(world, max_tokens, top_k)
    if op == DISPATCH_V2:
        assist = x.new_empty(ASSIST_WORDS * rows, dtype=int32)
    return DispatchOutput(
        expand_x=x.new_empty((tp * rows, hidden), dtype=rows_quant.dtype),
        dynamic_scales=_of_rows(rows_quant.scales, tp * rows),
        expand_idx=x.new_empty(num_tokens * top_k, dtype=int32),
        assist_info=assist,
        expert_token_nums=x.new_empty(local, dtype=torch.int64),
        ep_recv_counts=x.new_empty(counts, dtype=int32),
        tp_recv_counts=x.new_empty(tp, dtype=int32) if tp > 1 else None,
        expand_scales=None if expert_scales is None else x.new_empty(rows, dtype=torch.float32),
        waited=x.new_empty(world, dtype=torch.int64),
    )


def combine_output(
    *, expand_x: torch.Tensor, expert_ids: torch.Tensor, **_others: object
) -> torch.Tensor:
    """The output of ``distribute_combine``."""
    (num_tokens, _), (_, hidden) = _sizes(expert_ids), _sizes(expand_x)
    return expand_x.new_empty((num_tokens, hidden))


def dispatch_setup_outputs(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    quant_mode: int = 0,
    y_dtype: object = None,
    **_others: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The outputs of ``split_phase.dispatch_setup``."""
    (num_tokens, top_k), (_, hidden) = _sizes(expert_ids), _sizes(x)
    rows_quant = _row_quantization("", x, None, quant_mode, y_dtype, None, None)
    topology = _topology(arguments)
    fmt = message_format(rows_quant.quant, x.dtype, hidden)
    rows = num_tokens * (top_k + topology.num_shared_experts)
    records = rows + topology.world_size * topology.experts_per_rank
    return (
        x.new_empty((rows, fmt.stride // rows_quant.dtype.itemsize), dtype=rows_quant.dtype),
        x.new_empty(num_tokens * top_k, dtype=torch.int32),
        x.new_empty(records * RECORD, dtype=torch.int32),
    )


def dispatch_teardown_outputs(
    x: torch.Tensor,
    y: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    quant_mode: int = 0,
    **_others: object,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The outputs of ``split_phase.DispatchTeardown``."""
    (num_tokens, top_k), (_, hidden) = _sizes(expert_ids), _sizes(x)
    rows_quant = _row_quantization("", x, None, quant_mode, y.dtype, None, None)
    rows, local = _capacity(arguments, num_tokens, top_k)
    words = max(rows * ASSIST_WORDS, max(arguments.ep_world_size, 1) * local)
    return (
        x.new_empty((rows, hidden), dtype=rows_quant.dtype),
        _of_rows(rows_quant.scales, rows),
        x.new_empty(words, dtype=torch.int32),
        x.new_empty(local, dtype=torch.int64),
    )


def combine_setup_outputs(
    expand_x: torch.Tensor, expert_ids: torch.Tensor, arguments: GroupArguments, **_others: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of ``split_phase.combine_setup``."""
    (num_tokens, top_k), (_, hidden) = _sizes(expert_ids), _sizes(expand_x)
    rows, _ = _capacity(arguments, num_tokens, top_k)
    records = rows + max(arguments.ep_world_size, 1)
    return (
        expand_x.new_empty((rows, quant_row_bytes(hidden)), dtype=torch.int8),
        expand_x.new_empty(records * RECORD, dtype=torch.int32),
    )


def check_sizes(
    op: str, matrices: dict[str, torch.Tensor | None], arguments: dict[str, Any]
) -> None:
    """Check all that the sizes of a split-phase op's outputs depend on.

    Args:
        op: for error messages.
        matrices: (BS, H) rows and (BS, K) ids by their names.
        arguments: of the op.
    """
    checks.required(op, **matrices)
    for name, tensor in matrices.items():
        assert tensor is not None
        checks.dtype(op, name, tensor, (*checks.FLOATS, torch.int32))
        checks.shape(op, name, tensor, (None, None), "(BS, H)", tensor.device)
    names = ("ep_world_size", "moe_expert_num", "shared_expert_num", "shared_expert_rank_num")
    world, *experts = (arguments[name] for name in names)
    checks.integers(op, **{name: arguments[name] for name in names})
    checks.value(op, "ep_world_size", world >= 1, "be positive", world)
    checks.topology(op, world, *experts)


def _row_quantization(
    op: str,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    quant_mode: int,
    y_dtype: object,
    x_dtype: object,
    scales_dtype: object,
) -> quant_modes.RowQuantization:
    """The quantisation of the rows of a dispatch; none if the arguments are wrong."""
    try:
        x_kind, scales_kind, y_kind = (
            quant_modes.named_dtype(op, name, value)
            for name, value in (
                ("x_dtype", x_dtype),
                ("scales_dtype", scales_dtype),
                ("y_dtype", y_dtype),
            )
        )
        stored = quant_modes.stored_as(op, "x", x, x_kind)
        if scales is not None:
            scales = quant_modes.stored_as(op, "scales", scales, scales_kind)
        return quant_modes.row_quantization(op, stored, scales, quant_mode, y_kind)
    except (MoeError, IndexError):
        return quant_modes.RowQuantization(None, x.dtype, None)


def _of_rows(scales: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
    return None if scales is None else scales.new_empty((num_rows, *scales.shape[1:]))


def _sizes(matrix: torch.Tensor) -> tuple[int, int]:
    """Rows and columns; 0 for a missing dimension."""
    rows, columns, *_ = *matrix.shape, 0, 0
    return rows, columns


def _topology(arguments: GroupArguments) -> Topology:
    """The placement of the experts; without experts if the arguments are wrong."""
    world = max(arguments.ep_world_size, 1)
    try:
        return checks.topology(
            "",
            world,
            arguments.moe_expert_num,
            arguments.shared_expert_num,
            arguments.shared_expert_rank_num,
        )
    except MoeError:
        return Topology(world, 0)


def _max_tokens(arguments: GroupArguments, num_tokens: int) -> int:
    """The largest batch of a rank."""
    world = max(arguments.ep_world_size, 1)
    return max(arguments.global_bs, 0) // world if arguments.global_bs else num_tokens


def _capacity(arguments: GroupArguments, num_tokens: int, top_k: int) -> tuple[int, int]:
    """A and L of this rank."""
    rank = arguments.ep_rank_id
    placement = _topology(arguments)
    max_tokens = _max_tokens(arguments, num_tokens)
    return placement.capacity(rank, max_tokens, top_k), placement.num_local_experts(rank)

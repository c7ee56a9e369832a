"""The ops behind ``npu_moe_init_routing`` and ``npu_moe_init_routing_quant``.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import checks
from ..op_names import INIT_ROUTING, INIT_ROUTING_QUANT
from .gather import FLOATS, gather
from .init_routing import init_routing_v2, init_routing_v2_outputs

_CUMSUM, _COUNT = 1, 2  # expert_tokens_num_mode
_DYNAMIC = 1  # quant_mode


def init_routing(
    x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather tokens in the order of their experts; row_idx numbers the slots."""
    op = INIT_ROUTING
    checks.required(op, x=x, row_idx=row_idx, expert_idx=expert_idx)
    checks.integers(op, active_num=active_num)
    checks.dtype(op, "x", x, FLOATS)
    checks.dtype(op, "row_idx", row_idx, (torch.int32,))
    checks.dtype(op, "expert_idx", expert_idx, (torch.int32,))
    checks.shape(op, "x", x, (None, None), "(N, H)", x.device)
    checks.shape(op, "expert_idx", expert_idx, (len(x), None), "(N, K)", x.device)
    shape = tuple(expert_idx.shape)
    checks.shape(op, "row_idx", row_idx, shape, "of expert_idx", x.device)
    checks.value(op, "active_num", active_num >= 0, "not be negative", active_num)
    number = row_idx.numel()
    checks.indices(op, "row_idx", row_idx, number)
    if row_idx.device.type == "cpu":
        distinct = row_idx.unique().numel()
        contract = f"have N * K = {number} distinct elements"
        checks.value(op, "row_idx", distinct == number, contract, distinct)

    sorted_ids, order = expert_idx.reshape(-1).sort(stable=True)
    sorted_rows = row_idx.reshape(-1)[order]
    expanded_row_idx = torch.empty_like(sorted_rows)
    expanded_row_idx[sorted_rows.long()] = torch.arange(number, dtype=torch.int32, device=x.device)
    kept = min(len(x), active_num) * expert_idx.shape[1]
    return gather(x, sorted_rows[:kept].long() % max(len(x), 1)), expanded_row_idx, sorted_ids


def init_routing_outputs(
    *, x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake outputs of ``init_routing``."""
    kept = min(x.shape[0], max(active_num, 0)) * expert_idx.shape[1:].numel()
    number = expert_idx.numel()
    rows, ids = row_idx.new_empty(number), expert_idx.new_empty(number)
    return x.new_empty((kept, *x.shape[1:])), rows, ids


def init_routing_quant(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = 1024,
    expert_capacity: int = 0,
    expert_num: int = 256,
    drop_pad_mode: int = 0,
    expert_tokens_num_mode: int = 0,
    expert_tokens_before_capacity_flag: bool = False,
    quant_mode: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gather tokens in the order of their experts, quantised to int8."""
    op = INIT_ROUTING_QUANT
    checks.integers(op, expert_tokens_num_mode=expert_tokens_num_mode, quant_mode=quant_mode)
    checks.flags(op, expert_tokens_before_capacity_flag=expert_tokens_before_capacity_flag)
    fits = 0 <= expert_tokens_num_mode <= _COUNT
    checks.value(op, "expert_tokens_num_mode", fits, "be in [0, 2]", expert_tokens_num_mode)
    checks.value(op, "quant_mode", quant_mode in (0, 1), "be 0 or 1", quant_mode)
    expanded, row_idx, counts, scales = init_routing_v2(
        x,
        expert_idx,
        scale,
        offset,
        active_num,
        expert_capacity,
        expert_num,
        drop_pad_mode,
        0 if expert_tokens_num_mode == _CUMSUM and not drop_pad_mode else 1,
        True,
        quant_mode,
        op=op,
    )
    counts = counts.int()
    of_all = counts if drop_pad_mode == 0 and expert_tokens_num_mode else None
    before = counts if drop_pad_mode and expert_tokens_before_capacity_flag else None
    return expanded, row_idx, of_all, before, scales if quant_mode == _DYNAMIC else None


def init_routing_quant_outputs(
    *,
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_mode: int,
    expert_tokens_before_capacity_flag: bool,
    quant_mode: int,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Fake outputs of ``init_routing_quant``."""
    expanded, row_idx, _counts, scales = init_routing_v2_outputs(
        x=x,
        expert_idx=expert_idx,
        scale=scale,
        active_num=active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=1,
        quant_mode=quant_mode,
        active_expert_range=(),
    )
    counts = x.new_empty(max(expert_num, 0), dtype=torch.int32)
    of_all = counts if drop_pad_mode == 0 and expert_tokens_num_mode else None
    before = counts if drop_pad_mode and expert_tokens_before_capacity_flag else None
    return expanded, row_idx, of_all, before, scales if quant_mode == _DYNAMIC else None

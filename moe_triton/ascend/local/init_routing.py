"""The op behind ``npu_moe_init_routing_v2``: a copy of each token for each of its experts.

Shapes and errors are in ``compat.torch_npu``. ``init_routing_v2_outputs`` is for compilers: what
the op returns, with no values yet; nothing there raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentTypeError
from ...layout import NOWHERE, RoutingPlan, RowFormat
from ...ops import checks
from ...ops.device_steps import steps_on
from ...ops.quantization import E8M0
from ..op_names import INIT_ROUTING_V2 as OP
from ..quant_modes import named_dtype
from .gather import FLOATS

_CUMSUM, _COUNT, _KEY_VALUE = range(3)  # expert_tokens_num_type
_MAX_EXPERTS = {_CUMSUM: 10240, _COUNT: 10240, _KEY_VALUE: 5120}
_NONE, _STATIC, _DYNAMIC = -1, 0, 1  # quant_mode
_MX = {2: "mx_e5m2", 3: "mx_e4m3"}
_MODES = (_NONE, _STATIC, _DYNAMIC, *_MX)


class _Rows(NamedTuple):
    """What the rows of expanded_x are.

    Attributes:
        shape: of expanded_x, without H.
        fmt: of its rows.
    """

    shape: tuple[int, ...]
    fmt: RowFormat

    @property
    def number(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def padded(self) -> bool:
        return len(self.shape) == 2


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Copies in the order of their experts, quantised or not."""
    checks.required(OP, x=x, expert_idx=expert_idx)
    checks.integers(
        OP,
        active_num=active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=expert_tokens_num_type,
        quant_mode=quant_mode,
        row_idx_type=row_idx_type,
    )
    checks.flags(OP, expert_tokens_num_flag=expert_tokens_num_flag)
    checks.integer_list(OP, "active_expert_range", active_expert_range)
    _check_dtypes(x, expert_idx, scale, offset, quant_mode, x_dtype)

    checks.shape(OP, "x", x, (None, None), "(N, H)", x.device)
    checks.value(OP, "x", x.shape[1] > 0, "have columns", f"shape {tuple(x.shape)}")
    checks.shape(OP, "expert_idx", expert_idx, (len(x), None), "(N, K)", x.device)
    fits = expert_idx.shape[1] > 0
    checks.value(OP, "expert_idx", fits, "have columns", f"shape {tuple(expert_idx.shape)}")
    for name, number, most in (
        ("drop_pad_mode", drop_pad_mode, 1),
        ("expert_tokens_num_type", expert_tokens_num_type, 2),
        ("row_idx_type", row_idx_type, 1),
    ):
        checks.value(OP, name, 0 <= number <= most, f"be in [0, {most}]", number)
    most = _MAX_EXPERTS[expert_tokens_num_type]
    checks.value(OP, "expert_num", 1 <= expert_num <= most, f"be in [1, {most}]", expert_num)
    modes = [_NONE, _STATIC, _DYNAMIC] if drop_pad_mode else [*_MODES]
    contract = f"be in {modes}" + (" when drop_pad_mode is 1" if drop_pad_mode else "")
    checks.value(OP, "quant_mode", quant_mode in modes, contract, quant_mode)
    start, end = _check_range(active_expert_range, expert_num, drop_pad_mode)
    if drop_pad_mode:
        most = max(len(x), 1)
        fits = 1 <= expert_capacity <= most
        checks.value(OP, "expert_capacity", fits, f"be in [1, N] = [1, {most}]", expert_capacity)
    else:
        checks.value(OP, "active_num", active_num >= -1, "be at least -1", active_num)
    _check_factors(x, scale, offset, quant_mode, end - start)

    rows = _rows(x, expert_idx, active_num, expert_capacity, expert_num, drop_pad_mode, quant_mode)
    local_ids = expert_idx - start
    routing = steps_on(x.device).routing_plan(local_ids, end - start)
    row, row_idx = _places(routing, local_ids, rows, row_idx_type)
    expanded, scales = _expand(x, row.view(expert_idx.shape), local_ids, scale, offset, rows)
    numbers = None
    if expert_tokens_num_flag:
        numbers = _numbers(routing.counts, start, expert_num, expert_tokens_num_type)
    return expanded, row_idx, numbers, scales


def init_routing_v2_outputs(
    *,
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: Sequence[int],
    **_: object,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What ``init_routing_v2`` returns."""
    if x.dim() != 2:
        x = x.new_empty((0, 0))
    rows = _rows(
        x,
        expert_idx,
        active_num,
        max(expert_capacity, 0),
        max(expert_num, 0),
        drop_pad_mode,
        quant_mode,
    )
    start, end, *_rest = *active_expert_range, 0, max(expert_num, 0)
    if len(active_expert_range) != 2:
        start, end = 0, max(expert_num, 0)
    shape: tuple[int, ...] = (max(end - start, 0),)
    if expert_tokens_num_type == _KEY_VALUE:
        shape = (max(expert_num, 0), 2)
    return (
        x.new_empty((*rows.shape, rows.fmt.hidden), dtype=rows.fmt.dtype),
        x.new_empty(expert_idx.numel(), dtype=torch.int32),
        x.new_empty(shape, dtype=torch.int64) if expert_tokens_num_flag else None,
        _new_scales(x, scale, rows),
    )


def _check_dtypes(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    quant_mode: int,
    x_dtype: int | None,
) -> None:
    quantised = quant_mode != _NONE
    checks.dtype(OP, "x", x, FLOATS if quantised else (*FLOATS, torch.int8))
    checks.dtype(OP, "expert_idx", expert_idx, (torch.int32,))
    checks.dtype(OP, "scale", scale, (torch.float32,))
    checks.dtype(OP, "offset", offset, (torch.float32,))
    kind = named_dtype(OP, "x_dtype", x_dtype)
    if kind not in (None, x.dtype):
        raise ArgumentTypeError(OP, "x_dtype", f"be that of x, {x.dtype}", kind)


def _check_range(given: Sequence[int], num_experts: int, drop_pad: int) -> tuple[int, int]:
    """The experts that have rows, [start, end)."""
    bounds = (0, num_experts) if len(given) == 0 else tuple(given)
    fits = len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= num_experts
    contract = f"be empty, or [start, end] with 0 <= start < end <= expert_num = {num_experts}"
    checks.value(OP, "active_expert_range", fits, contract, list(given))
    contract = f"be [0, {num_experts}] when drop_pad_mode is 1"
    full = not drop_pad or bounds == (0, num_experts)
    checks.value(OP, "active_expert_range", full, contract, list(given))
    return int(bounds[0]), int(bounds[1])


def _check_factors(
    x: Tensor, scale: Tensor | None, offset: Tensor | None, quant_mode: int, num_experts: int
) -> None:
    """The factors that each mode takes."""
    num_tokens, hidden = x.shape
    if quant_mode == _STATIC:
        checks.value(OP, "scale", scale is not None, "be given when quant_mode is 0", None)
        checks.value(OP, "offset", offset is not None, "be given when quant_mode is 0", None)
        checks.shape(OP, "scale", scale, (1,), "(1,)", x.device)
        checks.shape(OP, "offset", offset, (1,), "(1,)", x.device)
        return
    contract = "be None unless quant_mode is 0"
    checks.value(OP, "offset", offset is None, contract, "a tensor")
    if scale is None:
        return
    if quant_mode == _NONE:
        checks.shape(OP, "scale", scale, (num_tokens,), "(N,)", x.device)
    elif quant_mode == _DYNAMIC:
        single = scale.dim() == 2 and len(scale) == 1
        shape = (1 if single else num_experts, hidden)
        checks.shape(OP, "scale", scale, shape, "(end - start, H) or (1, H)", x.device)
    else:
        contract = f"be None when quant_mode is {quant_mode}"
        checks.value(OP, "scale", False, contract, "a tensor")


def _rows(
    x: Tensor,
    expert_idx: Tensor,
    active_num: int,
    capacity: int,
    num_experts: int,
    drop_pad: int,
    quant_mode: int,
) -> _Rows:
    hidden, copies = x.shape[1], expert_idx.numel()
    if quant_mode in _MX:
        fmt = RowFormat.quantized(_MX[quant_mode], x.dtype, hidden)
    elif quant_mode == _DYNAMIC:
        fmt = RowFormat.tight(torch.int8, hidden, "per_row_div")
    elif quant_mode == _STATIC:
        fmt = RowFormat.tight(torch.int8, hidden, "static")
    else:
        fmt = RowFormat.tight(x.dtype, hidden)
    if drop_pad:
        return _Rows((num_experts, capacity), fmt)
    return _Rows((min(active_num, copies) if active_num > 0 else copies,), fmt)


def _places(
    routing: RoutingPlan, local_ids: Tensor, rows: _Rows, row_idx_type: int
) -> tuple[Tensor, Tensor]:
    """[N * K] the row of each copy or ``NOWHERE``, and expanded_row_idx."""
    absent = routing.position_in_expert == NOWHERE
    if rows.padded:
        capacity = rows.shape[1]
        row = local_ids.reshape(-1) * capacity + routing.position_in_expert
        row = row.masked_fill(absent | (routing.position_in_expert >= capacity), NOWHERE)
        return row, row
    order = routing.sorted_slot_ids
    position = torch.empty_like(order)
    position[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    position = position.masked_fill(absent, NOWHERE)
    row = position.masked_fill(position >= rows.number, NOWHERE)
    return row, order if row_idx_type == 1 else position


def _expand(
    x: Tensor,
    index: Tensor,
    local_ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    rows: _Rows,
) -> tuple[Tensor, Tensor | None]:
    """expanded_x and expanded_scale; what no copy comes to is zero if it is padding."""
    fmt, scales = rows.fmt, _new_scales(x, scale, rows)
    expanded = x.new_empty((rows.number, fmt.hidden), dtype=fmt.dtype)
    if rows.padded:
        expanded.zero_()
        if scales is not None:
            scales.zero_()
    if fmt.scheme == "static":
        # The same for all copies of a token, and so done before there are copies.
        assert scale is not None
        assert offset is not None
        x = steps_on(x.device).quantize_affine(x, scale, offset)
        fmt = RowFormat.tight(x.dtype, fmt.hidden)
    smooth_scales = made = None
    if fmt.scheme == "per_row_div" and scale is not None:
        smooth_scales = scale[0] if len(scale) == 1 else scale
    if scales is not None and fmt.scheme != "none":
        made = scales.view(fmt.scale_dtype)
    gather_quant = steps_on(x.device).gather_quant
    gather_quant(x, index, fmt, smooth_scales, local_ids, expanded, made)
    if scales is not None and scale is not None and made is None:
        # Where a copy has no row, its scale goes behind the last one.
        flat = index.reshape(-1).long()
        extended = torch.cat([scales, scales[:1].new_zeros(1)])
        extended[flat.where(flat != NOWHERE, rows.number)] = scale.repeat_interleave(index.shape[1])
        scales = extended[:-1]
    return expanded.view(*rows.shape, fmt.hidden), scales


def _new_scales(x: Tensor, scale: Tensor | None, rows: _Rows) -> Tensor | None:
    """Memory for expanded_scale, where there is one."""
    fmt = rows.fmt
    if fmt.scheme == "static" or (fmt.scheme == "none" and scale is None):
        return None
    scales = x.new_empty(fmt.scale_shape(rows.number), dtype=fmt.scale_dtype)
    return scales.view(E8M0) if fmt.scheme == "mx" else scales


def _numbers(counts: Tensor, start: int, num_experts: int, kind: int) -> Tensor:
    """expert_token_cumsum_or_count."""
    counts = counts.long()
    if kind == _CUMSUM:
        return counts.cumsum(0)
    if kind == _COUNT:
        return counts
    # Experts with rows come first, in their order; each has its place among them.
    found = counts.new_zeros((num_experts + 1, 2))
    expert = torch.arange(start, start + len(counts), device=counts.device)
    place = (counts > 0).cumsum(0) - 1
    place = place.where(counts > 0, num_experts)
    found[place] = torch.stack([expert, counts], dim=1)
    return found[:num_experts]

"""The op behind ``npu_moe_init_routing_v2``: gather tokens in the order of their experts.

Shapes and errors are documented in ``compat.torch_npu``. ``init_routing_v2_outputs`` is the fake
implementation and never raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentTypeError
from ...layout import FLOAT8, NOWHERE, RoutingPlan, RowFormat
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


class _ExpandedRows(NamedTuple):
    """Layout of expanded_x.

    Attributes:
        shape: without H.
        fmt: of a row.
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
    zero_unwritten: bool = False,
    op: str = OP,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gather tokens in the order of their experts, quantised or not.

    ``op`` is for error messages. ``zero_unwritten`` zeros the rows after the last one: garbage
    there times a zero gradient would make the experts' weight gradients NaN.
    """
    checks.required(op, x=x, expert_idx=expert_idx)
    checks.integers(
        op,
        active_num=active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=expert_tokens_num_type,
        quant_mode=quant_mode,
        row_idx_type=row_idx_type,
    )
    checks.flags(op, expert_tokens_num_flag=expert_tokens_num_flag)
    checks.integer_list(op, "active_expert_range", active_expert_range)
    _check_dtypes(op, x, expert_idx, scale, offset, quant_mode, x_dtype)

    checks.shape(op, "x", x, (None, None), "(N, H)", x.device)
    checks.value(op, "x", x.shape[1] > 0, "have columns", f"shape {tuple(x.shape)}")
    checks.shape(op, "expert_idx", expert_idx, (len(x), None), "(N, K)", x.device)
    fits = expert_idx.shape[1] > 0
    checks.value(op, "expert_idx", fits, "have columns", f"shape {tuple(expert_idx.shape)}")
    for name, number, most in (
        ("drop_pad_mode", drop_pad_mode, 1),
        ("expert_tokens_num_type", expert_tokens_num_type, 2),
        ("row_idx_type", row_idx_type, 1),
    ):
        checks.value(op, name, 0 <= number <= most, f"be in [0, {most}]", number)
    most = _MAX_EXPERTS[expert_tokens_num_type]
    checks.value(op, "expert_num", 1 <= expert_num <= most, f"be in [1, {most}]", expert_num)
    modes = [_NONE, _STATIC, _DYNAMIC] if drop_pad_mode else [*_MODES]
    contract = f"be in {modes}" + (" when drop_pad_mode is 1" if drop_pad_mode else "")
    checks.value(op, "quant_mode", quant_mode in modes, contract, quant_mode)
    start, end = _check_range(op, active_expert_range, expert_num, drop_pad_mode)
    if drop_pad_mode:
        most = max(len(x), 1)
        fits = 1 <= expert_capacity <= most
        checks.value(op, "expert_capacity", fits, f"be in [1, N] = [1, {most}]", expert_capacity)
    else:
        checks.value(op, "active_num", active_num >= -1, "be at least -1", active_num)
    if len(x) == 0 and quant_mode == _DYNAMIC:
        scale = None  # torch_npu does not look at the factors of no tokens
    _check_factors(op, x, scale, offset, quant_mode, end - start)

    rows = _rows(x, expert_idx, active_num, expert_capacity, expert_num, drop_pad_mode, quant_mode)
    local_ids = expert_idx - start
    plan = steps_on(x.device).routing_plan(local_ids, end - start)
    row, row_idx = _row_index(plan, local_ids, rows)
    if row_idx_type == 1 and not rows.padded:
        row_idx = _scattered(expert_idx, start)
    expanded, scales = _new_outputs(x, scale, rows)
    if rows.padded or zero_unwritten:
        scales.view(torch.uint8).zero_()
    if rows.padded:
        expanded.view(torch.uint8).zero_()
    elif zero_unwritten:
        index = torch.arange(rows.number, device=x.device)
        index = index.where(index < plan.counts.sum(), NOWHERE)
        as_moved = expanded.view(torch.int8) if x.dtype in FLOAT8 else expanded
        steps_on(x.device).zero_padding(as_moved, index)
    _expand(x, row.view(expert_idx.shape), local_ids, scale, offset, rows, expanded, scales)
    token_counts = _token_counts(plan.counts, start, expert_num, expert_tokens_num_type)
    return expanded.view(*rows.shape, rows.fmt.hidden), row_idx, token_counts, scales


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
    quant_mode: int,
    active_expert_range: Sequence[int],
    **_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fake outputs of ``init_routing_v2``."""
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
    bounds = active_expert_range if len(active_expert_range) == 2 else (0, expert_num)
    shape: tuple[int, ...] = (max(bounds[1] - bounds[0], 0),)
    if expert_tokens_num_type == _KEY_VALUE:
        shape = (max(expert_num, 0), 2)
    expanded, scales = _new_outputs(x, scale, rows)
    return (
        expanded.view(*rows.shape, rows.fmt.hidden),
        x.new_empty(expert_idx.numel(), dtype=torch.int32),
        x.new_empty(shape, dtype=torch.int64),
        scales,
    )


def _check_dtypes(
    op: str,
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    quant_mode: int,
    x_dtype: int | None,
) -> None:
    quantised = quant_mode != _NONE
    checks.dtype(op, "x", x, FLOATS if quantised else (*FLOATS, torch.int8, *FLOAT8))
    checks.dtype(op, "expert_idx", expert_idx, (torch.int32,))
    mx = (E8M0, torch.uint8) if x.dtype in FLOAT8 else ()
    checks.dtype(op, "scale", scale, (torch.float32, *mx))
    checks.dtype(op, "offset", offset, (torch.float32,))
    kind = named_dtype(op, "x_dtype", x_dtype)
    if kind not in (None, x.dtype):
        raise ArgumentTypeError(op, "x_dtype", f"be that of x, {x.dtype}", kind)


def _check_range(
    op: str, active: Sequence[int], num_experts: int, drop_pad: int
) -> tuple[int, int]:
    """The range [start, end) of experts that get rows."""
    bounds = tuple(active) or (0, num_experts)
    fits = len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= num_experts
    contract = f"be empty, or [start, end] with 0 <= start < end <= expert_num = {num_experts}"
    checks.value(op, "active_expert_range", fits, contract, list(active))
    contract = f"be [0, {num_experts}] when drop_pad_mode is 1"
    full = not drop_pad or bounds == (0, num_experts)
    checks.value(op, "active_expert_range", full, contract, list(active))
    return int(bounds[0]), int(bounds[1])


def _check_factors(
    op: str,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    quant_mode: int,
    num_experts: int,
) -> None:
    """Scale and offset have the shapes of their mode."""
    num_tokens, hidden = x.shape
    if quant_mode == _STATIC:
        checks.value(op, "scale", scale is not None, "be given when quant_mode is 0", None)
        checks.value(op, "offset", offset is not None, "be given when quant_mode is 0", None)
        checks.shape(op, "scale", scale, (1,), "(1,)", x.device)
        checks.shape(op, "offset", offset, (1,), "(1,)", x.device)
        return
    contract = "be None unless quant_mode is 0"
    checks.value(op, "offset", offset is None, contract, "a tensor")
    if scale is None:
        return
    if quant_mode == _NONE:
        shape: tuple[int | None, ...] = (num_tokens,)
        if scale.dtype != torch.float32:
            shape += (None,) * (scale.dim() - 1)
        checks.shape(op, "scale", scale, shape, "(N,)", x.device)
    elif quant_mode == _DYNAMIC:
        single = scale.dim() == 2 and len(scale) == 1
        shape = (1 if single else num_experts, hidden)
        checks.shape(op, "scale", scale, shape, "(end - start, H) or (1, H)", x.device)
    else:
        contract = f"be None when quant_mode is {quant_mode}"
        checks.value(op, "scale", False, contract, "a tensor")


def _rows(
    x: Tensor,
    expert_idx: Tensor,
    active_num: int,
    capacity: int,
    num_experts: int,
    drop_pad: int,
    quant_mode: int,
) -> _ExpandedRows:
    """The layout of expanded_x for checked arguments."""
    hidden, num_slots = x.shape[1], expert_idx.numel()
    if quant_mode in _MX:
        fmt = RowFormat.quantized(_MX[quant_mode], x.dtype, hidden)
    elif quant_mode == _DYNAMIC:
        fmt = RowFormat.tight(torch.int8, hidden, "per_row_div")
    elif quant_mode == _STATIC:
        fmt = RowFormat.tight(torch.int8, hidden, "static")
    else:
        fmt = RowFormat.tight(x.dtype, hidden)
    if drop_pad:
        return _ExpandedRows((num_experts, capacity), fmt)
    return _ExpandedRows((min(active_num, num_slots) if active_num > 0 else num_slots,), fmt)


def _row_index(plan: RoutingPlan, local_ids: Tensor, rows: _ExpandedRows) -> tuple[Tensor, Tensor]:
    """[N * K] the row of each slot or ``NOWHERE``, and the same with rows that are not kept."""
    absent = plan.position_in_expert == NOWHERE
    if rows.padded:
        capacity = rows.shape[1]
        row = local_ids.reshape(-1) * capacity + plan.position_in_expert
        row = row.masked_fill(absent | (plan.position_in_expert >= capacity), NOWHERE)
        return row, row
    order = plan.sorted_slot_ids
    position = torch.empty_like(order)
    position[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    position = position.masked_fill(absent, NOWHERE)
    row = position.masked_fill(position >= rows.number, NOWHERE)
    return row, position


def _scattered(expert_idx: Tensor, start: int) -> Tensor:
    """[N * K] slots in the order of their experts, those below ``start`` at the end.

    torch_npu's own tests compare also the slots without rows, which its documents leave open.
    """
    ids = expert_idx.reshape(-1)
    last = torch.iinfo(ids.dtype).max
    return ids.masked_fill(ids < start, last).argsort(stable=True).int()


def _expand(
    x: Tensor,
    index: Tensor,
    local_ids: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    rows: _ExpandedRows,
    expanded: Tensor,
    scales: Tensor,
) -> None:
    """Write the rows that ``index`` [N, K] names, and their scales."""
    fmt = rows.fmt
    if x.dtype in FLOAT8:
        # They move as bytes, since not every device step knows them.
        x, expanded = x.view(torch.int8), expanded.view(torch.int8)
        fmt = RowFormat.tight(torch.int8, fmt.hidden)
    if fmt.scheme == "static":
        # All rows of a token have the same codes, so quantise before the gather.
        assert scale is not None
        assert offset is not None
        x = steps_on(x.device).quantize_affine(x, scale, offset)
        fmt = RowFormat.tight(x.dtype, fmt.hidden)
    smooth_scales = row_scales = None
    if fmt.scheme == "per_row_div" and scale is not None:
        smooth_scales = scale[0] if len(scale) == 1 else scale
    if fmt.scheme != "none":
        row_scales = scales.view(fmt.scale_dtype)
    gather_quant = steps_on(x.device).gather_quant
    gather_quant(x, index, fmt, smooth_scales, local_ids, expanded, row_scales)
    if rows.fmt.scheme == "none" and scale is not None:
        # A slot without a row writes its scale behind the last one.
        flat = index.reshape(-1).long()
        if scale.dtype != torch.float32:
            scale, scales = scale.view(torch.uint8), scales.view(torch.uint8)
        extended = torch.cat([scales, scales.new_zeros((1, *scales.shape[1:]))])
        extended[flat.where(flat != NOWHERE, rows.number)] = scale.repeat_interleave(
            index.shape[1], dim=0
        )
        scales.copy_(extended[:-1])


def _new_outputs(x: Tensor, scale: Tensor | None, rows: _ExpandedRows) -> tuple[Tensor, Tensor]:
    """expanded_x as 2-D rows, uninitialised, and expanded_scale, zeros if the mode has none."""
    fmt = rows.fmt
    expanded = x.new_empty((rows.number, fmt.hidden), dtype=fmt.dtype)
    if fmt.scheme == "static" or (fmt.scheme == "none" and scale is None):
        return expanded, x.new_zeros(rows.number, dtype=torch.float32)
    if fmt.scheme == "none" and scale is not None and scale.dtype != torch.float32:
        return expanded, scale.new_empty((rows.number, *scale.shape[1:]))
    scales = x.new_empty(fmt.scale_shape(rows.number), dtype=fmt.scale_dtype)
    return expanded, scales.view(E8M0) if fmt.scheme == "mx" else scales


def _token_counts(counts: Tensor, start: int, num_experts: int, kind: int) -> Tensor:
    """expert_token_cumsum_or_count."""
    counts = counts.long()
    if kind == _CUMSUM:
        return counts.cumsum(0)
    if kind == _COUNT:
        return counts
    # Experts with rows move to the front, the others behind the last pair.
    pairs = counts.new_zeros((num_experts + 1, 2))
    expert = torch.arange(start, start + len(counts), device=counts.device)
    position = (counts > 0).cumsum(0) - 1
    position = position.where(counts > 0, num_experts)
    pairs[position] = torch.stack([expert, counts], dim=1)
    return pairs[:num_experts]

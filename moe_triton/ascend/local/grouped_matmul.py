"""The op behind ``npu_grouped_matmul``: one matrix product for each group of rows.

Shapes and errors are documented in ``compat.torch_npu``. ``grouped_matmul_outputs`` is the fake
implementation and never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ArgumentTypeError, MissingArgumentError
from ...layout import FLOAT8
from ...ops import checks
from ...ops.quantization import E8M0
from ..op_names import GROUPED_MATMUL as OP
from ..quant_modes import fake_dtype, named_dtype, stored_as
from .groups import KEY_VALUE, group_ends

_FLOATS = (*checks.FLOATS, torch.float32)
_UNGROUPED, _BY_ROW, _BY_DEPTH = -1, 0, 2  # group_type
_SEVERAL = (0, 1)  # split_item: an output of each group
_MX_BLOCK = 32
_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    1: functional.relu,
    2: lambda y: functional.gelu(y, approximate="tanh"),
    4: lambda y: y * torch.sigmoid(1.702 * y),
    5: functional.silu,
}
_ACT_TYPES = (0, *_ACTIVATIONS)


class Scales(NamedTuple):
    """How products of quantised rows are scaled and shifted, and what follows.

    Attributes:
        of_weights: for each group [N] or [1] fp32, or [C, N, 2] e8m0; or None.
        of_rows: [M] fp32, or [M, C, 2] e8m0; or None.
        bias: [N] for each group, int32 before scaling or floating after it; or None.
        activation: applied last, in fp32; or None.
    """

    of_weights: Sequence[Tensor] | None = None
    of_rows: Tensor | None = None
    bias: Sequence[Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | None = None


def products(
    rows: Tensor,
    weights: Tensor | Sequence[Tensor],
    ends: Tensor,
    scales: Scales,
    dtype: torch.dtype,
    order: Sequence[int] | None = None,
) -> Tensor:
    """[M, N]: each group of rows times its matrix; zeros after the last group.

    Args:
        rows: [M, K] floating point, int8 or float8.
        weights: [E, K, N], or E of [K, N], of the dtype of the rows.
        ends: [n] the row after the last one of each group.
        scales: what is applied to the products.
        dtype: of the result.
        order: [n] the matrix of each group; None for all in order.
    """
    plain = scales == Scales() and rows.dtype == dtype and order is None
    if plain and isinstance(weights, Tensor) and _takes_grouped_mm(rows, weights):
        out = torch._grouped_mm(rows, weights, offs=ends.int())
        row = torch.arange(len(rows), device=rows.device)[:, None]
        return out.masked_fill_(row >= ends[-1], 0)
    out = rows.new_zeros((len(rows), weights[0].shape[1]), dtype=dtype)
    for group, part in _groups(ends, order):
        out[part] = _product(rows, weights, group, part, scales).to(dtype)
    return out


def grouped_matmul(
    *,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """Multiply each group of rows with its matrix."""
    del tuning_config
    split_item, group_list_type, act_type = split_item or 0, group_list_type or 0, act_type or 0
    for name, tensors in (("x", x), ("weight", weight)):
        if not isinstance(tensors, (list, tuple)):
            raise ArgumentTypeError(OP, name, "be a list of tensors", type(tensors).__name__)
        if not tensors:
            raise MissingArgumentError(OP, name, "have tensors", "an empty list")
    _refuse(
        offset=offset,
        activation_input=activation_input,
        activation_quant_scale=activation_quant_scale,
        activation_quant_offset=activation_quant_offset,
    )
    contract = "be None: weights that the operator itself dequantises are not supported"
    for name, factors in (
        ("antiquant_scale", antiquant_scale),
        ("antiquant_offset", antiquant_offset),
    ):
        checks.value(OP, name, not factors, contract, "a list")
    checks.integers(OP, split_item=split_item, group_list_type=group_list_type, act_type=act_type)
    x = _stored("x", x, x_dtype)
    weight = _stored("weight", weight, weight_dtype)
    weight_scales = _stored("scale", scale or (), scale_dtype)
    row_scales = _stored("per_token_scale", per_token_scale or (), per_token_scale_dtype)
    biases = tuple(bias or ())
    dtype = _output_dtype(x[0].dtype, output_dtype)

    contract = "be -1 (no groups), 0 (rows) or 2 (the inner dimension)"
    known = group_type in (_UNGROUPED, _BY_ROW, _BY_DEPTH)
    checks.value(OP, "group_type", known, contract, group_type)
    checks.value(OP, "split_item", 0 <= split_item <= 3, "be in [0, 3]", split_item)
    checks.value(OP, "group_list_type", 0 <= group_list_type <= 2, "be in [0, 2]", group_list_type)
    checks.value(OP, "act_type", act_type in _ACT_TYPES, f"be one of {[*_ACT_TYPES]}", act_type)
    quantised = x[0].dtype not in _FLOATS
    contract = "be 0 unless x is quantised"
    checks.value(OP, "act_type", quantised or act_type == 0, contract, act_type)
    _check_tensors(x, weight)
    if group_type == _BY_DEPTH:
        return _by_depth(x, weight, group_list, group_list_type, split_item, dtype)

    stacked = len(weight) == 1 and weight[0].dim() == 3
    matrices: Tensor | Sequence[Tensor] = weight[0] if stacked else weight
    _check_sizes(x, matrices)
    _check_scales(x, weight, matrices, weight_scales, row_scales, biases)
    scales = Scales(
        of_weights=_of_groups(weight_scales, stacked),
        of_rows=_row_scales(row_scales),
        bias=_of_groups(biases, stacked),
        activation=_ACTIVATIONS.get(act_type),
    )
    if group_type == _UNGROUPED:
        fits = split_item in _SEVERAL
        checks.value(OP, "split_item", fits, "be 0 or 1 when group_type is -1", split_item)
        contract = "be None when group_type is -1"
        checks.value(OP, "group_list", group_list is None, contract, "a list")
    if len(x) > 1 or group_type == _UNGROUPED:
        return _each(x, matrices, group_list, group_list_type, split_item, scales, dtype)

    (rows,) = x
    checks.shape(OP, "x", rows, (None, None), "(M, K)", rows.device)
    checks.value(OP, "group_list", group_list is not None, "be given for groups of rows", None)
    assert group_list is not None
    ends = _ends(group_list, group_list_type, len(rows), len(matrices))
    order = None
    if group_list_type == KEY_VALUE:
        checks.indices(OP, "group_list", group_list[:, 0], len(matrices))
        order = group_list[:, 0].tolist()
    if split_item not in _SEVERAL:
        return [products(rows, matrices, ends, scales, dtype, order)]
    return [
        _product(rows, matrices, group, part, scales).to(dtype)
        for group, part in _groups(ends, order)
    ]


def grouped_matmul_outputs(
    *,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    group_list: Tensor | None,
    split_item: int | None,
    group_type: int | None,
    output_dtype: int | None,
    **_: object,
) -> list[Tensor]:
    """Fake outputs of ``grouped_matmul``."""
    if not x or not weight:
        return []
    first = x[0]
    dtype = fake_dtype(output_dtype, first.dtype)
    columns = [one.shape[-1] for one in weight]
    if len(weight) == 1 and weight[0].dim() == 3:
        columns = columns * weight[0].shape[0]
    groups = len(x) if group_list is None else group_list.shape[0]
    if (split_item or 0) not in _SEVERAL:
        shape: tuple[int, ...] = (sum(one.shape[0] for one in x), columns[0])
        if group_type == _BY_DEPTH:
            shape = (groups, first.shape[0], columns[0])
        return [first.new_empty(shape, dtype=dtype)]
    if group_type == _BY_DEPTH:
        shape = (first.shape[0], columns[0])
        return [first.new_empty(shape, dtype=dtype) for _ in range(groups)]
    if group_list is None or len(x) > 1:
        return [
            one.new_empty((*one.shape[:-1], size), dtype=dtype)
            for one, size in zip(x, columns, strict=False)
        ]
    # The sizes are values of group_list.
    context = torch.library.get_ctx()
    return [
        first.new_empty((context.new_dynamic_size(), size), dtype=dtype)
        for size, _ in zip(columns, range(groups), strict=False)
    ]


def _groups(ends: Tensor, order: Sequence[int] | None) -> Iterator[tuple[int, slice]]:
    """The matrix and the rows of each group."""
    start = 0
    for number, end in enumerate(ends.tolist()):
        yield number if order is None else order[number], slice(start, end)
        start = end


def _product(
    rows: Tensor, weights: Tensor | Sequence[Tensor], group: int, part: slice, scales: Scales
) -> Tensor:
    """The scaled product of one group."""
    x, matrix = rows[part], weights[group]
    bias = None if scales.bias is None else scales.bias[group]
    if x.dtype in _FLOATS:
        if bias is None:
            return x @ matrix
        return x.float() @ matrix.float() + bias.float()
    of_weights = None if scales.of_weights is None else scales.of_weights[group]
    of_rows = None if scales.of_rows is None else scales.of_rows[part]
    if x.dtype == torch.int8:
        y = x.double() @ matrix.double()  # exact, and faster than integers
        if bias is not None and bias.dtype == torch.int32:
            y, bias = y + bias, None
        y = y.float()
    else:
        wide, wide_matrix = x.float(), matrix.float()
        if of_rows is not None and of_rows.dtype == E8M0:
            wide = wide * _spread(of_rows, x.shape[1])
            of_rows = None
        if of_weights is not None and of_weights.dtype == E8M0:
            wide_matrix = wide_matrix * _spread(of_weights.transpose(0, 1), len(matrix)).T
            of_weights = None
        y = wide @ wide_matrix
    if of_weights is not None:
        y = y * of_weights.float()
    if of_rows is not None:
        y = y * of_rows[:, None]
    if bias is not None:
        y = y + bias.float()
    return y if scales.activation is None else scales.activation(y)


def _spread(scales: Tensor, size: int) -> Tensor:
    """[R, size] fp32: the scale of each element, of [R, C, 2] e8m0 scales of 32 elements."""
    return scales.float().flatten(1).repeat_interleave(_MX_BLOCK, dim=1)[:, :size]


def _each(
    x: Sequence[Tensor],
    matrices: Tensor | Sequence[Tensor],
    group_list: Tensor | None,
    group_list_type: int,
    split_item: int,
    scales: Scales,
    dtype: torch.dtype,
) -> list[Tensor]:
    """One matrix for each tensor of ``x``."""
    contract = f"have one matrix for each tensor of x, {len(x)}"
    checks.value(OP, "weight", len(matrices) == len(x), contract, len(matrices))
    sizes = [one.shape[:-1].numel() for one in x]
    ends = torch.tensor(sizes, device=x[0].device).cumsum(0)
    if group_list is not None:
        given = _ends(group_list, group_list_type, sum(sizes), len(x))
        same = given.device.type != "cpu" or torch.equal(given, ends)
        contract = f"divide the rows as x does, {sizes}"
        checks.value(OP, "group_list", same, contract, group_list.tolist())
    parts = []
    for number, (_, part) in enumerate(_groups(ends, None)):
        of_rows = None if scales.of_rows is None else scales.of_rows[part]
        rows = x[number].flatten(0, -2)
        y = _product(rows, matrices, number, slice(None), scales._replace(of_rows=of_rows))
        parts.append(y.to(dtype))
    if split_item not in _SEVERAL:
        width = {part.shape[1] for part in parts}
        contract = "have one N in all matrices when split_item is 2 or 3"
        checks.value(OP, "weight", len(width) == 1, contract, sorted(width))
        return [torch.cat(parts)]
    return [part.view(*one.shape[:-1], -1) for part, one in zip(parts, x, strict=True)]


def _by_depth(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    group_list: Tensor | None,
    group_list_type: int,
    split_item: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """[M, K] times [K, N] for each group of K: the gradients of the matrices of groups of rows."""
    left, right = x[0], weight[0]
    contract = "be one matrix when group_type is 2"
    for name, tensors in (("x", x), ("weight", weight)):
        single = len(tensors) == 1 and tensors[0].dim() == 2
        checks.value(OP, name, single, contract, [tuple(one.shape) for one in tensors])
    floating = left.dtype in _FLOATS
    contract = "be float16, bfloat16 or float32 when group_type is 2"
    if not floating:
        raise ArgumentTypeError(OP, "x", contract, left.dtype)
    depth = left.shape[1]
    checks.shape(OP, "weight", right, (depth, None), "(K, N)", left.device)
    checks.value(OP, "group_list", group_list is not None, "be given when group_type is 2", None)
    assert group_list is not None
    contract = "be 0 or 1 when group_type is 2"
    checks.value(OP, "group_list_type", group_list_type != KEY_VALUE, contract, group_list_type)
    ends = _ends(group_list, group_list_type, depth, len(group_list))
    if left.dtype == dtype and _takes_grouped_mm(left, right):
        out = torch._grouped_mm(left, right, offs=ends.int())
    else:
        parts = [left[:, part] @ right[part] for _, part in _groups(ends, None)]
        out = torch.stack(parts).to(dtype)
    return [out] if split_item not in _SEVERAL else [one.clone() for one in out]


def _takes_grouped_mm(*matrices: Tensor) -> bool:
    """Whether the strides and addresses are those that ``torch._grouped_mm`` takes."""

    def aligned(one: Tensor) -> bool:
        *leading, row, column = one.stride()
        steps = [*leading, max(row, column)]
        dense = min(row, column) == 1 and one.dtype in _FLOATS and one.numel() > 0
        return (
            dense
            and one.data_ptr() % 16 == 0
            and all(step * one.itemsize % 16 == 0 for step in steps)
        )

    return all(aligned(one) for one in matrices)


def _refuse(**arguments: Sequence[Tensor] | None) -> None:
    """Arguments that torch_npu itself takes as None only."""
    for name, tensors in arguments.items():
        checks.value(OP, name, not tensors, "be None, as it is reserved", "a list")


def _stored(name: str, tensors: Sequence[Tensor], number: int | None) -> tuple[Tensor, ...]:
    """``tensors`` as the dtype that ``{name}_dtype`` says."""
    kind = named_dtype(OP, f"{name}_dtype", number)
    return tuple(stored_as(OP, name, one, kind) for one in tensors)


def _output_dtype(kind: torch.dtype, number: int | None) -> torch.dtype:
    allowed = [*_FLOATS, torch.int32] if kind == torch.int8 else _FLOATS
    dtype = named_dtype(OP, "output_dtype", number, allowed)
    if dtype is None and kind not in _FLOATS:
        contract = f"be one of {[*allowed]} when x is {kind}"
        raise ArgumentTypeError(OP, "output_dtype", contract, None)
    return kind if dtype is None else dtype


def _check_tensors(x: Sequence[Tensor], weight: Sequence[Tensor]) -> None:
    """All tensors have one dtype and device, and matrices two or three dimensions."""
    kinds = (*_FLOATS, torch.int8, *FLOAT8)
    for one in x:
        checks.dtype(OP, "x", one, kinds if one is x[0] else (x[0].dtype,))
        checks.shape(OP, "x", one, (None,) * max(one.dim(), 2), "(.., K)", x[0].device)
    for one in weight:
        if one.dtype == torch.int32:
            contract = f"be {x[0].dtype}"
            raise ArgumentTypeError(OP, "weight", contract, "torch.int32, which is packed int4")
        allowed = FLOAT8 if x[0].dtype in FLOAT8 else (x[0].dtype,)
        checks.dtype(OP, "weight", one, allowed)
        dims = 3 if len(weight) == 1 and one.dim() == 3 else 2
        meaning = "(E, K, N) or (K, N)"
        checks.shape(OP, "weight", one, (None,) * dims, meaning, x[0].device)


def _check_sizes(x: Sequence[Tensor], matrices: Tensor | Sequence[Tensor]) -> None:
    for number, one in enumerate(x):
        of = matrices if len(x) == 1 else matrices[number : number + 1]
        for matrix in of:
            depth = matrix.shape[0]
            contract = f"have as many columns as weight has rows, {depth}"
            got = f"shape {tuple(one.shape)}"
            checks.value(OP, "x", one.shape[-1] == depth, contract, got)


def _check_scales(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    matrices: Tensor | Sequence[Tensor],
    scale: Sequence[Tensor],
    per_token_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> None:
    """Scales and biases have the dtypes and shapes that go with the dtype of x."""
    kind, device = x[0].dtype, x[0].device
    quantised = kind not in _FLOATS
    for name, tensors, number in (
        ("scale", scale, len(weight)),
        ("per_token_scale", per_token_scale, len(x)),
        ("bias", bias, len(weight)),
    ):
        if tensors:
            if name != "bias":
                contract = "be None unless x is quantised"
                checks.value(OP, name, quantised, contract, "a list")
            contract = f"have {number} tensors, as {'x' if name == 'per_token_scale' else 'weight'}"
            checks.value(OP, name, len(tensors) == number, contract, len(tensors))
    mx = (E8M0,) if kind in FLOAT8 else ()
    for one in scale:
        if one.dtype in (torch.int64, torch.uint64):
            contract = "be float32 or bfloat16"
            raise ArgumentTypeError(OP, "scale", contract, f"{one.dtype}, a packed format")
        checks.dtype(OP, "scale", one, (torch.float32, torch.bfloat16, *mx))
    for one in per_token_scale:
        checks.dtype(OP, "per_token_scale", one, (torch.float32, *mx))
    for one in bias:
        checks.dtype(OP, "bias", one, (*_FLOATS, torch.int32) if quantised else _FLOATS)

    for number, one in enumerate(per_token_scale):
        rows, depth = x[number].shape[:-1].numel(), x[number].shape[-1]
        if one.dtype == E8M0:
            shape: tuple[int, ...] = (rows, -(-depth // (2 * _MX_BLOCK)), 2)
            checks.shape(OP, "per_token_scale", one, shape, "(M, C, 2)", device)
        else:
            shape = (rows, 1)[: max(one.dim(), 1)]
            checks.shape(OP, "per_token_scale", one, shape, "(M,)", device)
    stacked = isinstance(matrices, Tensor)
    leading = (len(matrices),) if stacked else ()
    for name, tensors in (("scale", scale), ("bias", bias)):
        for number, one in enumerate(tensors):
            depth, columns = matrices[number].shape
            if one.dtype == E8M0:
                shape = (*leading, -(-depth // (2 * _MX_BLOCK)), columns, 2)
                checks.shape(OP, name, one, shape, "([E,] C, N, 2)", device)
            else:
                single = name == "scale" and one.shape[len(leading) :].numel() == 1
                tail = tuple(one.shape[len(leading) :]) if single else (columns,)
                checks.shape(OP, name, one, (*leading, *tail), "([E,] N)", device)


def _of_groups(tensors: Sequence[Tensor], stacked: bool) -> Sequence[Tensor] | None:
    """A tensor for each group, of one with a row for each group or a list; or None."""
    if not tensors:
        return None
    return tensors[0].unbind(0) if stacked else tensors


def _row_scales(scales: Sequence[Tensor]) -> Tensor | None:
    """[M] fp32, or [M, C, 2] e8m0, of all tensors of x; or None."""
    if not scales:
        return None
    if scales[0].dtype == E8M0:
        return scales[0] if len(scales) == 1 else torch.cat([*scales])
    return torch.cat([one.reshape(-1) for one in scales])


def _ends(groups: Tensor, kind: int, num_rows: int, num_groups: int) -> Tensor:
    """The end of each group of a checked list."""
    checks.dtype(OP, "group_list", groups, (torch.int64, torch.int32))
    pairs = kind == KEY_VALUE
    # Pairs name the groups with rows, which may be few.
    shape = (None, 2) if pairs else (num_groups,)
    meaning = "(n, 2)" if pairs else "(E,)"
    checks.shape(OP, "group_list", groups, shape, meaning, groups.device)
    return group_ends(OP, "group_list", groups, kind, num_rows)

"""What torch_npu's modes and dtype numbers ask of a dispatch: how its rows travel and come out."""

from __future__ import annotations

import dataclasses
import numbers
from typing import NamedTuple

import torch

from ..comm import Received
from ..errors import ArgumentTypeError
from ..layout import FLOAT8, RowFormat
from ..ops import checks
from ..ops.quantization import E8M0, as_e8m0

# The number of a dtype in torch itself, and in the Ascend interface, to which torch_npu adds 256.
_NUMBERS = {
    1: torch.int8,
    258: torch.int8,
    5: torch.float16,
    257: torch.float16,
    6: torch.float32,
    256: torch.float32,
    15: torch.bfloat16,
    283: torch.bfloat16,
    23: torch.float8_e5m2,
    291: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    292: torch.float8_e4m3fn,
    44: E8M0,
    293: E8M0,
}
_NOT_THERE: dict[object, str] = {
    285: "packed int4",
    290: "HiFloat8",
    296: "fp4 (e2m1)",
    297: "fp4 (e1m2)",
}
if hasattr(torch, "float4_e2m1fn_x2"):  # of torch 2.8
    _NOT_THERE |= {45: "fp4 (e2m1)", torch.float4_e2m1fn_x2: "fp4 (e2m1)"}

# quant_mode -> dtype of the rows -> name of the quantisation; the first one is the default.
_QUANTS = {
    1: {torch.int8: "int8_static"},
    2: {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"},
    3: {torch.float8_e4m3fn: "group_e4m3", torch.float8_e5m2: "group_e5m2"},
    4: {torch.float8_e4m3fn: "mx_e4m3", torch.float8_e5m2: "mx_e5m2"},
}
QUANT_MODES = (0, *_QUANTS)


class Rows(NamedTuple):
    """What the rows of a dispatch are.

    Attributes:
        quant: the quantisation, of ``layout.QUANTS``, or None.
        dtype: of expand_x.
        scales: a [1, ..] example of dynamic_scales, without values, or None.
        given: the caller has quantised the tokens, and their scales travel with them.
    """

    quant: str | None
    dtype: torch.dtype
    scales: torch.Tensor | None
    given: bool = False


def dtype_number(kind: object) -> object:
    """torch_npu's number of a torch dtype; what is none, or has none, as it is."""
    known = {dtype: number for number, dtype in _NUMBERS.items()}
    return known.get(kind, kind) if isinstance(kind, torch.dtype) else kind


def named_dtype(op: str, argument: str, value: object) -> torch.dtype | None:
    """The dtype that an argument names by itself, or by its number.

    Raises:
        ArgumentTypeError: it names none, or a format that this library does not have.
    """
    if value is None:
        return None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    if isinstance(value, (int, torch.dtype)):
        if value in _NOT_THERE:
            contract = "name a format that there is here"
            raise ArgumentTypeError(op, argument, contract, f"{value}, {_NOT_THERE[value]}")
        kind = value if isinstance(value, torch.dtype) else _NUMBERS.get(value)
        if kind in _NUMBERS.values():
            return kind
    contract = "be a torch dtype of 8 or 16 bits, or torch_npu's number of one"
    raise ArgumentTypeError(op, argument, contract, repr(value))


def stored_as(op: str, name: str, tensor: torch.Tensor, kind: torch.dtype | None) -> torch.Tensor:
    """``tensor`` with the dtype that another argument says it has; bytes may stand for any."""
    if kind is None or not isinstance(tensor, torch.Tensor) or tensor.dtype == kind:
        return tensor
    if tensor.dtype in (torch.uint8, torch.int8) and kind.itemsize == 1:
        return tensor.view(kind)
    contract = f"be {kind}, as {name}_dtype says, or bytes that stand for it"
    raise ArgumentTypeError(op, name, contract, tensor.dtype)


def check_dtypes(op: str, x: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Tokens and scales have dtypes that there are."""
    if isinstance(x, torch.Tensor) and x.dtype == torch.int32:
        contract = "be float16, bfloat16 or a float8"
        raise ArgumentTypeError(op, "x", contract, "torch.int32, which would be packed int4")
    checks.dtype(op, "x", x, (*checks.FLOATS, *FLOAT8))
    given = x.dtype in FLOAT8
    checks.dtype(op, "scales", scales, (torch.float32, E8M0) if given else (torch.float32,))


def check_mode(op: str, quant_mode: int) -> None:
    """There is such a ``quant_mode``."""
    modes = [*QUANT_MODES]
    checks.value(op, "quant_mode", quant_mode in modes, f"be in {modes}", quant_mode)


def rows_of(
    op: str,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    quant_mode: int,
    y_dtype: torch.dtype | None,
) -> Rows:
    """How the rows of a dispatch with these arguments travel and come out.

    Raises:
        ArgumentTypeError: tokens are quantised already, or the mode does not make the dtype.
        ArgumentValueError: there is no such mode.
    """
    check_mode(op, quant_mode)
    if quant_mode == 0:
        if y_dtype not in (None, x.dtype):
            contract = f"be that of x, {x.dtype}, when quant_mode is 0"
            raise ArgumentTypeError(op, "y_dtype", contract, y_dtype)
        given = x.dtype in FLOAT8
        like = None if scales is None or not given else scales.new_empty((1, *scales.shape[1:]))
        return Rows(None, x.dtype, like, given)
    if x.dtype in FLOAT8:
        contract = f"be float16 or bfloat16 when quant_mode is {quant_mode}"
        raise ArgumentTypeError(op, "x", contract, x.dtype)
    names = _QUANTS[quant_mode]
    dtype = next(iter(names)) if y_dtype is None else y_dtype
    if dtype not in names:
        contract = f"be one of {[*names]} when quant_mode is {quant_mode}"
        raise ArgumentTypeError(op, "y_dtype", contract, dtype)
    quant = names[dtype]
    return Rows(quant, dtype, new_scales(quant, x, 1))


def new_scales(quant: str, x: torch.Tensor, num_rows: int) -> torch.Tensor | None:
    """[num_rows, ..] memory for the scales of [.., H] ``x``, where the quantisation makes such."""
    fmt = RowFormat.quantized(quant, x.dtype, x.shape[-1])
    if fmt.scale_offset is None:
        return None
    scales = x.new_empty(fmt.scale_shape(num_rows), dtype=fmt.scale_dtype)
    return as_e8m0(quant, scales)


def check_given(op: str, x: torch.Tensor, scales: torch.Tensor | None) -> None:
    """The scales of tokens that the caller has quantised: a row for each token."""
    contract = "be given where x is quantised already"
    checks.value(op, "scales", scales is not None, contract, None)
    assert scales is not None
    expected = (len(x), None)[: max(scales.dim(), 1)]
    checks.shape(op, "scales", scales, expected, "(BS,) or (BS, d)", x.device)
    most = x.shape[1]
    fits = 1 <= scales.shape[1:].numel() <= most
    contract = f"have 1 to H = {most} columns"
    checks.value(op, "scales", fits, contract, f"shape {tuple(scales.shape)}")


def with_scales(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[T, bytes] uint8: tokens that are quantised already, each with its scales behind it."""
    # Not contiguous(): of one row, torch keeps any strides.
    columns = scales.new_empty((len(scales), scales.shape[1:].numel()))
    columns.view(scales.shape).copy_(scales)
    return torch.cat([x.view(torch.uint8), columns.view(torch.uint8)], dim=1)


def without_scales(received: Received, rows: Rows, hidden: int) -> Received:
    """What arrived of ``with_scales``, as tokens of H elements and their scales."""
    assert rows.scales is not None
    num_rows, n = len(received.x), len(received.recv_permutation.source)
    x = received.x.new_empty((num_rows, hidden))
    scales = rows.scales.new_empty((num_rows, *rows.scales.shape[1:]))
    columns = scales.view(num_rows, rows.scales.shape[1:].numel())
    x[:n] = received.x[:n, :hidden]
    columns.view(torch.uint8)[:n] = received.x[:n, hidden:]
    return dataclasses.replace(received, x=x.view(rows.dtype), scales=scales)

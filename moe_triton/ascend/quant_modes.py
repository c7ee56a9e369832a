"""torch_npu's quantisation modes and dtype numbers, as formats of a dispatch's rows."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..comm import Received
from ..errors import ArgumentTypeError
from ..layout import FLOAT8, RowFormat
from ..ops import checks
from ..ops.quantization import E8M0, as_e8m0

# Numbers of dtypes in torch, and in the Ascend interface, where torch_npu adds 256.
_NUMBERS = {
    1: torch.int8,
    258: torch.int8,
    3: torch.int32,
    259: torch.int32,
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
_UNSUPPORTED: dict[object, str] = {
    285: "packed int4",
    290: "HiFloat8",
    296: "fp4 (e2m1)",
    297: "fp4 (e1m2)",
    16: "packed int4",
    torch.quint4x2: "packed int4",
}
if hasattr(torch, "float4_e2m1fn_x2"):  # of torch 2.8
    _UNSUPPORTED |= {45: "fp4 (e2m1)", torch.float4_e2m1fn_x2: "fp4 (e2m1)"}

# quant_mode -> dtype of the rows -> name of the quantisation; the first one is the default.
_QUANTS = {
    1: {torch.int8: "int8_static"},
    2: {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"},
    3: {torch.float8_e4m3fn: "group_e4m3", torch.float8_e5m2: "group_e5m2"},
    4: {torch.float8_e4m3fn: "mx_e4m3", torch.float8_e5m2: "mx_e5m2"},
}
QUANT_MODES = (0, *_QUANTS)


class RowQuantization(NamedTuple):
    """The format of a dispatch's rows.

    Attributes:
        quant: the quantisation, of ``layout.QUANTS``, or None.
        dtype: of expand_x.
        scales: [1, ..] of the dtype and row shape of dynamic_scales, uninitialised, or None.
        prequantized: whether the caller has quantised the tokens; their scales travel with them.
    """

    quant: str | None
    dtype: torch.dtype
    scales: torch.Tensor | None
    prequantized: bool = False


def dtype_number(kind: object) -> object:
    """torch_npu's number of a torch dtype; any other value unchanged."""
    known = {dtype: number for number, dtype in _NUMBERS.items()}
    return known.get(kind, kind) if isinstance(kind, torch.dtype) else kind


def named_dtype(
    op: str, argument: str, value: object, allowed: Sequence[torch.dtype] | None = None
) -> torch.dtype | None:
    """The dtype of an argument that is a torch dtype or torch_npu's number of one; None of None.

    Raises:
        ArgumentTypeError: any other value, a format that this library does not support, or a dtype
            that is not ``allowed``.
    """
    if value is None:
        return None
    kind = _known_dtype(op, argument, value)
    if allowed is not None and kind not in allowed:
        raise ArgumentTypeError(op, argument, f"be one of {[*allowed]}", kind)
    return kind


def _known_dtype(op: str, argument: str, value: object) -> torch.dtype:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    if isinstance(value, (int, torch.dtype)):
        if value in _UNSUPPORTED:
            contract = "name a supported format"
            raise ArgumentTypeError(op, argument, contract, f"{value}, {_UNSUPPORTED[value]}")
        kind = value if isinstance(value, torch.dtype) else _NUMBERS.get(value)
        if kind in _NUMBERS.values():
            assert kind is not None
            return kind
    contract = "be a torch dtype of 8 to 32 bits, or torch_npu's number of one"
    raise ArgumentTypeError(op, argument, contract, repr(value))


def fake_dtype(value: object, default: torch.dtype) -> torch.dtype:
    """The dtype that ``named_dtype`` finds, for fake outputs; ``default`` for None and errors."""
    try:
        return named_dtype("", "", value) or default
    except ArgumentTypeError:
        return default


def stored_as(op: str, name: str, tensor: torch.Tensor, kind: torch.dtype | None) -> torch.Tensor:
    """View ``tensor`` as the dtype that ``{name}_dtype`` gives; its bytes may come as int8."""
    if kind is None or not isinstance(tensor, torch.Tensor) or tensor.dtype == kind:
        return tensor
    if tensor.dtype in (torch.uint8, torch.int8) and kind.itemsize == 1:
        return tensor.view(kind)
    contract = f"be {kind}, as {name}_dtype says, or its bytes as uint8 or int8"
    raise ArgumentTypeError(op, name, contract, tensor.dtype)


def check_dtypes(op: str, x: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Check the dtypes of tokens and scales."""
    if isinstance(x, torch.Tensor) and x.dtype == torch.int32:
        contract = "be float16, bfloat16 or a float8"
        raise ArgumentTypeError(op, "x", contract, "torch.int32, which would be packed int4")
    checks.dtype(op, "x", x, (*checks.FLOATS, *FLOAT8))
    allowed = (torch.float32, E8M0) if x.dtype in FLOAT8 else (torch.float32,)
    checks.dtype(op, "scales", scales, allowed)


def check_mode(op: str, quant_mode: int) -> None:
    """Check ``quant_mode``."""
    modes = [*QUANT_MODES]
    checks.value(op, "quant_mode", quant_mode in modes, f"be in {modes}", quant_mode)


def row_quantization(
    op: str,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    quant_mode: int,
    y_dtype: torch.dtype | None,
) -> RowQuantization:
    """The format of the rows of a dispatch with these arguments.

    Raises:
        ArgumentTypeError: quantised tokens in a mode that quantises, or a y_dtype that the mode
            does not produce.
        ArgumentValueError: an unknown mode.
    """
    check_mode(op, quant_mode)
    if quant_mode == 0:
        if y_dtype not in (None, x.dtype):
            contract = f"be that of x, {x.dtype}, when quant_mode is 0"
            raise ArgumentTypeError(op, "y_dtype", contract, y_dtype)
        prequantized = x.dtype in FLOAT8
        row_scales = None
        if scales is not None and prequantized:
            row_scales = scales.new_empty((1, *scales.shape[1:]))
        return RowQuantization(None, x.dtype, row_scales, prequantized)
    if x.dtype in FLOAT8:
        contract = f"be float16 or bfloat16 when quant_mode is {quant_mode}"
        raise ArgumentTypeError(op, "x", contract, x.dtype)
    names = _QUANTS[quant_mode]
    dtype = next(iter(names)) if y_dtype is None else y_dtype
    if dtype not in names:
        contract = f"be one of {[*names]} when quant_mode is {quant_mode}"
        raise ArgumentTypeError(op, "y_dtype", contract, dtype)
    quant = names[dtype]
    return RowQuantization(quant, dtype, new_scales(quant, x, 1))


def new_scales(quant: str, x: torch.Tensor, num_rows: int) -> torch.Tensor | None:
    """[num_rows, ..] memory for the scales of [.., H] ``x``; None for a format without scales."""
    fmt = RowFormat.quantized(quant, x.dtype, x.shape[-1])
    if fmt.scale_offset is None:
        return None
    scales = x.new_empty(fmt.scale_shape(num_rows), dtype=fmt.scale_dtype)
    return as_e8m0(quant, scales)


def check_prequantized(op: str, x: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Check the scales of tokens that the caller has quantised: a row for each token."""
    contract = "be given where x is quantised already"
    checks.value(op, "scales", scales is not None, contract, None)
    assert scales is not None
    expected = (len(x), None)[: max(scales.dim(), 1)]
    checks.shape(op, "scales", scales, expected, "(BS,) or (BS, d)", x.device)
    most = x.shape[1]
    fits = 1 <= scales.shape[1:].numel() <= most
    contract = f"have 1 to H = {most} columns"
    checks.value(op, "scales", fits, contract, f"shape {tuple(scales.shape)}")


def append_scales(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[T, bytes] uint8: each quantised token followed by its scales."""
    # contiguous() would keep the strides of a single row.
    columns = scales.new_empty((len(scales), scales.shape[1:].numel()))
    columns.view(scales.shape).copy_(scales)
    return torch.cat([x.view(torch.uint8), columns.view(torch.uint8)], dim=1)


def split_scales(received: Received, quantization: RowQuantization, hidden: int) -> Received:
    """``received`` with rows of ``append_scales`` split into tokens of H elements and scales."""
    assert quantization.scales is not None
    num_rows, n = len(received.x), len(received.recv_permutation.source)
    x = received.x.new_empty((num_rows, hidden))
    row_shape = quantization.scales.shape[1:]
    scales = quantization.scales.new_empty((num_rows, *row_shape))
    columns = scales.view(num_rows, row_shape.numel())
    x[:n] = received.x[:n, :hidden]
    columns.view(torch.uint8)[:n] = received.x[:n, hidden:]
    return received._replace(x=x.view(quantization.dtype), scales=scales)

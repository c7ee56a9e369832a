"""Names of torch_npu: operators of ``moe_triton.compat``, and the dtype constants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..compat import torch_npu
from . import formats, missing
from .barrier import npu_distribute_barrier
from .runtime_errors import raising_runtime_errors

# Functions that libraries import wherever torch_npu is there, whether or not they call them.
_REFUSED = ("npu_fusion_attention",)


def _refused(name: str) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> Any:
        return missing.refuse_call(f"torch_npu.{name}")

    function.__name__ = name
    function.__doc__ = "Refused: not emulated."
    return function


OPERATORS: dict[str, Callable[..., Any]] = {
    "_npu_distribute_barrier": npu_distribute_barrier,
    "npu_format_cast": formats.npu_format_cast,
    "npu_format_cast_": formats.npu_format_cast_,
    "get_npu_format": formats.get_npu_format,
    **{
        name: raising_runtime_errors(getattr(torch_npu, name))
        for name in torch_npu.__all__
        if name.startswith(("npu_", "_npu_"))
    },
    **{name: _refused(name) for name in _REFUSED},
}


# torch_npu's dtype constants: the numbers of ACL, plus 256.
DTYPES = {
    name: 256 + number
    for number, name in {
        0: "float32",
        1: "float16",
        2: "int8",
        3: "int32",
        4: "uint8",
        6: "int16",
        7: "uint16",
        8: "uint32",
        9: "int64",
        10: "uint64",
        11: "float64",
        12: "bool",
        13: "string",
        16: "complex64",
        17: "complex128",
        27: "bfloat16",
        29: "int4",
        30: "uint1",
        33: "complex32",
        34: "hifloat8",
        35: "float8_e5m2",
        36: "float8_e4m3fn",
        37: "float8_e8m0fnu",
        38: "float6_e3m2",
        39: "float6_e2m3",
        40: "float4_e2m1fn_x2",
        41: "float4_e1m2fn_x2",
    }.items()
}

NAMES: dict[str, Any] = {**OPERATORS, **DTYPES, "Format": formats.Format}


def _with_overload(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with itself as the overload ``default``, like an operator of torch.ops."""

    @functools.wraps(function)
    def operator(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    operator.default = operator  # type: ignore[attr-defined]
    return operator


class _Namespace(torch._ops._OpNamespace):
    """``torch.ops.npu``; also finds operators that scripts register there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return missing.not_emulated("torch.ops.npu", name)


def install() -> None:
    """Fill ``torch.ops.npu``, for the rest of this process."""
    namespace = _Namespace("npu")
    for name, function in OPERATORS.items():
        setattr(namespace, name, _with_overload(function))
    torch.ops.npu = namespace  # type: ignore[attr-defined]

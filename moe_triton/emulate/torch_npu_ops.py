"""Names of torch_npu: operators of ``moe_triton.compat``, dtypes, and errors for all others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..compat import torch_npu
from ..errors import UnavailableError
from .barrier import npu_distribute_barrier


class NotEmulatedError(UnavailableError, AttributeError):
    """A name of torch_npu or torchair that has no stand-in.

    Also an ``AttributeError``, so that ``hasattr`` is False.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "is not emulated by moe-triton npu-run")


def not_emulated(module: str, name: str) -> NoReturn:
    """Refuse a name that a stand-in module lacks.

    Raises:
        NotEmulatedError: with the full name.
        AttributeError: for dunder names, which Python itself looks up.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    raise NotEmulatedError(f"{module}.{name}")


OPERATORS: dict[str, Callable[..., Any]] = {
    "_npu_distribute_barrier": npu_distribute_barrier,
    **{name: getattr(torch_npu, name) for name in torch_npu.__all__ if name.startswith("npu_")},
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
            not_emulated("torch.ops.npu", name)


def install() -> None:
    """Fill ``torch.ops.npu``, for the rest of this process."""
    namespace = _Namespace("npu")
    for name, function in OPERATORS.items():
        setattr(namespace, name, _with_overload(function))
    torch.ops.npu = namespace  # type: ignore[attr-defined]

"""The operators of torch_npu: those that ``moe_triton.compat`` has, and errors for all others."""

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

    An ``AttributeError`` too, so that scripts which look with ``hasattr`` what their version of
    torch_npu offers take the way without it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "is not emulated by moe-triton npu-run")


def not_emulated(module: str, name: str) -> NoReturn:
    """What a module does about a name that it lacks.

    Raises:
        NotEmulatedError: with the full name.
        AttributeError: for names with two underscores, which Python itself asks for.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    raise NotEmulatedError(f"{module}.{name}")


OPERATORS: dict[str, Callable[..., Any]] = {
    "_npu_distribute_barrier": npu_distribute_barrier,
    **{name: getattr(torch_npu, name) for name in torch_npu.__all__ if name.startswith("npu_")},
}


def _with_overload(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` in the form of an operator of torch.ops: it is its own overload ``default``."""

    @functools.wraps(function)
    def operator(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    operator.default = operator  # type: ignore[attr-defined]
    return operator


class _Namespace(torch._ops._OpNamespace):
    """``torch.ops.npu``; it finds operators that scripts register there themselves as well."""

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

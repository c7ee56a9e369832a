"""Errors of operators as ``RuntimeError``, which all errors of torch_npu's operators are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .. import errors

# A class for each of the library's errors that is not a RuntimeError, under the same name.
_CLASSES: dict[type[errors.MoeError], Any] = {
    kind: type(kind.__name__, (kind, RuntimeError), {"__module__": __name__})
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.MoeError)
    and not issubclass(kind, RuntimeError)
}
# Errors cross process boundaries, so the classes must be found in their module.
globals().update({kind.__name__: kind for kind in _CLASSES.values()})


def raising_runtime_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with errors that are both their own kind and a ``RuntimeError``."""

    @functools.wraps(function)
    def operator(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except errors.MoeError as error:
            error.__class__ = _CLASSES.get(type(error), type(error))
            raise

    return operator

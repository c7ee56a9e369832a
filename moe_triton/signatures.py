"""Results that depend on the signature of a call alone, computed once for each signature.

A signature is the dtypes, shapes, strides and devices of a call's tensors, and its other arguments:
all that argument checks look at, and all that a launch is planned from. So a call whose signature
has been seen needs neither again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch

_T = TypeVar("_T")
_NEW = object()
_STRIDED = torch.strided
MOST = 4096  # signatures to remember; then they start over, as sizes may change with every call


def once_per_signature(
    function: Callable[..., _T], *, within: Callable[..., Hashable] | None = None
) -> Callable[..., _T]:
    """Remember what ``function`` returns for each signature of its arguments.

    Args:
        function: of positional arguments: tensors, and others that hold no tensor. It looks at no
            element of a tensor and at no address. What it raises is not remembered.
        within: of the same arguments; what else the result depends on.
    """
    known: dict[Hashable, object] = {}

    @functools.wraps(function)
    def remembered(*arguments: Any) -> _T:
        parts = [
            part
            if part is None or not isinstance(part, torch.Tensor)
            else (part.dtype, part.shape, part.device, part.layout is _STRIDED and part.stride())
            for part in arguments
        ]
        if within is not None:
            parts.append(within(*arguments))
        signature = tuple(parts)
        try:
            result = known.get(signature, _NEW)
        except TypeError:  # an argument that cannot be hashed, which the function may refuse
            return function(*arguments)
        if result is _NEW:
            result = function(*arguments)
            if len(known) >= MOST:
                known.clear()
            known[signature] = result
        return cast("_T", result)

    return remembered

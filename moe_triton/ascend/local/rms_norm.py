"""The ops behind ``npu_rms_norm`` and its gradient.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import checks
from ...ref import accumulator
from ..op_names import RMS_NORM, RMS_NORM_BACKWARD
from .gather import FLOATS


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalise over the dimensions of gamma; also return 1 / rms(x)."""
    op = RMS_NORM
    _check(op, x, gamma)
    checks.reals(op, epsilon=epsilon)
    wide = x.to(accumulator(x.dtype))
    rstd = _rstd(wide, gamma, epsilon)
    scaled = wide * rstd
    if gamma.dtype == x.dtype:
        # As in combine_add_rms_norm: the normalised row is rounded before gamma.
        scaled = scaled.to(x.dtype).to(wide.dtype)
    return (scaled * gamma.to(wide.dtype)).to(x.dtype), rstd


def rms_norm_outputs(*, x: Tensor, gamma: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    """Fake outputs of ``rms_norm``."""
    return x.new_empty(x.shape), x.new_empty(_rstd_shape(x, gamma), dtype=accumulator(x.dtype))


def rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in float32, of gamma."""
    op = RMS_NORM_BACKWARD
    checks.required(op, dy=dy, rstd=rstd)
    _check(op, x, gamma)
    checks.dtype(op, "dy", dy, (x.dtype,))
    checks.dtype(op, "rstd", rstd, (accumulator(x.dtype),))
    checks.shape(op, "dy", dy, tuple(x.shape), "of self", x.device)
    checks.shape(op, "rstd", rstd, _rstd_shape(x, gamma), "as npu_rms_norm returns it", x.device)
    wide, gradient = (one.to(accumulator(x.dtype)) for one in (x, dy))
    normal = wide * rstd
    scaled = gradient * gamma.to(wide.dtype)
    dims = _dims(gamma)
    dx = rstd * (scaled - normal * (scaled * normal).mean(dims, keepdim=True))
    leading = x.dim() - gamma.dim()
    dgamma = gradient * normal
    if leading:
        dgamma = dgamma.sum([*range(leading)])
    return dx.to(x.dtype), dgamma.to(accumulator(gamma.dtype))


def rms_norm_backward_outputs(*, x: Tensor, gamma: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    """Fake outputs of ``rms_norm_backward``."""
    return x.new_empty(x.shape), gamma.new_empty(gamma.shape, dtype=accumulator(gamma.dtype))


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what ``backward`` needs; rstd has no gradient."""
    x, gamma, ctx.epsilon = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gamma)


def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of ``rms_norm``."""
    x, gamma = ctx.saved_tensors
    # Computed anew from x, so that second derivatives pass through it.
    rstd = _rstd(x.to(accumulator(x.dtype)), gamma, ctx.epsilon)
    dx, dgamma = rms_norm_backward(gradient, x, gamma, rstd)
    return dx, dgamma.to(gamma.dtype), None


def _rstd(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    return (x.square().mean(_dims(gamma), keepdim=True) + epsilon).rsqrt()


def _dims(gamma: Tensor) -> list[int]:
    """The last dimensions, those of gamma."""
    return [*range(-gamma.dim(), 0)]


def _rstd_shape(x: Tensor, gamma: Tensor) -> tuple[int, ...]:
    leading = max(x.dim() - gamma.dim(), 0)
    return (*x.shape[:leading], *[1] * (x.dim() - leading))


def _check(op: str, x: Tensor, gamma: Tensor) -> None:
    checks.required(op, self=x, gamma=gamma)
    checks.dtype(op, "self", x, FLOATS)
    checks.dtype(op, "gamma", gamma, [*dict.fromkeys((x.dtype, torch.float32))])
    checks.shape(op, "self", x, (None,) * x.dim(), "any", x.device)
    fits = 0 < gamma.dim() <= x.dim()
    checks.value(op, "gamma", fits, f"have 1 to {x.dim()} dimensions", tuple(gamma.shape))
    expected = tuple(x.shape[x.dim() - gamma.dim() :])
    checks.shape(op, "gamma", gamma, expected, "of the last dimensions of self", x.device)

"""The ops behind ``npu_swiglu`` and its gradient.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...ops import checks
from ...ref import accumulator
from ..op_names import SWIGLU, SWIGLU_BACKWARD
from .gather import FLOATS


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """Multiply silu of the first half by the second half; round once."""
    _check(SWIGLU, x, dim)
    gate, up = x.to(accumulator(x.dtype)).chunk(2, dim)
    return (silu(gate) * up).to(x.dtype)


def swiglu_outputs(*, x: Tensor, dim: int) -> Tensor:
    """Fake output of ``swiglu``."""
    shape = [*x.shape]
    if -x.dim() <= dim < x.dim():
        shape[dim] //= 2
    return x.new_empty(shape)


def swiglu_backward(grad_output: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """The gradient of x, from that of the output."""
    op = SWIGLU_BACKWARD
    _check(op, x, dim)
    checks.required(op, grad_output=grad_output)
    checks.dtype(op, "grad_output", grad_output, (x.dtype,))
    shape = tuple(swiglu_outputs(x=x, dim=dim).shape)
    checks.shape(op, "grad_output", grad_output, shape, "of swiglu(self)", x.device)
    gate, up = x.to(accumulator(x.dtype)).chunk(2, dim)
    gradient, sigmoid = grad_output.to(gate.dtype), gate.sigmoid()
    to_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([to_gate, gradient * gate * sigmoid], dim).to(x.dtype)


def swiglu_backward_outputs(*, x: Tensor, **_: object) -> Tensor:
    """Fake output of ``swiglu_backward``."""
    return x.new_empty(x.shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    """Save what ``backward`` needs."""
    x, ctx.dim = inputs
    ctx.save_for_backward(x)


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``swiglu``."""
    (x,) = ctx.saved_tensors
    return swiglu_backward(gradient, x, ctx.dim), None


def _check(op: str, x: Tensor, dim: int) -> None:
    checks.required(op, self=x)
    checks.integers(op, dim=dim)
    checks.dtype(op, "self", x, FLOATS)
    checks.shape(op, "self", x, (None,) * x.dim(), "any", x.device)
    most = x.dim()
    checks.value(op, "dim", -most <= dim < most, f"be in [{-most}, {most})", dim)
    even = x.shape[dim] % 2 == 0
    checks.value(op, "self", even, f"have an even size in dimension {dim}", tuple(x.shape))

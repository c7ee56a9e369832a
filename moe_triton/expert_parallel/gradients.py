"""Dispatch and combine as autograd functions: the backward of each is the other.

Their forwards return outputs that the exchange has computed, and only record the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UnavailableError
from . import custom_ops
from .exchange import DISPATCH, Exchange


def needed(*inputs: Tensor | None) -> bool:
    """Whether autograd records operations on the inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


class DispatchFunction(torch.autograd.Function):
    """From tokens and their weights to rows and theirs.

    The gradient of a token is the sum of those of its rows: a combine without weights. Integers and
    float8 carry no gradients: quantised rows are represented by zeros of the tokens' dtype, whose
    gradient is that of the dequantised rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # noqa: ARG004 (has a gradient)
        topk_weights: Tensor | None,
        expert_ids: Tensor,
        recv_counts_cumsum: Tensor,
        received: tuple[Tensor, Tensor],
        name: str,
        owner: Exchange | None,
        quantised: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the rows and their weights, ``received``.

        Args:
            ctx: of autograd.
            x: [T, H] tokens.
            topk_weights: [T, K], or None.
            expert_ids: [T, K] int32.
            recv_counts_cumsum: [L * W] int32.
            received: [A, H] of the tokens' dtype, and [A].
            name: of the exchange.
            owner: the exchange, kept alive until backward; None in compiled code.
            quantised: whether the rows were sent quantised.
        """
        rows, row_weights = received
        ctx.save_for_backward(expert_ids, recv_counts_cumsum)
        ctx.name, ctx.owner = name, owner
        ctx.has_weights = topk_weights is not None
        ctx.to_quantised_tokens = quantised and ctx.needs_input_grad[0]
        return rows, row_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, row_weights: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tokens and of their weights."""
        expert_ids, recv_counts_cumsum = ctx.saved_tensors
        x, weights = custom_ops.return_gradients(
            rows=rows,
            row_weights=row_weights,
            expert_ids=expert_ids,
            recv_counts_cumsum=recv_counts_cumsum,
            to_quantised_tokens=ctx.to_quantised_tokens,
            name=ctx.name,
        )
        return x, weights if ctx.has_weights else None, None, None, None, None, None, None


class ScalesFunction(torch.autograd.Function):
    """Scales whose gradient raises: rows that the caller dequantises pass none to the tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        path: Tensor,  # noqa: ARG004 (makes the scales require gradients)
        scales: tuple[Tensor],
        owner: Exchange,
    ) -> Tensor:
        """Return the scales."""
        ctx.owner = owner
        return scales[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:  # noqa: ARG004
        """Raise, on the peers too."""
        error = UnavailableError(
            f"{DISPATCH}, backward",
            'the gradients of quant_gradient="straight_through" come through '
            "Dispatched.dequantized(), got rows multiplied by Dispatched.scales; call the first, "
            "or detach the second",
        )
        ctx.owner.communicator.abort_peers("combine", error.op, error)
        raise error


class CombineFunction(torch.autograd.Function):
    """From rows and their weights to sums.

    The gradient of a row is its weight times that of its token's sum: a dispatch. The gradient of
    a weight is the dot product of its row and that gradient, and returns to the weight's rank in
    the backward of ``DispatchFunction``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        row_weights: Tensor,
        addend: Tensor | None,
        expert_ids: Tensor,
        out: tuple[Tensor],
        name: str,
        owner: Exchange | None,
    ) -> Tensor:
        """Return the sums, ``out``.

        Args:
            ctx: of autograd.
            y: [A, H] or [n, H] rows, unchanged until backward.
            row_weights: [A].
            addend: [T, H], or None.
            expert_ids: [T, K] int32.
            out: [T, H].
            name: of the exchange.
            owner: the exchange, kept alive until backward; None in compiled code.
        """
        # The rows are for the gradient of the weights alone.
        rows = y if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(rows, row_weights, expert_ids)
        ctx.name, ctx.owner, ctx.num_rows, ctx.dtype = name, owner, len(y), y.dtype
        ctx.has_addend = addend is not None
        return out[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the rows, of their weights and of the addend."""
        y, row_weights, expert_ids = ctx.saved_tensors
        rows = custom_ops.send_gradients(
            gradient=gradient, expert_ids=expert_ids, num_rows=ctx.num_rows, name=ctx.name
        ).to(row_weights.dtype)
        # y may have more rows than arrived, or fewer than A.
        size = min(ctx.num_rows, len(row_weights))
        factors = torch.zeros_like(rows[:, 0])
        factors[:size] = row_weights[:size]
        products = None
        if y is not None:
            products = torch.zeros_like(row_weights)
            products[:size] = (rows * y)[:size].sum(1)
        addend = gradient if ctx.has_addend else None
        return (rows * factors[:, None]).to(ctx.dtype), products, addend, None, None, None, None

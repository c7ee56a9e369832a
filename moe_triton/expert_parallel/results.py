"""Results of the calls of ``ExpertParallel``, and the handles between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..comm import CombineInput, DispatchInput, Pending, Plan
from ..layout import RecvPermutation
from ..ops import quantization


def _described(tensor: torch.Tensor | None) -> str:
    """Shape and dtype, for a repr."""
    if tensor is None:
        return "None"
    return f"{[*tensor.shape]} {str(tensor.dtype).removeprefix('torch.')}"


class _StraightThrough(torch.autograd.Function):
    """Rows that do not depend on ``path``, but pass their gradient on to it."""

    @staticmethod
    def forward(ctx: Any, path: torch.Tensor, rows: tuple[torch.Tensor]) -> torch.Tensor:
        """Return the rows."""
        ctx.dtype = path.dtype
        return rows[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of the rows, in the dtype of ``path``."""
        return gradient.to(ctx.dtype), None


@dataclasses.dataclass(frozen=True, repr=False)
class Handle:
    """A dispatch's routing, which combine needs; good for any number of combines.

    Attributes:
        expert_ids: [T, K] int32 of this rank's tokens.
        weights: [T, K] float32 (float64 where the tokens are), or None.
        row_weights: [A] weights of the received rows, 1 where their source gave none; combine gives
            gradients to the weights through them.
        recv_counts_cumsum: [L * W] int32 inclusive prefix sums of the rows by (local expert,
            source).
        numbering: the plan of the tokens and the permutation of the received rows, which follow
            from the ids and the prefix sums; None from compiled code.
        owner: name of the ``ExpertParallel`` object that dispatched.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor | None
    row_weights: torch.Tensor
    recv_counts_cumsum: torch.Tensor
    numbering: tuple[Plan, RecvPermutation] | None
    owner: str

    def unweighted(self) -> Handle:
        """The same for a combine that only sums, as the experts have applied the weights.

        All ranks combine with it, or none does.
        """
        ones = torch.ones_like(self.row_weights)
        if self.row_weights.requires_grad:
            # A zero gradient keeps dispatch in the graph: all ranks run its backward, even where
            # nothing else leads from combine to dispatch.
            ones = ones + 0 * self.row_weights
        return dataclasses.replace(self, weights=None, row_weights=ones)

    def __repr__(self) -> str:
        ids, weights = _described(self.expert_ids), _described(self.weights)
        return f"Handle(expert_ids={ids}, weights={weights}, owner={self.owner!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class Dispatched:
    """The rows that a rank received.

    Rows are sorted by (local expert, source rank, token). Those of local expert i end, padding
    included, before row ``offsets[i]``: the offsets of a grouped matrix product. Padding rows are
    zeros. Rows after the last one, with their scales and weights, are zeros if gradients are
    enabled in the teardown and inference mode is off, whichever tensors require them. Else they are
    garbage, which would make the weight gradients of experts NaN.

    Attributes:
        x: [A, H] of the model's dtype, or quantised; [n, H] with ``exact``.
        scales: such that x * scales approximates the tokens: [A] float32 for a scale per row,
            [A, ceil(H / 128)] for those of groups, [A, C] float8_e8m0fnu of MX with C =
            ceil(H / 32) rounded up to an even number. None without quant, and with "int8_static".
        weights: [A] routing weights of the rows, of the dtype of topk_weights; None without those.
        tokens_per_expert: [L] rows of each local expert without padding, int64 or ``counts_dtype``.
        offsets: [L] int32, at most the rows of ``x``.
        num_tokens: 0-d int32, received rows without padding, those beyond ``max_recv_tokens``
            included.
        handle: for combine.
        gradient_path: [A, H] zeros by which gradients of ``dequantized`` reach the tokens; None
            where rows are not quantised or the tokens require no gradients.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    offsets: torch.Tensor
    num_tokens: torch.Tensor
    handle: Handle
    gradient_path: torch.Tensor | None = None

    def dequantized(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """``x`` times its scales, computed in float32 and rounded once.

        Args:
            dtype: of the result, floating.

        Returns:
            [A, H], or [n, H] with ``exact``; ``x`` in ``dtype`` without quant. Its gradient reaches
            the tokens with ``quant_gradient``, and else raises where they require one.

        Raises:
            ArgumentTypeError: ``dtype`` is not a floating dtype.
            ArgumentValueError: rows of "int8_static", whose factors only the caller has.
        """
        scales = None if self.scales is None else self.scales.detach()
        rows = quantization.dequantize("Dispatched.dequantized", self.x, scales, dtype)
        if self.gradient_path is None:
            return rows
        return _StraightThrough.apply(self.gradient_path, (rows,))

    def __repr__(self) -> str:
        x, scales = _described(self.x), _described(self.scales)
        experts = len(self.tokens_per_expert)
        return f"Dispatched(x={x}, scales={scales}, local experts={experts}, {self.handle!r})"


@dataclasses.dataclass(frozen=True)
class DispatchPending:
    """A dispatch between setup and teardown.

    Attributes:
        operation: the transport's part; in compiled code its number.
        x: the tokens, for their gradient.
        expert_ids: [T, K] int32, a copy.
        topk_weights: of the caller, for their gradient, or None.
        weights: a copy of them.
    """

    operation: Pending[DispatchInput] | torch.Tensor
    x: torch.Tensor
    expert_ids: torch.Tensor
    topk_weights: torch.Tensor | None
    weights: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class CombinePending:
    """A combine between setup and teardown.

    Attributes:
        operation: the transport's part; in compiled code its number.
        y: the experts' outputs.
        handle: of their dispatch.
        borrowed: the zero-copy combine buffer of ``output_rows``, if it was for this combine.
    """

    operation: Pending[CombineInput] | torch.Tensor
    y: torch.Tensor
    handle: Handle
    borrowed: torch.Tensor | None

"""What the calls of ``ExpertParallel`` return and take back."""

from __future__ import annotations

import dataclasses

import torch

from ..comm import Pending
from ..layout import RecvPermutation, RoutingPlan


@dataclasses.dataclass(frozen=True)
class Handle:
    """What combine needs of a dispatch; good for any number of combines.

    Attributes:
        expert_ids: [T, K] int32 of this rank's tokens.
        weights: [T, K] float32 (float64 where the tokens are), or None.
        row_weights: [A] weights that the sources give the received rows, 1 where they give none; it
            is through them that combine gives gradients to the weights.
        recv_counts_cumsum: [L * W] int32 inclusive prefix sums of the rows by (local expert,
            source).
        numbering: the plan of the tokens and the sources of the rows, which follow from the ids and
            the prefix sums; None from compiled code.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor | None
    row_weights: torch.Tensor
    recv_counts_cumsum: torch.Tensor
    numbering: tuple[RoutingPlan, RecvPermutation] | None

    def unweighted(self) -> Handle:
        """The same for a combine that only sums, as the experts have applied the weights.

        All ranks take it, or none does.
        """
        ones = torch.ones_like(self.row_weights)
        if self.row_weights.requires_grad:
            # No gradient, but a place in the graph: going backward is for all ranks, even where
            # nothing else leads from combine to dispatch.
            ones = ones + 0 * self.row_weights
        return dataclasses.replace(self, weights=None, row_weights=ones)


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What a rank received.

    Rows are sorted by (local expert, source rank, token). Those of local expert i end, padding
    included, before row ``offsets[i]``, which is what grouped matrix products ask for. Padding
    rows are zeros. Rows after the last one are zeros where there are gradients to come, and not
    written otherwise.

    Attributes:
        x: [A, H] of the model's dtype, or quantised; [n, H] with ``exact``.
        scales: such that x * scales approximates the tokens: [A] float32 for a scale per row,
            [A, ceil(H / 128)] for those of groups, [A, C] float8_e8m0fnu of MX with C =
            ceil(H / 32) rounded up to an even number. None without quant, and with "int8_static".
        weights: [A] routing weights of the rows, of the dtype of topk_weights; None without those.
        tokens_per_expert: [L] rows of each local expert without padding, int64 or ``counts_dtype``.
        offsets: [L] int32, none above the rows of ``x``.
        num_tokens: 0-d int32, received rows without padding, those without room included.
        handle: for combine.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    offsets: torch.Tensor
    num_tokens: torch.Tensor
    handle: Handle


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

    operation: Pending | torch.Tensor
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
        borrowed: the memory of ``output_rows``, if this is the combine it was for.
    """

    operation: Pending | torch.Tensor
    y: torch.Tensor
    handle: Handle
    borrowed: torch.Tensor | None

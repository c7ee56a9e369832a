"""What the device steps hand to each other: the routing plan, row formats, windows, row numbers.

Letters: T tokens of this rank, K experts per token, H hidden size, E routed experts, W ranks,
L experts of one rank, C copies one source may send to one rank, n rows received. Index tensors are
int32 unless said otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """Where the copies of one rank's tokens go; everything follows from counting.

    Example: expert_ids [[0, 2], [2, 1], [0, 3]], E = 4:
        counts [2, 1, 2, 1], expand_idx [0, 0, 1, 0, 1, 0], order [0, 4, 3, 1, 2, 5]

    Attributes:
        counts: [E] copies for each expert.
        expand_idx: [T*K] earlier flat positions that chose the same expert.
        order: [T*K] flat positions sorted by (expert, flat position).
    """

    counts: torch.Tensor
    expand_idx: torch.Tensor
    order: torch.Tensor


class DispatchHeader(NamedTuple):
    """What a source tells one rank about the rows for it; [W] in front when stacked over sources.

    Attributes:
        num_tokens: [1] tokens of the source.
        counts: [E] the source's copies for every expert, so that all ranks know all loads.
        slots: [C] which of the source's rows is copy i for this rank; copies in (expert, flat
            position) order, or in token order for a shared expert.
        weights: [C] fp32 routing weights of these copies, 1 for a shared expert, or None.
    """

    num_tokens: torch.Tensor
    counts: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor | None


class RowFormat(NamedTuple):
    """How one token row lies in a window.

    Attributes:
        dtype: of the payload; int8 means that rows are quantised and carry an fp32 scale.
        hidden: H.
        stride: bytes from row to row, a multiple of 16.
        scale_offset: byte offset of the fp32 scale, or None.
    """

    dtype: torch.dtype
    hidden: int
    stride: int
    scale_offset: int | None

    def payload(self, rows: torch.Tensor) -> torch.Tensor:
        """[.., stride] uint8 -> [.., H] of ``dtype``, a view."""
        return rows.view(self.dtype)[..., : self.hidden]

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        """[.., stride] uint8 -> [..] fp32, a view."""
        assert self.scale_offset is not None
        return rows.view(torch.float32)[..., self.scale_offset // 4]


class Sources(NamedTuple):
    """Which copy of which source each received row is; rows in (local expert, source, flat) order.

    Attributes:
        source: [n] int64 rank that sent the row.
        copy: [n] int64 its place in that source's list of copies.
        ends: [L*W] inclusive prefix sums of the counts, which is ep_recv_counts.
    """

    source: torch.Tensor
    copy: torch.Tensor
    ends: torch.Tensor

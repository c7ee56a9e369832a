"""The order of the rows that a rank receives."""

from __future__ import annotations

import torch

from ..layout import NOWHERE, RecvPermutation
from ._common import exclusive_cumsum, fitted


def recv_permutation(
    counts: torch.Tensor, alignment: int = 1, capacity: int | None = None
) -> RecvPermutation:
    """Order the received rows by (local expert, source, slot id).

    Args:
        counts: [L, W] int32 rows for each local expert from each source.
        alignment: the rows of each expert are padded to a multiple of this.
        capacity: rows of the result, at which offsets are clamped; rows after the n-th have the
            source ``NOWHERE`` and the index 0. None for n.
    """
    world = counts.shape[1]
    rows = counts.sum(1, dtype=torch.int32)
    padded = (rows + alignment - 1) // alignment * alignment
    groups = torch.cat([counts, (padded - rows)[:, None]], dim=1)
    group_starts = exclusive_cumsum(groups.reshape(-1))
    group = torch.repeat_interleave(
        torch.arange(groups.numel(), device=counts.device), groups.reshape(-1).long()
    )
    # A source lists the rows of all experts of this rank one after the other.
    first = torch.nn.functional.pad(exclusive_cumsum(counts, dim=0), (0, 1)).reshape(-1)
    within = torch.arange(group.numel(), device=counts.device) - group_starts[group]
    source = group % (world + 1)
    source = source.where(source < world, NOWHERE)
    index_in_source = (first[group] + within).long()
    offsets = padded.cumsum(0, dtype=torch.int32)
    if capacity is not None:
        offsets = offsets.clamp(max=capacity)
        source = fitted(source, capacity, NOWHERE)
        index_in_source = fitted(index_in_source, capacity, 0)
    return RecvPermutation(
        source,
        index_in_source,
        counts.reshape(-1).cumsum(0, dtype=torch.int32),
        offsets,
        group_starts.view(groups.shape).int(),
    )

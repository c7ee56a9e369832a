"""The order of the rows that a rank receives."""

from __future__ import annotations

import functools

import numpy as np
import torch

from ..layout import NOWHERE, RecvPermutation


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
    # numpy: its calls cost a tenth of torch's.
    received = counts.numpy()
    padding = -received.sum(1, dtype=np.int32) % alignment
    groups = np.concatenate([received, padding[:, None]], axis=1)
    sizes = groups.reshape(-1)
    ends = sizes.cumsum(dtype=np.int32)
    group_starts = ends - sizes
    # A source lists the rows of all experts of this rank one after the other.
    first = groups.cumsum(0, dtype=np.int32) - groups
    first[:, -1] = 0
    source = _sources(*received.shape).repeat(sizes)
    index_in_source = np.arange(len(source))
    index_in_source += (first.reshape(-1) - group_starts).repeat(sizes)
    offsets = ends.reshape(groups.shape)[:, -1].copy()
    if capacity is not None:
        offsets = offsets.clip(max=capacity)
        source = _fitted(source, capacity, NOWHERE)
        index_in_source = _fitted(index_in_source, capacity, 0)
    return RecvPermutation(
        torch.from_numpy(source),
        torch.from_numpy(index_in_source),
        torch.from_numpy(received.reshape(-1).cumsum(dtype=np.int32)),
        torch.from_numpy(offsets),
        torch.from_numpy(group_starts.reshape(groups.shape)),
    )


@functools.lru_cache(256)
def _sources(num_experts: int, world: int) -> np.ndarray:
    """[L * (W + 1)] source of each group of rows; ``NOWHERE`` for padding."""
    return np.tile(np.append(np.arange(world), NOWHERE), num_experts)


def _fitted(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    """Cut or pad [n] to [size]."""
    return np.pad(values[:size], (0, max(size - len(values), 0)), constant_values=fill)

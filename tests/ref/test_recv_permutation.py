"""Plans and row numbers, against numbers worked out by hand."""

from __future__ import annotations

import torch

from moe_triton import ref
from moe_triton.layout import NOWHERE


def test_sources_example():
    # Two local experts, three sources: 1, 0, 2 rows for the first and 2, 1, 0 for the second.
    found = ref.recv_permutation(torch.tensor([[1, 0, 2], [2, 1, 0]], dtype=torch.int32))
    assert found.recv_counts_cumsum.tolist() == [1, 1, 3, 5, 6, 6]
    assert found.source.tolist() == [0, 2, 2, 0, 0, 1]
    assert found.index_in_source.tolist() == [0, 0, 1, 1, 2, 0]


def test_sources_pads_each_expert():
    found = ref.recv_permutation(
        torch.tensor([[1, 0, 2], [0, 0, 0], [2, 1, 1]], dtype=torch.int32), 4
    )
    pad = NOWHERE
    assert found.source.tolist() == [0, 2, 2, pad, 0, 0, 1, 2]
    assert found.index_in_source[found.source != pad].tolist() == [
        0,
        0,
        1,
        1,
        2,
        0,
        2,
    ]
    assert found.recv_counts_cumsum.tolist() == [1, 1, 3, 3, 3, 3, 5, 6, 7]
    assert found.offsets.tolist() == [4, 4, 8]

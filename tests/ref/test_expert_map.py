"""Gating and replicas, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moe_triton import ref

TABLE = torch.tensor([[1, 5, 0, 0], [2, 0, 4, 0], [3, 1, 3, 6], [2, 7, 2, 0]], dtype=torch.int32)
IDS = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32)


@pytest.mark.parametrize(
    "ranks, expected",
    [
        ((0, 1, 2), [[5, 0], [1, 7], [0, 1]]),
        ((3,), [[5, 0], [3, 7], [0, 3]]),
        ((4, 5), [[5, 4], [3, 2], [4, 3]]),
        ((6, 7), [[5, 4], [6, 2], [4, 6]]),
        ((None,), [[5, 0], [3, 2], [0, 6]]),
    ],
)
def test_eplb_map_by_hand(ranks, expected):
    for rank in ranks:
        for ids in (IDS, IDS.long()):
            found = ref.eplb_map(ids, TABLE, rank=rank, world_size=8)
            assert found.dtype == ids.dtype
            assert found.tolist() == expected


def test_keep_experts_by_hand():
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])
    active = torch.tensor([True, True, False])
    keep = ref.keep_experts(weights, torch.tensor([0.0, 0.3]), active)
    assert keep.tolist() == [[True, False], [True, True], [False, False]]
    assert ref.keep_experts(weights, torch.tensor([0.0, 0.3]), None)[2].tolist() == [True, False]


@pytest.mark.parametrize("columns", [5, 6, 16])
def test_sums_of_weights_are_ascending(columns):
    # One by one 2**-24 is lost beside 1; two and more together would not be.
    weights = torch.full((1, columns), 2.0**-24)
    weights[0, 0] = 1.0
    kept = ref.keep_experts(weights, torch.ones(columns), None)
    assert kept[0].tolist() == [True] + [False] * (columns - 1)

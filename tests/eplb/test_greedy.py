"""The published greedy scheme: by hand, and on its authors' example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_triton import eplb
from moe_triton.eplb import greedy

# The loads and the placement of the example in the README of github.com/deepseek-ai/EPLB: two
# layers, 12 experts in 4 groups, 16 slots on 8 ranks of 2 nodes.
PUBLISHED_LOAD = torch.tensor(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
PUBLISHED = torch.tensor(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)


def test_pack_by_hand():
    # 9 | 7, 6 joins 7, 4 joins 9, the tie 13 : 13 fills the first bin, then 2 and 1.
    weights = np.array([1.0, 9, 4, 7, 2, 6])
    assert greedy.pack(weights, 2).tolist() == [1, 0, 0, 1, 0, 1]


def test_pack_fills_bins_equally_even_where_that_is_heavier():
    assert greedy.pack(np.array([9.0, 1, 1, 1]), 2).tolist() == [0, 1, 1, 0]


def test_replicate_by_hand():
    # 8 -> 4 4, then 6 -> 3 3, then 4 4 -> 8/3 each.
    assert greedy.replicate(np.array([8.0, 6, 3]), 6, 4).tolist() == [3, 2, 1]


def test_replicate_stops_at_the_most_replicas():
    assert greedy.replicate(np.array([80.0, 1, 1]), 6, 2).tolist() == [2, 2, 2]


def test_placement_and_table_by_hand():
    # Replicas 4 4 2 2 2 2 of experts 0 0 1 1 2 3 go in turn to the two ranks.
    plan = eplb.plan_greedy(torch.tensor([8, 4, 2, 2]), num_ranks=2, num_slots=6)
    assert plan.placement.tolist() == [0, 1, 2, 0, 1, 3]
    assert plan.eplb_table.tolist() == [[2, 0, 3], [2, 1, 4], [1, 2, -1], [1, 5, -1]]
    assert plan.load_before.tolist() == [12, 4]
    assert plan.load_after.tolist() == [8, 8]


def test_the_published_example():
    plan = eplb.plan_greedy(
        PUBLISHED_LOAD, num_ranks=8, num_slots=16, num_nodes=2, num_groups=4, balance_mode=1
    )
    ranks = PUBLISHED.view(2, 8, 2).sort().values
    assert torch.equal(plan.placement[0], ranks[0].flatten())
    # In the second layer an expert and half of another weigh 86 each, in any order.
    for layer, placement in enumerate(PUBLISHED):
        assert torch.equal(plan.placement[layer].sort().values, placement.sort().values)
        each = PUBLISHED_LOAD[layer] / placement.bincount()
        heaviest = each[placement].view(8, 2).sum(1).max().item()
        assert plan.load_after[layer].max().item() == pytest.approx(heaviest)

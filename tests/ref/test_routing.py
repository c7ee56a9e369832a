"""Plans and row numbers, against numbers worked out by hand."""

from __future__ import annotations

import torch

from moe_triton import ref
from moe_triton.layout import NOWHERE


def test_plan_example():
    plan = ref.routing_plan(torch.tensor([[0, 2], [2, 1], [0, 3]], dtype=torch.int32), 4)
    assert plan.counts.tolist() == [2, 1, 2, 1]
    assert plan.position_in_expert.tolist() == [0, 0, 1, 0, 1, 0]
    assert plan.sorted_slot_ids.tolist() == [0, 4, 3, 1, 2, 5]
    assert {part.dtype for part in plan} == {torch.int32}


def test_plan_of_nothing():
    plan = ref.routing_plan(torch.empty((0, 2), dtype=torch.int32), 3)
    assert plan.counts.tolist() == [0, 0, 0]
    assert plan.sorted_slot_ids.numel() == plan.position_in_expert.numel() == 0


def test_plan_leaves_out_what_is_not_routed():
    ids = torch.tensor([[0, NOWHERE], [2, 0], [1, 3]], dtype=torch.int32)
    plan = ref.routing_plan(ids, 2)
    assert plan.counts.tolist() == [2, 1]
    assert plan.position_in_expert.tolist() == [0, NOWHERE, NOWHERE, 1, 0, NOWHERE]
    assert plan.sorted_slot_ids.tolist() == [0, 3, 4, 1, 2, 5]


def test_sources_example():
    # Two local experts, three sources: 1, 0, 2 rows for the first and 2, 1, 0 for the second.
    recv_permutation = ref.recv_permutation(torch.tensor([[1, 0, 2], [2, 1, 0]], dtype=torch.int32))
    assert recv_permutation.recv_counts_cumsum.tolist() == [1, 1, 3, 5, 6, 6]
    assert recv_permutation.source.tolist() == [0, 2, 2, 0, 0, 1]
    assert recv_permutation.copy.tolist() == [0, 0, 1, 1, 2, 0]


def test_sources_pads_each_expert():
    recv_permutation = ref.recv_permutation(
        torch.tensor([[1, 0, 2], [0, 0, 0], [2, 1, 1]], dtype=torch.int32), 4
    )
    pad = NOWHERE
    assert recv_permutation.source.tolist() == [0, 2, 2, pad, 0, 0, 1, 2]
    assert recv_permutation.copy[recv_permutation.source != pad].tolist() == [0, 0, 1, 1, 2, 0, 2]
    assert recv_permutation.recv_counts_cumsum.tolist() == [1, 1, 3, 3, 3, 3, 5, 6, 7]
    assert recv_permutation.offsets.tolist() == [4, 4, 8]

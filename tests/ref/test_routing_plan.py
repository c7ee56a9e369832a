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

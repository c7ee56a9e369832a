"""Methods of ``Plan``."""

from __future__ import annotations

import pytest
import torch

from moe_triton import eplb
from moe_triton.errors import MoeError

LOAD = torch.tensor([[6.0, 1, 1], [1, 1, 6]])


@pytest.mark.parametrize("load", [LOAD[0], LOAD], ids=["one layer", "layers"])
def test_logical_load_adds_up_replicas(load):
    plan = eplb.plan(load, num_ranks=2, num_slots=4)
    counted = torch.arange(1, plan.placement.numel() + 1).view(plan.placement.shape)
    result = plan.logical_load(counted)
    assert result.dtype == counted.dtype
    experts = torch.arange(3)
    expected = ((plan.placement[..., None] == experts) * counted[..., None]).sum(-2)
    assert torch.equal(result, expected)


def test_logical_load_stays_on_its_device():
    """ExpertParallel.gather_load returns counts on the device of the layer."""
    plan = eplb.plan(LOAD[0], num_ranks=2, num_slots=4)
    result = plan.logical_load(torch.empty(4, dtype=torch.int64, device="meta"))
    assert (result.device.type, result.shape) == ("meta", (3,))


@pytest.mark.parametrize(
    "load, kind, message",
    [
        ([1, 2, 3, 4], TypeError, "be a tensor, got list"),
        (torch.ones(3), ValueError, r"have the shape of placement, \(4,\), got shape \(3,\)"),
        (torch.ones(1, 4), ValueError, "have the shape of placement"),
    ],
)
def test_a_load_of_something_else(load, kind, message):
    plan = eplb.plan(LOAD[0], num_ranks=2, num_slots=4)
    with pytest.raises(kind, match=f"eplb.Plan.logical_load: load must {message}") as caught:
        plan.logical_load(load)
    assert isinstance(caught.value, MoeError)

"""Plans: by hand, properties of every plan, DeepSeek-V3's shape, and refusals."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from moe_triton import MoeError, eplb

# Includes equally hot experts and experts without load.
LOADS = st.one_of(st.integers(0, 3), st.integers(0, 1000), st.floats(0, 1e6))


def zipf(exponent, *, experts=256, seed=0):
    """Popularity ``rank ** -exponent`` of experts in random order."""
    popularity = np.arange(1, experts + 1) ** -float(exponent)
    return torch.from_numpy(np.random.default_rng(seed).permutation(popularity))


def test_by_rank_by_hand():
    """Expert 0 is as heavy as all others together, and every rank has a replica of it."""
    plan = eplb.plan(torch.tensor([6, 2, 2, 2]), num_ranks=2, num_slots=6)
    assert plan.load_before.tolist() == [8, 4]
    assert plan.load_after.tolist() == [6, 6]
    assert plan.balance_before.item() == pytest.approx(4 / 3)
    assert plan.balance_after.item() == 1
    assert plan.replicas.tolist() == [2, 2, 1, 1]
    assert plan.placement.tolist() == [0, 1, 2, 0, 1, 3]
    assert plan.ranks.tolist() == [0, 0, 0, 1, 1, 1]
    # Each rank uses its own replica.
    assert plan.eplb_table.tolist() == [[2, 0, 3], [2, 1, 4], [1, 2, -1], [1, 5, -1]]


@pytest.mark.parametrize("balance_mode, greedy", [(0, 6), (1, 5)])
def test_unequal_parts_by_hand(balance_mode, greedy):
    """4 + 0, 2 + 2 and 3 + 1, where halves of the 6 would leave one rank with 3 + 2 at least."""
    arguments = {"num_ranks": 3, "num_slots": 6, "balance_mode": balance_mode}
    load = torch.tensor([6, 0, 2, 1, 3])
    assert eplb.plan(load, **arguments).load_after.tolist() == [4, 4, 4]
    assert eplb.plan_greedy(load, **arguments).load_after.max() == greedy


def test_layers_are_planned_one_by_one():
    load = torch.stack([zipf(1.2, experts=12, seed=seed) for seed in range(3)])
    arguments = {"num_ranks": 4, "num_slots": 16, "num_nodes": 2}
    plan = eplb.plan(load, **arguments)
    assert plan.eplb_table.shape[:2] == (3, 12)
    assert plan.placement.shape == (3, 16) and plan.replicas.shape == (3, 12)
    assert plan.load_before.shape == plan.load_after.shape == (3, 4)
    for layer, layer_load in enumerate(load):
        alone = eplb.plan(layer_load, **arguments)
        columns = alone.eplb_table.shape[1]
        assert torch.equal(plan.eplb_table[layer, :, :columns], alone.eplb_table)
        assert (plan.eplb_table[layer, :, columns:] == -1).all()
        assert torch.equal(plan.placement[layer], alone.placement)
        assert torch.equal(plan.replicas[layer], alone.replicas)
        assert plan.balance_before[layer] == alone.balance_before
        assert plan.balance_after[layer] == alone.balance_after


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float32])
def test_any_real_dtype_and_stride(dtype):
    load = torch.tensor([[7, 0], [1, 0], [4, 0], [2, 0]]).to(dtype)[:, 0]
    expected = eplb.plan(torch.tensor([7.0, 1, 4, 2]).double(), num_ranks=2, num_slots=6)
    result = eplb.plan(load, num_ranks=2, num_slots=6)
    assert torch.equal(result.eplb_table, expected.eplb_table)
    assert torch.equal(result.load_after, expected.load_after)


def test_a_plan_cannot_be_changed():
    plan = eplb.plan(torch.ones(4), num_ranks=2, num_slots=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_ranks = 3


def test_one_rank_and_no_load():
    plan = eplb.plan(torch.zeros(3), num_ranks=1, num_slots=3)
    assert plan.eplb_table.tolist() == [[1, 0], [1, 1], [1, 2]]
    assert plan.balance_before == plan.balance_after == 1


@st.composite
def planned(draw):
    """Draw a load and sizes."""
    nodes = draw(st.integers(1, 3))
    ranks = nodes * draw(st.integers(1, 4))
    groups = draw(st.none() | st.integers(1, 2).map(lambda each: each * nodes))
    experts = draw(st.integers(1, 4)) * (groups or draw(st.integers(1, 4)))
    most = experts * (ranks if groups is None else ranks // nodes)
    slots = ranks * draw(st.integers(-(-experts // ranks), most // ranks))
    load = draw(st.lists(LOADS, min_size=experts, max_size=experts))
    sizes = {"num_ranks": ranks, "num_slots": slots, "num_nodes": nodes, "num_groups": groups}
    return torch.tensor(load, dtype=torch.float64), sizes | {
        "balance_mode": draw(st.sampled_from([0, 1]))
    }


@hypothesis.given(planned())
def test_every_plan(case):
    load, sizes = case
    experts, ranks, slots = len(load), sizes["num_ranks"], sizes["num_slots"]
    plan, greedy = eplb.plan(load, **sizes), eplb.plan_greedy(load, **sizes)
    for one in (plan, greedy):
        assert one.placement.shape == (slots,) and one.placement.dtype == torch.int64
        assert one.replicas.min() >= 1 and one.replicas.sum() == slots
        assert one.eplb_table.dtype == torch.int32 and one.eplb_table.is_contiguous()
        count = one.eplb_table[:, 0]
        columns = one.eplb_table.shape[1]
        assert 2 <= columns <= ranks + 1
        assert count.min() >= 1 and count.max() == columns - 1
        for expert, row in enumerate(one.eplb_table.tolist()):
            used, unused = row[1 : 1 + row[0]], row[1 + row[0] :]
            assert all(one.placement[slot] == expert for slot in used)
            assert set(unused) <= {-1}
        for total in (one.load_before.sum(), one.load_after.sum()):
            torch.testing.assert_close(total, load.sum())
        assert one.balance_after >= 1 - 1e-12
        if sizes["num_groups"] is not None:
            node = one.ranks // (ranks // sizes["num_nodes"])
            group = one.placement // (experts // sizes["num_groups"])
            homes = set(zip(group.tolist(), node.tolist(), strict=True))
            assert len(homes) == sizes["num_groups"]
    for held in plan.placement.view(ranks, -1).tolist():
        assert held == sorted(set(held)), "two replicas on one rank, or out of order"
    assert plan.balance_after <= greedy.balance_after * (1 + 1e-9)
    again = eplb.plan(load, **sizes)
    assert torch.equal(again.eplb_table, plan.eplb_table)
    assert torch.equal(again.placement, plan.placement)


def test_search_improves_the_packing_of_groups():
    """Heaviest first packs 8 5 4 and 7 6 0; the search exchanges groups."""
    load = torch.tensor([8.0, 7, 6, 5, 4, 0])
    arguments = {"num_ranks": 2, "num_slots": 6, "num_nodes": 2, "num_groups": 6}
    assert eplb.plan_greedy(load, **arguments).load_after.max() == 17
    assert eplb.plan(load, **arguments).load_after.tolist() == [15, 15]


# (ranks, slots): 32 redundant experts, or 64 if 288 slots do not divide by the ranks.
SHAPES = [(8, 288), (16, 288), (32, 288), (64, 320)]


@pytest.mark.parametrize("balance_mode", [0, 1])
@pytest.mark.parametrize("num_ranks, num_slots", SHAPES)
@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.0, 1.2, 1.4, 1.6])
def test_deepseek_v3_is_balanced(exponent, num_ranks, num_slots, balance_mode):
    load = zipf(exponent)
    arguments = {"num_ranks": num_ranks, "num_slots": num_slots, "balance_mode": balance_mode}
    plan = eplb.plan(load, **arguments)
    assert plan.balance_after < 1.1
    assert plan.balance_after <= eplb.plan_greedy(load, **arguments).balance_after * (1 + 1e-9)


def test_lower_bound_of_a_hot_expert_by_rank():
    """The hottest expert weighs 19.5 times the mean of 32 ranks, in 32nds of 0.61.

    A rank with two of them has 1.22. Without such a rank, all 32 hold a replica; of the 32
    redundant ones that leaves one for the second expert, 4.9 times the mean, and a rank with half.
    """
    load = zipf(2)
    hottest, second = (load * 32 / load.sum()).topk(2).values
    least = torch.minimum(hottest / 16, hottest / 32 + second / 2)
    assert 1.21 < least < 1.23
    plan = eplb.plan(load, num_ranks=32, num_slots=288)
    assert least <= plan.balance_after < least + 0.005


GIVEN = {"load": torch.ones(8), "num_ranks": 4, "num_slots": 12}
REFUSED = {
    "a list": ({"load": [1, 2]}, TypeError, "load must be a tensor, got list"),
    "complex": ({"load": torch.ones(8) * 1j}, TypeError, "load must be of a real dtype"),
    "bool": ({"load": torch.ones(8) > 0}, TypeError, "load must be of a real dtype"),
    "no dimension": ({"load": torch.tensor(1.0)}, ValueError, "load must have shape"),
    "no expert": ({"load": torch.ones(0)}, ValueError, "load must have shape"),
    "no layer": ({"load": torch.ones(0, 8)}, ValueError, "load must have shape"),
    "negative": ({"load": -torch.ones(8)}, ValueError, "not negative, got -1"),
    "NaN": ({"load": torch.full((8,), torch.nan)}, ValueError, "got nan"),
    "infinite": ({"load": torch.full((8,), torch.inf)}, ValueError, "got an infinite sum"),
    "float": ({"num_ranks": 4.0}, TypeError, "num_ranks must be an integer, got 4.0"),
    "True": ({"num_nodes": True}, TypeError, "num_nodes must be an integer, got True"),
    "no rank": ({"num_ranks": 0}, ValueError, "num_ranks must be positive, got 0"),
    "does not divide": ({"num_slots": 10}, ValueError, "multiple of num_ranks = 4 from 8 to 32"),
    "too few": ({"num_slots": 4}, ValueError, "num_slots must be"),
    "too many": ({"num_slots": 36}, ValueError, "num_slots must be"),
    "nodes": ({"num_nodes": 3}, ValueError, "num_nodes must be a positive divisor"),
    "groups": ({"num_groups": 3}, ValueError, "num_groups must be a multiple of num_nodes = 1"),
    "groups of nodes": ({"num_nodes": 2, "num_groups": 1}, ValueError, "num_groups must be"),
    "too many in a node": (
        {"num_nodes": 2, "num_groups": 2, "num_slots": 20},
        ValueError,
        "from 8 to 16 .8 experts, each on at most 2 ranks.",
    ),
    "mode": ({"balance_mode": 2}, ValueError, "balance_mode must be 0"),
}


@pytest.mark.parametrize("op", [eplb.plan, eplb.plan_greedy], ids=["plan", "plan_greedy"])
@pytest.mark.parametrize("changes, kind, message", REFUSED.values(), ids=REFUSED)
def test_refusals(op, changes, kind, message):
    arguments = GIVEN | changes
    load = arguments.pop("load")
    with pytest.raises(kind, match=f"eplb.{op.__name__}: .*{message}") as caught:
        op(load, **arguments)
    assert isinstance(caught.value, MoeError)
    assert caught.value.argument in changes

"""The plan's kernels against its definition."""

from __future__ import annotations

import dataclasses
import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import ArgumentTypeError, ArgumentValueError
from moe_triton.kernels import launch_config
from moe_triton.layout import NOWHERE, RoutingCopies


def assert_same_plan(expert_ids, num_experts):
    actual, expected = (
        kernels.routing_plan(expert_ids, num_experts),
        ref.routing_plan(expert_ids, num_experts),
    )
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        assert one.dtype == other.dtype == torch.int32
        assert one.tolist() == other.tolist(), name


def draw(num_tokens, top_k, num_experts, device, seed=0):
    """Ids with duplicates, NOWHERE, ids of zero-computation experts and ids beyond all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, num_experts + 2, (num_tokens, top_k), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.05] = 2**31 - 1
    return ids.int().to(device)


def test_example(steps, device):
    """The numbers of the kernel's docstring."""
    ids = torch.tensor([[0, 2], [2, 1], [0, 3]], dtype=torch.int32, device=device)
    plan = steps.routing_plan(ids, 4)
    assert plan.counts.tolist() == [2, 1, 2, 1]
    assert plan.position_in_expert.tolist() == [0, 0, 1, 0, 1, 0]
    assert plan.sorted_slot_ids.tolist() == [0, 4, 3, 1, 2, 5]


def test_ids_of_no_routed_expert_are_not_sent(steps, device):
    ids = torch.tensor([[0, NOWHERE], [2, 0], [1, 3]], dtype=torch.int32, device=device)
    plan = steps.routing_plan(ids, 2)
    assert plan.counts.tolist() == [2, 1]
    assert plan.position_in_expert.tolist() == [0, NOWHERE, NOWHERE, 1, 0, NOWHERE]
    assert plan.sorted_slot_ids.tolist() == [0, 3, 4, 1, 2, 5]


def test_example_in_blocks(device, monkeypatch):
    """The numbers of the docstrings of the three kernels of many slots."""
    few = dataclasses.replace(launch_config.policy(device), compared=0, ranked=4)
    monkeypatch.setattr(launch_config, "policy", lambda device: few)
    test_example(kernels, device)
    ids = torch.tensor([0, 2, 2, 1, 0, 3], dtype=torch.int32, device=device)
    module = importlib.import_module("moe_triton.kernels.routing_plan")
    histogram, starts = torch.full((2, 2, 5), -7, dtype=torch.int32, device=device)
    module._histogram_kernel[(1,)](ids, histogram, 6, 4, 2, BLOCK=4, BINS=8)
    assert histogram.tolist() == [[1, 1, 2, 0, 0], [1, 0, 0, 1, 2]]
    counts, first = torch.full((2, 5), -7, dtype=torch.int32, device=device)
    module._block_starts_kernel[(1,)](histogram, starts, counts, first, 4, 2, BLOCKS=2, EXPERTS=8)
    assert counts.tolist() == [2, 1, 2, 1, -7]
    assert first.tolist() == [0, 2, 3, 5, 6]
    assert starts.tolist() == [[0, 2, 3, 5, 6], [1, 3, 5, 5, 6]]


@pytest.mark.parametrize(
    "T, K, E",
    [
        pytest.param(0, 2, 3, id="no tokens"),
        pytest.param(1, 1, 1, id="smallest"),
        pytest.param(5, 3, 300, id="more experts than a program compares at a time"),
        pytest.param(33, 8, 7, id="one past the slots that are compared"),
        pytest.param(64, 4, 5, id="just the slots that are compared"),
        pytest.param(129, 8, 256, id="three blocks, the last short"),
        pytest.param(70, 8, 700, id="experts in three stretches"),
        pytest.param(2048, 8, 64, id="many blocks"),
    ],
)
def test_matches_ref(T, K, E, device):
    assert_same_plan(draw(T, K, E, device), E)


@pytest.mark.parametrize("num_tokens", [40, 700])
@pytest.mark.parametrize("expert", [0, 4, NOWHERE, 5])
def test_all_tokens_to_one_expert(num_tokens, expert, device):
    ids = torch.full((num_tokens, 1), expert, dtype=torch.int32, device=device)
    assert_same_plan(ids, 5)


@hypothesis.given(
    num_tokens=st.integers(0, 90),
    top_k=st.integers(1, 9),
    num_experts=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
def test_plans_of_any_size(num_tokens, top_k, num_experts, seed, device):
    assert_same_plan(draw(num_tokens, top_k, num_experts, device, seed), num_experts)


def test_more_blocks_than_are_summed_at_a_time(device, monkeypatch):
    few = dataclasses.replace(launch_config.policy(device), tile=512, compared=0, ranked=4)
    monkeypatch.setattr(launch_config, "policy", lambda device: few)
    assert_same_plan(draw(150, 4, 5, device), 5)


def test_strided_and_64_bit_ids(device):
    ids = draw(50, 8, 16, device)
    assert_same_plan(ids[:, ::2], 16)
    assert_same_plan(ids.long() * 2**20, 16)
    assert_same_plan(ids.long() + 2**32, 16)


@pytest.mark.parametrize("T, K", [(0, 2), (40, 3), (700, 8)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_copies(T, K, dtype, device):
    ids = draw(T, K, 16, device).to(dtype)
    given = torch.rand((T, 2 * K)).to(device)[:, ::2]
    for weights in (given, given.double(), None):
        copies = RoutingCopies(
            torch.full((T, K), -7, dtype=torch.int32, device=device),
            weights,
            None if weights is None else torch.full_like(weights, -7.0).contiguous(),
        )
        for one, other in zip(
            kernels.routing_plan(ids, 16, copies), ref.routing_plan(ids, 16), strict=True
        ):
            assert one.tolist() == other.tolist()
        assert copies.expert_ids.tolist() == ids.tolist()
        if weights is not None:
            assert copies.weights_copy.tolist() == weights.tolist()


def test_both_ways_are_taken(device):
    few, many = (launch_config.plan_launch(device, n).compare for n in (256, 2**15))
    assert few
    assert not many


def test_rejects(device):
    with pytest.raises(ArgumentTypeError, match="expert_ids must be one of"):
        kernels.routing_plan(torch.zeros((2, 2), device=device), 4)
    with pytest.raises(ArgumentValueError, match="expert_ids must have the shape"):
        kernels.routing_plan(torch.zeros(2, dtype=torch.int32, device=device), 4)
    ids = torch.zeros((2, 2), dtype=torch.int32, device=device)
    weights = torch.zeros((2, 2), device=device)
    with pytest.raises(ArgumentTypeError, match=r"copies\.expert_ids must be one of"):
        kernels.routing_plan(ids, 4, RoutingCopies(ids.long()))
    with pytest.raises(ArgumentValueError, match=r"copies\.weights must have the shape"):
        kernels.routing_plan(ids, 4, RoutingCopies(ids, weights[:1], weights))
    with pytest.raises(ArgumentTypeError, match=r"copies\.weights_copy must be one of"):
        kernels.routing_plan(ids, 4, RoutingCopies(ids, weights, weights.double()))

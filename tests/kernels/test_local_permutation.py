"""Tokens planned and sorted by the experts of their own rank, against the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from row_index_cases import ALIGNMENTS, CAPACITIES, capacity_of, drawn_ids, same

from moe_triton import kernels, ref
from moe_triton.errors import ArgumentTypeError, ArgumentValueError
from moe_triton.kernels import launch_config
from moe_triton.layout import NOWHERE, RoutingCopies


@pytest.fixture(params=["compared", "planned"])
def both_ways(request, device, monkeypatch):
    """Slots are compared with each other, as they are few, or planned first."""
    if request.param == "planned":
        limits = dataclasses.replace(launch_config.policy(device), compared=0)
        monkeypatch.setattr(launch_config, "policy", lambda device: limits)


@ALIGNMENTS
@CAPACITIES
@pytest.mark.parametrize("T, K, E", [(0, 2, 4), (1, 1, 1), (13, 3, 5), (30, 8, 300)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.usefixtures("both_ways")
def test_permutation(T, K, E, dtype, alignment, spare, device):
    ids = drawn_ids(T, K, E, device).to(dtype)
    counts = ref.routing_plan(ids, E).counts
    capacity = capacity_of(counts[:, None], alignment, spare)
    weights = torch.rand((T, K)).to(device)
    for given, totals in ((weights, torch.int64), (None, torch.int32)):
        options = {"alignment": alignment, "capacity": capacity, "totals_dtype": totals}
        loads = torch.full((2, E), 2**33, device=device)
        actual = kernels.local_permutation(ids, E, given, load=loads[0], **options)
        same(actual, ref.local_permutation(ids, E, given, load=loads[1], **options))
        assert torch.equal(loads[0], loads[1])
        assert torch.equal(loads[0] - 2**33, counts.long())


@pytest.mark.usefixtures("both_ways")
def test_examples(steps, device):
    """The numbers of the docstrings of the kernels."""
    ids = torch.tensor([[2, 0], [NOWHERE, 2]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5, 0.25], [0.75, 1.0]], device=device)
    actual = steps.local_permutation(ids, 3, weights, capacity=4)
    assert actual.counts.tolist() == [1, 0, 2]
    assert actual.position_in_expert.tolist() == [0, 0, NOWHERE, 1]
    assert actual.row_index.tolist() == [[1, 0], [NOWHERE, 2]]
    assert actual.slot_ids.tolist() == [1, 0, 3, NOWHERE]
    assert actual.weights.tolist() == [0.25, 0.5, 1.0, 0.0]
    assert actual.recv_permutation.offsets.tolist() == [1, 1, 3]
    actual = steps.local_permutation(ids, 3, weights, alignment=2, capacity=5)
    assert actual.row_index.tolist() == [[2, 0], [NOWHERE, 3]]
    assert actual.slot_ids.tolist() == [1, NOWHERE, 0, 3, NOWHERE]
    assert actual.weights.tolist() == [0.25, 0.0, 0.5, 1.0, 0.0]
    assert actual.recv_permutation.offsets.tolist() == [2, 2, 4]


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.usefixtures("both_ways")
def test_a_capacity_that_is_too_small_cuts_the_end_off(alignment, device):
    ids = drawn_ids(13, 3, 5, device)
    weights = torch.rand((13, 3)).to(device)
    options = {"alignment": alignment, "capacity": 17}
    actual = kernels.local_permutation(ids, 5, weights, **options)
    same(actual, ref.local_permutation(ids, 5, weights, **options))
    assert int(actual.row_index.max()) < 17
    assert int(actual.recv_permutation.offsets[-1]) == 17


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.usefixtures("both_ways")
def test_copies(alignment, dtype, device):
    ids = drawn_ids(13, 3, 5, device).to(dtype)
    given = torch.rand((13, 6)).to(device)[:, ::2]
    for weights in (given, given.double(), None):
        copies = RoutingCopies(
            torch.full((13, 3), -7, dtype=torch.int32, device=device),
            weights,
            None if weights is None else torch.full_like(weights, -7.0).contiguous(),
        )
        actual = kernels.local_permutation(ids, 5, weights, copies, alignment=alignment)
        same(actual, ref.local_permutation(ids, 5, weights, alignment=alignment))
        assert copies.expert_ids.tolist() == ids.tolist()
        if copies.weights_copy is not None:
            assert copies.weights_copy.tolist() == weights.tolist()


@pytest.mark.usefixtures("both_ways")
def test_more_experts_than_a_block_holds(device):
    ids = drawn_ids(50, 4, 1100, device)
    same(kernels.local_permutation(ids, 1100, None), ref.local_permutation(ids, 1100, None))


@pytest.mark.usefixtures("both_ways")
def test_more_rows_than_slots(device):
    """The rows of a small batch are a part of those of the largest."""
    ids = drawn_ids(3, 2, 5, device)
    actual = kernels.local_permutation(ids, 5, None, capacity=40_000)
    same(actual, ref.local_permutation(ids, 5, None, capacity=40_000))


def test_refusals(device):
    ids = torch.zeros((2, 1), dtype=torch.int32, device=device)
    with pytest.raises(ArgumentTypeError, match="expert_ids"):
        kernels.local_permutation(ids.float(), 2, None)
    with pytest.raises(ArgumentValueError, match="weights"):
        kernels.local_permutation(ids, 2, torch.ones((1, 2), device=device))
    with pytest.raises(ArgumentTypeError, match="weights"):
        kernels.local_permutation(ids, 2, ids)
    with pytest.raises(ArgumentTypeError, match=r"copies\.expert_ids"):
        kernels.local_permutation(ids, 2, None, RoutingCopies(ids.long()))
    for alignment in (1, 8):
        with pytest.raises(ArgumentTypeError, match="load"):
            kernels.local_permutation(ids, 2, None, alignment=alignment, load=ids[:, 0])
    for alignment in (0, -8):
        with pytest.raises(ArgumentValueError, match="alignment"):
            kernels.local_permutation(ids, 2, None, alignment=alignment)

"""Tokens sorted by the experts of their own rank, against the definition."""

from __future__ import annotations

import pytest
import torch
from row_index_cases import ALIGNMENTS, CAPACITIES, capacity_of, drawn_ids, same

from moe_triton import kernels, ref
from moe_triton.errors import ArgumentTypeError, ArgumentValueError
from moe_triton.layout import NOWHERE


@ALIGNMENTS
@CAPACITIES
@pytest.mark.parametrize("T, K, E", [(0, 2, 4), (1, 1, 1), (13, 3, 5), (300, 8, 40)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_permutation(T, K, E, dtype, alignment, spare, device):
    ids = drawn_ids(T, K, E, device).to(dtype)
    plan = ref.routing_plan(ids, E)
    capacity = capacity_of(plan.counts[:, None], alignment, spare)
    weights = torch.rand((T, K)).to(device)
    for given, totals in ((weights, torch.int64), (None, torch.int32)):
        options = {"alignment": alignment, "capacity": capacity, "totals_dtype": totals}
        loads = torch.full((2, E), 2**33, device=device)
        actual = kernels.local_permutation(plan, ids, given, load=loads[0], **options)
        same(actual, ref.local_permutation(plan, ids, given, load=loads[1], **options))
        assert torch.equal(loads[0], loads[1])
        assert torch.equal(loads[0] - 2**33, plan.counts.long())


def test_examples(device):
    """The numbers of the docstrings of the two kernels."""
    ids = torch.tensor([[2, 0], [NOWHERE, 2]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5, 0.25], [0.75, 1.0]], device=device)
    plan = kernels.routing_plan(ids, 3)
    actual = kernels.local_permutation(plan, ids, weights, capacity=4)
    assert actual.row_index.tolist() == [[1, 0], [NOWHERE, 2]]
    assert actual.slot_ids.tolist() == [1, 0, 3, NOWHERE]
    assert actual.weights.tolist() == [0.25, 0.5, 1.0, 0.0]
    assert actual.recv_permutation.offsets.tolist() == [1, 1, 3]
    actual = kernels.local_permutation(plan, ids, weights, alignment=2, capacity=5)
    assert actual.row_index.tolist() == [[2, 0], [NOWHERE, 3]]
    assert actual.slot_ids.tolist() == [1, NOWHERE, 0, 3, NOWHERE]
    assert actual.weights.tolist() == [0.25, 0.0, 0.5, 1.0, 0.0]
    assert actual.recv_permutation.offsets.tolist() == [2, 2, 4]


@pytest.mark.parametrize("alignment", [1, 4])
def test_a_capacity_that_is_too_small_cuts_the_end_off(alignment, device):
    ids = drawn_ids(13, 3, 5, device)
    plan, weights = ref.routing_plan(ids, 5), torch.rand((13, 3)).to(device)
    options = {"alignment": alignment, "capacity": 17}
    actual = kernels.local_permutation(plan, ids, weights, **options)
    same(actual, ref.local_permutation(plan, ids, weights, **options))
    assert int(actual.row_index.max()) < 17
    assert int(actual.recv_permutation.offsets[-1]) == 17


def test_more_experts_than_a_block_holds(device):
    ids = drawn_ids(50, 4, 9000, device)
    plan = ref.routing_plan(ids, 9000)
    same(kernels.local_permutation(plan, ids, None), ref.local_permutation(plan, ids, None))


def test_refusals(device):
    ids = torch.zeros((2, 1), dtype=torch.int32, device=device)
    plan = kernels.routing_plan(ids, 2)
    with pytest.raises(ArgumentValueError, match="weights"):
        kernels.local_permutation(plan, ids, torch.ones((1, 2), device=device))
    with pytest.raises(ArgumentTypeError, match="weights"):
        kernels.local_permutation(plan, ids, ids)
    for alignment in (1, 8):
        with pytest.raises(ArgumentTypeError, match="load"):
            kernels.local_permutation(plan, ids, None, alignment=alignment, load=plan.counts)
    for alignment in (0, -8):
        with pytest.raises(ArgumentValueError, match="alignment"):
            kernels.local_permutation(plan, ids, None, alignment=alignment)

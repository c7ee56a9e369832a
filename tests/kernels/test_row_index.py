"""Addresses of rows against their definition, with the slot ids and weights of received rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from row_index_cases import ALIGNMENTS, CAPACITIES, capacity_of, drawn_ids, same

from moe_triton import kernels, ref
from moe_triton.errors import ArgumentTypeError, ArgumentValueError, MissingArgumentError
from moe_triton.kernels import launch_config
from moe_triton.layout import NOWHERE


def drawn_headers(L, W, per_token, seed, device):
    """Counts [L, W], slot ids [W, C] and their weights, poison past the counts."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (L, W), generator=generator, dtype=torch.int32)
    counts[:, torch.rand(W, generator=generator) < 0.3] = 0
    longest = int(counts.sum(0).max()) + 2
    slot_ids = torch.full((W, longest), 2**30, dtype=torch.int32)
    weights = torch.full((W, longest + 3), float("nan"))
    for source in range(W):
        n = int(counts[:, source].sum())
        slot_ids[source, :n] = torch.randperm(n * per_token, generator=generator)[:n].int()
        weights[source, :n] = torch.rand(n, generator=generator)
    return counts.to(device), slot_ids.to(device), weights.to(device)


@ALIGNMENTS
@CAPACITIES
@pytest.mark.parametrize("L, W", [(1, 1), (3, 4), (32, 8)])
def test_recv_row_index(L, W, alignment, spare, device):
    counts, slot_ids, weights = drawn_headers(L, W, 3, L + W, device)
    capacity = capacity_of(counts, alignment, spare)
    origins = torch.arange(W, device=device) * 1000 + 2**33
    options = {"slots_per_row": 3, "alignment": alignment, "capacity": capacity}
    for given, dtype in ((weights, torch.int64), (None, torch.int32)):
        options["totals_dtype"] = dtype
        arguments = (counts, slot_ids, given)
        actual = kernels.recv_row_index(*arguments, origins=origins, step=7, **options)
        same(actual, ref.recv_row_index(*arguments, origins=origins, step=7, **options))


@ALIGNMENTS
@pytest.mark.parametrize("L, W", [(1, 1), (3, 4), (300, 8)])
def test_load_is_added_up(L, W, alignment, device):
    """Rows without padding are added, those past the capacity too."""
    counts, slot_ids, _ = drawn_headers(L, W, 1, L + W, device)
    origins = torch.zeros(W, dtype=torch.int64, device=device)
    before = torch.arange(L, device=device) + 2**33
    for recv_row_index in (kernels.recv_row_index, ref.recv_row_index):
        for capacity in (0, None):
            options = {"alignment": alignment, "capacity": capacity, "slots_per_row": 1}
            load = before.clone()
            recv_row_index(counts, slot_ids, None, origins=origins, load=load, **options)
            assert torch.equal(load, before + counts.sum(1))


@ALIGNMENTS
def test_recv_row_index_by_a_table(alignment, device):
    counts, slot_ids, weights = drawn_headers(4, 3, 2, 0, device)
    table = torch.randperm(3 * 50, device=device).view(3, 50)
    options = {"slots_per_row": 1, "table": table, "alignment": alignment}
    same(
        kernels.recv_row_index(counts, slot_ids, weights.double(), **options),
        ref.recv_row_index(counts, slot_ids, weights.double(), **options),
    )


def test_slots_past_the_room_of_their_source(device):
    """Duplicate expert ids of a token: rows past the slot ids of the source are zeros."""
    counts = torch.tensor([[3]], dtype=torch.int32, device=device)
    slot_ids = torch.tensor([[7, 8, 9]], dtype=torch.int32, device=device)[:, :2]
    weights = torch.ones((1, 3), device=device)[:, :2]
    origins = torch.tensor([100], device=device)
    actual = kernels.recv_row_index(counts, slot_ids, weights, slots_per_row=1, origins=origins)
    assert actual.slot_ids.tolist() == [7, 8, NOWHERE]
    assert actual.row_index.tolist() == [107, 108, NOWHERE]
    assert actual.weights.tolist() == [1.0, 1.0, 0.0]


def test_recv_row_index_example(device):
    """The numbers of the kernel's docstring."""
    counts = torch.tensor([[1, 0], [1, 2]], dtype=torch.int32, device=device)
    slot_ids = torch.tensor([[4, 1, -7], [0, 5, -7]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5, 0.25, 9.0], [0.125, 1.0, 9.0]], device=device)
    origins = torch.tensor([100, 200], device=device)
    actual = kernels.recv_row_index(
        counts, slot_ids, weights, slots_per_row=2, origins=origins, step=10, capacity=6
    )
    assert actual.recv_permutation.source.tolist() == [0, 0, 1, 1, NOWHERE, NOWHERE]
    assert actual.slot_ids.tolist() == [4, 1, 0, 5, NOWHERE, NOWHERE]
    assert actual.row_index.tolist() == [120, 100, 200, 220, NOWHERE, NOWHERE]
    assert actual.weights.tolist() == [0.5, 0.25, 0.125, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("T, K", [(0, 2), (1, 1), (37, 3), (1500, 8)])
def test_combine_row_index(T, K, num_shared, device):
    """For the first and last rank of a group in which each shared expert has a rank."""
    moe_ranks, L = 4, 10
    E, W = moe_ranks * L, moe_ranks + num_shared
    ids = drawn_ids(T, K, E, device, seed=K)
    ids[1::5] = NOWHERE  # inactive tokens
    plan = ref.routing_plan(ids, E)
    generator = torch.Generator().manual_seed(T)
    group_starts = torch.randint(0, 2**20, (W, L, W + 1), generator=generator, dtype=torch.int32)
    origins = torch.randint(0, 2**40, (W,), generator=generator).to(device)
    for rank in (0, W - 1):
        options = {
            "rank": rank,
            "num_shared_ranks": num_shared,
            "shared_ranks": range(num_shared),
            "origins": origins,
            "step": 449,
        }
        actual = kernels.combine_row_index(group_starts.to(device), plan, ids, **options)
        expected = ref.combine_row_index(group_starts.to(device), plan, ids, **options)
        assert actual.dtype == expected.dtype == torch.int64
        assert actual.tolist() == expected.tolist()


def test_rows_past_the_capacity_have_no_address(device):
    """The numbers of the kernel's docstring, then room for 3 routed rows and 2 shared ones."""
    ids = torch.tensor([[0, 1], [NOWHERE, 0], [1, 0]], dtype=torch.int32, device=device)
    # Rank 1 has three rows of expert 0 and two of expert 1, rank 0 three of the shared expert.
    group_starts = torch.tensor([[[0, 3, 3], [0, 0, 0]], [[0, 3, 3], [3, 5, 5]]], dtype=torch.int32)
    options = {
        "rank": 0,
        "num_shared_ranks": 1,
        "shared_ranks": (0,),
        "origins": torch.tensor([100, 200], device=device),
    }
    for steps in (kernels, ref):
        given = group_starts.to(device), ref.routing_plan(ids, 2), ids
        every = steps.combine_row_index(*given, **options)
        assert every.tolist() == [[200, 203, 100], [NOWHERE, 201, 101], [204, 202, 102]]
        some = steps.combine_row_index(*given, **options, capacity=3, shared_capacity=2)
        assert some.tolist() == [[200, NOWHERE, 100], [NOWHERE, 201, 101], [NOWHERE, 202, NOWHERE]]


def test_combine_row_index_in_several_tiles(device, monkeypatch):
    few = dataclasses.replace(launch_config.policy(device), line=32)
    monkeypatch.setattr(launch_config, "policy", lambda device: few)
    test_combine_row_index(37, 3, 2, device)


def test_refusals(device):
    counts = torch.ones((2, 3), dtype=torch.int32, device=device)
    slot_ids = torch.zeros((3, 4), dtype=torch.int32, device=device)
    origins = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(MissingArgumentError, match="origins"):
        kernels.recv_row_index(counts, slot_ids, None, slots_per_row=1)
    with pytest.raises(ArgumentTypeError, match="slot_ids"):
        kernels.recv_row_index(counts, slot_ids.long(), None, slots_per_row=1, origins=origins)
    with pytest.raises(ArgumentValueError, match="origins"):
        kernels.recv_row_index(counts, slot_ids, None, slots_per_row=1, origins=origins[:2])
    with pytest.raises(ArgumentValueError, match="alignment"):
        kernels.recv_row_index(
            counts, slot_ids, None, slots_per_row=1, origins=origins, alignment=0
        )
    given = {"slots_per_row": 1, "origins": origins}
    with pytest.raises(ArgumentTypeError, match="load"):
        kernels.recv_row_index(counts, slot_ids, None, load=counts[:, 0], **given)
    with pytest.raises(ArgumentValueError, match="load"):
        kernels.recv_row_index(counts, slot_ids, None, load=origins, **given)
    ids = torch.zeros((2, 1), dtype=torch.int32, device=device)
    group_starts = torch.zeros((3, 2, 3), dtype=torch.int32, device=device)
    with pytest.raises(ArgumentValueError, match=r"W, L, W \+ 1"):
        kernels.combine_row_index(
            group_starts,
            kernels.routing_plan(ids, 2),
            ids,
            rank=0,
            num_shared_ranks=0,
            shared_ranks=(),
            origins=origins,
        )

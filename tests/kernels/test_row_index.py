"""Indices of rows against their definition, with the slot ids and weights of received rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from row_index_cases import ALIGNMENTS, CAPACITIES, capacity_of, drawn_ids, same

from moe_triton import kernels, ref
from moe_triton.errors import ArgumentTypeError, ArgumentValueError
from moe_triton.kernels import launch_config
from moe_triton.layout import NOWHERE


def drawn_sources(L, W, per_token, seed, device):
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
    counts, slot_ids, weights = drawn_sources(L, W, 3, L + W, device)
    capacity = capacity_of(counts, alignment, spare)
    table = torch.randperm(W * 500, device=device).view(W, 500) + 2**33
    options = {"slots_per_row": 3, "alignment": alignment, "capacity": capacity, "table": table}
    for given, dtype in ((weights, torch.int64), (None, torch.int32)):
        options["totals_dtype"] = dtype
        arguments = (counts, slot_ids, given)
        actual = kernels.recv_row_index(*arguments, **options)
        same(actual, ref.recv_row_index(*arguments, **options))


@ALIGNMENTS
@pytest.mark.parametrize("L, W", [(1, 1), (3, 4), (300, 8)])
def test_load_is_added_up(L, W, alignment, device):
    """Rows without padding are added, those past the capacity too."""
    counts, slot_ids, _ = drawn_sources(L, W, 1, L + W, device)
    table = torch.zeros((W, slot_ids.shape[1] * 2 + 2000), dtype=torch.int64, device=device)
    before = torch.arange(L, device=device) + 2**33
    for recv_row_index in (kernels.recv_row_index, ref.recv_row_index):
        for capacity in (0, None):
            options = {"alignment": alignment, "capacity": capacity, "slots_per_row": 1}
            load = before.clone()
            recv_row_index(counts, slot_ids, None, table=table, load=load, **options)
            assert torch.equal(load, before + counts.sum(1))


def test_slots_past_the_room_of_their_source(device):
    """Duplicate expert ids of a token: rows past the slot ids of the source are zeros."""
    counts = torch.tensor([[3]], dtype=torch.int32, device=device)
    slot_ids = torch.tensor([[7, 8, 9]], dtype=torch.int32, device=device)[:, :2]
    weights = torch.ones((1, 3), device=device)[:, :2]
    table = torch.arange(100, 110, device=device)[None]
    actual = kernels.recv_row_index(counts, slot_ids, weights, slots_per_row=1, table=table)
    assert actual.slot_ids.tolist() == [7, 8, NOWHERE]
    assert actual.row_index.tolist() == [107, 108, NOWHERE]
    assert actual.weights.tolist() == [1.0, 1.0, 0.0]


def test_recv_row_index_example(device):
    """The numbers of the kernel's docstring."""
    counts = torch.tensor([[1, 0], [1, 2]], dtype=torch.int32, device=device)
    slot_ids = torch.tensor([[4, 1, -7], [0, 5, -7]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5, 0.25, 9.0], [0.125, 1.0, 9.0]], device=device)
    table = torch.tensor([[100, 110, 120], [200, 210, 220]], device=device)
    actual = kernels.recv_row_index(
        counts, slot_ids, weights, slots_per_row=2, table=table, capacity=6
    )
    assert actual.recv_permutation.source.tolist() == [0, 0, 1, 1, NOWHERE, NOWHERE]
    assert actual.slot_ids.tolist() == [4, 1, 0, 5, NOWHERE, NOWHERE]
    assert actual.row_index.tolist() == [120, 100, 200, 220, NOWHERE, NOWHERE]
    assert actual.weights.tolist() == [0.5, 0.25, 0.125, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("T, K", [(0, 2), (1, 1), (37, 3), (1500, 8)])
def test_combine_row_index(T, K, device):
    E = 40
    ids = drawn_ids(T, K, E, device, seed=K)
    ids[1::5] = NOWHERE  # inactive tokens
    plan = ref.routing_plan(ids, E)
    group_starts = torch.randint(0, 2**20, (E, 2), dtype=torch.int32, device=device)
    actual = kernels.combine_row_index(group_starts, plan, ids)
    expected = ref.combine_row_index(group_starts, plan, ids)
    assert actual.dtype == expected.dtype == torch.int64
    assert actual.tolist() == expected.tolist()


def test_rows_past_the_capacity_have_no_index(device):
    """The numbers of the kernel's docstring, then room for 3 rows."""
    ids = torch.tensor([[0, 1], [NOWHERE, 0], [1, 0]], dtype=torch.int32, device=device)
    group_starts = torch.tensor([[0, 3], [3, 5]], dtype=torch.int32, device=device)
    for steps in (kernels, ref):
        given = group_starts, ref.routing_plan(ids, 2), ids
        assert steps.combine_row_index(*given).tolist() == [[0, 3], [NOWHERE, 1], [4, 2]]
        some = steps.combine_row_index(*given, capacity=3)
        assert some.tolist() == [[0, NOWHERE], [NOWHERE, 1], [NOWHERE, 2]]


def test_combine_row_index_in_several_tiles(device, monkeypatch):
    few = dataclasses.replace(launch_config.policy(device), line=32)
    monkeypatch.setattr(launch_config, "policy", lambda device: few)
    test_combine_row_index(37, 3, device)


def test_refusals(device):
    counts = torch.ones((2, 3), dtype=torch.int32, device=device)
    slot_ids = torch.zeros((3, 4), dtype=torch.int32, device=device)
    given = {"slots_per_row": 1, "table": torch.zeros((3, 4), dtype=torch.int64, device=device)}
    with pytest.raises(ArgumentTypeError, match="slot_ids"):
        kernels.recv_row_index(counts, slot_ids.long(), None, **given)
    with pytest.raises(ArgumentValueError, match="table"):
        kernels.recv_row_index(counts, slot_ids, None, slots_per_row=1, table=given["table"][:2])
    with pytest.raises(ArgumentValueError, match="alignment"):
        kernels.recv_row_index(counts, slot_ids, None, alignment=0, **given)
    with pytest.raises(ArgumentTypeError, match="load"):
        kernels.recv_row_index(counts, slot_ids, None, load=counts[:, 0], **given)
    load = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ArgumentValueError, match="load"):
        kernels.recv_row_index(counts, slot_ids, None, load=load, **given)
    ids = torch.zeros((2, 1), dtype=torch.int32, device=device)
    group_starts = torch.zeros((3, 2), dtype=torch.int32, device=device)
    with pytest.raises(ArgumentValueError, match=r"group_starts.*\(2, 2\)"):
        kernels.combine_row_index(group_starts, kernels.routing_plan(ids, 2), ids)

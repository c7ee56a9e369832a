"""Replicas and slots below a threshold: against the definition, and by hand."""

from __future__ import annotations

import importlib

import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.kernels.launch_config import Launch

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[None, Launch(3, 1, 4, 1), Launch(2, 4, 8, 1)], ids=["own", "low", "tall"])
def launch(request, monkeypatch):
    """Every shape of tile that a device may get."""
    if request.param is not None:
        module = importlib.import_module("moe_triton.kernels.expert_map")
        monkeypatch.setattr(module, "tiles", lambda *args: request.param)
    return request.param


TABLE = [[1, 5, 0, 0], [2, 0, 4, 0], [3, 1, 3, 6], [2, 7, 2, 0]]
IDS = [[0, 1], [2, 3], [1, 2]]


@pytest.mark.parametrize(
    "ranks, expected",
    [
        ((0, 1, 2), [[5, 0], [1, 7], [0, 1]]),
        ((3,), [[5, 0], [3, 7], [0, 3]]),
        ((4, 5), [[5, 4], [3, 2], [4, 3]]),
        ((6, 7), [[5, 4], [6, 2], [4, 6]]),
        ((None,), [[5, 0], [3, 2], [0, 6]]),
    ],
)
def test_worked_example_of_replicas(ranks, expected, steps, launch, device):
    """The numbers of the kernel's docstring, and those of other ranks."""
    table = torch.tensor(TABLE, dtype=torch.int32, device=device)
    for rank in ranks:
        for dtype in (torch.int32, torch.int64):
            ids = torch.tensor(IDS, dtype=dtype, device=device)
            actual = steps.eplb_map(ids, table, rank=rank, world_size=8)
            assert actual.dtype == dtype
            assert actual.tolist() == expected


@pytest.mark.parametrize("T, K", [(0, 8), (1, 1), (9000, 8), (5, 17)])
@pytest.mark.parametrize("rank", [None, 0, 5, 12])
def test_replicas_of_any_sizes(T, K, rank, device):
    generator = torch.Generator().manual_seed(T + K)
    table = torch.randint(0, 999, (40, 7), generator=generator).int()
    table[:, 0] = torch.randint(1, 7, (40,), generator=generator)
    ids = torch.randint(0, 40, (K, T), generator=generator).T
    ids, table = ids.to(device), table.to(device)
    actual = kernels.eplb_map(ids, table, rank=rank, world_size=13)
    assert torch.equal(actual, ref.eplb_map(ids, table, rank=rank, world_size=13))


@pytest.mark.parametrize(
    "ids, count, message",
    [
        (40, 1, "expert_ids out of range"),
        (-1, 1, "expert_ids out"),
        (0, 0, "replicas"),
        (0, 7, "replicas"),
    ],
)
def test_ids_and_counts_out_of_range_are_errors(ids, count, message, asserting, device):
    table = torch.full((40, 7), count, dtype=torch.int32)
    with pytest.raises(Exception, match=message):
        kernels.eplb_map(torch.tensor([[ids]]), table, rank=0, world_size=8)


def test_worked_example_of_kept_slots(steps, launch, device):
    """The numbers of the kernel's docstring."""
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]], device=device)
    threshold = torch.tensor([0.0, 0.3], device=device)
    active = torch.tensor([True, True, False], device=device)
    keep = steps.keep_experts(weights, threshold, active)
    assert keep.tolist() == [[True, False], [True, True], [False, False]]
    assert steps.keep_experts(weights, threshold, None)[2].tolist() == [True, False]


@pytest.mark.parametrize("columns", [5, 6, 16])
def test_weights_are_summed_in_ascending_order(columns, steps, device):
    # One by one 2**-24 is lost beside 1; the sum of two and more would not be.
    weights = torch.full((1, columns), 2.0**-24, device=device)
    weights[0, 0] = 1.0
    kept = steps.keep_experts(weights, torch.ones(columns, device=device), None)
    assert kept[0].tolist() == [True] + [False] * (columns - 1)


@pytest.mark.parametrize("T, K", [(0, 8), (3, 0), (1, 1), (9000, 6), (70, 17)])
def test_kept_slots_of_any_sizes(T, K, launch, device):
    if launch is not None:
        T = min(T, 70)
    generator = torch.Generator().manual_seed(K)
    # Few distinct weights, so that many equal their threshold.
    weights = torch.randint(0, 4, (T, K), generator=generator) / 3
    threshold = torch.randint(0, 3, (K,), generator=generator) / 24
    active = torch.rand(T, generator=generator) < 0.7
    if T > 4:
        weights[1], weights[2, 0] = NAN, INF
    weights, threshold, active = (x.to(device) for x in (weights, threshold, active))
    keep = kernels.keep_experts(weights, threshold, active)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, ref.keep_experts(weights, threshold, active))
    apart = torch.stack([weights, weights], dim=2)[..., 1]
    assert torch.equal(
        kernels.keep_experts(apart, threshold, None), ref.keep_experts(weights, threshold, None)
    )


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"expert_ids": torch.zeros((1, 2))}, TypeError, "expert_ids must be one of"),
        ({"table": torch.zeros((2, 2)).long()}, TypeError, "table must be one of"),
        ({"table": torch.zeros((2, 1)).int()}, ValueError, "table must have at least 2 columns"),
        ({"rank": 8}, ValueError, r"rank must be in \[0, 8\), got 8"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 8\), got -1"),
    ],
)
def test_replicas_reject(changed, error, message):
    arguments = {
        "expert_ids": torch.zeros((1, 2)).int(),
        "table": torch.ones((2, 2)).int(),
        "rank": 0,
        "world_size": 8,
    } | changed
    with pytest.raises(error, match=f"eplb_map: {message}") as caught:
        kernels.eplb_map(**arguments)
    assert isinstance(caught.value, MoeError)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"weights": torch.ones((2, 3)).double()}, TypeError, "weights must be one of"),
        ({"threshold": torch.ones(2)}, ValueError, r"threshold must have the shape \(3\)"),
        ({"active": torch.ones(2)}, TypeError, "active must be one of"),
        ({"active": torch.ones(3).bool()}, ValueError, r"active must have the shape \(2\)"),
    ],
)
def test_kept_slots_reject(changed, error, message):
    arguments = {"weights": torch.ones((2, 3)), "threshold": torch.ones(3), "active": None}
    with pytest.raises(error, match=f"keep_experts: {message}") as caught:
        kernels.keep_experts(**arguments | changed)
    assert isinstance(caught.value, MoeError)

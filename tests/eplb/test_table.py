"""Columns of a table, and tables from parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_triton import eplb
from moe_triton.eplb import table
from moe_triton.errors import MoeError

# Four experts, three slots on each of two ranks: 0, 1, 2 and 3, 4, 5.
TABLE = torch.tensor([[2, 0, 3], [1, 5, -1], [1, 1, -1], [1, 4, -1]], dtype=torch.int32)


@pytest.mark.parametrize(
    "num_ranks, balance_mode, expected",
    [
        # ceil(8 / 3) = 3 ranks for each replica but the last; ceil(8 / 5) = 2, none for the fifth.
        (8, 0, [[1, 0, 0, 0, 0], [3 / 8, 3 / 8, 1 / 4, 0, 0], [1 / 4] * 4 + [0]]),
        (8, 1, [[1, 0, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0, 0], [1 / 5] * 5]),
    ],
)
def test_shares_of_columns(num_ranks, balance_mode, expected):
    result = table.column_shares(np.array([1, 3, 5]), 5, num_ranks, balance_mode)
    np.testing.assert_allclose(result, expected, rtol=1e-15)


@pytest.mark.parametrize("balance_mode", [0, 1])
def test_load_of_ranks(balance_mode):
    load = torch.tensor([10, 1, 2, 4])
    result = eplb.rank_load(load, TABLE, num_ranks=2, num_slots=6, balance_mode=balance_mode)
    assert result.dtype == torch.float64
    assert result.tolist() == [7, 10]


REFUSED = {
    "layers": ({"load": torch.ones(2, 4)}, ValueError, "load must have shape .E,., got shape"),
    "negative": ({"load": -torch.ones(4)}, ValueError, "load must be finite and not negative"),
    "other experts": ({"load": torch.ones(3)}, ValueError, "E = 3 and F > 1, got shape .4, 3."),
    "layers of tables": ({"eplb_table": TABLE[None]}, ValueError, "eplb_table must have shape"),
    "counts alone": ({"eplb_table": TABLE[:, :1]}, ValueError, "eplb_table must have shape"),
    "a list": ({"eplb_table": TABLE.tolist()}, TypeError, "a tensor of int32, got list"),
    "int64": ({"eplb_table": TABLE.long()}, TypeError, "a tensor of int32, got torch.int64"),
    "no replica": ({"eplb_table": TABLE * 0}, ValueError, r"got \[0, 0, 0\] for expert 0"),
    "a count too many": ({"eplb_table": TABLE + 1}, ValueError, r"got \[3, 1, 4\] for expert 0"),
    "no slot": ({"eplb_table": TABLE.where(TABLE != 4, -1)}, ValueError, r"-1, -1\] for expert 3"),
    "a slot too many": ({"num_slots": 4}, ValueError, r"slots in \[0, 4\), got \[1, 5, -1\]"),
    "no ranks": ({"num_ranks": 0}, ValueError, "num_ranks must be positive, got 0"),
    "does not divide": ({"num_ranks": 4}, ValueError, "positive multiple of num_ranks = 4, got 6"),
    "no slots": ({"num_slots": 0}, ValueError, "num_slots must be a positive multiple"),
    "a float": ({"num_slots": 6.0}, TypeError, "num_slots must be an integer, got 6.0"),
    "mode": ({"balance_mode": 2}, ValueError, "balance_mode must be 0"),
}


@pytest.mark.parametrize("changes, kind, message", REFUSED.values(), ids=REFUSED)
def test_refusals_of_rank_load(changes, kind, message):
    arguments = {
        "load": torch.ones(4),
        "eplb_table": TABLE,
        "num_ranks": 2,
        "num_slots": 6,
    } | changes
    with pytest.raises(kind, match=f"eplb.rank_load: .*{message}") as caught:
        eplb.rank_load(arguments.pop("load"), arguments.pop("eplb_table"), **arguments)
    assert isinstance(caught.value, MoeError)


# Experts 0 on all four ranks, 1 on the second; slots 0 and 1, 2 and 3, ...
PLACEMENT = np.array([0, 2, 0, 1, 0, 3, 0, 4])
PARTS = np.array([[1, 0, 0, 3], [0, 4, 0, 0], [4, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]])


def test_by_rank_a_rank_uses_its_own_replica():
    result = table.of_parts(PARTS, PLACEMENT, 0, 1)
    # Ranks 0 and 3 use their own replica; the others the remaining part of rank 3.
    assert result[0].tolist() == [4, 0, 6, 6, 6]
    assert result[1:].tolist() == [[1, slot, -1, -1, -1] for slot in (3, 1, 5, 7)]


def test_by_rank_a_rank_uses_a_replica_of_its_node():
    """One expert on six ranks of three nodes; ranks 1, 3 and 5 serve no rank."""
    parts, placement = np.array([[3, 0, 2, 0, 1, 0]]), np.zeros(6, np.int64)
    # Rank 3 uses rank 2 of its node, not rank 0; rank 5 uses the remaining part of rank 0.
    assert table.of_parts(parts, placement, 0, 3).tolist() == [[6, 0, 0, 2, 2, 4, 0]]
    assert table.of_parts(parts, placement, 0, 1).tolist() == [[6, 0, 0, 2, 0, 4, 2]]


def test_by_token_parts_are_reduced_and_spread():
    parts = np.array([[2, 0, 4, 2], *PARTS[1:]])
    result = table.of_parts(parts, PLACEMENT, 1, 1)
    # 1 : 2 : 1, without the same replica in adjacent columns.
    assert result[0].tolist() == [4, 4, 0, 6, 4]
    equal = np.array([[2, 2, 2, 2], *PARTS[1:]])
    assert table.of_parts(equal, PLACEMENT, 1, 1)[0].tolist() == [4, 0, 2, 4, 6]


def test_the_first_columns_by_token_are_near_the_parts():
    parts = np.array([7, 3, 0, 2])
    placement = np.array([0, 0, 0, 0])
    (row,) = table.of_parts(parts[None], placement, 1, 1)
    for columns in range(1, 13):
        arguments = np.bincount(row[1 : 1 + columns], minlength=4)
        assert (abs(arguments - columns * parts / 12) < 1).all()


def test_tables_of_layers_are_as_wide_as_the_widest():
    narrow, wide = np.ones((1, 2), np.int32), np.full((1, 3), 2, np.int32)
    assert table.stack([narrow, wide]).tolist() == [[[1, 1, -1]], [[2, 2, 2]]]

"""Layouts of rows, and worked examples."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton.compat.deep_ep import routing


def test_example_of_the_send_order():
    order = routing.send_order(torch.tensor([[1, 1], [0, 1], [1, 0]], dtype=torch.bool))
    assert order.tokens.tolist() == [0, 2, 0, 1]
    assert order.row_of.tolist() == [[0, 2], [-1, 3], [1, -1]]
    assert order.counts == [2, 2]


def test_example_of_expanded_rows():
    layout = routing.expand(torch.tensor([[0, 1], [1, -1], [-1, 0]]), 2, 4)
    assert layout.slots.tolist() == [[0, 4], [5, -1], [-1, 1]]
    assert layout.counts.tolist() == [2, 2]
    assert layout.ends.tolist() == [2, 6]


def test_a_rank_s_sum_stands_at_its_last_slot():
    ranks = torch.tensor([[0, 1, 0, -1]])
    row_of = torch.tensor([[5, 7]])
    assert routing.partial_sums(ranks, row_of).tolist() == [[-1, 7, 5, -1]]


def test_copies_are_numbered_by_rank_token_slot():
    ranks = torch.tensor([[1, 0], [0, -1], [1, 1]])
    assert routing.number_copies(ranks, 2).tolist() == [[2, 0], [1, -1], [3, 4]]


@hypothesis.given(
    rows=st.integers(0, 9),
    top_k=st.integers(1, 4),
    count=st.integers(1, 5),
    alignment=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_expanded_rows_of_any_size(rows, top_k, count, alignment, seed):
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k, count)
    local = torch.rand((rows, count), generator=generator).argsort(1)[:, :top_k]
    local[torch.rand(local.shape, generator=generator) < 0.4] = -1
    layout = routing.expand(local, count, alignment)
    begin = 0
    for expert in range(count):
        expected = list(range(begin, begin + int((local == expert).sum())))
        assert layout.slots[local == expert].tolist() == expected
        assert layout.ends[expert] == begin + len(expected)
        assert layout.counts[expert] == len(expected)
        begin += -(-len(expected) // alignment) * alignment
    assert (layout.slots[local < 0] == -1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_owners(dtype):
    ids = torch.tensor([[0, 3, -1]], dtype=dtype)
    assert routing.owners(ids, 2).tolist() == [[0, 1, -1]]
    assert routing.tokens_in_ranks(routing.owners(ids, 2), 3).tolist() == [[True, True, False]]

"""The definition against the worked examples' literal numbers, and its rounding against torch's."""

from __future__ import annotations

import definition
import numpy as np
import pytest
import torch
from definition import Group, Remaining, Tokens
from worked_examples import EXAMPLES, TWO_SHARED, bits, dynamic_scales, expert_bits


@pytest.mark.parametrize("name", EXAMPLES)
def test_dispatch_gives_the_literal_numbers(name):
    example = EXAMPLES[name]
    for rank, result in enumerate(definition.dispatch(example.group, example.tokens)):
        wanted = np.array(example.expand_x[rank], np.float32)
        if example.dynamic_scales is None:
            wanted = wanted.reshape(result.expand_x.shape)
            assert np.array_equal(definition.decode(result.expand_x, example.group.dtype), wanted)
            assert result.dynamic_scales is None
        else:
            assert result.expand_x.tolist() == example.expand_x[rank]
            assert result.dynamic_scales.tolist() == dynamic_scales(example, rank).tolist()
        assert [row[1:] for row in result.rows] == example.rows[rank]
        assert result.capacity == example.capacity[rank]
        if example.expand_idx is not None:
            assert result.expand_idx == example.expand_idx[rank]
        assert result.token_nums == example.token_nums[rank]
        assert result.token_nums_running == example.token_nums_running[rank]
        assert result.ep_recv_counts == example.ep_recv_counts[rank]
        if example.tp_recv_counts is not None:
            assert result.tp_recv_counts == example.tp_recv_counts[rank]
        if example.expand_scales is not None:
            assert result.expand_scales.tolist() == example.expand_scales[rank]


@pytest.mark.parametrize("name", EXAMPLES)
def test_combine_gives_the_literal_numbers(name):
    example = EXAMPLES[name]
    group = example.group
    received = definition.dispatch(group, example.tokens)
    rows = [expert_bits(example, rank) for rank in range(len(example.tokens))]
    results = definition.combine(group, example.tokens, received, rows)
    for rank, result in enumerate(results):
        wanted = np.array(example.combined[rank], np.float32)
        assert np.array_equal(definition.decode(result, group.dtype), wanted)


def test_decimal_and_hexadecimal_factors_agree():
    decimal = [
        [0.031496062874794006, 0.0, 0.06299212574958801, 0.007874015718698502],
        [0.12598425149917603, 0.0, 0.04724409431219101, 0.031496062874794006],
    ]
    for rank, row in enumerate(decimal):
        assert dynamic_scales(EXAMPLES["quantised"], rank).tolist() == row


def test_a_shared_expert_with_more_copies_than_its_rank_count_divides():
    # W=5, two copies of one shared expert: copy 0 serves ranks 0, 2, 4, copy 1 serves ranks 1, 3.
    group = Group(world_size=5, num_experts=3, top_k=1, hidden=1, shared_ranks=2, global_bs=10)
    one = Tokens(np.zeros((1, 1), np.uint16), np.array([[2]]), np.ones((1, 1), np.float32))
    results = definition.dispatch(group, [one] * 5)
    assert [result.ep_recv_counts for result in results[:2]] == [[1, 1, 2, 2, 3], [0, 1, 1, 2, 2]]
    assert [result.capacity for result in results] == [6, 6, 10, 10, 10]
    assert [result.token_nums for result in results[2:]] == [[0], [0], [5]]


def test_shared_rows_of_two_experts_carry_their_own_slot():
    results = definition.dispatch(TWO_SHARED.group, TWO_SHARED.tokens)
    assert {row[3] for row in results[0].rows} == {2}
    assert {row[3] for row in results[1].rows} == {3}
    assert results[0].expand_scales.tolist() == [1.0] * 8


def test_a_group_that_one_rank_has_left():
    # Rank 1 of 4 is lost: ranks 0, 2, 3 are now 0, 1, 2 and hold experts 0, 1, 2.
    group = Group(
        world_size=4, num_experts=4, top_k=1, hidden=1, remaining=Remaining((0, 2, 3), 0, 3)
    )
    tokens = [
        Tokens(bits([[10 * rank + 1], [10 * rank + 2]]), np.array(ids), np.full((2, 1), 0.5, "f"))
        for rank, ids in enumerate([[[1], [2]], [[0], [0]], [[1], [1]], [[0], [2]]])
    ]
    results = definition.dispatch(group, tokens)
    assert results[1] is None
    left = [results[old] for old in (0, 2, 3)]
    assert [[row[1:] for row in mine.rows] for mine in left] == [
        [(2, 0, 0)],
        [(0, 0, 0), (1, 0, 0), (1, 1, 0)],
        [(0, 1, 0), (2, 1, 0)],
    ]
    assert [mine.ep_recv_counts for mine in left] == [[0, 0, 1, 1], [1, 3, 3, 3], [1, 1, 2, 2]]
    assert [mine.capacity for mine in left] == [8, 8, 8]
    # Expert e returns e + 1.
    rows = [bits([[1]]), None, bits([[2]] * 3), bits([[3]] * 2)]
    combined = definition.combine(group, tokens, results, rows)
    assert combined[1] is None
    actual = [definition.decode(combined[old], "bfloat16").tolist() for old in (0, 2, 3)]
    assert actual == [[[1], [1.5]], [[1], [1]], [[0.5], [1.5]]]


def test_constant_experts_with_an_alpha_for_each_column():
    group = Group(world_size=1, num_experts=1, top_k=2, hidden=2, const_experts=2)
    mine = Tokens(
        x=bits([[1, 1]]),
        ids=np.array([[2, 1]]),
        weights=np.array([[0.5, 2]], np.float32),
        ori_x=bits([[3, 4]]),
        alpha_1=bits([[0, 1], [2, -1]]),
        alpha_2=bits([[1, 1], [0, 0.5]]),
        const_v=bits([[8, 16], [1, 2]]),
    )
    (result,) = definition.combine(group, [mine], definition.dispatch(group, [mine]), [bits([])])
    # 0.5 * ([6, -4] + [0, 1]) + 2 * ([0, 4] + [8, 16])
    assert definition.decode(result, "bfloat16").tolist() == [[19, 38.5]]


@pytest.mark.parametrize("dtype", definition.TORCH_DTYPES)
def test_comm_quantised_rows_are_near_the_originals(dtype):
    rng = np.random.default_rng(0)
    rows = definition.encode(rng.normal(size=(200, 16)), dtype)
    rows[::7, :8] = 0
    for row in rows:
        before = definition.decode(row, dtype).reshape(2, 8)
        after = definition.decode(definition.through_int8_blocks(row, dtype), dtype).reshape(2, 8)
        largest = np.abs(before).max(axis=1, keepdims=True)
        # Half a code, and the rounding of the factor and of the product.
        assert (np.abs(after - before) <= largest * (0.5 / 127 + 2**-7)).all()


@pytest.mark.parametrize("dtype", definition.TORCH_DTYPES)
def test_rounding_is_that_of_torch(dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    # Exact ties, both neighbours, overflow to infinity, subnormals, signed zeros.
    ties = (np.arange(0, 2**16, 7, dtype=np.uint32) << 16) + np.uint32(0x8000)
    values = np.concatenate([bits, ties, ties - 1, ties + 1, [0, 0x80000000]]).astype(np.uint32)
    values = values.view(np.float32)
    values = values[~np.isnan(values)]
    wanted = definition.to_bits(torch.from_numpy(values).to(definition.TORCH_DTYPES[dtype]))
    assert np.array_equal(definition.encode(values, dtype), wanted)


@pytest.mark.parametrize("dtype", definition.TORCH_DTYPES)
def test_bits_survive_the_way_through_a_tensor(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(definition.to_bits(definition.to_tensor(bits, dtype)), bits)
    values = definition.decode(bits, dtype)
    finite = ~np.isnan(values)
    assert np.array_equal(definition.encode(values, dtype)[finite], bits[finite])


@pytest.mark.parametrize(
    "row, smooth, codes, factor",
    [
        pytest.param([127, 0.5, 1.5, 2.5, -2.5], None, [127, 0, 2, 2, -2], 1.0, id="ties"),
        pytest.param([0, -0.0], None, [0, 0], 0.0, id="zero row"),
        pytest.param([1, 2], [0, 0], [0, 0], 0.0, id="zeroed by its smooth row"),
        pytest.param([1, -2], [-1, 4], [-16, -127], float.fromhex("0x1.020408p-4"), id="smooth"),
    ],
)
def test_int8_by_hand(row, smooth, codes, factor):
    smooth = None if smooth is None else np.array(smooth, np.float32)
    actual, found_factor = definition.quantise_int8(np.array(row, np.float32), smooth)
    assert actual.tolist() == codes
    assert found_factor == np.float32(factor)

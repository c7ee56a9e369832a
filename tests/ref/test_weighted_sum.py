"""Weighted sums, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moe_triton import ref
from moe_triton.layout import NOWHERE, Norm, RowFormat, ZeroComputationExperts


def weighted_sum(rows, index, weights, addend, out, zero_computation=None, norm=None):
    fmt = RowFormat(rows.dtype, rows.shape[1], rows.shape[1] * rows.itemsize)
    ref.weighted_sum(
        rows.view(torch.uint8), index, fmt, weights, zero_computation, addend, out, norm
    )


def test_rows_longer_than_a_block():
    hidden = 2**17 + 3
    x = torch.ones((3, hidden))
    x[1] = 2.0
    out = torch.empty((1, hidden))
    weighted_sum(x, torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 2.0]]), None, out)
    assert (out == 1 + 4 + 1).all()


def test_reduce_rounds_once_and_to_even():
    # 256 + 1 + 1 = 258; adding in bf16 would lose each 1, and 257 is a tie that goes to 256.
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    out = torch.empty((2, 1), dtype=torch.bfloat16)
    index = torch.tensor([[0, 1, 2], [0, 1, 1]])
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]])
    weighted_sum(rows, index, weights, None, out)
    assert out.flatten().tolist() == [258.0, 256.0]


def test_reduce_adds_in_ascending_order():
    # (2**24 + 1) + 1 loses both ones in float32; 1 + 1 first would not.
    rows = torch.tensor([[2.0**24], [1.0]], dtype=torch.float32)
    out = torch.empty((2, 1))
    weighted_sum(rows, torch.tensor([[0, 1, 1], [1, 1, 0]]), None, None, out)
    assert out.flatten().tolist() == [2.0**24, 2.0**24 + 2]


def test_reduce_adds_unweighted_rows_and_the_addend_last():
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0]], dtype=torch.float16)
    out = torch.empty((1, 2), dtype=torch.float16)
    addend = torch.tensor([[0.5, 0.25]], dtype=torch.float16)
    weighted_sum(rows, torch.tensor([[0, 1]]), torch.tensor([[3.0]]), addend, out)
    assert out.tolist() == [[13.5, 26.25]]


def test_reduce_never_gives_a_negative_zero():
    rows = torch.tensor([[-0.0]], dtype=torch.bfloat16)
    out = torch.empty((1, 1), dtype=torch.bfloat16)
    weighted_sum(rows, torch.tensor([[0]]), None, None, out)
    assert not torch.signbit(out).any()


def test_reduce_leaves_out_what_is_nowhere_whatever_its_weight():
    rows = torch.tensor([[float("nan")], [2.0]])
    out = torch.empty((3, 1))
    index = torch.tensor([[NOWHERE, 1], [1, NOWHERE], [NOWHERE, NOWHERE]])
    weights = torch.tensor([[float("nan"), 3.0], [2.0, float("inf")], [1.0, 1.0]])
    weighted_sum(rows, index, weights, None, out)
    assert out.flatten().tolist() == [6.0, 4.0, 0.0]
    weighted_sum(rows[:0], index[2:], weights[2:], None, out[2:])
    assert out[2] == 0


def test_reduce_special_experts_in_their_place():
    # Experts: 0 routed, 1 zero, 2 copy, 3 and 4 constant with alphas (2, 3) and (0.5, 1).
    zero_computation = ZeroComputationExperts(
        torch.tensor([[0, 1, 2], [3, 4, NOWHERE]], dtype=torch.int32),
        2,
        3,
        5,
        torch.tensor([[7.0, 8.0], [1.0, 2.0]]),
        torch.tensor([2.0, 0.5]),
        torch.tensor([3.0, 1.0]),
        torch.tensor([[1.0, -1.0], [4.0, 6.0]]),
    )
    rows = torch.tensor([[10.0, 20.0]])
    index = torch.tensor([[0, NOWHERE, NOWHERE], [NOWHERE, NOWHERE, NOWHERE]])
    weights = torch.tensor([[1.0, 5.0, 2.0], [0.5, 4.0, float("nan")]])
    out = torch.empty((2, 2))
    weighted_sum(rows, index, weights, None, out, zero_computation)
    assert out.tolist() == [[24.0, 36.0], [0.5 * 5 + 4 * 4.5, 0.5 * 1 + 4 * 7.0]]
    columns = zero_computation._replace(
        alpha_1=torch.tensor([[2.0, 0.0], [0.5, 0.0]]),
        alpha_2=torch.tensor([[3.0, 1.0], [1.0, 2.0]]),
    )
    weighted_sum(rows, index, weights, None, out, columns)
    assert out[1].tolist() == [0.5 * 5 + 4 * 4.5, 0.5 * -1 + 4 * 12.0]


def test_add_rows_rounds_once_to_even():
    own = torch.tensor([[256.0, 3.0]], dtype=torch.bfloat16)
    peer = torch.tensor([[1.0, 4.0]], dtype=torch.bfloat16)
    out = torch.empty_like(own)
    ref.add_rows(own, peer, out)
    assert out.tolist() == [[256.0, 7.0]]


def test_reduce_with_residual_and_norm_by_hand():
    rows = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.bfloat16)
    residual = torch.tensor([[1.0, 1.0, -1.0, 0.0]], dtype=torch.bfloat16)
    gamma = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.bfloat16)
    out, y = torch.empty_like(rows), torch.empty_like(rows)
    norm = Norm(residual, gamma, 1e-6, y, torch.empty(1))
    weighted_sum(rows, torch.tensor([[0]]), torch.tensor([[1.0]]), None, out, norm=norm)
    assert out.tolist() == [[2, 3, 2, 4]]
    assert norm.rstd.item() == pytest.approx(0.34815528988838196, rel=1e-6)
    assert y.tolist() == [[0.6953125, 0.5234375, 1.390625, 1.390625]]

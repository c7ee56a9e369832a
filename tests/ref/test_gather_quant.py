"""Rows gathered from windows."""

from __future__ import annotations

import torch

from moe_triton import ref
from moe_triton.layout import NOWHERE, RowFormat


def test_gather_quant_writes_each_token_to_its_rows():
    fmt = RowFormat(torch.int8, 2, 0, "per_row", 0)
    x = torch.tensor([[127.0, 1.0], [254.0, -2.0]])
    index = torch.tensor([[3, NOWHERE], [0, 2]])
    out = torch.full((4, 2), 99, dtype=torch.int8)
    scales = torch.full((4,), 99.0)
    ref.gather_quant(x, index, fmt, None, None, out, scales)
    assert out.tolist() == [[127, -1], [99, 99], [127, -1], [127, 1]]
    assert scales.tolist() == [2.0, 99.0, 2.0, 1.0]


def test_gather_quant_with_factors_of_each_expert():
    # One shared expert with the factors of row 0; experts 0 and 1 with those of rows 1 and 2.
    fmt = RowFormat(torch.int8, 2, 0, "static")
    smooth_scales = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = torch.zeros((3, 2), dtype=torch.int8)
    ids = torch.tensor([[1, 0]], dtype=torch.int32)
    ref.gather_quant(torch.ones((1, 2)), torch.tensor([[0, 1, 2]]), fmt, smooth_scales, ids, out)
    assert out.tolist() == [[5, 6], [3, 4], [1, 2]]

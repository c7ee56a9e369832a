"""Rows gathered from windows."""

from __future__ import annotations

import torch

from moe_triton import ref
from moe_triton.layout import NOWHERE, RowFormat


def test_pack_leaves_later_rows_untouched():
    fmt = RowFormat(torch.int8, 4, 32, "per_row", 16)
    rows = torch.zeros((3, 32), dtype=torch.uint8)
    fmt.payload(rows).copy_(torch.arange(12, dtype=torch.int8).view(3, 4))
    fmt.scales(rows).copy_(torch.tensor([[1.0], [2.0], [3.0]]))
    x = torch.full((4, 4), 99, dtype=torch.int8)
    scales = torch.full((4,), 99.0)
    ref.gather_rows(rows, torch.tensor([2, 0]), fmt, x, scales)
    assert x.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3], [99] * 4, [99] * 4]
    assert scales.tolist() == [3.0, 1.0, 99.0, 99.0]


def test_pack_makes_zeros_of_what_is_nowhere():
    fmt = RowFormat(torch.bfloat16, 2, 16)
    rows = torch.full((2, 16), 0xFF, dtype=torch.uint8)  # NaN
    fmt.payload(rows)[1] = 3.0
    x = torch.full((4, 2), 99.0, dtype=torch.bfloat16)
    ref.gather_rows(rows, torch.tensor([NOWHERE, 1, NOWHERE]), fmt, x)
    assert x.tolist() == [[0, 0], [3, 3], [0, 0], [99, 99]]
    ref.gather_rows(rows[:0], torch.tensor([NOWHERE]), fmt, x)
    assert x.tolist() == [[0, 0], [3, 3], [0, 0], [99, 99]]


def test_pack_of_float8_with_gaps():
    fmt = RowFormat(torch.float8_e4m3fn, 2, 16)
    rows = torch.full((2, 16), 0x38, dtype=torch.uint8)  # 1.0
    x = torch.full((3, 2), 9.0).to(fmt.dtype)
    ref.gather_rows(rows, torch.tensor([1, NOWHERE]), fmt, x)
    assert x.float().tolist() == [[1, 1], [0, 0], [9, 9]]

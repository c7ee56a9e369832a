"""Rows gathered from windows, against the definition."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from triton.runtime.errors import InterpreterError

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.layout import NOWHERE, RowFormat

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def formats(hidden):
    """A format of each kind, of the smallest stride."""
    found = []
    for dtype, scale_dtype in (
        (torch.bfloat16, None),
        (torch.float32, None),
        (torch.float64, None),
        (torch.int8, torch.float32),
        (E4M3, torch.float32),
        (E5M2, torch.uint8),
        (torch.int8, torch.bfloat16),
    ):
        payload = -(-hidden * dtype.itemsize // 16) * 16
        if scale_dtype is None:
            found.append(RowFormat(dtype, hidden, payload))
        else:
            found.append(
                RowFormat(dtype, hidden, payload + 16, "per_row", payload, scale_dtype=scale_dtype)
            )
    return found


def assert_same_gather(rows, index, fmt, capacity=None):
    """Gather with both, into outputs with a few rows more than are gathered."""
    results = []
    for gather_rows in (kernels.gather_rows, ref.gather_rows):
        capacity = index.numel() + 2 if capacity is None else capacity
        x = torch.zeros((capacity, fmt.hidden), device=rows.device).to(fmt.dtype)
        scales = None
        if fmt.scale_offset is not None:
            shape = fmt.scale_shape(capacity)
            scales = torch.zeros(shape, device=rows.device).to(fmt.scale_dtype)
        for output in (x, scales):
            if output is not None:
                output.view(torch.uint8).fill_(0xA5)
        gather_rows(rows, index, fmt, x, scales)
        results.append((x, scales))
    for actual, expected in zip(*results, strict=True):
        if expected is not None:
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def drawn_rows(count, stride, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, stride), generator=generator).byte().to(device)


def test_examples(steps, device):
    """The numbers of the docstrings of the two steps."""
    fmt = RowFormat(torch.float32, 2, 32, "per_row", 16)
    rows = torch.zeros((3, 32), dtype=torch.uint8, device=device)
    fmt.payload(rows).copy_(torch.arange(1.0, 7.0).view(3, 2))
    fmt.scales(rows).copy_(torch.tensor([[0.5], [0.25], [2.0]]))
    x, scales = torch.full((4, 2), 99.0, device=device), torch.full((4,), 99.0, device=device)
    count = torch.tensor([3], dtype=torch.int32, device=device)
    index = torch.tensor([2, NOWHERE, 0, 1], device=device)
    steps.gather_rows(rows, index, fmt, x, scales, count)
    assert x.tolist() == [[5, 6], [0, 0], [1, 2], [99, 99]]
    assert scales.tolist() == [2.0, 0.0, 0.5, 99.0]
    x = torch.arange(1.0, 9.0, device=device).view(4, 2)
    steps.zero_padding(x, torch.tensor([0, NOWHERE, 5, NOWHERE], device=device), count)
    assert x.tolist() == [[1, 2], [0, 0], [5, 6], [7, 8]]


def test_rows_of_nowhere_are_zeros(steps, device):
    fmt = RowFormat(torch.bfloat16, 2, 16)
    rows = torch.full((2, 16), 0xFF, dtype=torch.uint8, device=device)  # NaN
    fmt.payload(rows)[1] = 3.0
    x = torch.full((4, 2), 99.0, dtype=torch.bfloat16, device=device)
    steps.gather_rows(rows, torch.tensor([NOWHERE, 1, NOWHERE], device=device), fmt, x)
    assert x.tolist() == [[0, 0], [3, 3], [0, 0], [99, 99]]
    steps.gather_rows(rows[:0], torch.tensor([NOWHERE], device=device), fmt, x)
    assert x.tolist() == [[0, 0], [3, 3], [0, 0], [99, 99]]
    fmt = RowFormat(E4M3, 2, 16)
    rows.fill_(0x38)  # 1.0
    x = torch.full((3, 2), 9.0, device=device).to(E4M3)
    steps.gather_rows(rows, torch.tensor([1, NOWHERE], device=device), fmt, x)
    assert x.float().tolist() == [[1, 1], [0, 0], [9, 9]]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("hidden", [1, 3, 8, 130, 7168, 40_000])
def test_matches_ref(hidden, index_dtype, device):
    index = torch.tensor([2, NOWHERE, 0, 2, 1, NOWHERE], dtype=index_dtype, device=device)
    for fmt in formats(hidden):
        assert_same_gather(drawn_rows(3, fmt.stride, device), index, fmt)


@pytest.mark.parametrize("quant", ["group_e4m3", "mx_e5m2"])
@pytest.mark.parametrize("hidden", [1, 40, 130, 7168])
def test_several_scales_a_row(quant, hidden, device):
    index = torch.tensor([2, NOWHERE, 0, 2, 1, NOWHERE], device=device)
    fmt = RowFormat.quantized(quant, torch.bfloat16, hidden)
    assert_same_gather(drawn_rows(3, fmt.stride, device), index, fmt)
    assert_same_gather(drawn_rows(3, fmt.stride, device), index[[1]], fmt)


@hypothesis.given(
    num_rows=st.integers(1, 9),
    num_gathered=st.integers(0, 300),
    hidden=st.integers(1, 100),
    which=st.integers(0, 6),
    seed=st.integers(0, 2**16),
)
def test_any_size(num_rows, num_gathered, hidden, which, seed, device):
    fmt = formats(hidden)[which]
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(NOWHERE, num_rows, (num_gathered,), generator=generator).to(device)
    assert_same_gather(drawn_rows(num_rows, fmt.stride, device, seed), index, fmt)


def test_nothing_there(device):
    fmt = formats(5)[3]
    rows = drawn_rows(3, fmt.stride, device)
    nowhere = torch.full((3,), NOWHERE, device=device)
    assert_same_gather(rows, nowhere, fmt)
    assert_same_gather(rows[:0], nowhere, fmt)
    assert_same_gather(rows, nowhere[:0], fmt)


@pytest.mark.parametrize("num_gathered", [0, 2, 3, 9])
def test_a_count_on_the_device(num_gathered, device):
    fmt = formats(24)[3]
    rows = drawn_rows(4, fmt.stride, device)
    index = torch.tensor([3, NOWHERE, 1], device=device)
    x = torch.full((4, 24), 99, dtype=torch.int8, device=device)
    scales = torch.full((4,), 99.0, device=device)
    count = torch.tensor([num_gathered], dtype=torch.int32, device=device)
    kernels.gather_rows(rows, index, fmt, x, scales, count)
    expected, expected_scales = torch.full_like(x, 99), torch.full_like(scales, 99.0)
    ref.gather_rows(rows, index[:num_gathered], fmt, expected, expected_scales)
    assert torch.equal(x, expected)
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))


@pytest.mark.parametrize("hidden", [1, 40, 9000, 40_000])
def test_zero_padding(hidden, device):
    index = torch.tensor([0, NOWHERE, 5, NOWHERE, NOWHERE], device=device)
    for dtype in (torch.int8, torch.bfloat16, torch.float64):
        for num_gathered in (None, 0, 4):
            x = torch.ones((7, hidden + 3), dtype=dtype, device=device)
            count = None
            if num_gathered is not None:
                count = torch.tensor([num_gathered], dtype=torch.int32, device=device)
            kernels.zero_padding(x[:, 1 : hidden + 1], index, count)
            expected = torch.ones_like(x)
            expected[
                [row for row in (1, 3, 4) if num_gathered is None or row < num_gathered], 1:-2
            ] = 0
            assert torch.equal(x, expected)


def test_zero_padding_rejects(device):
    index = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(MoeError, match="x must have a row for each of 3 indices, got 2"):
        kernels.zero_padding(torch.ones((2, 4), device=device), index)
    with pytest.raises(MoeError, match="count must be one of"):
        kernels.zero_padding(torch.ones((3, 4), device=device), index, index[:1])


def test_overlapping_rows_are_counted_in_16_bytes(device):
    fmt = RowFormat(torch.int8, 40, 64, "per_row", 48)
    memory = drawn_rows(1, 4096, device)[0]
    rows = memory.as_strided(((4096 - 64) // 16 + 1, 64), (16, 1))
    index = torch.tensor([0, 3, 252, NOWHERE, 3], device=device)
    assert_same_gather(rows, index, fmt)


def test_a_strided_index(device):
    fmt = formats(8)[3]
    index = torch.tensor([2, 0, NOWHERE, 0, 1, 0], device=device)[::2]
    assert_same_gather(drawn_rows(3, fmt.stride, device), index, fmt)


def test_rows_that_are_not_aligned(device):
    # Outputs of experts of 3 or 5 bf16 elements, wherever their memory begins.
    for offset, hidden in ((0, 3), (2, 3), (2, 5), (6, 4), (4, 8)):
        memory = drawn_rows(1, 1000, device)[0]
        rows = memory[offset : offset + 20 * 2 * hidden].view(20, 2 * hidden)
        fmt = RowFormat(torch.bfloat16, hidden, 2 * hidden)
        index = torch.tensor([19, NOWHERE, 4, 0], device=device)
        assert_same_gather(rows, index, fmt)


def test_a_column_alone_may_have_any_stride(device):
    fmt = RowFormat(torch.int8, 1, 16)
    x = torch.zeros((1, 3), dtype=torch.int8, device=device).T
    rows = drawn_rows(3, 16, device)
    kernels.gather_rows(rows, torch.tensor([2, NOWHERE, 1], device=device), fmt, x)
    assert x.flatten().tolist() == [rows[2, 0].view(torch.int8), 0, rows[1, 0].view(torch.int8)]


def test_strided_output(device):
    fmt = formats(24)[0]
    rows = drawn_rows(4, fmt.stride, device)
    wide = torch.zeros((3, 40), dtype=torch.bfloat16, device=device)
    kernels.gather_rows(rows, torch.tensor([3, 1], device=device), fmt, wide[:, 5:29])
    expected = fmt.payload(rows)[[3, 1]].view(torch.int16)
    assert torch.equal(wide[:2, 5:29].view(torch.int16), expected)
    assert not wide[:, :5].any() and not wide[:, 29:].any() and not wide[2].any()


# Strides must have 32 bits, or what is made of them has 64 anyway; their odd number of bytes makes
# words of one byte. Of the memory a few pages are touched.
FAR = 2**30 + 1


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_addresses_are_64_bit(index_dtype, device, reserve):
    reserve(2 * FAR + 2**20)
    rows = torch.empty_strided((3, 32), (FAR, 1), dtype=torch.uint8, device=device)
    rows.copy_(drawn_rows(3, 32, device))
    x = torch.zeros((3, 32), dtype=torch.int8, device=device)
    index = torch.tensor([2, 0, 2], dtype=index_dtype, device=device)
    kernels.gather_rows(rows, index, RowFormat(torch.int8, 32, 32), x)
    assert torch.equal(x, rows.view(torch.int8)[[2, 0, 2]])


def test_addresses_of_outputs_are_64_bit(device, reserve):
    reserve(2 * FAR + 2**20)
    x = torch.empty_strided((3, 32), (FAR, 1), dtype=torch.int8, device=device)
    rows = drawn_rows(3, 32, device)
    kernels.gather_rows(
        rows, torch.tensor([1, 0, 2], device=device), RowFormat(torch.int8, 32, 32), x
    )
    assert torch.equal(x, rows.view(torch.int8)[[1, 0, 2]])


def test_an_index_out_of_range_fails_where_the_device_asserts(asserting, device):
    x = torch.zeros((2, 4), dtype=torch.int8, device=device)
    rows = torch.zeros((2, 16), dtype=torch.uint8, device=device)
    with pytest.raises(InterpreterError, match="index out of range"):
        kernels.gather_rows(
            rows, torch.tensor([0, 2], device=device), RowFormat(torch.int8, 4, 16), x
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": torch.zeros((2, 16))}, "rows must be one of"),
        ({"rows": torch.zeros((16, 2), dtype=torch.uint8).T}, "rows must be contiguous in its"),
        ({"index": torch.zeros(2)}, "index must be one of"),
        ({"index": torch.zeros((2, 1), dtype=torch.int64)}, r"index must have the shape \(\*\)"),
        ({"x": torch.zeros((2, 4))}, "x must be one of"),
        ({"x": torch.zeros((1, 4), dtype=torch.int8)}, r"x must have the shape \(2, 4\)"),
        ({"x": torch.zeros((2, 5), dtype=torch.int8)}, r"x must have the shape \(2, 4\)"),
        ({"x": torch.zeros((2, 4), dtype=torch.int8, device="meta")}, "x must be on"),
        ({"scales": torch.zeros(2, dtype=torch.half)}, "scales must be one of"),
        ({"scales": torch.zeros(1)}, r"scales must have the shape \(2\)"),
    ],
)
def test_rejects(change, message, device):
    arguments = {
        "rows": torch.zeros((2, 32), dtype=torch.uint8),
        "index": torch.zeros(2, dtype=torch.int64),
        "fmt": RowFormat(torch.int8, 4, 32, "per_row", 16),
        "x": torch.zeros((2, 4), dtype=torch.int8),
        "scales": torch.zeros(2),
    } | change
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in arguments.items()
    }
    with pytest.raises(MoeError, match=message):
        kernels.gather_rows(**moved)

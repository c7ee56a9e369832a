"""The kernels of every quantisation against their definition, bit for bit."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.kernels import launch_config
from moe_triton.layout import RowFormat

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PAYLOADS = (torch.int8, E4M3, E5M2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(actual, expected):
    """Equal in dtype, shape and bits; one NaN is like another."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = BITS[actual.element_size()]
    same = actual.contiguous().view(bits) == expected.contiguous().view(bits)
    if actual.dtype.is_floating_point:
        same |= actual.float().isnan() & expected.float().isnan()
    assert same.all(), f"{int((~same).sum())} differ, first at {(~same).nonzero()[0].tolist()}"


def assert_all_same_bits(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def tokens(num_rows, hidden, dtype, device, seed=0):
    """Numbers over fifty octaves, ties among them; a row each of zeros, tiny ones, inf and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num_rows, hidden), generator=generator)
    x *= torch.exp2(torch.randint(-30, 20, (num_rows, 1), generator=generator).float())
    x *= torch.exp2(torch.randint(-8, 1, (num_rows, hidden), generator=generator).float())
    if num_rows > 4:
        x[1], x[2] = 0.0, 1e-40
        x[3, hidden // 2], x[4, -1] = float("inf"), float("nan")
        x[0] = torch.arange(hidden) % 255 / 2
        x[0, -1] = -127.0
    return x.to(device=device, dtype=dtype)


def factors(shape, device, seed=1):
    return (0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))).to(device)


def group_of_128(x, dtype):
    return kernels.quantize_groups(x, 128, None, dtype)


SHAPES = [
    pytest.param(1, 1, id="smallest"),
    pytest.param(6, 3, id="odd row"),
    pytest.param(0, 8, id="no tokens"),
    pytest.param(7, 129, id="one past a group"),
    pytest.param(3, 7168, id="DeepSeek's row"),
    pytest.param(5, 8193, id="one past a tile"),
    pytest.param(300, 96, id="many short rows"),
]


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("T, H", SHAPES)
def test_rows(T, H, x_dtype, device):
    x = tokens(T, H, x_dtype, device)
    for dtype in PAYLOADS:
        for smooth_scales in (None, factors(H, device), factors((T, H), device)):
            actual = kernels.quantize_rows(x, smooth_scales, dtype)
            assert_all_same_bits(actual, ref.quantize_rows(x, smooth_scales, dtype))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("T, H", SHAPES)
def test_static(T, H, x_dtype, device):
    x = tokens(T, H, x_dtype, device)
    for shape in (1, H, (T, H)):
        given_factors = 50 * factors(shape, device)
        actual = kernels.quantize_static(x, given_factors)
        assert_same_bits(actual, ref.quantize_static(x, given_factors))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("T, H", SHAPES)
def test_by_division(T, H, x_dtype, device):
    x = tokens(T, H, x_dtype, device)
    for smooth_scales in (None, factors(H, device), factors((T, H), device)):
        actual = kernels.quantize_by_division(x, smooth_scales)
        assert_all_same_bits(actual, ref.quantize_by_division(x, smooth_scales))


@pytest.mark.parametrize("group", [128, 7, 5000, 8200])
@pytest.mark.parametrize("T, H", SHAPES)
def test_groups(T, H, group, device):
    x = tokens(T, H, torch.bfloat16, device)
    smooth_scales = factors((T, H), device)
    for dtype in PAYLOADS:
        actual = kernels.quantize_groups(x, group, smooth_scales, dtype)
        assert_all_same_bits(actual, ref.quantize_groups(x, group, smooth_scales, dtype))


@pytest.mark.parametrize("group", [3000, 9000])
def test_several_long_groups(group, device):
    x = tokens(5, 20001, torch.float32, device)
    for smooth_scales in (None, factors((5, 20001), device)):
        actual = kernels.quantize_groups(x, group, smooth_scales)
        assert_all_same_bits(actual, ref.quantize_groups(x, group, smooth_scales))


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("T, H", SHAPES)
def test_mx(T, H, x_dtype, device):
    x = tokens(T, H, x_dtype, device)
    for dtype in (E4M3, E5M2):
        assert_all_same_bits(kernels.quantize_mx(x, dtype), ref.quantize_mx(x, dtype))


def test_mx_of_every_exponent(device):
    # All finite fp32 magnitudes, subnormal ones too, at the top of a block and below it.
    exponents = torch.arange(255, dtype=torch.int32)
    top = ((exponents << 23) | 0x712345).view(torch.float32)
    x = top[:, None] * torch.linspace(1, -1, 32)
    x = x.to(device)
    for dtype in (E4M3, E5M2):
        assert_all_same_bits(kernels.quantize_mx(x, dtype), ref.quantize_mx(x, dtype))


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("block", [8, 12, 128])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_blocks(x_dtype, block, scale_dtype, device):
    x = tokens(9, block * 83, x_dtype, device)
    actual = kernels.quantize_blocks(x, block, scale_dtype)
    assert_all_same_bits(actual, ref.quantize_blocks(x, block, scale_dtype))


def test_returned_rows_are_divided(device):
    # 94.5625 / scale is 67.46875, half way between two fp16; times 1 / scale it is below.
    x = torch.tensor([[178.0, 94.5625] + [0.0] * 6], device=device)
    assert kernels.quantize_blocks(x, 8, torch.float32)[0].tolist() == [[127, 68] + [0] * 6]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_that_has_lost_bits_gives_no_larger_code(sign, device):
    # 190 / 127 of the smallest numbers is one of them, and the quotient 190.
    x = torch.tensor([[sign * 190] + [0] * 7], dtype=torch.float32, device=device) * 2.0**-149
    q, scale = kernels.quantize_blocks(x, 8, torch.float32)
    assert q[0, 0] == sign * 127
    assert scale.item() == 2.0**-149


def test_a_nan_of_all_ones_stays_one_in_bf16(device):
    x = torch.full((1, 8), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
    q, scale = kernels.quantize_blocks(x, 8, torch.bfloat16)
    assert q.tolist() == [[0] * 8]
    assert scale.isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_half_converts_to_float8(dtype, device):
    # With the largest value in each row the factor is 1, and the other values come out rounded.
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    largest = torch.finfo(dtype).max
    halves = halves[halves.abs() <= largest].float()
    for scale in (1.0, 2.0**-8):
        x = torch.cat([halves * scale, torch.tensor([largest])])[None].to(device)
        q, scales = kernels.quantize_rows(x, None, dtype)
        assert scales.tolist() == [1.0]
        assert_same_bits(q, x.to(dtype))


@hypothesis.given(
    num_rows=st.integers(0, 9),
    hidden=st.integers(1, 300),
    group=st.integers(1, 300),
    dtype=st.sampled_from(PAYLOADS),
    x_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**16),
)
def test_groups_of_any_size(num_rows, hidden, group, dtype, x_dtype, seed, device):
    x = tokens(num_rows, hidden, x_dtype, device, seed)
    actual = kernels.quantize_groups(x, group, None, dtype)
    assert_all_same_bits(actual, ref.quantize_groups(x, group, None, dtype))


def test_strided_tokens(device):
    x = tokens(6, 80, torch.bfloat16, device)
    expected = ref.quantize_rows(x[:, ::2])
    assert_all_same_bits(kernels.quantize_rows(x[:, ::2]), expected)
    wide = torch.zeros((6, 100), dtype=torch.bfloat16, device=device)
    wide[:, 3:43] = x[:, ::2]
    assert_all_same_bits(kernels.quantize_rows(wide[:, 3:43]), expected)
    assert_all_same_bits(
        kernels.quantize_rows(x[:1].expand(6, 80)), ref.quantize_rows(x[:1].expand(6, 80))
    )


def formats(hidden, dtype):
    return [
        RowFormat(dtype, hidden, -(-hidden * dtype.itemsize // 16) * 16),
        RowFormat(torch.int8, hidden, 4096, "static"),
        RowFormat(torch.int8, hidden, 4096, "per_row", 2048),
        RowFormat(torch.int8, hidden, 4096, "per_row_div", 2048),
        RowFormat(E4M3, hidden, 4096, "group", 2048, torch.float32, 128),
        RowFormat(E5M2, hidden, 4096, "mx", 2048, torch.uint8, 32),
        RowFormat(torch.int8, hidden, 4096, "block8", 2048, dtype, 8),
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden", [8, 72, 520])
def test_encode_and_decode(hidden, dtype, device):
    x = tokens(6, hidden, dtype, device)
    for fmt in formats(hidden, dtype):
        for smooth_scales in (None, factors(hidden, device), factors((6, hidden), device)):
            if fmt.scheme == "static" and smooth_scales is None:
                continue
            rows = torch.full((6, fmt.stride), 0xA5, dtype=torch.uint8, device=device)
            expected = rows.clone()
            kernels.encode(x, fmt, rows, smooth_scales)
            ref.encode(x, fmt, expected, smooth_scales)
            for part in (fmt.payload, *([fmt.scales] if fmt.scale_offset else [])):
                assert_same_bits(part(rows), part(expected))
            padding = torch.ones_like(rows, dtype=torch.bool)
            fmt.payload(padding.view(torch.uint8)).view(torch.uint8).zero_()
            if fmt.scale_offset:
                fmt.scales(padding.view(torch.uint8)).view(torch.uint8).zero_()
            assert (rows[padding] == 0xA5).all(), f"{fmt.scheme}: padding was written"
            if fmt.scheme == "block8":
                for out_dtype in (*FLOATS, torch.float64):
                    out, wanted = torch.full((2, 6, hidden), 99.0, dtype=out_dtype, device=device)
                    kernels.decode(rows, fmt, out)
                    ref.decode(rows, fmt, wanted)
                    assert_same_bits(out, wanted)


@pytest.mark.parametrize("taken", [0, 2, 3, 9])
def test_encode_a_count(taken, device):
    fmt = RowFormat(torch.int8, 8, 32, "per_row", 16)
    x = tokens(3, 8, torch.float32, device)
    rows = torch.full((3, 32), 0xA5, dtype=torch.uint8, device=device)
    expected = rows.clone()
    kernels.encode(x, fmt, rows, None, torch.tensor([taken], dtype=torch.int32, device=device))
    ref.encode(x[:taken], fmt, expected[: min(taken, 3)])
    assert torch.equal(rows, expected)


def test_decode_blocks_of_any_size(device):
    fmt = RowFormat(torch.int8, 36, 80, "block8", 48, torch.bfloat16, 12)
    x = tokens(5, 36, torch.bfloat16, device)
    rows = torch.zeros((5, 80), dtype=torch.uint8, device=device)
    ref.encode(x, fmt, rows)
    out, expected = torch.full((2, 5, 36), 99.0, dtype=torch.bfloat16, device=device)
    kernels.decode(rows, fmt, out)
    ref.decode(rows, fmt, expected)
    assert_same_bits(out, expected)


def test_decode_in_several_tiles(device, monkeypatch):
    few = dataclasses.replace(launch_config.policy(device), tile=1)
    monkeypatch.setattr(launch_config, "policy", lambda device: few)
    test_decode_blocks_of_any_size(device)


def test_float64_moves_as_it_is_and_quantises_as_float32(device):
    x = torch.randn((5, 6), dtype=torch.float64, device=device)
    fmt = RowFormat(torch.float64, 6, 48)
    rows = torch.full((5, 48), 0xA5, dtype=torch.uint8, device=device)
    kernels.encode(x, fmt, rows)
    assert_same_bits(fmt.payload(rows), x)
    assert_all_same_bits(kernels.quantize_rows(x), ref.quantize_rows(x))


@pytest.mark.parametrize(
    "factors, rows, scales",
    [
        pytest.param(
            [1.0, 1.0, 1.0, 1.0],
            [[32, -64, 16, 127], [0, 0, 0, 0], [48, -127, 24, 4], [16, 32, -64, 127]],
            ["0x1.020408p-5", "0x0p+0", "0x1.020408p-4", "0x1.020408p-7"],
            id="shared expert",
        ),
        pytest.param(
            [2.0, 0.5, 1.0, 4.0],
            [[16, -8, 4, 127], [0, 0, 0, 0], [127, -85, 32, 21], [8, 4, -16, 127]],
            ["0x1.020408p-3", "0x0p+0", "0x1.83060cp-5", "0x1.020408p-5"],
            id="routed expert",
        ),
    ],
)
def test_worked_example_of_smooth_rows(factors, rows, scales, device):
    x = torch.tensor(
        [[1, -2, 0.5, 4], [0, 0, 0, 0], [3, -8, 1.5, 0.25], [0.125, 0.25, -0.5, 1]],
        dtype=torch.bfloat16,
        device=device,
    )
    q, found = kernels.quantize_rows(x, torch.tensor(factors, device=device))
    assert q.tolist() == rows
    assert found.tolist() == [float.fromhex(scale) for scale in scales]


def test_worked_example_of_returned_rows(device):
    row = [1, -2, 0.5, 4, 3, -0.125, 0, 2.5] + [0] * 8
    for dtype, expected in (
        (torch.bfloat16, [1.0078125, -2.015625, 0.50390625, 4, 2.984375, -0.1259765625, 0]),
        (torch.float16, [1.0078125, -2.015625, 0.50390625, 4, 2.9921875, -0.1259765625, 0]),
    ):
        x = torch.tensor([row], dtype=dtype, device=device)
        q, scales = kernels.quantize_blocks(x, 8, dtype)
        assert q.tolist() == [[32, -64, 16, 127, 95, -4, 0, 79] + [0] * 8]
        assert scales.tolist() == [[0.031494140625, 0]]
        fmt = RowFormat(torch.int8, 16, 32, "block8", 16, dtype, 8)
        rows = torch.zeros((1, 32), dtype=torch.uint8, device=device)
        kernels.encode(x, fmt, rows)
        out = torch.empty_like(x)
        kernels.decode(rows, fmt, out)
        assert out[0, :7].tolist() == expected


@pytest.mark.parametrize(
    "quantize, dtype, scales, codes",
    [
        (kernels.quantize_mx, E4M3, [121, 0], "7a fe 5a 32 70 68"),
        (kernels.quantize_mx, E5M2, [114, 0], "79 fb 69 55 74 70"),
        (group_of_128, E4M3, [0.0167410708963871], "79 fe 59 32 6f 67"),
        (group_of_128, E5M2, [0.00013078961637802422], "79 fb 68 55 73 6f"),
    ],
)
def test_worked_example_of_float8(quantize, dtype, scales, codes, device):
    row = [5, -7.5, 0.30078125, 0.010009765625, 2, 1] + [0] * 58
    x = torch.tensor([row], dtype=torch.bfloat16, device=device)
    q, found = quantize(x, dtype)
    assert found.tolist() == [scales]
    assert bytes(q.view(torch.uint8)[0, :6].tolist()) == bytes.fromhex(codes)
    assert not q[0, 6:].float().any()


def test_rows_past_2_to_the_31_elements(device, reserve):
    # Row 2 begins at element 2**31; of the memory only a few pages are touched.
    reserve(2**32 + 2**20)
    x = torch.empty_strided((3, 8), (2**30, 1), dtype=torch.bfloat16, device=device)
    for row in range(3):
        x[row] = 127 * 2**row
    q, scale = kernels.quantize_rows(x)
    assert scale.tolist() == [1.0, 2.0, 4.0]
    assert (q == 127).all()


def test_coded_rows_past_2_to_the_31_elements(device, reserve):
    reserve(2**31 + 2**20)
    fmt = RowFormat(torch.int8, 8, 2**31 + 16, "per_row", 16)
    x = torch.tensor([[127.0] * 8, [254.0] * 8], device=device)
    rows = torch.empty_strided((2, 2**31 + 16), (2**31 + 16, 1), dtype=torch.uint8, device=device)
    kernels.encode(x, fmt, rows)
    assert fmt.payload(rows).tolist() == [[127] * 8] * 2
    assert fmt.scales(rows).flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: kernels.quantize_rows(x.int()), "x must be one of"),
        (lambda x: kernels.quantize_rows(x, None, torch.int16), "dtype must be one of"),
        (lambda x: kernels.quantize_mx(x, torch.int8), "dtype must be one of .* for MX"),
        (
            lambda x: kernels.encode(x, RowFormat(E4M3, 4, 32, "per_row_div", 16), bytes_of(2, 32)),
            "dtype must be torch.int8 for per_row_div",
        ),
        (lambda x: kernels.quantize_rows(x, x.half()), "smooth_scales must be one of"),
        (lambda x: kernels.quantize_rows(x, x[:1]), "smooth_scales must have the shape"),
        (lambda x: kernels.quantize_static(x, x[0, :3]), "smooth_scales must have the shape"),
        (lambda x: kernels.quantize_rows(x, x.to("meta")), "smooth_scales must be on"),
        (lambda x: kernels.quantize_rows(x[:, :0]), "x must have columns"),
        (lambda x: kernels.encode(x, RowFormat(torch.float32, 4, 16), x), "rows must be one of"),
        (
            lambda x: kernels.encode(x, RowFormat(torch.int8, 4, 16, "static"), bytes_of(2, 16)),
            "smooth_scales must hold the factors",
        ),
        (
            lambda x: kernels.encode(x, RowFormat(torch.bfloat16, 4, 16), bytes_of(2, 16)),
            "x must be one of",
        ),
        (
            lambda x: kernels.encode(x, RowFormat(torch.float32, 4, 16), bytes_of(3, 16)),
            r"rows must have the shape \(2, \*\)",
        ),
        (
            lambda x: kernels.decode(bytes_of(2, 16), RowFormat(torch.int8, 4, 16), x),
            "fmt must have the scheme 'return'",
        ),
    ],
)
def test_rejects(call, message, device):
    torch.set_default_device(device)
    try:
        with pytest.raises(MoeError, match=message) as caught:
            call(torch.ones((2, 4), device=device))
    finally:
        torch.set_default_device(None)
    assert isinstance(caught.value, (TypeError, ValueError))


def bytes_of(*shape):
    return torch.zeros(shape, dtype=torch.uint8)

"""The kernel of every quantisation against its definition, bit for bit."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.kernels import launch_config, quantize
from moe_triton.layout import RowFormat

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PAYLOADS = (torch.int8, E4M3, E5M2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
tight = RowFormat.tight


def assert_same_bits(actual, expected):
    """Equal in dtype, shape and bits; all NaNs are equal."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = BITS[actual.element_size()]
    same = actual.contiguous().view(bits) == expected.contiguous().view(bits)
    if actual.dtype.is_floating_point:
        same |= actual.float().isnan() & expected.float().isnan()
    assert same.all(), f"{int((~same).sum())} differ, first at {(~same).nonzero()[0].tolist()}"


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


def coded(x, fmt, smooth_scales=None, steps=kernels):
    """Payload and scales of tokens; the padding of their rows stays 0xA5."""
    rows = torch.full((len(x), fmt.stride), 0xA5, dtype=torch.uint8, device=x.device)
    steps.encode(x, fmt, rows, smooth_scales)
    scales = None if fmt.scale_offset is None else fmt.scales(rows)
    padding = torch.ones_like(rows, dtype=torch.bool)
    for part in (fmt.payload, *([fmt.scales] if scales is not None else [])):
        part(padding.view(torch.uint8)).view(torch.uint8).zero_()
    assert (rows[padding] == 0xA5).all(), f"{fmt.scheme}: padding was written"
    return fmt.payload(rows), scales


def check(x, fmt, smooth_scales=None):
    (codes, scales), (expected_codes, expected_scales) = (
        coded(x, fmt, smooth_scales, steps) for steps in (kernels, ref)
    )
    assert_same_bits(codes, expected_codes)
    if scales is not None:
        assert_same_bits(scales, expected_scales)


SHAPES = [
    pytest.param(1, 1, id="smallest"),
    pytest.param(6, 3, id="odd row"),
    pytest.param(0, 8, id="no tokens"),
    pytest.param(7, 129, id="one past a group"),
    pytest.param(3, 7168, id="DeepSeek's row"),
    pytest.param(5, 8193, id="one past a tile"),
    pytest.param(300, 96, id="many short rows"),
]
SCHEMES = {
    "static": (torch.int8, "static"),
    "int8": (torch.int8, "per_row"),
    "e4m3": (E4M3, "per_row"),
    "e5m2": (E5M2, "per_row"),
    "per_row_div": (torch.int8, "per_row_div"),
    "mx e4m3": (E4M3, "mx", torch.uint8, 32),
    "mx e5m2": (E5M2, "mx", torch.uint8, 32),
    "group_pow2 e4m3": (E4M3, "group_pow2", torch.float32, 128),
    "group_pow2 e5m2": (E5M2, "group_pow2", torch.float32, 128),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("T, H", SHAPES)
def test_every_scheme(T, H, x_dtype, scheme, device):
    x = tokens(T, H, x_dtype, device)
    dtype, *rest = SCHEMES[scheme]
    fmt = tight(dtype, H, *rest)
    if scheme == "static":
        for shape in (1, H, (T, H)):
            check(x, fmt, 50 * factors(shape, device))
    else:
        for smooth_scales in (None, factors(H, device), factors((T, H), device)):
            check(x, fmt, smooth_scales)


@pytest.mark.parametrize("group", [128, 7, 5000, 8200])
@pytest.mark.parametrize("T, H", SHAPES)
def test_groups(T, H, group, device):
    x = tokens(T, H, torch.bfloat16, device)
    for dtype in PAYLOADS:
        check(x, tight(dtype, H, "group", block=group), factors((T, H), device))


@pytest.mark.parametrize("group", [100, 300, 600])
def test_groups_that_leave_lanes_of_an_npu_idle(group, device, monkeypatch):
    """In small tiles: the masks of a whole one and its float8 would not fit the buffer."""
    limits = launch_config.npu_policy(2)
    monkeypatch.setattr(launch_config, "policy", lambda device: limits)
    x = tokens(9, 2100, torch.bfloat16, device)
    for dtype in PAYLOADS:
        fmt = tight(dtype, 2100, "group", block=group)
        launch = quantize.encode_launch(x, fmt, None, None, 1, 2100, 4)
        constants = launch.constants
        assert constants["ROWS"] * constants["GROUPS"] * constants["LANES"] <= 512
        for smooth_scales in (None, factors((9, 2100), device)):
            check(x, fmt, smooth_scales)


@pytest.mark.parametrize("group", [3000, 9000])
def test_several_long_groups(group, device):
    x = tokens(5, 20001, torch.float32, device)
    for smooth_scales in (None, factors((5, 20001), device)):
        check(x, tight(E4M3, 20001, "group", block=group), smooth_scales)


def test_mx_of_every_exponent(device):
    # All finite fp32 magnitudes, subnormal ones too, at the top of a block and below it.
    exponents = torch.arange(255, dtype=torch.int32)
    top = ((exponents << 23) | 0x712345).view(torch.float32)
    x = (top[:, None] * torch.linspace(1, -1, 32)).to(device)
    for dtype in (E4M3, E5M2):
        check(x, tight(dtype, 32, "mx", torch.uint8, 32))


def block8(hidden, scale_dtype, block=8):
    return tight(torch.int8, hidden, "block8", scale_dtype, block)


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("block", [8, 12, 128])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_blocks(x_dtype, block, scale_dtype, device):
    x = tokens(9, block * 83, x_dtype, device)
    check(x, block8(block * 83, scale_dtype, block))


def test_block8_rows_are_divided(steps, device):
    # 94.5625 / scale is 67.46875, half way between two fp16; times 1 / scale it is below.
    x = torch.tensor([[178.0, 94.5625] + [0.0] * 6], device=device)
    assert coded(x, block8(8, torch.float32), steps=steps)[0].tolist() == [[127, 68] + [0] * 6]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_that_has_lost_bits_gives_no_larger_code(sign, steps, device):
    # 190 / 127 of the smallest numbers is one of them, and the quotient 190.
    x = torch.tensor([[sign * 190] + [0] * 7], dtype=torch.float32, device=device) * 2.0**-149
    codes, scale = coded(x, block8(8, torch.float32), steps=steps)
    assert codes[0, 0] == sign * 127
    assert scale.item() == 2.0**-149


def test_a_nan_of_all_ones_stays_one_in_bf16(device):
    x = torch.full((1, 8), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
    codes, scale = coded(x, block8(8, torch.bfloat16))
    assert codes.tolist() == [[0] * 8]
    assert scale.isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_half_converts_to_float8(dtype, device):
    # With the largest value in each row the factor is 1, and the other values come out rounded.
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    largest = torch.finfo(dtype).max
    halves = halves[halves.abs() <= largest].float()
    for scale in (1.0, 2.0**-8):
        x = torch.cat([halves * scale, torch.tensor([largest])])[None].to(device)
        codes, scales = coded(x, tight(dtype, x.shape[1], "per_row"))
        assert scales.tolist() == [[1.0]]
        assert_same_bits(codes, x.to(dtype))


@hypothesis.given(
    num_rows=st.integers(0, 9),
    hidden=st.integers(1, 300),
    group=st.integers(1, 300),
    dtype=st.sampled_from(PAYLOADS),
    x_dtype=st.sampled_from(FLOATS),
    pow2=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_groups_of_any_size(num_rows, hidden, group, dtype, x_dtype, pow2, seed, device):
    x = tokens(num_rows, hidden, x_dtype, device, seed)
    scheme = "group_pow2" if pow2 and dtype != torch.int8 else "group"
    check(x, tight(dtype, hidden, scheme, block=group))


def test_rounded_scales_of_every_exponent(device):
    """amax / 448 on both sides of each power of two, subnormal and infinite ones among them."""
    exponents = torch.arange(1, 255, dtype=torch.int32)
    top = (exponents << 23).view(torch.float32) * 1.75  # 448 = 1.75 * 2 ** 8
    below, above = (top.view(torch.int32) + step for step in (-1, 1))
    largest = torch.cat([top, below.view(torch.float32), above.view(torch.float32)])
    x = (largest[:, None] * torch.linspace(-1, 1, 33)).to(device)
    for dtype in (E4M3, E5M2):
        check(x, tight(dtype, 33, "group_pow2", block=128))


def test_strided_tokens(device):
    x = tokens(6, 80, torch.bfloat16, device)
    fmt = tight(torch.int8, 40, "per_row")
    check(x[:, ::2], fmt)
    wide = torch.zeros((6, 100), dtype=torch.bfloat16, device=device)
    wide[:, 3:43] = x[:, ::2]
    check(wide[:, 3:43], fmt)
    check(x[:1].expand(6, 80), tight(torch.int8, 80, "per_row"))


def test_payload_and_scales_may_lie_apart(device):
    """Scales far from their payload, and rows in their own dtype."""
    x = tokens(6, 520, torch.bfloat16, device)
    for dtype in (*FLOATS, torch.float64):
        check(x.to(dtype), RowFormat(dtype, 520, 16 * (520 * dtype.itemsize // 16 + 2)))
    check(x, RowFormat(torch.int8, 520, 4096, "per_row", 2048), factors(520, device))


@pytest.mark.parametrize("num_rows", [0, 2, 3, 9])
def test_encode_a_count(num_rows, device):
    fmt = RowFormat(torch.int8, 8, 32, "per_row", 16)
    x = tokens(3, 8, torch.float32, device)
    rows = torch.full((3, 32), 0xA5, dtype=torch.uint8, device=device)
    expected = rows.clone()
    kernels.encode(x, fmt, rows, None, torch.tensor([num_rows], dtype=torch.int32, device=device))
    ref.encode(x[:num_rows], fmt, expected[: min(num_rows, 3)])
    assert torch.equal(rows, expected)


def test_float64_quantises_as_float32(device):
    check(torch.randn((5, 6), dtype=torch.float64, device=device), tight(torch.int8, 6, "per_row"))


@pytest.mark.parametrize(
    "smooth_scales, codes, scales",
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
def test_worked_example_of_smooth_rows(smooth_scales, codes, scales, steps, device):
    x = torch.tensor(
        [[1, -2, 0.5, 4], [0, 0, 0, 0], [3, -8, 1.5, 0.25], [0.125, 0.25, -0.5, 1]],
        dtype=torch.bfloat16,
        device=device,
    )
    smooth_scales = torch.tensor(smooth_scales, device=device)
    found, found_scales = coded(x, tight(torch.int8, 4, "per_row"), smooth_scales, steps=steps)
    assert found.tolist() == codes
    assert found_scales.flatten().tolist() == [float.fromhex(scale) for scale in scales]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_worked_example_of_block8(dtype, steps, device):
    """How these rows are decoded is in test_weighted_sum."""
    row = [1, -2, 0.5, 4, 3, -0.125, 0, 2.5] + [0] * 8
    x = torch.tensor([row], dtype=dtype, device=device)
    codes, scales = coded(x, block8(16, dtype), steps=steps)
    assert codes.tolist() == [[32, -64, 16, 127, 95, -4, 0, 79] + [0] * 8]
    assert scales.tolist() == [[0.031494140625, 0]]


@pytest.mark.parametrize(
    "fmt, scales, codes",
    [
        (tight(E4M3, 64, "mx", torch.uint8, 32), [121, 0], "7a fe 5a 32 70 68"),
        (tight(E5M2, 64, "mx", torch.uint8, 32), [114, 0], "79 fb 69 55 74 70"),
        (tight(E4M3, 64, "group", block=128), [0.0167410708963871], "79 fe 59 32 6f 67"),
        (tight(E5M2, 64, "group", block=128), [0.00013078961637802422], "79 fb 68 55 73 6f"),
        (tight(E4M3, 64, "group_pow2", block=128), [2.0**-5], "72 f7 52 2a 68 60"),
    ],
    ids=["mx e4m3", "mx e5m2", "group e4m3", "group e5m2", "group_pow2 e4m3"],
)
def test_worked_example_of_float8(fmt, scales, codes, steps, device):
    row = [5, -7.5, 0.30078125, 0.010009765625, 2, 1] + [0] * 58
    x = torch.tensor([row], dtype=torch.bfloat16, device=device)
    found, found_scales = coded(x, fmt, steps=steps)
    assert found_scales.tolist() == [scales]
    assert bytes(found.view(torch.uint8)[0, :6].tolist()) == bytes.fromhex(codes)
    assert not found[0, 6:].float().any()


NAN, INF = float("nan"), float("inf")
MX, INT8, DIVISION = tight(E4M3, 96, "mx", torch.uint8, 32), "per_row", "per_row_div"


@pytest.mark.parametrize(
    "scheme, row, codes, scale",
    [
        pytest.param(INT8, [127, 0.5, 1.5, 2.5, -2.5], [127, 0, 2, 2, -2], 1.0, id="ties"),
        pytest.param(INT8, [-254, 2, 3, 0, 0], [-127, 1, 2, 0, 0], 2.0, id="negative maximum"),
        pytest.param(INT8, [0.0] * 5, [0] * 5, 0.0, id="zeros"),
        pytest.param(INT8, [-0.0] * 5, [0] * 5, 0.0, id="negative zeros"),
        # 127 / 1e-40 overflows: too small to tell from zeros.
        pytest.param(INT8, [1e-40, 0, 0, 0, 0], [0] * 5, 0.0, id="factor overflows"),
        # One division: 127 * (1 / 6) would be 21.166668, and its reciprocal another scale.
        pytest.param(
            INT8, [6, -4, 1.5, 1, 0], [127, -85, 32, 21, 0], float.fromhex("0x1.83060cp-5"),
            id="one division",
        ),
        pytest.param(DIVISION, [127, -63.5, 1.5, 0, 0], [127, -64, 2, 0, 0], 1.0, id="divided"),
        pytest.param(DIVISION, [0.0] * 5, [0] * 5, 0.0, id="zeros divided"),
        pytest.param(DIVISION, [INF, 1, 0, 0, 0], [0] * 5, INF, id="infinity divided"),
    ],
)  # fmt: skip
def test_rows_by_hand(scheme, row, codes, scale, steps, device):
    x = torch.tensor([row], dtype=torch.float32, device=device)
    found, scales = coded(x, tight(torch.int8, 5, scheme), steps=steps)
    assert found.tolist() == [codes]
    assert scales.tolist() == [[scale]]
    assert not torch.signbit(scales).any()


def test_static_by_hand(steps, device):
    x = torch.tensor([[1.5, -100.0, 2.5, 63.6]], dtype=torch.float16, device=device)
    fmt, factors = tight(torch.int8, 4, "static"), torch.tensor([2.0, 2.0, 1.0, 2.0], device=device)
    for shape, codes in ((factors[2:3], [2, -100, 2, 64]), (factors, [3, -128, 2, 127])):
        assert coded(x, fmt, shape, steps)[0].tolist() == [codes]
    assert coded(x, fmt, factors[None], steps)[0].tolist() == [[3, -128, 2, 127]]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinity_stay_in_their_row_or_block(bad, steps, device):
    x = torch.tensor([[1.0, 2.0], [bad, 1.0], [127.0, 1.0]], device=device)
    codes, scales = coded(x, tight(torch.int8, 2, "per_row"), steps=steps)
    assert codes[::2].tolist() == [[64, 127], [127, 1]]
    assert scales[2] == 1.0
    x = torch.tensor([[bad, 1.0, 2.0, 1.0]], dtype=torch.float16, device=device)
    codes, scales = coded(x, block8(4, torch.float16, 2), steps=steps)
    assert codes[0, 2:].tolist() == [127, 64]
    assert scales[0, 1] == torch.tensor(2 / 127).half()


def test_groups_have_scales_of_their_own_and_the_last_may_be_short(steps, device):
    x = torch.tensor([[448.0, 1.0, 0.0, 0.0, 896.0]], device=device)
    smooth_scales = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5], device=device)
    codes, scales = coded(x, tight(E4M3, 5, "group", block=2), smooth_scales, steps)
    assert codes.float().tolist() == [[448, 1, 0, 0, 448]]
    assert scales.tolist() == [[1.0, 0.0, 1.0]]


def test_mx_by_hand(steps, device):
    """1.99 * 2**3: 15.92 * 2**(8 - 3) = 509 saturates to 448. Inf makes its block NaN, code 255."""
    x = torch.zeros((2, 96), device=device)
    x[0, 0], x[0, 32], x[0, 64] = 15.92, INF, -1.0
    x[1, 0], x[1, 1] = 2.0**-149, 2.0**-126
    codes, scales = coded(x, MX, steps=steps)
    assert codes[0, ::64].float().tolist() == [448, -256]
    assert codes[0, 32:64].float().isnan().all()
    assert codes[1, :2].float().tolist() == [0.0, 2.0]
    assert scales.tolist() == [[127 + 3 - 8, 255, 127 - 8, 0], [0] * 4]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_float8_rows_by_hand(dtype, steps, device):
    x = torch.tensor([[3.0, -6.0, 1.0], [0.0, 0.0, 0.0]], device=device)
    codes, scales = coded(x, tight(dtype, 3, "per_row"), steps=steps)
    largest = torch.finfo(dtype).max
    assert codes.float()[:, :2].tolist() == [[largest / 2, -largest], [0, 0]]
    assert scales.tolist() == [[float(1 / (torch.tensor(largest) / 6))], [0.0]]


def test_rows_longer_than_a_block_of_ref(steps, device):
    x = torch.ones((3, 2**17 + 3), device=device)
    x[1] = 2.0
    codes, scales = coded(x, tight(torch.int8, 2**17 + 3, "per_row"), steps=steps)
    assert (codes == 127).all()
    assert scales.flatten().tolist() == pytest.approx([1 / 127, 2 / 127, 1 / 127])


def test_rows_past_2_to_the_31_elements(device, reserve):
    # Row 2 begins at element 2**31; of the memory only a few pages are touched.
    reserve(2**32 + 2**20)
    x = torch.empty_strided((3, 8), (2**30, 1), dtype=torch.bfloat16, device=device)
    for row in range(3):
        x[row] = 127 * 2**row
    codes, scales = coded(x, tight(torch.int8, 8, "per_row"))
    assert scales.flatten().tolist() == [1.0, 2.0, 4.0]
    assert (codes == 127).all()


def test_coded_rows_past_2_to_the_31_elements(device, reserve):
    reserve(2**31 + 2**20)
    fmt = RowFormat(torch.int8, 8, 2**31 + 16, "per_row", 16)
    x = torch.tensor([[127.0] * 8, [254.0] * 8], device=device)
    rows = torch.empty_strided((2, 2**31 + 16), (2**31 + 16, 1), dtype=torch.uint8, device=device)
    kernels.encode(x, fmt, rows)
    assert fmt.payload(rows).tolist() == [[127] * 8] * 2
    assert fmt.scales(rows).flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones((2, 4)).int()}, "x must be one of"),
        ({"fmt": tight(torch.int16, 4, "per_row")}, "fmt.dtype must be one of .* 'per_row'"),
        ({"fmt": tight(torch.int8, 4, "mx")}, "fmt.dtype must be one of .* 'mx'"),
        ({"fmt": tight(E4M3, 4, "per_row_div")}, "fmt.dtype must be .*int8.* 'per_row_div'"),
        ({"fmt": tight(torch.int8, 4, "per_column")}, "fmt must have a scheme of .*'per_column'"),
        ({"smooth_scales": torch.ones((2, 4)).half()}, "smooth_scales must be one of"),
        ({"smooth_scales": torch.ones((1, 4))}, "smooth_scales must have the shape"),
        ({"smooth_scales": torch.ones(3)}, "smooth_scales must have the shape"),
        ({"smooth_scales": torch.ones((2, 4), device="meta")}, "smooth_scales must be on"),
        ({"x": torch.ones((2, 0)), "fmt": tight(torch.int8, 0, "per_row")}, "x must have columns"),
        ({"rows": torch.ones((2, 32))}, "rows must be one of"),
        ({"rows": torch.ones((3, 32)).byte()}, r"rows must have the shape \(2, \*\)"),
        ({"fmt": tight(torch.int8, 4, "static")}, "smooth_scales must hold the factors"),
        ({"fmt": tight(torch.bfloat16, 4)}, "x must be one of"),
    ],
)
def test_rejects(change, message, device):
    arguments = {
        "x": torch.ones((2, 4)),
        "fmt": tight(torch.int8, 4, "per_row"),
        "rows": torch.zeros((2, 32), dtype=torch.uint8),
    } | change
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in arguments.items()
    }
    with pytest.raises(MoeError, match=f"encode: {message}") as caught:
        kernels.encode(**arguments)
    assert isinstance(caught.value, (TypeError, ValueError))


def test_the_kernel_knows_no_other_scheme(device, monkeypatch):
    """A scheme that only the table of launchers has is an error before anything is written."""
    monkeypatch.setitem(quantize._SCHEMES, "per_column", quantize._SCHEMES["per_row"])
    fmt = tight(torch.int8, 4, "per_column")
    rows = torch.zeros((2, fmt.stride), dtype=torch.uint8, device=device)
    with pytest.raises(Exception, match="unknown scheme"):
        kernels.encode(torch.ones((2, 4), device=device), fmt, rows)
    assert not rows.any()

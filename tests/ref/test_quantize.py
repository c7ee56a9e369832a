"""Every quantisation, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moe_triton import ref
from moe_triton.layout import RowFormat


@pytest.mark.parametrize(
    "row, codes, scale",
    [
        pytest.param([127.0, 0.5, 1.5, 2.5, -2.5], [127, 0, 2, 2, -2], 1.0, id="ties to even"),
        pytest.param([-254.0, 2.0, 3.0, 0.0, 0.0], [-127, 1, 2, 0, 0], 2.0, id="negative maximum"),
        pytest.param([0.0] * 5, [0] * 5, 0.0, id="zeros"),
        pytest.param([-0.0] * 5, [0] * 5, 0.0, id="negative zeros"),
        # 127 / 1e-40 overflows: too small to tell from zeros.
        pytest.param([1e-40, 0.0, 0.0, 0.0, 0.0], [0] * 5, 0.0, id="factor overflows"),
        # One division: 127 * (1 / 6) would be 21.166668, and its reciprocal another scale.
        pytest.param(
            [6.0, -4.0, 1.5, 1.0, 0.0],
            [127, -85, 32, 21, 0],
            float.fromhex("0x1.83060cp-5"),
            id="one division",
        ),
    ],
)
def test_quantize_rows_to_int8_by_hand(row, codes, scale):
    q, scales = ref.quantize_rows(torch.tensor([row]))
    assert q.tolist() == [codes]
    assert scales.tolist() == [scale]
    assert not torch.signbit(scales).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_leaves_the_others_alone(bad):
    x = torch.tensor([[1.0, 2.0], [bad, 1.0], [127.0, 1.0]])
    q, scales = ref.quantize_rows(x)
    assert q[2].tolist() == [127, 1]
    assert scales[2] == 1.0
    assert q[0].tolist() == [64, 127]


def test_rows_longer_than_a_block():
    hidden = 2**17 + 3
    x = torch.ones((3, hidden))
    x[1] = 2.0
    q, scales = ref.quantize_rows(x)
    assert (q == 127).all()
    assert scales.tolist() == pytest.approx([1 / 127, 2 / 127, 1 / 127])


def test_quantize_blocks_by_hand():
    x = torch.tensor([[1, -2, 0.5, 4, 3, -0.125, 0, 2.5] + [0.0] * 8], dtype=torch.bfloat16)
    q, scales = ref.quantize_blocks(x, 8, torch.bfloat16)
    assert q.tolist() == [[32, -64, 16, 127, 95, -4, 0, 79] + [0] * 8]
    assert scales.tolist() == [[0.031494140625, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_block_leaves_the_others_alone(bad):
    x = torch.tensor([[bad, 1.0, 2.0, 1.0]], dtype=torch.float16)
    q, scales = ref.quantize_blocks(x, 2, torch.float16)
    assert q[0, 2:].tolist() == [127, 64]
    assert scales[0, 1] == torch.tensor(2 / 127).half()


def test_a_tiny_block_saturates():
    # The scale is the smallest subnormal, 2**-149, where the block's largest is 2**-133.
    x = torch.tensor([[2.0**-133, -(2.0**-133)]], dtype=torch.bfloat16)
    q, _ = ref.quantize_blocks(x, 2, torch.bfloat16)
    assert q.abs().max() <= 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_survive_encode_and_decode(dtype):
    x = torch.randn((5, 24)).to(dtype)
    fmt = RowFormat(torch.int8, 24, 48, "block8", 32, dtype, 8)
    rows = torch.full((5, 48), 0xFF, dtype=torch.uint8)
    out = torch.empty_like(x)
    ref.encode(x, fmt, rows)
    ref.decode(rows, fmt, out)
    q, scales = ref.quantize_blocks(x, 8, dtype)
    expected = q.float() * scales.float().repeat_interleave(8, dim=1)
    assert torch.equal(out, expected.to(dtype))
    assert (rows[:, 24:32] == 0xFF).all(), "wrote between payload and scales"


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROW = [5, -7.5, 0.30078125, 0.010009765625, 2, 1] + [0.0] * 58


def codes_of(q, count):
    return [f"{code:02x}" for code in q[0, :count].view(torch.uint8).tolist()]


@pytest.mark.parametrize(
    "dtype, scale, codes, values",
    [
        (E4M3, 121, "7a fe 5a 32 70 68", [320, -448, 20, 0.625, 128, 64]),
        (E5M2, 114, "79 fb 69 55 74 70", [40960, -57344, 2560, 80, 16384, 8192]),
    ],
)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_mx_by_hand(kind, dtype, scale, codes, values):
    q, found = ref.quantize_mx(torch.tensor([ROW]).to(kind), dtype)
    if kind == torch.bfloat16 or torch.tensor(ROW).to(kind).tolist() == ROW:
        assert codes_of(q, 6) == codes.split()
        assert q[0, :6].float().tolist() == values
    assert found.tolist() == [[scale, 0]]
    assert not q[0, 6:].float().any()


@pytest.mark.parametrize(
    "dtype, scale, codes, values",
    [
        (E4M3, 0.0167410708963871, "79 fe 59 32 6f 67", [288, -448, 18, 0.625, 120, 60]),
        (
            E5M2,
            0.00013078961637802422,
            "79 fb 68 55 73 6f",
            [40960, -57344, 2048, 80, 14336, 7168],
        ),
    ],
)
def test_quantize_groups_by_hand(dtype, scale, codes, values):
    q, found = ref.quantize_groups(torch.tensor([ROW]).bfloat16(), 128, None, dtype)
    assert codes_of(q, 6) == codes.split()
    assert q[0, :6].float().tolist() == values
    assert found.tolist() == [[scale]]


def test_groups_have_scales_of_their_own_and_the_last_may_be_short():
    x = torch.tensor([[448.0, 1.0, 0.0, 0.0, 896.0]])
    q, scales = ref.quantize_groups(x, 2, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5]))
    assert q.float().tolist() == [[448, 1, 0, 0, 448]]
    assert scales.tolist() == [[1.0, 0.0, 1.0]]


def test_mx_blocks_saturate_and_keep_bad_ones_apart():
    # 1.99 * 2**3 in e4m3: 15.92 * 2**(8 - 3) = 509 goes to 448. Inf makes its block NaN, code 255.
    x = torch.zeros((1, 96))
    x[0, 0], x[0, 32], x[0, 64] = 15.92, float("inf"), -1.0
    q, codes = ref.quantize_mx(x)
    assert q[0, 0].float() == 448
    assert q[0, 32:64].float().isnan().all()
    assert q[0, 64].float() == -256
    assert codes.tolist() == [[127 + 3 - 8, 255, 127 - 8, 0]]


def test_mx_of_the_tiniest_values():
    x = torch.tensor([[2.0**-149, 2.0**-126]])
    q, codes = ref.quantize_mx(x)
    assert codes.tolist() == [[0, 0]]
    assert q.float().tolist() == [[0.0, 2.0]]


def test_quantize_static_by_hand():
    x = torch.tensor([[1.5, -100.0, 2.5, 63.6]], dtype=torch.float16)
    assert ref.quantize_static(x, torch.tensor([1.0])).tolist() == [[2, -100, 2, 64]]
    factors = torch.tensor([2.0, 2.0, 1.0, 2.0])
    assert ref.quantize_static(x, factors).tolist() == [[3, -128, 2, 127]]
    assert ref.quantize_static(x, factors[None]).tolist() == [[3, -128, 2, 127]]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantize_rows_to_float8(dtype):
    x = torch.tensor([[3.0, -6.0, 1.0], [0.0, 0.0, 0.0]])
    q, scales = ref.quantize_rows(x, None, dtype)
    largest = torch.finfo(dtype).max
    assert q.float().tolist()[1] == [0, 0, 0]
    assert q[0, 1].float() == -largest
    assert q[0, 0].float() == largest / 2
    assert scales.tolist() == [float(1 / (torch.tensor(largest) / 6)), 0.0]


@pytest.mark.parametrize(
    "fmt",
    [
        RowFormat(torch.int8, 70, 80, "static"),
        RowFormat(E4M3, 70, 96, "per_row", 80),
        RowFormat(E5M2, 70, 96, "group", 80, torch.float32, 128),
        RowFormat(E4M3, 70, 96, "mx", 80, torch.uint8, 32),
    ],
    ids=lambda fmt: fmt.scheme,
)
def test_encode_writes_payload_and_scales_only(fmt):
    x = torch.randn((3, 70)).bfloat16()
    smooth_scales = None if fmt.scheme == "mx" else 0.5 + torch.rand((3, 70))
    rows = torch.full((3, fmt.stride), 0xA5, dtype=torch.uint8)
    ref.encode(x, fmt, rows, smooth_scales)
    if fmt.scheme == "static":
        q, scales = ref.quantize_static(x, smooth_scales), None
    elif fmt.scheme == "per_row":
        q, scales = ref.quantize_rows(x, smooth_scales, fmt.dtype)
    elif fmt.scheme == "group":
        q, scales = ref.quantize_groups(x, 128, smooth_scales, fmt.dtype)
    else:
        q, scales = ref.quantize_mx(x, fmt.dtype)
    assert torch.equal(rows[:, :70], q.view(torch.uint8))
    end = 70
    if scales is not None:
        assert torch.equal(fmt.scales(rows), scales.view(3, -1))
        end = fmt.scale_offset + fmt.num_scales * fmt.scale_dtype.itemsize
        assert (rows[:, 70:80] == 0xA5).all()
    assert (rows[:, end:] == 0xA5).all()


def test_by_division_by_hand():
    """As rows are, but for the scale: a row of zeros has the scale 0, and codes of 0."""
    x = torch.tensor([[127.0, -63.5, 1.5], [0, 0, 0], [float("inf"), 1, 0]])
    q, scale = ref.quantize_by_division(x)
    assert q.tolist() == [[127, -64, 2], [0, 0, 0], [0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0, float("inf")]
    q, scale = ref.quantize_by_division(x[:1].repeat(2, 1), torch.tensor([[1.0] * 3, [0, 2, 2]]))
    assert q.tolist() == [[127, -64, 2], [0, -127, 3]]
    assert scale.tolist() == [1.0, 1.0]

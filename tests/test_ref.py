"""The reference itself, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moe_triton import ref
from moe_triton.layout import NOWHERE, RowFormat, SpecialExperts


def reduce(rows, index, weights, addend, out, special=None):
    fmt = RowFormat(rows.dtype, rows.shape[1], rows.shape[1] * rows.itemsize)
    ref.reduce(rows.view(torch.uint8), index, fmt, weights, special, addend, out)


def test_plan_example():
    plan = ref.plan(torch.tensor([[0, 2], [2, 1], [0, 3]], dtype=torch.int32), 4)
    assert plan.counts.tolist() == [2, 1, 2, 1]
    assert plan.expand_idx.tolist() == [0, 0, 1, 0, 1, 0]
    assert plan.order.tolist() == [0, 4, 3, 1, 2, 5]
    assert {part.dtype for part in plan} == {torch.int32}


def test_plan_of_nothing():
    plan = ref.plan(torch.empty((0, 2), dtype=torch.int32), 3)
    assert plan.counts.tolist() == [0, 0, 0]
    assert plan.order.numel() == plan.expand_idx.numel() == 0


def test_plan_leaves_out_what_is_not_routed():
    ids = torch.tensor([[0, NOWHERE], [2, 0], [1, 3]], dtype=torch.int32)
    plan = ref.plan(ids, 2)
    assert plan.counts.tolist() == [2, 1]
    assert plan.expand_idx.tolist() == [0, NOWHERE, NOWHERE, 1, 0, NOWHERE]
    assert plan.order.tolist() == [0, 3, 4, 1, 2, 5]


def test_sources_example():
    # Two local experts, three sources: 1, 0, 2 rows for the first and 2, 1, 0 for the second.
    sources = ref.sources(torch.tensor([[1, 0, 2], [2, 1, 0]], dtype=torch.int32))
    assert sources.ends.tolist() == [1, 1, 3, 5, 6, 6]
    assert sources.source.tolist() == [0, 2, 2, 0, 0, 1]
    assert sources.copy.tolist() == [0, 0, 1, 1, 2, 0]


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
def test_quantize_int8_by_hand(row, codes, scale):
    q, scales = ref.quantize_int8(torch.tensor([row]))
    assert q.tolist() == [codes]
    assert scales.tolist() == [scale]
    assert not torch.signbit(scales).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_leaves_the_others_alone(bad):
    x = torch.tensor([[1.0, 2.0], [bad, 1.0], [127.0, 1.0]])
    q, scales = ref.quantize_int8(x)
    assert q[2].tolist() == [127, 1]
    assert scales[2] == 1.0
    assert q[0].tolist() == [64, 127]


def test_rows_longer_than_a_block():
    hidden = 2**17 + 3
    x = torch.ones((3, hidden))
    x[1] = 2.0
    q, scales = ref.quantize_int8(x)
    assert (q == 127).all()
    assert scales.tolist() == pytest.approx([1 / 127, 2 / 127, 1 / 127])
    out = torch.empty((1, hidden))
    reduce(x, torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 2.0]]), None, out)
    assert (out == 1 + 4 + 1).all()


def test_reduce_rounds_once_and_to_even():
    # 256 + 1 + 1 = 258; adding in bf16 would lose each 1, and 257 is a tie that goes to 256.
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    out = torch.empty((2, 1), dtype=torch.bfloat16)
    index = torch.tensor([[0, 1, 2], [0, 1, 1]])
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]])
    reduce(rows, index, weights, None, out)
    assert out.flatten().tolist() == [258.0, 256.0]


def test_reduce_adds_in_ascending_order():
    # (2**24 + 1) + 1 loses both ones in float32; 1 + 1 first would not.
    rows = torch.tensor([[2.0**24], [1.0]], dtype=torch.float32)
    out = torch.empty((2, 1))
    reduce(rows, torch.tensor([[0, 1, 1], [1, 1, 0]]), None, None, out)
    assert out.flatten().tolist() == [2.0**24, 2.0**24 + 2]


def test_reduce_adds_unweighted_rows_and_the_addend_last():
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0]], dtype=torch.float16)
    out = torch.empty((1, 2), dtype=torch.float16)
    addend = torch.tensor([[0.5, 0.25]], dtype=torch.float16)
    reduce(rows, torch.tensor([[0, 1]]), torch.tensor([[3.0]]), addend, out)
    assert out.tolist() == [[13.5, 26.25]]


def test_reduce_never_gives_a_negative_zero():
    rows = torch.tensor([[-0.0]], dtype=torch.bfloat16)
    out = torch.empty((1, 1), dtype=torch.bfloat16)
    reduce(rows, torch.tensor([[0]]), None, None, out)
    assert not torch.signbit(out).any()


def test_pack_leaves_later_rows_untouched():
    fmt = RowFormat(torch.int8, 4, 32, 16)
    rows = torch.zeros((3, 32), dtype=torch.uint8)
    fmt.payload(rows).copy_(torch.arange(12, dtype=torch.int8).view(3, 4))
    fmt.scales(rows).copy_(torch.tensor([[1.0], [2.0], [3.0]]))
    x = torch.full((4, 4), 99, dtype=torch.int8)
    scales = torch.full((4,), 99.0)
    ref.pack(rows, torch.tensor([2, 0]), fmt, x, scales)
    assert x.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3], [99] * 4, [99] * 4]
    assert scales.tolist() == [3.0, 1.0, 99.0, 99.0]


def test_sources_pads_each_expert():
    sources = ref.sources(torch.tensor([[1, 0, 2], [0, 0, 0], [2, 1, 1]], dtype=torch.int32), 4)
    pad = NOWHERE
    assert sources.source.tolist() == [0, 2, 2, pad, 0, 0, 1, 2]
    assert sources.copy[sources.source != pad].tolist() == [0, 0, 1, 1, 2, 0, 2]
    assert sources.ends.tolist() == [1, 1, 3, 3, 3, 3, 5, 6, 7]
    assert sources.offsets.tolist() == [4, 4, 8]


def test_pack_makes_zeros_of_what_is_nowhere():
    fmt = RowFormat(torch.bfloat16, 2, 16)
    rows = torch.full((2, 16), 0xFF, dtype=torch.uint8)  # NaN
    fmt.payload(rows)[1] = 3.0
    x = torch.full((4, 2), 99.0, dtype=torch.bfloat16)
    ref.pack(rows, torch.tensor([NOWHERE, 1, NOWHERE]), fmt, x)
    assert x.tolist() == [[0, 0], [3, 3], [0, 0], [99, 99]]
    ref.pack(rows[:0], torch.tensor([NOWHERE]), fmt, x)
    assert x.tolist() == [[0, 0], [3, 3], [0, 0], [99, 99]]


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
    fmt = RowFormat(torch.int8, 24, 48, 32, dtype, 8)
    rows = torch.full((5, 48), 0xFF, dtype=torch.uint8)
    out = torch.empty_like(x)
    ref.encode(x, fmt, rows)
    ref.decode(rows, fmt, out)
    q, scales = ref.quantize_blocks(x, 8, dtype)
    expected = q.float() * scales.float().repeat_interleave(8, dim=1)
    assert torch.equal(out, expected.to(dtype))
    assert (rows[:, 24:32] == 0xFF).all(), "wrote between payload and scales"


def test_reduce_leaves_out_what_is_nowhere_whatever_its_weight():
    rows = torch.tensor([[float("nan")], [2.0]])
    out = torch.empty((3, 1))
    index = torch.tensor([[NOWHERE, 1], [1, NOWHERE], [NOWHERE, NOWHERE]])
    weights = torch.tensor([[float("nan"), 3.0], [2.0, float("inf")], [1.0, 1.0]])
    reduce(rows, index, weights, None, out)
    assert out.flatten().tolist() == [6.0, 4.0, 0.0]
    reduce(rows[:0], index[2:], weights[2:], None, out[2:])
    assert out[2] == 0


def test_reduce_special_experts_in_their_place():
    # Experts: 0 routed, 1 zero, 2 copy, 3 and 4 constant with alphas (2, 3) and (0.5, 1).
    special = SpecialExperts(
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
    reduce(rows, index, weights, None, out, special)
    assert out.tolist() == [[24.0, 36.0], [0.5 * 5 + 4 * 4.5, 0.5 * 1 + 4 * 7.0]]
    columns = special._replace(
        alpha_1=torch.tensor([[2.0, 0.0], [0.5, 0.0]]),
        alpha_2=torch.tensor([[3.0, 1.0], [1.0, 2.0]]),
    )
    reduce(rows, index, weights, None, out, columns)
    assert out[1].tolist() == [0.5 * 5 + 4 * 4.5, 0.5 * -1 + 4 * 12.0]


def test_add_rows_rounds_once_to_even():
    own = torch.tensor([[256.0, 3.0]], dtype=torch.bfloat16)
    peer = torch.tensor([[1.0, 4.0]], dtype=torch.bfloat16)
    out = torch.empty_like(own)
    ref.add_rows(own, peer, out)
    assert out.tolist() == [[256.0, 7.0]]

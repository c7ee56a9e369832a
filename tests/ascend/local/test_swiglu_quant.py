"""Quantised swiglu: definitions row by row, groups, refusals and compiled calls."""

from __future__ import annotations

import compilers
import pytest
import torch
from torch.nn.functional import silu

from moe_triton import MoeError
from moe_triton.compat import torch_npu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

swiglu_quant = torch_npu.npu_swiglu_quant
dequant = torch_npu.npu_dequant_swiglu_quant

COUNTS = [2, 0, 3]  # of 6 rows: the last one is in no group
GROUP_OF_ROW = [0, 0, 2, 2, 2]


def dynamic(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes, and the factors by which rows were multiplied."""
    largest = t.abs().amax(1)
    factor = torch.full_like(largest, 127.0) / largest
    return (t * factor[:, None]).round().to(torch.int8), factor


def static(t: torch.Tensor) -> torch.Tensor:
    return t.round().clamp(-128, 127).to(torch.int8)


def grouped(values: torch.Tensor | None) -> torch.Tensor | None:
    """The row of each of the first five rows' group."""
    return None if values is None else values[GROUP_OF_ROW]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("kind", [None, 0, 1], ids=["one group", "prefix sums", "counts"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_swiglu_quant(back_end, left, mode, kind, dtype):
    x = torch.randn(6, 10).to(dtype)
    number = 1 if kind is None else 3
    smooth, offsets = torch.rand(number, 5) * 9, torch.rand(number, 5)
    index = torch.tensor(COUNTS, dtype=torch.int32)
    index = None if kind is None else (index.cumsum(0) if kind == 0 else index)
    out, scale = swiglu_quant(
        x,
        smooth_scales=smooth,
        offsets=offsets,
        group_index=index,
        activate_left=left,
        quant_mode=mode,
        group_list_type=kind or 0,
    )
    a, b = x.float().chunk(2, 1)
    s = silu(a) * b if left else silu(b) * a
    rows = 6 if kind is None else 5
    of_row, added = (smooth, offsets) if kind is None else (grouped(smooth), grouped(offsets))
    if mode == 0:
        assert torch.equal(out[:rows], static(of_row * s[:rows] + added))
        assert not scale.any()
    else:
        codes, factor = dynamic(s[:rows] * of_row)
        assert torch.equal(out[:rows], codes)
        torch.testing.assert_close(scale[:rows], factor, rtol=3e-7, atol=0)
    assert not out[rows:].any()


def test_a_factor_for_each_group_and_more_dimensions(back_end):
    x = torch.randn(2, 3, 8)
    numbers = torch.tensor([2.0, 3.0])
    index = torch.tensor([1, 6])
    out, scale = swiglu_quant(x, smooth_scales=numbers, group_index=index, quant_mode=1)
    wide = numbers[:, None].expand(-1, 4)
    flat, factors = swiglu_quant(x.view(6, 8), smooth_scales=wide, group_index=index, quant_mode=1)
    assert torch.equal(out.view(6, 4), flat)
    assert torch.equal(scale.view(-1), factors)
    assert scale.shape == (2, 3)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("variant", [0, 1, 2])
@pytest.mark.parametrize("smooth", [False, True])
def test_dequant_swiglu_quant(back_end, mode, groups, variant, smooth):
    x = torch.randint(-99, 99, (6, 10), dtype=torch.int32)
    number = 3 if groups else 1
    weight, rows_scale = torch.rand(number, 10) / 9, torch.rand(6, 1)
    quant_scale = torch.rand(number, 5) + 0.5 if smooth else None
    offset = torch.rand(number, 5) if mode == 0 else None
    out, scale = dequant(
        x,
        weight_scale=weight,
        activation_scale=rows_scale,
        quant_scale=quant_scale,
        quant_offset=offset,
        group_index=torch.tensor(COUNTS) if groups else None,
        activate_left=True,
        quant_mode=mode,
        swiglu_mode=variant,
        clamp_limit=2.0,
    )
    rows = 5 if groups else 6
    of_row = grouped if groups else (lambda values: values)
    t = (x[:rows].float() * of_row(weight)) * rows_scale[:rows]
    a, b = (t[:, ::2], t[:, 1::2]) if variant == 1 else t.chunk(2, 1)
    if variant == 0:
        s = silu(a) * b
    else:
        a, b = a.clamp(max=2.0), b.clamp(-2.0, 2.0)
        s = a * torch.sigmoid(1.702 * a) * (b + 1.0)
    if mode == 0:
        s = s / of_row(quant_scale) if smooth else s
        assert torch.equal(out[:rows], static(s + of_row(offset)))
        assert not scale.any()
    else:
        codes, factor = dynamic(s * of_row(quant_scale) if smooth else s)
        assert torch.equal(out[:rows], codes)
        assert torch.equal(scale[:rows], factor.reciprocal())
    assert not out[rows:].any()
    assert not scale[rows:].any()


def test_biases(back_end):
    """Integers are added before the scales, numbers after them."""
    x = torch.randint(-99, 99, (4, 6), dtype=torch.int32)
    weight, rows = torch.rand(6), torch.rand(4)
    whole = torch.randint(-99, 99, (6,), dtype=torch.int32)
    options = {"weight_scale": weight, "activation_scale": rows, "quant_mode": 1}
    out, scale = dequant(x, bias=whole, **options)
    wanted = dequant(x + whole, **options)
    assert torch.equal(out, wanted[0])
    assert torch.equal(scale, wanted[1])
    bias = torch.randn(6)
    t = x.float() * weight * rows[:, None] + bias
    a, b = t.chunk(2, 1)
    codes, _ = dynamic(silu(b) * a)
    assert torch.equal(dequant(x, bias=bias, **options)[0], codes)


def test_float_rows(back_end):
    x = torch.randn(4, 6).bfloat16()
    a, b = x.float().chunk(2, 1)
    codes, factor = dynamic(silu(a) * b)
    out, scale = dequant(x, activate_left=True, quant_mode=1)
    assert torch.equal(out, codes)
    assert torch.equal(scale, factor.reciprocal())


X = torch.zeros(4, 8)
REFUSED = [
    (swiglu_quant, {"x": X[:, :7]}, 561002, "x must have at least 2 dimensions, the last one even"),
    (swiglu_quant, {"x": X.int()}, 161002, "x must be float16"),
    (swiglu_quant, {}, 561002, "smooth_scales must be given when quant_mode is 0"),
    (swiglu_quant, {"quant_mode": 2}, 561002, "quant_mode must be 0 or 1"),
    (swiglu_quant, {"quant_mode": 1, "dst_type": torch.quint4x2}, 161002, "packed int4"),
    (
        swiglu_quant,
        {"quant_mode": 1, "smooth_scales": torch.ones(2, 5)},
        561002,
        "smooth_scales must have shape",
    ),
    (
        swiglu_quant,
        {"quant_mode": 1, "group_index": torch.tensor([5])},
        561002,
        "group_index must divide at most 4 rows",
    ),
    (dequant, {"x": X}, 161002, "x must be int32"),
    (dequant, {"x": X.half(), "bias": X[0]}, 561002, "bias must be None unless x is int32"),
    (
        dequant,
        {"x": X.half(), "activation_scale": X[:, :1]},
        561002,
        "activation_scale must be None",
    ),
    (dequant, {"x": X.int(), "dst_type": 292}, 161002, "dst_type must be one of"),
    (dequant, {"x": X.int(), "round_mode": 1}, 561002, "round_mode must be 0"),
    (dequant, {"x": X.int(), "activate_dim": 0}, 561002, "activate_dim must be the last"),
    (dequant, {"x": X.int(), "clamp_limit": -1.0}, 561002, "clamp_limit must be positive"),
    (dequant, {"x": X.int(), "swiglu_mode": 3}, 561002, "swiglu_mode must be in"),
    (dequant, {"x": X.int(), "weight_scale": torch.ones(7)}, 561002, "weight_scale must have"),
]


@pytest.mark.parametrize("call, changes, code, message", REFUSED)
def test_refusals(call, changes, code, message):
    with pytest.raises(MoeError, match=f"{call.__name__}: .*{message}") as raised:
        call(**{"x": X} | changes)
    assert raised.value.code == code


@compilers.usual
def test_compiled():
    smooth, index = torch.rand(2, 4), torch.tensor([1, 3])
    compilers.check(
        lambda x: swiglu_quant(x, smooth_scales=smooth, group_index=index, quant_mode=1),
        torch.randn(3, 8),
    )
    compilers.check(
        lambda x: dequant(x, quant_scale=smooth, group_index=index, quant_mode=1),
        torch.randn(4, 8).half(),
    )

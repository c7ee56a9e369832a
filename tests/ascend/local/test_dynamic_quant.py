"""Dynamic quantisation: definitions written out, factors of groups, MX blocks, refusals."""

from __future__ import annotations

import compilers
import harness
import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import MoeError
from moe_triton.compat import torch_npu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

quant = torch_npu.npu_dynamic_quant
mx_quant = torch_npu.npu_dynamic_mx_quant

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
EXPONENTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}


def test_the_documented_example(back_end):
    x = torch.tensor([[0.7261, 0.3726, 0.9126], [0.9023, 0.9990, 0.1279], [0.8628, 0.6240, 0.9028]])
    q, scale = quant(x.half())
    assert q.tolist() == [[101, 52, 127], [115, 127, 16], [121, 88, 127]]
    torch.testing.assert_close(scale, torch.tensor([0.0072, 0.0079, 0.0071]), rtol=0, atol=5e-5)


@hypothesis.given(data=st.data())
def test_any_rows(back_end, data):
    draw = data.draw
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = draw(st.sampled_from([(3, 5), (2, 2, 17), (1, 1), (0, 4)]))
    x = torch.randn(shape, generator=random).to(draw(st.sampled_from(FLOATS)))
    rows = x.reshape(-1, shape[-1])
    groups = draw(st.integers(0, 3))
    smooth = torch.randn(max(groups, 1), shape[-1], generator=random).to(x.dtype)
    index = None
    factors = torch.ones(1, 1)
    if groups:
        cuts = [draw(st.integers(0, len(rows))) for _ in range(groups - 1)]
        index = torch.tensor([*sorted(cuts), len(rows)], dtype=torch.int32)
        sizes = index.diff(prepend=index.new_zeros(1))
        factors = smooth.float().repeat_interleave(sizes, 0)
    elif draw(st.booleans()):
        factors = smooth.float()
    given = smooth if groups else (smooth[0] if factors.shape[1] == shape[-1] > 1 else None)
    factors = torch.ones(1, 1) if given is None else factors
    t = rows.float() * factors
    kind = draw(st.sampled_from([torch.int8, *FLOAT8]))
    if x.dim() == 2:
        x = harness.strided(x, draw(st.sampled_from(harness.STRIDES)))
    q, scale = quant(x, smooth_scales=given, group_index=index, dst_type=kind)
    assert q.shape == x.shape
    assert scale.shape == x.shape[:-1]
    largest = t.abs().amax(1)
    if kind == torch.int8:
        wanted = largest / torch.full_like(largest, 127.0)
        codes = (t / wanted[:, None]).round().nan_to_num(0.0).to(torch.int8)
        assert torch.equal(q.reshape(rows.shape), codes)
    else:
        factor = torch.full_like(largest, FLOAT8[kind]) / largest
        wanted = factor.reciprocal()
        codes = (t * factor[:, None]).to(kind)
        assert torch.equal(q.reshape(rows.shape).float(), codes.float())
    assert torch.equal(scale.reshape(-1), wanted)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_columns_and_whole_tensors(back_end, kind):
    x, smooth = torch.randn(2, 3, 5, dtype=torch.bfloat16), torch.rand(3, dtype=torch.bfloat16)
    q, scale = quant(x, smooth_scales=smooth, dst_type=kind, quant_mode="perchannel")
    by_row, scales = quant(x.mT.contiguous(), smooth_scales=smooth, dst_type=kind)
    assert torch.equal(q.float(), by_row.float().mT)
    assert torch.equal(scale, scales)
    assert scale.shape == (2, 5)
    smooth = torch.rand(5)
    q, scale = quant(x, smooth_scales=smooth, dst_type=kind, quant_mode="pertensor")
    one, scales = quant((x.float() * smooth).view(1, -1), dst_type=kind)
    assert torch.equal(q.float().view(1, -1), one.float())
    assert torch.equal(scale, scales)
    assert scale.shape == (1,)


def test_a_row_of_zeros(back_end):
    q, scale = quant(torch.tensor([[0.0, 0.0], [1.0, -0.5]]))
    assert q.tolist() == [[0, 0], [127, -64]]
    assert scale[0] == 0


@pytest.mark.parametrize("kind", EXPONENTS)
@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_mx_blocks(back_end, kind, axis):
    x = torch.randn(3, 40, 70)
    y, scales = mx_quant(x, axis=axis, dst_type=kind)
    assert y.dtype == kind
    assert y.shape == x.shape
    shape = [*x.shape, 2]
    shape[axis % 3] = -(-shape[axis % 3] // 64)
    assert [*scales.shape] == shape
    assert scales.dtype == torch.uint8
    assert y.is_contiguous()
    rows, codes = x.movedim(axis, -1), y.float().movedim(axis, -1)
    of_rows = scales.movedim(axis % 3, -2).flatten(-2)
    for start in range(0, rows.shape[-1], 32):
        block = rows[..., start : start + 32]
        exponent = block.abs().amax(-1).log2().floor() - EXPONENTS[kind]
        assert torch.equal(of_rows[..., start // 32].float() - 127, exponent)
        wanted = (block / exponent.exp2()[..., None]).clamp(*[-FLOAT8[kind], FLOAT8[kind]][::1])
        assert torch.equal(codes[..., start : start + 32], wanted.to(kind).float())
    assert not of_rows[..., -(-rows.shape[-1] // 32) :].any()


X = torch.randn(4, 8).half()
REFUSED = [
    (quant, {"input": X[0]}, 561002, "input must have at least 2"),
    (quant, {"input": X.double()}, 161002, "input must be float16"),
    (quant, {"smooth_scales": torch.ones(7)}, 561002, r"smooth_scales must have shape \(H,\)"),
    (quant, {"smooth_scales": torch.ones(8).long()}, 161002, "smooth_scales must be"),
    (quant, {"group_index": torch.tensor([4])}, 561002, "smooth_scales must be given"),
    (
        quant,
        {"group_index": torch.tensor([3]), "smooth_scales": torch.ones(1, 8)},
        561002,
        "group_index must divide the 4 rows, got 3",
    ),
    (
        quant,
        {"group_index": torch.tensor([4, 3]), "smooth_scales": torch.ones(2, 8)},
        561002,
        "group_index must not descend",
    ),
    (
        quant,
        {
            "group_index": torch.tensor([4]),
            "smooth_scales": torch.ones(1, 8),
            "quant_mode": "pertensor",
        },
        561002,
        "group_index must be None unless",
    ),
    (quant, {"dst_type": torch.quint4x2}, 161002, "packed int4"),
    (quant, {"dst_type": 290}, 161002, "HiFloat8"),
    (quant, {"dst_type": torch.float16}, 161002, "dst_type must be one of"),
    (quant, {"quant_mode": "pertile"}, 561002, "quant_mode must be one of"),
    (quant, {"dst_type_max": 15.0}, 561002, "dst_type_max must be 0"),
    (mx_quant, {}, 161002, "fp4"),
    (mx_quant, {"dst_type": torch.int8}, 161002, "dst_type must be one of"),
    (mx_quant, {"dst_type": 292, "axis": 2}, 561002, "axis must be in"),
    (mx_quant, {"dst_type": 292, "round_mode": "floor"}, 561002, "round_mode must be"),
    (mx_quant, {"dst_type": 292, "block_size": 64}, 561002, "block_size must be 32"),
    (mx_quant, {"dst_type": 292, "scale_alg": 1}, 561002, "scale_alg must be 0"),
]


@pytest.mark.parametrize("call, changes, code, message", REFUSED)
def test_refusals(call, changes, code, message):
    with pytest.raises(MoeError, match=f"{call.__name__}: .*{message}") as raised:
        call(**{"input": X} | changes)
    assert raised.value.code == code


@compilers.usual
def test_compiled():
    smooth, index = torch.rand(2, 8), torch.tensor([1, 4])
    compilers.check(lambda x: quant(x, smooth_scales=smooth, group_index=index), X)
    compilers.check(lambda x: quant(x, quant_mode="perchannel"), X)
    compilers.check(lambda x: mx_quant(x, axis=0, dst_type=292)[1], X)

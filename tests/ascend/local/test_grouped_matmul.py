"""Grouped matmul: every form against one product for each group, refusals and compiled calls.

Products of integers, and of small integers in floating point, are exact in any order of summation.
"""

from __future__ import annotations

import compilers
import harness
import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import MoeError
from moe_triton.compat import torch_npu

matmul = torch_npu.npu_grouped_matmul

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
E8M0 = torch.float8_e8m0fnu


def whole(shape, dtype, random=None) -> torch.Tensor:
    """Small integers, whose products and sums every dtype holds."""
    return torch.randint(-3, 4, shape, generator=random).to(dtype)


def lists(counts: list[int]) -> dict[int, torch.Tensor]:
    """The group lists of some counts, by group_list_type."""
    count = torch.tensor(counts)
    pairs = torch.stack([torch.arange(len(counts)), count], 1)
    return {0: count.cumsum(0), 1: count, 2: pairs[count > 0]}


def expected(x, weight, counts) -> torch.Tensor:
    """One product for each group, and zeros."""
    out = torch.zeros(len(x), weight[0].shape[1], dtype=torch.float64)
    start = 0
    for matrix, count in zip(weight, counts, strict=True):
        part = slice(start, start + count)
        out[part] = x[part].double() @ matrix.double()
        start += count
    return out


@hypothesis.given(data=st.data())
def test_any_groups_of_rows(data):
    draw = data.draw
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([*FLOATS, torch.int8]))
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    depth, columns = draw(st.sampled_from([(8, 16), (3, 5), (16, 8), (1, 1)]))
    rows = sum(counts) + draw(st.integers(0, 2))
    x = harness.strided(whole((rows, depth), dtype, random), draw(st.sampled_from(harness.STRIDES)))
    weight = whole((len(counts), depth, columns), dtype, random)
    if draw(st.booleans()):
        weight = weight.mT.contiguous().mT
    kind = draw(st.sampled_from([0, 1, 2]))
    matrices = [*weight] if draw(st.booleans()) else [weight]
    out_dtype = torch.float32 if dtype == torch.int8 else None
    arguments = {
        "group_list": lists(counts)[kind],
        "group_list_type": kind,
        "group_type": 0,
        "output_dtype": out_dtype,
    }
    reference = expected(x, weight, counts)
    (out,) = matmul([x], matrices, split_item=draw(st.sampled_from([2, 3])), **arguments)
    assert out.dtype == (out_dtype or dtype)
    assert torch.equal(out.double(), reference)
    parts = matmul([x], matrices, split_item=0, **arguments)
    sizes = [count for count in counts if count] if kind == 2 else counts
    assert [len(part) for part in parts] == sizes
    joined = torch.cat([reference[:0].to(out.dtype), *parts])
    assert torch.equal(joined.double(), reference[: sum(counts)])


def test_pairs_may_come_in_any_order():
    x, weight = whole((3, 8), torch.float32), whole((4, 8, 8), torch.float32)
    pairs = torch.tensor([[2, 1], [0, 2]])
    (out,) = matmul([x], [weight], group_list=pairs, group_list_type=2, group_type=0, split_item=2)
    assert torch.equal(out, torch.cat([x[:1] @ weight[2], x[1:] @ weight[0]]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_tensor_for_each_matrix(dtype):
    x = [whole((2, 3, 4), dtype), whole((1, 5, 8), dtype)]
    weight, bias = (
        [whole((4, 6), dtype), whole((8, 7), dtype)],
        [whole((6,), dtype), whole((7,), dtype)],
    )
    parts = matmul(x, weight, bias=bias, group_type=-1, split_item=0)
    for part, rows, matrix, addend in zip(parts, x, weight, bias, strict=True):
        assert torch.equal(part, rows @ matrix + addend)
    weight[1] = whole((8, 6), dtype)
    x = [rows.flatten(0, 1) for rows in x]
    (out,) = matmul(x, weight, split_item=3, group_type=0)
    assert torch.equal(out, torch.cat([x[0] @ weight[0], x[1] @ weight[1]]))


def test_a_list_of_prefix_sums():
    x, weight = whole((5, 8), torch.float32), [*whole((2, 8, 8), torch.float32)]
    (out,) = matmul([x], weight, group_list=[2, 5], split_item=2)
    assert torch.equal(out.double(), expected(x, weight, [2, 3]))
    parts = matmul([x], weight, group_list=[2, 5])
    assert [len(part) for part in parts] == [2, 3]
    assert torch.equal(matmul([x], weight[:1])[0], x @ weight[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "rows, columns", [pytest.param(16, 8, id="grouped_mm"), pytest.param(3, 5, id="unaligned")]
)
def test_groups_of_the_inner_dimension(dtype, rows, columns):
    counts = [3, 0, 5]
    x, weight = whole((8, rows), dtype).T, whole((8, columns), dtype)
    (out,) = matmul(
        [x],
        [weight],
        group_list=torch.tensor(counts),
        group_list_type=1,
        group_type=2,
        split_item=3,
    )
    wanted = [x[:, :3] @ weight[:3], torch.zeros(rows, columns), x[:, 3:] @ weight[3:]]
    assert torch.equal(out.double(), torch.stack([one.double() for one in wanted]))
    parts = matmul([x], [weight], group_list=torch.tensor([3, 3, 8]), group_type=2, split_item=0)
    assert torch.equal(torch.stack(parts), out)


@pytest.mark.parametrize("single", [True, False])
def test_scaled_products_of_int8(single):
    """An int32 bias comes before the scales, any other after; each result is rounded once."""
    x = torch.randint(-128, 128, (4, 64), dtype=torch.int8)
    weight = torch.randint(-128, 128, (2, 64, 6), dtype=torch.int8)
    scale, rows = torch.rand(2, 6), torch.rand(4)
    whole_bias, bias = torch.randint(-999, 999, (2, 6), dtype=torch.int32), torch.randn(2, 6)
    sums = torch.cat([x[:3].int() @ weight[0].int(), x[3:].int() @ weight[1].int()])
    each = torch.tensor([0, 0, 0, 1])

    def call(output_dtype=torch.bfloat16, **arguments):
        arguments = {
            name: [value] if single or name == "per_token_scale" else [*value]
            for name, value in arguments.items()
        }
        (out,) = matmul(
            [x],
            [weight] if single else [*weight],
            group_list=torch.tensor([3, 4]),
            group_type=0,
            split_item=2,
            output_dtype=output_dtype,
            **arguments,
        )
        return out

    assert torch.equal(call(torch.int32), sums)
    scaled = (sums.float() * scale[each]) * rows[:, None]
    assert torch.equal(call(scale=scale, per_token_scale=rows), scaled.bfloat16())
    added = ((sums + whole_bias[each]).float() * scale[each]) * rows[:, None]
    assert torch.equal(call(scale=scale, per_token_scale=rows, bias=whole_bias), added.bfloat16())
    added = scaled + bias[each]
    assert torch.equal(call(scale=scale, per_token_scale=rows, bias=bias), added.bfloat16())
    of_groups = (sums.float() * scale[each, :1]).half()
    assert torch.equal(call(torch.float16, scale=scale[:, :1]), of_groups)


@pytest.mark.parametrize(
    "act_type, activation",
    [
        (1, torch.relu),
        (2, lambda y: torch.nn.functional.gelu(y, approximate="tanh")),
        (4, lambda y: y * torch.sigmoid(1.702 * y)),
        (5, torch.nn.functional.silu),
    ],
)
def test_activations(act_type, activation):
    x, weight = whole((4, 8), torch.int8), whole((1, 8, 8), torch.int8)
    (out,) = matmul(
        [x],
        [weight],
        scale=[torch.full((1, 8), 0.25)],
        group_list=torch.tensor([4]),
        group_type=0,
        split_item=2,
        act_type=act_type,
        output_dtype=torch.float32,
    )
    assert torch.equal(out, activation((x.float() @ weight[0].float()) * 0.25))


@pytest.mark.parametrize("depth", [32, 100])
def test_products_of_mx_rows(depth):
    """Rows and matrices of npu_dynamic_mx_quant give the products of what they stand for."""
    x, weight = torch.randn(4, depth), torch.randn(2, depth, 8)
    kind = torch.float8_e4m3fn
    codes, row_scales = torch_npu.npu_dynamic_mx_quant(x, dst_type=kind)
    matrix, matrix_scales = torch_npu.npu_dynamic_mx_quant(weight, axis=-2, dst_type=kind)
    (out,) = matmul(
        [codes],
        [matrix],
        scale=[matrix_scales],
        per_token_scale=[row_scales],
        scale_dtype=293,
        per_token_scale_dtype=293,
        output_dtype=torch.float32,
        group_list=torch.tensor([1, 3]),
        group_list_type=1,
        group_type=0,
        split_item=2,
    )
    wide = row_scales.view(E8M0).float().flatten(1).repeat_interleave(32, 1)[:, :depth]
    rows = codes.float() * wide
    wide = matrix_scales.view(E8M0).float().movedim(-1, 2).flatten(1, 2)
    matrices = matrix.float() * wide.repeat_interleave(32, 1)[:, :depth]
    wanted = torch.cat([rows[:1] @ matrices[0], rows[1:] @ matrices[1]])
    assert torch.equal(out, wanted)
    torch.testing.assert_close(out[:1], x[:1] @ weight[0], rtol=0.1, atol=1.5)


def test_float8_rows_with_scales_of_their_own():
    x, weight = whole((4, 8), torch.float8_e4m3fn), whole((1, 8, 8), torch.float8_e4m3fn)
    scale, rows = torch.rand(1, 8), torch.rand(4)
    (out,) = matmul(
        [x],
        [weight],
        scale=[scale],
        per_token_scale=[rows],
        group_list=torch.tensor([4]),
        group_type=0,
        split_item=2,
        output_dtype=torch.bfloat16,
    )
    sums = x.float() @ weight[0].float()
    assert torch.equal(out, ((sums * scale) * rows[:, None]).bfloat16())


ROWS, MATRICES = torch.zeros(4, 8), torch.zeros(2, 8, 8)
CALL = {"group_list": torch.tensor([1, 4]), "group_type": 0, "split_item": 2}
INT8 = {"x": [ROWS.to(torch.int8)], "weight": [MATRICES.to(torch.int8)]}
REFUSED = [
    ({"x": []}, 161001, "x must have tensors"),
    ({"x": ROWS}, 161002, "x must be a list"),
    ({"weight": [MATRICES.half()]}, 161002, "weight must be float32"),
    ({"weight": [MATRICES.int()]}, 161002, "packed int4"),
    ({"weight": [MATRICES[:, :7]]}, 561002, "x must have as many columns"),
    ({"group_type": None}, 561002, "group_type must be -1"),
    ({"group_type": -1}, 561002, "split_item must be 0 or 1"),
    ({"split_item": 4}, 561002, r"split_item must be in \[0, 3\]"),
    ({"group_list": torch.tensor([4, 1])}, 561002, "group_list must not descend"),
    ({"group_list": torch.tensor([1, 5])}, 561002, "group_list must divide at most 4"),
    ({"group_list": torch.tensor([4])}, 561002, "group_list must have shape"),
    ({"group_list": torch.tensor([1.0, 4])}, 161002, "group_list must be int64"),
    ({"group_list": torch.tensor([-1, 5]), "group_list_type": 1}, 561002, "not be negative"),
    ({"antiquant_scale": [ROWS]}, 561002, "antiquant_scale must be None: weights that"),
    ({"antiquant_offset": [ROWS]}, 561002, "antiquant_offset must be None"),
    ({"offset": [ROWS]}, 561002, "offset must be None"),
    ({"scale": [torch.ones(2, 8)]}, 561002, "scale must be None unless x is quantised"),
    ({"act_type": 1}, 561002, "act_type must be 0 unless"),
    ({"act_type": 3}, 561002, "act_type must be one of"),
    (INT8, 161002, "output_dtype must be one of"),
    (
        {**INT8, "output_dtype": torch.float16, "scale": [torch.ones(2, 8).long()]},
        161002,
        "a packed format",
    ),
    ({**INT8, "output_dtype": torch.int8}, 161002, "output_dtype must be one of"),
    (
        {**INT8, "output_dtype": torch.float16, "scale": [torch.ones(2, 7)]},
        561002,
        "scale must have shape",
    ),
    (
        {**INT8, "output_dtype": torch.float16, "per_token_scale": [torch.ones(3)]},
        561002,
        "per_token_scale must have shape",
    ),
    ({"weight_dtype": 296}, 161002, "fp4"),
]


@pytest.mark.parametrize("changes, code, message", REFUSED)
def test_refusals(changes, code, message):
    arguments = {"x": [ROWS], "weight": [MATRICES], **CALL} | changes
    with pytest.raises(MoeError, match=f"npu_grouped_matmul: .*{message}") as raised:
        matmul(**arguments)
    assert raised.value.code == code


@compilers.usual
def test_compiled():
    ends = torch.tensor([1, 4])

    def rows(x, weight):
        return matmul([x], [weight], group_list=ends, group_type=0, split_item=2)[0]

    def depth(x, weight):
        return matmul([x.T], [weight], group_list=ends, group_type=2, split_item=3)[0]

    compilers.check(rows, whole((4, 8), torch.float32), whole((2, 8, 8), torch.float32))
    compilers.check(depth, whole((4, 8), torch.float32), whole((4, 8), torch.float32))

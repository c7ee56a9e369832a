"""Grouped matmul fused with swiglu and with the sum of each token's rows."""

from __future__ import annotations

import compilers
import pytest
import torch
from torch.nn.functional import silu

from moe_triton import MoeError
from moe_triton.compat import torch_npu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

swiglu_quant = torch_npu.npu_grouped_matmul_swiglu_quant
swiglu_quant_v2 = torch_npu.npu_grouped_matmul_swiglu_quant_v2
finalize = torch_npu.npu_grouped_matmul_finalize_routing

X = torch.randint(-128, 128, (6, 16), dtype=torch.int8)
WEIGHT = torch.randint(-128, 128, (3, 16, 8), dtype=torch.int8)
SCALE, ROWS = torch.rand(3, 8) / 99, torch.rand(6)
ENDS = torch.tensor([2, 2, 5])  # the last row is in no group
GROUP_OF_ROW = [0, 0, 2, 2, 2]


def scaled() -> torch.Tensor:
    """The products of the rows in groups."""
    sums = torch.cat([X[:2].int() @ WEIGHT[0].int(), X[2:5].int() @ WEIGHT[2].int()])
    return (sums.float() * SCALE[GROUP_OF_ROW]) * ROWS[:5, None]


def test_swiglu_quant(back_end):
    out, scale, offset = swiglu_quant(X, WEIGHT, ENDS, SCALE, ROWS)
    a, b = scaled().chunk(2, 1)
    s = silu(a) * b
    largest = s.abs().amax(1)
    divisor = largest / torch.full_like(largest, 127.0)
    assert torch.equal(out[:5], (s / divisor[:, None]).round().to(torch.int8))
    assert torch.equal(scale[:5], divisor)
    assert not out[5:].any()
    assert not scale[5:].any()
    assert offset.shape == ()


@pytest.mark.parametrize("kind", [0, 1])
def test_swiglu_quant_v2_of_int8(back_end, kind):
    groups = torch.tensor([2, 0, 3]) if kind else ENDS
    out, scale = swiglu_quant_v2(X, [WEIGHT], [SCALE], ROWS, groups, group_list_type=kind)
    wanted = swiglu_quant(X, WEIGHT, ENDS, SCALE, ROWS)
    assert torch.equal(out, wanted[0])
    assert torch.equal(scale, wanted[1])


@pytest.mark.parametrize("rounded", [torch.float32, torch.bfloat16])
def test_swiglu_quant_v2_of_float8(back_end, rounded):
    kind = torch.float8_e4m3fn
    x, weight = torch.randn(6, 16).to(kind), torch.randn(3, 16, 8).to(kind)
    out, scale = swiglu_quant_v2(
        x, [weight], [SCALE], ROWS, ENDS, quant_dtype=kind, dequant_dtype=rounded
    )
    y = torch_npu.npu_grouped_matmul(
        [x],
        [weight],
        scale=[SCALE],
        per_token_scale=[ROWS],
        group_list=ENDS,
        group_type=0,
        split_item=2,
        output_dtype=rounded,
    )[0]
    a, b = y.float().chunk(2, 1)
    wanted = torch_npu.npu_dynamic_quant(silu(a) * b, dst_type=kind)
    assert torch.equal(out[:5].float(), wanted[0][:5].float())
    assert torch.equal(scale[:5], wanted[1][:5])


def test_swiglu_quant_v2_of_mx_rows(back_end):
    kind = torch.float8_e4m3fn
    x, row_scales = torch_npu.npu_dynamic_mx_quant(torch.randn(6, 100), dst_type=kind)
    weight, scales = torch_npu.npu_dynamic_mx_quant(torch.randn(3, 100, 80), axis=1, dst_type=kind)
    common = {"group_list": ENDS}
    out, out_scale = swiglu_quant_v2(
        x,
        [weight],
        [scales],
        row_scales,
        dequant_mode=2,
        quant_mode=2,
        quant_dtype=kind,
        weight_scale_dtype=293,
        x_scale_dtype=293,
        **common,
    )
    y = torch_npu.npu_grouped_matmul(
        [x],
        [weight],
        scale=[scales],
        per_token_scale=[row_scales],
        scale_dtype=293,
        per_token_scale_dtype=293,
        group_type=0,
        split_item=2,
        output_dtype=torch.float32,
        **common,
    )[0]
    a, b = y.chunk(2, 1)
    wanted, wanted_scale = torch_npu.npu_dynamic_mx_quant(silu(a) * b, dst_type=kind)
    assert torch.equal(out.float(), wanted.float())
    assert out_scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(out_scale.view(torch.uint8), wanted_scale)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_finalize_routing(kind, shared):
    logit, row_index = torch.rand(6), torch.tensor([3, 0, 0, 2, 3, 1])
    logit[5] = float("nan")  # not used
    counts = torch.tensor([2, 0, 3])
    shared_input = torch.randn(2, 8).bfloat16() if shared else None
    out = finalize(
        X,
        WEIGHT,
        counts if kind else ENDS,
        scale=SCALE,
        pertoken_scale=ROWS,
        shared_input=shared_input,
        logit=logit,
        row_index=row_index,
        shared_input_weight=0.5,
        shared_input_offset=1,
        output_bs=4,
        group_list_type=kind,
    )
    wanted = torch.zeros(4, 8)
    if shared:
        wanted[1:3] = shared_input.float() * 0.5
    for row, product in enumerate(scaled()):
        wanted[row_index[row]] += product * logit[row]
    assert torch.equal(out, wanted)


FINALIZE = {"x": X, "w": WEIGHT, "group_list": ENDS, "group_list_type": 0, "scale": SCALE}
FINALIZE["row_index"] = torch.arange(6)
QUANT = {"x": X, "weight": WEIGHT, "group_list": ENDS, "weight_scale": SCALE, "x_scale": ROWS}
QUANT_V2 = QUANT | {"weight": [WEIGHT], "weight_scale": [SCALE]}
REFUSED = [
    (swiglu_quant, {"x": X.half()}, 161002, "x must be int8"),
    (swiglu_quant, {"weight": WEIGHT.int()}, 161002, "weight must be int8"),
    (swiglu_quant, {"group_list": ENDS[:2]}, 561002, "group_list must have shape"),
    (swiglu_quant, {"group_list": ENDS + 2}, 561002, "group_list must divide at most 6"),
    (swiglu_quant, {"x_scale": ROWS[:5]}, 561002, "x_scale must have shape"),
    (swiglu_quant, {"bias": SCALE}, 561002, "bias must be left at its default"),
    (swiglu_quant, {"weight_scale": None}, 161001, "weight_scale must be given"),
    (swiglu_quant_v2, {"weight": [WEIGHT] * 2}, 561002, "weight must be a list of one tensor"),
    (swiglu_quant_v2, {"weight": WEIGHT}, 561002, "weight must be a list of one tensor, got a"),
    (swiglu_quant_v2, {"dequant_mode": 1}, 561002, "dequant_mode must be 0 or 2"),
    (swiglu_quant_v2, {"dequant_mode": 2}, 161002, "x must be float8_e4m3fn or float8_e5m2"),
    (swiglu_quant_v2, {"quant_mode": 2}, 161002, "quant_dtype must be one of"),
    (swiglu_quant_v2, {"quant_dtype": 296}, 161002, "fp4"),
    (swiglu_quant_v2, {"dequant_dtype": 3}, 161002, "dequant_dtype must be one of"),
    (swiglu_quant_v2, {"smooth_scale": SCALE}, 561002, "smooth_scale must be left"),
    (swiglu_quant_v2, {"weight_assist_matrix": [SCALE]}, 561002, "goes with int4"),
    (finalize, {"row_index": None}, 161001, "row_index must be given"),
    (finalize, {"row_index": torch.arange(6) + 1}, 561002, r"row_index must be in \[0, 6\)"),
    (finalize, {"dtype": torch.float16}, 161002, "dtype must be one of"),
    (finalize, {"w_dtype": 296}, 161002, "fp4"),
    (finalize, {"offset": SCALE}, 561002, "offset must be left at its default"),
    (finalize, {"group_list_type": 2}, 561002, "group_list_type must be 0 or 1"),
    (
        finalize,
        {"shared_input": SCALE.bfloat16(), "shared_input_offset": 4},
        561002,
        "shared_input_offset must leave room",
    ),
]


@pytest.mark.parametrize("call, changes, code, message", REFUSED)
def test_refusals(call, changes, code, message):
    arguments = {swiglu_quant: QUANT, swiglu_quant_v2: QUANT_V2, finalize: FINALIZE}[call]
    with pytest.raises(MoeError, match=f"{call.__name__}: .*{message}") as raised:
        call(**arguments | changes)
    assert raised.value.code == code


@compilers.usual
def test_compiled():
    compilers.check(lambda rows: swiglu_quant(X, WEIGHT, ENDS, SCALE, rows), ROWS)
    compilers.check(lambda rows: swiglu_quant_v2(X, [WEIGHT], [SCALE], rows, ENDS), ROWS)
    compilers.check(lambda rows: finalize(**FINALIZE, pertoken_scale=rows), ROWS)

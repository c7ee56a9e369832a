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
REFUSED = [
    (swiglu_quant, {"x": X.half()}, 161002, "x must be int8"),
    (swiglu_quant, {"weight": WEIGHT.int()}, 161002, "weight must be int8"),
    (swiglu_quant, {"group_list": ENDS[:2]}, 561002, "group_list must have shape"),
    (swiglu_quant, {"group_list": ENDS + 2}, 561002, "group_list must divide at most 6"),
    (swiglu_quant, {"x_scale": ROWS[:5]}, 561002, "x_scale must have shape"),
    (swiglu_quant, {"bias": SCALE}, 561002, "bias must be left at its default"),
    (swiglu_quant, {"weight_scale": None}, 161001, "weight_scale must be given"),
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
    arguments = QUANT if call is swiglu_quant else FINALIZE
    with pytest.raises(MoeError, match=f"{call.__name__}: .*{message}") as raised:
        call(**arguments | changes)
    assert raised.value.code == code


@compilers.usual
def test_compiled():
    compilers.check(lambda rows: swiglu_quant(X, WEIGHT, ENDS, SCALE, rows), ROWS)
    compilers.check(lambda rows: finalize(**FINALIZE, pertoken_scale=rows), ROWS)

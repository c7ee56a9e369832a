"""Experts' rows summed for each token: a definition in loops, all modes, gradients, refusals.

All results are exact: the order of the sums and their rounding is stated.
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

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

finalize = torch_npu.npu_moe_finalize_routing
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
int32 = torch.int32


def define(rows, skips, bias, scales, index, experts, mode, top_k):
    """Compute the sums token by token and expert by expert."""
    hidden = rows.shape[-1]
    flat = rows.reshape(-1, hidden)
    num_tokens = len(index) // top_k
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros(num_tokens, hidden, dtype=wide)
    for i in range(num_tokens):
        for skip in skips:
            if skip is not None:
                out[i] += skip[i].to(wide)
        for k in range(top_k):
            row = int(index[k * num_tokens + i if mode < 2 else i * top_k + k])
            term = torch.zeros(hidden, dtype=wide) if row == -1 else flat[row].to(wide)
            if bias is not None:
                term = term + bias[experts[i, k]].to(wide)
            out[i] += term if scales is None else scales[i, k].to(wide) * term
    return out.to(rows.dtype)


def test_by_hand(back_end):
    """Slots by column, then by row."""
    rows = torch.tensor([[1.0], [10], [100], [1000]])
    scales = torch.tensor([[1.0, 2], [3, 4]])
    index = torch.tensor([0, 1, 2, 3], dtype=int32)
    arguments = (rows, None, None, None, scales, index, None)
    assert finalize(*arguments).tolist() == [[201.0], [4030.0]]
    assert finalize(*arguments, 2).tolist() == [[21.0], [4300.0]]
    skip, bias = torch.tensor([[0.5], [0.25]]), torch.tensor([[7.0], [8.0]])
    experts = torch.tensor([[0, 1], [1, 0]], dtype=int32)
    out = finalize(rows, skip, skip, bias, scales, index, experts, 2)
    assert out.tolist() == [[1 + 8 + 2 * 18], [0.5 + 3 * 108 + 4 * 1007]]


def test_rows_that_were_dropped(back_end):
    """A dropped row contributes its weighted bias only."""
    rows = torch.tensor([[[1.0], [2]], [[3], [4]]])
    index = torch.tensor([-1, 3, 0, -1], dtype=int32)
    experts = torch.tensor([[0, 1], [1, 0]], dtype=int32)
    bias, scales = torch.tensor([[10.0], [20]]), torch.tensor([[1.0, 2], [3, 4]])
    out = finalize(rows, None, None, None, scales, index, None, 3)
    assert out.tolist() == [[8.0], [3.0]]
    out = finalize(rows, None, None, bias, scales, index, experts, 3)
    assert out.tolist() == [[10.0 + 48], [63.0 + 40]]
    scales[0, 0] = float("nan")
    out = finalize(rows, None, None, None, scales, index, None, 3)
    assert out.tolist() == [[8.0], [3.0]]


@hypothesis.given(data=st.data())
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_any(back_end, mode, data):
    draw = data.draw
    num_tokens, top_k = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    hidden, experts, capacity = draw(st.sampled_from([1, 5, 33])), 3, 4
    dtype = draw(st.sampled_from(FLOATS))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    kind = draw(st.sampled_from(harness.STRIDES))
    copies = num_tokens * top_k

    def numbers(*shape):
        return torch.randn(shape, generator=random).to(dtype)

    def maybe(*shape):
        return numbers(*shape) if draw(st.booleans()) else None

    if mode in (1, 3):
        rows = numbers(experts, capacity, hidden)
        given_rows = numbers(experts, 2 * capacity, hidden)[:, ::2]
        given_rows.copy_(rows)
        index = torch.randint(-1, experts * capacity, (copies,), generator=random)
    else:
        rows = numbers(copies, hidden)
        given_rows = harness.strided(rows, kind)
        index = torch.randperm(copies, generator=random)
        index[torch.rand(copies, generator=random) < 0.2] = -1
    skip1 = maybe(num_tokens, hidden)
    skip2 = None if skip1 is None else maybe(num_tokens, hidden)
    bias, scales = maybe(experts, hidden), maybe(num_tokens, top_k)
    if scales is not None and draw(st.booleans()):
        scales = scales.to(draw(st.sampled_from(FLOATS[:3])))
    ids = torch.randint(0, experts, (num_tokens, top_k), generator=random).to(int32)

    def strided(tensor):
        return None if tensor is None else harness.strided(tensor, kind)

    out = finalize(
        given_rows,
        strided(skip1),
        strided(skip2),
        strided(bias),
        strided(scales),
        harness.strided(index.to(int32), kind),
        strided(ids) if bias is not None or draw(st.booleans()) else None,
        mode,
        k=top_k if scales is None else draw(st.sampled_from([1, None, top_k])),
    )
    wanted = define(rows, (skip1, skip2), bias, scales, index, ids, mode, top_k)
    assert out.dtype == dtype
    assert torch.equal(out, wanted)


def test_scales_of_more_bits_than_the_rows(back_end):
    """1 + 2**-8 does not fit bfloat16; the sum of the products does."""
    rows = torch.tensor([[512.0], [256.0]]).bfloat16().requires_grad_()
    scales = torch.tensor([[1 + 2**-8, 1 - 2**-7]]).requires_grad_()
    index = torch.tensor([0, 1], dtype=int32)
    out = finalize(rows, None, None, None, scales, index, None)
    assert (out.dtype, out.tolist()) == (torch.bfloat16, [[768.0]])
    out.sum().backward()
    assert scales.grad.dtype == torch.float32 and scales.grad.tolist() == [[512.0, 256.0]]
    assert rows.grad.dtype == torch.bfloat16 and rows.grad.tolist() == [[1.0], [0.9921875]]


def test_init_routing_and_back(back_end):
    """finalize_routing with index by row inverts init_routing_v2."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 8, (7, 3), generator=random).float()
    ids = torch.stack([torch.randperm(5, generator=random)[:2] for _ in range(7)]).to(int32)
    scales = torch.tensor([[0.25, 0.75]]).repeat(7, 1)
    arguments = {"expert_num": 5}
    rows, index, _, _ = torch_npu.npu_moe_init_routing_v2(x, ids, **arguments)
    assert torch.equal(finalize(rows, None, None, None, scales, index, None, 2), x)
    rows, index, _, _ = torch_npu.npu_moe_init_routing_v2(
        x, ids, drop_pad_mode=1, expert_capacity=7, **arguments
    )
    assert torch.equal(finalize(rows, None, None, None, scales, index, None, 3), x)


# Gradients.

DOUBLE = torch.Generator().manual_seed(1)
ROWS, SKIP, BIAS, SCALES = (
    torch.randn(shape, dtype=torch.float64, generator=DOUBLE)
    for shape in ((6, 2), (3, 2), (4, 2), (3, 2))
)
INDEX = torch.tensor([5, -1, 0, 2, 1, 3], dtype=int32)
EXPERTS = torch.tensor([[0, 1], [3, 1], [2, 2]], dtype=int32)
DIFFERENTIABLE = {
    "all, by column": (
        lambda r, a, b, c, s: finalize(r, a, b, c, s, INDEX, EXPERTS),
        ROWS,
        SKIP,
        SKIP,
        BIAS,
        SCALES,
    ),
    "all, by row and padded": (
        lambda r, a, c, s: finalize(r.view(2, 3, 2), a, None, c, s, INDEX, EXPERTS, 3),
        ROWS,
        SKIP,
        BIAS,
        SCALES,
    ),
    "bias without weights": (
        lambda r, c: finalize(r, None, None, c, None, INDEX, EXPERTS, 2, 2),
        ROWS,
        BIAS,
    ),
    "weights alone": (
        lambda s: finalize(ROWS, None, None, None, s, INDEX, None, 2),
        SCALES,
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name, back_end):
    call, *inputs = DIFFERENTIABLE[name]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(call, leaves)
    if back_end == "cpu":  # the formulas are the same ones
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@compilers.usual
def test_compiled(name):
    call, *inputs = DIFFERENTIABLE[name]
    compilers.check(call, *(tensor.clone().requires_grad_() for tensor in inputs))


# Refusals.

ROWS_NAME, INDEX_NAME = "expanded_permuted_rows", "expanded_src_to_dst_row"
EXPERTS_NAME = "export_for_source_row"
GOOD = {
    ROWS_NAME: ROWS,
    "skip1": SKIP,
    "skip2": SKIP,
    "bias": BIAS,
    "scales": SCALES,
    INDEX_NAME: INDEX,
    EXPERTS_NAME: EXPERTS,
}
PLAIN = {"scales": None, "bias": None, EXPERTS_NAME: None, "skip1": None, "skip2": None}
BAD = {
    "no rows": ({ROWS_NAME: None}, 161001, ROWS_NAME),
    "no index": ({INDEX_NAME: None}, 161001, INDEX_NAME),
    "rows int8": ({ROWS_NAME: ROWS.to(torch.int8)}, 161002, ROWS_NAME),
    "skip1 half": ({"skip1": SKIP.half()}, 161002, "skip1"),
    "skip2 half": ({"skip2": SKIP.half()}, 161002, "skip2"),
    "bias half": ({"bias": BIAS.half()}, 161002, "bias"),
    "scales int": ({"scales": SCALES.int()}, 161002, "scales"),
    "scales double": (PLAIN | {ROWS_NAME: ROWS.float(), "scales": SCALES}, 161002, "scales"),
    "index int64": ({INDEX_NAME: INDEX.long()}, 161002, INDEX_NAME),
    "experts int64": ({EXPERTS_NAME: EXPERTS.long()}, 161002, EXPERTS_NAME),
    "mode a word": ({"drop_pad_mode": "0"}, 161002, "drop_pad_mode"),
    "mode 4": ({"drop_pad_mode": 4}, 561002, "drop_pad_mode"),
    "rows 3-D": ({ROWS_NAME: ROWS.view(2, 3, 2)}, 561002, ROWS_NAME),
    "rows 2-D, padded": ({"drop_pad_mode": 1}, 561002, ROWS_NAME),
    "fewer rows": ({ROWS_NAME: ROWS[:5]}, 561002, ROWS_NAME),
    "index 2-D": ({INDEX_NAME: EXPERTS}, 561002, INDEX_NAME),
    "index beyond": ({INDEX_NAME: INDEX + 1}, 561002, INDEX_NAME),
    "index below": ({INDEX_NAME: INDEX - 1}, 561002, INDEX_NAME),
    "scales N + 1": ({"scales": torch.cat([SCALES, SCALES])}, 561002, "scales"),
    "scales 1-D": ({"scales": SCALES[0]}, 561002, "scales"),
    "skip1 H + 1": ({"skip1": torch.cat([SKIP, SKIP], 1)}, 561002, "skip1"),
    "skip2 N + 1": ({"skip2": ROWS}, 561002, "skip2"),
    "skip2 alone": ({"skip1": None}, 561002, "skip2"),
    "bias H + 1": ({"bias": torch.cat([BIAS, BIAS], 1)}, 561002, "bias"),
    "bias without experts": ({EXPERTS_NAME: None}, 561002, EXPERTS_NAME),
    "experts N + 1": ({EXPERTS_NAME: EXPERTS[:2]}, 561002, EXPERTS_NAME),
    "expert beyond": ({EXPERTS_NAME: EXPERTS + 1}, 561002, EXPERTS_NAME),
    "k 0": (PLAIN | {"k": 0}, 561002, "k"),
    "k 4": (PLAIN | {"k": 4}, 561002, "k"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    changes, code, argument = BAD[name]
    finalize(**GOOD)
    with pytest.raises(MoeError) as caught:
        finalize(**GOOD | changes)
    assert (caught.value.code, caught.value.argument) == (code, argument)

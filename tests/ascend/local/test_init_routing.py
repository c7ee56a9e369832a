"""init_routing_v2: worked example, a definition in loops, gradients, errors.

All results are exact. Rows that the op does not write are poisoned and not compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import compilers
import harness
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from moe_triton import MoeError, ref
from moe_triton.compat import torch_npu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

init_routing = torch_npu.npu_moe_init_routing_v2
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
int32, int8 = torch.int32, torch.int8

X = torch.tensor([[1.0], [2.0], [3.0]])
IDS = torch.tensor([[1, 0], [0, 2], [1, 0]], dtype=int32)


@dataclass
class Defined:
    """Expected outputs; rows and scales by row number."""

    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    scales: dict[int, torch.Tensor] = field(default_factory=dict)
    gather: list[int] = field(default_factory=list)
    scatter: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def quantised(row: torch.Tensor, mode: int, scale, offset):
    """Quantise one row; returns it and its scale."""
    if mode == 0:
        total = row.half() * scale.half() + offset.half()
        return total.float().round().clamp(-128, 127).to(int8), None
    if mode in (2, 3):
        dtype = torch.float8_e5m2 if mode == 2 else torch.float8_e4m3fn
        q, codes = ref.quantize_mx(row[None], dtype)
        return q[0], codes[0]
    t = row.float() if scale is None else row.float() * scale
    largest = t.abs().max() / torch.tensor(127.0)
    q = [0.0 if largest == 0 else float((value / largest).round()) for value in t]
    return torch.tensor(q).to(int8), largest


def define(x, ids, experts, bounds, mode, scale, offset, capacity=None) -> Defined:
    """Compute the outputs slot by slot."""
    start, end = bounds
    top_k, flat = ids.shape[1], ids.flatten().tolist()
    out = Defined(gather=[-1] * len(flat), counts=[0] * (end - start))
    copies = sorted((e, i) for i, e in enumerate(flat) if start <= e < end)
    out.scatter = [copy for _, copy in copies]
    for number, (expert, copy) in enumerate(copies):
        earlier = out.counts[expert - start]
        out.counts[expert - start] += 1
        row = number
        if capacity is not None:
            if earlier >= capacity:
                continue
            row = expert * capacity + earlier
        out.gather[copy] = row
        token = x[copy // top_k]
        if mode == -1:
            out.rows[row] = token
            if scale is not None:
                out.scales[row] = scale[copy // top_k]
            continue
        factor = scale
        if mode == 1 and scale is not None:
            factor = scale[0] if len(scale) == 1 else scale[expert - start]
        out.rows[row], row_scale = quantised(token, mode, factor, offset)
        if row_scale is not None:
            out.scales[row] = row_scale
    return out


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )


def test_worked_example(back_end):
    options = {"expert_num": 4, "expert_tokens_num_flag": True}
    rows, index, token_counts, scales = init_routing(X, IDS, expert_tokens_num_type=1, **options)
    assert rows[:, 0].tolist() == [1, 2, 3, 1, 3, 2]
    assert index.tolist() == [3, 0, 1, 5, 4, 2]
    assert token_counts.tolist() == [3, 2, 1, 0]
    assert (index.dtype, token_counts.dtype) == (int32, torch.int64)
    assert scales.dtype == torch.float32 and scales.tolist() == [0] * 6
    _, index, token_counts, _ = init_routing(X, IDS, row_idx_type=1, **options)
    assert index.tolist() == [1, 2, 5, 0, 4, 3]
    assert token_counts.tolist() == [3, 5, 6, 6]


def test_worked_example_of_drop_and_pad(back_end):
    rows, index, token_counts, _ = init_routing(
        X, IDS, expert_num=4, drop_pad_mode=1, expert_capacity=2
    )
    assert rows[..., 0].tolist() == [[1, 2], [1, 3], [2, 0], [0, 0]]
    assert index.tolist() == [2, 0, 1, 4, 3, -1]
    assert token_counts.tolist() == [3, 5, 6, 6]


def test_pairs_of_experts_and_counts(back_end):
    options = {"expert_num": 6, "expert_tokens_num_flag": True, "expert_tokens_num_type": 2}
    _, _, pairs, _ = init_routing(X, IDS + 2, **options)
    assert pairs.tolist() == [[2, 3], [3, 2], [4, 1], [0, 0], [0, 0], [0, 0]]
    _, _, pairs, _ = init_routing(X, 2 * IDS, active_expert_range=[1, 5], **options)
    assert pairs.tolist() == [[2, 2], [4, 1], [0, 0], [0, 0], [0, 0], [0, 0]]


@hypothesis.given(data=st.data())
@pytest.mark.parametrize(
    "mode, padded",
    [*((mode, False) for mode in (-1, 0, 1, 2, 3)), *((mode, True) for mode in (-1, 0, 1))],
)
def test_any(back_end, mode, padded, data):
    draw = data.draw
    num_tokens, top_k = draw(st.integers(1 if padded else 0, 6)), draw(st.integers(1, 4))
    experts, hidden = draw(st.integers(1, 6)), draw(st.sampled_from([1, 5, 40]))
    dtype = draw(st.sampled_from(FLOATS if mode != -1 else [*FLOATS, int8]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = 20 * torch.randn(num_tokens, hidden, generator=random)
    x[:1] = 0
    x = x.to(dtype)
    ids = torch.randint(-1, experts + 1, (num_tokens, top_k), generator=random).to(int32)
    start = 0 if padded else draw(st.integers(0, experts - 1))
    end = experts if padded else draw(st.integers(start + 1, experts))
    scale = offset = None
    if mode == 0:
        scale, offset = torch.randn(2, 1, generator=random)
    elif mode < 2 and draw(st.booleans()):
        shapes = {-1: [(num_tokens,)], 1: [(1, hidden), (end - start, hidden)]}[mode]
        scale = torch.rand(draw(st.sampled_from(shapes)), generator=random)
    capacity = draw(st.integers(1, num_tokens)) if padded else None
    active = draw(st.sampled_from([-1, 0, 1, 3, 99]))
    index_type, count_type = draw(st.integers(0, 1)), draw(st.integers(0, 2))
    whole = (start, end) == (0, experts) and draw(st.booleans())
    kind = draw(st.sampled_from(harness.STRIDES))
    rows, index, token_counts, scales = init_routing(
        harness.strided(x, kind),
        harness.strided(ids, kind),
        scale=scale,
        offset=offset,
        active_num=active,
        expert_capacity=capacity or -1,
        expert_num=experts,
        drop_pad_mode=int(padded),
        expert_tokens_num_type=count_type,
        expert_tokens_num_flag=True,
        quant_mode=mode,
        active_expert_range=[] if whole else [start, end],
        row_idx_type=index_type,
        x_dtype=draw(st.sampled_from([None, dtype])) if dtype != torch.float64 else None,
    )
    wanted = define(x, ids, experts, (start, end), mode, scale, offset, capacity)
    copies = ids.numel()
    if padded:
        assert rows.shape == (experts, capacity, hidden)
        rows, kept = rows.flatten(0, 1), experts * capacity
        zero = torch.zeros(hidden, dtype=rows.dtype)
        for row in range(kept):
            wanted.rows.setdefault(row, zero)
            wanted.scales.setdefault(row, torch.zeros(()))
    else:
        kept = min(active, copies) if active > 0 else copies
        assert rows.shape == (kept, hidden)
    for row, value in wanted.rows.items():
        assert row >= kept or same(rows[row], value)
    assert len(scales) == kept
    assert scales.dtype == (torch.float8_e8m0fnu if mode > 1 else torch.float32)
    if scale is not None if mode == -1 else mode != 0:
        for row, value in wanted.scales.items():
            row_scale = (
                scales.view(torch.uint8)[row : row + 1] if mode > 1 else scales[row : row + 1]
            )
            assert row >= kept or torch.equal(row_scale.view(value.shape), value)
    if index_type == 1 and not padded:
        assert index.tolist()[: len(wanted.scatter)] == wanted.scatter
        assert len(index) == copies
    else:
        assert index.tolist() == wanted.gather
    pairs = [[start + e, n] for e, n in enumerate(wanted.counts) if n]
    pairs += [[0, 0]] * (experts - len(pairs))
    sums = np.cumsum(wanted.counts).tolist()
    assert token_counts.tolist() == [sums, wanted.counts, pairs][count_type]


def test_rows_of_nan_and_of_zeros(back_end):
    x = torch.tensor([[float("nan"), 1], [0, 0], [float("inf"), 1], [254, -127]])
    ids = torch.zeros(4, 1, dtype=int32)
    rows, _, _, scales = init_routing(x, ids, expert_num=1, quant_mode=1)
    assert rows.tolist() == [[0, 0], [0, 0], [0, 0], [127, -64]]
    assert scales.isnan().tolist() == [True, False, False, False]
    assert scales[1:].tolist() == [0, float("inf"), 2]
    rows, _, _, _ = init_routing(x, ids, expert_num=1)
    assert torch.equal(rows.isnan(), x.isnan())


def test_no_tokens(back_end):
    for mode in (0, 1):
        rows, index, token_counts, _ = init_routing(
            X[:0],
            IDS[:0],
            expert_num=3,
            expert_capacity=1,
            drop_pad_mode=mode,
            expert_tokens_num_flag=True,
        )
        assert rows.shape == ((3, 1, 1) if mode else (0, 1))
        assert not rows.any()
        assert (len(index), token_counts.tolist()) == (0, [0, 0, 0])


def test_many_copies(back_end):
    """More slots than one tile of the plan compares."""
    x = torch.arange(700.0)[:, None]
    ids = torch.randint(0, 9, (700, 3), generator=torch.Generator().manual_seed(0)).to(int32)
    rows, index, _, _ = init_routing(x, ids, expert_num=9, active_expert_range=[2, 7])
    wanted = define(x, ids, 9, (2, 7), -1, None, None)
    assert index.tolist() == wanted.gather
    assert rows[: len(wanted.rows), 0].tolist() == [float(row) for row in wanted.rows.values()]


# Gradients.

CALLS = {
    "all": {},
    "some": {"active_num": 4},
    "a range": {"active_expert_range": [1, 3]},
    "scatter": {"row_idx_type": 1, "active_expert_range": [0, 2]},
    "padded": {"drop_pad_mode": 1, "expert_capacity": 2, "row_idx_type": 1},
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name, back_end):
    """Gradients of the written rows."""
    wide = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def call(x):
        rows, _, token_counts, _ = init_routing(
            x, IDS, expert_num=4, expert_tokens_num_flag=True, **CALLS[name]
        )
        return rows if "drop_pad_mode" in CALLS[name] else rows[: int(token_counts[-1])]

    assert torch.autograd.gradcheck(call, wide.requires_grad_())
    assert torch.autograd.gradgradcheck(call, wide)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale_dtype", [None, torch.float32, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize("padded", [False, True])
def test_quantised_tokens_keep_their_scales(back_end, dtype, scale_dtype, padded):
    x = torch.randint(0, 100, (3, 5), dtype=torch.uint8).view(dtype)
    scale = None
    if scale_dtype == torch.float32:
        scale = torch.rand(3)
    elif scale_dtype is not None:
        scale = torch.randint(0, 255, (3, 2, 2), dtype=torch.uint8).view(scale_dtype)
    options = {"drop_pad_mode": 1, "expert_capacity": 2} if padded else {}
    out, index, _, scales = init_routing(x, IDS, scale=scale, expert_num=4, **options)
    token = torch.arange(6) // 2
    assert out.dtype == dtype
    kept = index >= 0
    rows = out.view(torch.uint8).flatten(0, -2)[index[kept].long()]
    assert torch.equal(rows, x.view(torch.uint8)[token[kept]])
    if scale is not None:
        assert scales.dtype == scale_dtype
        moved = scales.view(torch.uint8).view(len(scales), -1)[index[kept].long()]
        assert torch.equal(moved, scale.view(torch.uint8).view(3, -1)[token[kept]])


def test_slots_without_a_row_follow_in_scattered_indices(back_end):
    """First those of experts after the range, then those before it."""
    ids = torch.tensor([[0, 3], [1, 4], [2, 1]], dtype=int32)
    _, index, *_ = init_routing(
        X, ids, expert_num=5, active_expert_range=[1, 3], row_idx_type=1, expert_tokens_num_type=1
    )
    assert index.tolist() == [2, 5, 4, 1, 3, 0]


def test_no_tokens_need_no_factors(back_end):
    empty = torch.empty(0)
    out, *_, scales = init_routing(X[:0], IDS[:0], scale=empty, expert_num=4, quant_mode=1)
    assert out.shape == (0, 1)
    assert scales.shape == (0,)


@pytest.mark.parametrize("row_idx_type", [0, 1])
def test_gradients_of_unwritten_rows_are_ignored(row_idx_type):
    """Experts 0 and 1 alone: token 1 has one of them, the others two."""
    x = X.clone().requires_grad_()
    rows, *_ = init_routing(
        x, IDS, expert_num=4, active_expert_range=[0, 2], row_idx_type=row_idx_type
    )
    rows.backward(torch.ones_like(rows))
    assert x.grad.tolist() == [[2.0], [1.0], [2.0]]


@pytest.mark.parametrize("quant_mode", [1, 2, 3])
def test_quantised_rows_have_no_gradients(quant_mode):
    x = X.clone().requires_grad_()
    rows, _, _, scales = init_routing(x, IDS, expert_num=4, quant_mode=quant_mode)
    assert not rows.requires_grad and not scales.requires_grad


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen tokens", "trained tokens"])
@compilers.usual
def test_experts_trained_over_all_rows_have_finite_gradients(back_end, frozen, compiled):
    """Experts 1 and 2 have 3 of the 6 rows; garbage in the others would make dW NaN."""

    def experts(x, weight):
        rows, _, counts, _ = init_routing(x, IDS, expert_num=4, active_expert_range=[1, 3])
        valid = torch.arange(len(rows)) < counts[-1]
        return ((rows * weight) * valid[:, None]).sum()

    weight = torch.ones(1, requires_grad=True)
    x = X.clone().requires_grad_(not frozen)
    call = torch.compile(experts, backend="aot_eager", fullgraph=True) if compiled else experts
    call(x, weight).backward()
    assert weight.grad.tolist() == [1.0 + 3.0 + 2.0]
    assert x.grad is None if frozen else x.grad.tolist() == [[1.0], [1.0], [1.0]]


@pytest.mark.parametrize("mode", [-1, 1, 3])
def test_rows_after_the_last_copy_are_zeros_while_gradients_are_enabled(back_end, mode):
    scale = torch.ones(3) if mode == -1 else None
    rows, _, _, scales = init_routing(
        X, IDS, scale=scale, expert_num=4, quant_mode=mode, active_expert_range=[1, 3]
    )
    assert not rows.view(torch.uint8).view(6, -1)[3:].any()
    assert not scales.view(torch.uint8).view(6, -1)[3:].any()


@pytest.mark.parametrize(
    "options",
    [
        {"expert_tokens_num_flag": True, "scale": torch.rand(3)},
        {"drop_pad_mode": 1, "expert_capacity": 2},
        {"quant_mode": 0, "scale": torch.ones(1), "offset": torch.ones(1)},
        {"quant_mode": 1, "scale": torch.rand(4, 1), "active_num": 5},
        {"quant_mode": 3, "expert_tokens_num_flag": True, "expert_tokens_num_type": 2},
    ],
    ids=" ".join,
)
@compilers.usual
def test_compiled(options):
    x = X.clone().requires_grad_("quant_mode" not in options)
    compilers.check(lambda x: init_routing(x, IDS, expert_num=4, **options), x)


# Refusals.

ONE = torch.ones(1)
GOOD = {"x": X, "expert_idx": IDS, "expert_num": 4}
STATIC = {"quant_mode": 0, "scale": ONE, "offset": ONE}
PAD = {"drop_pad_mode": 1, "expert_capacity": 2}
BAD = {
    "no x": ({"x": None}, 161001, "x"),
    "no ids": ({"expert_idx": None}, 161001, "expert_idx"),
    "x int32": ({"x": X.int()}, 161002, "x"),
    "x int8, quantised": (STATIC | {"x": X.to(int8)}, 161002, "x"),
    "ids int64": ({"expert_idx": IDS.long()}, 161002, "expert_idx"),
    "scale half": ({"scale": X[:, 0].half()}, 161002, "scale"),
    "offset half": (STATIC | {"offset": ONE.half()}, 161002, "offset"),
    "hifloat8": ({"x_dtype": 290}, 161002, "x_dtype"),
    "another dtype": ({"x_dtype": torch.float16}, 161002, "x_dtype"),
    "a word": ({"active_num": "1"}, 161002, "active_num"),
    "flag 1": ({"expert_tokens_num_flag": 1}, 161002, "expert_tokens_num_flag"),
    "range 4": ({"active_expert_range": 4}, 161002, "active_expert_range"),
    "range of words": ({"active_expert_range": ["0", "4"]}, 161002, "active_expert_range"),
    "x 1-D": ({"x": X[:, 0]}, 561002, "x"),
    "x 3-D": ({"x": X[None]}, 561002, "x"),
    "no columns": ({"x": X[:, :0]}, 561002, "x"),
    "ids 1-D": ({"expert_idx": IDS[:, 0]}, 561002, "expert_idx"),
    "ids N + 1": ({"expert_idx": IDS[:2]}, 561002, "expert_idx"),
    "K 0": ({"expert_idx": IDS[:, :0]}, 561002, "expert_idx"),
    "no experts": ({"expert_num": -1}, 561002, "expert_num"),
    "10241 experts": ({"expert_num": 10241}, 561002, "expert_num"),
    "5121 pairs": ({"expert_num": 5121, "expert_tokens_num_type": 2}, 561002, "expert_num"),
    "drop_pad_mode 2": ({"drop_pad_mode": 2}, 561002, "drop_pad_mode"),
    "type 3": ({"expert_tokens_num_type": 3}, 561002, "expert_tokens_num_type"),
    "row_idx_type 2": ({"row_idx_type": 2}, 561002, "row_idx_type"),
    "active_num -2": ({"active_num": -2}, 561002, "active_num"),
    "capacity 0": (PAD | {"expert_capacity": 0}, 561002, "expert_capacity"),
    "capacity N + 1": (PAD | {"expert_capacity": 4}, 561002, "expert_capacity"),
    "a part, padded": (PAD | {"active_expert_range": [0, 3]}, 561002, "active_expert_range"),
    "range of one": ({"active_expert_range": [1]}, 561002, "active_expert_range"),
    "empty range": ({"active_expert_range": [2, 2]}, 561002, "active_expert_range"),
    "range beyond": ({"active_expert_range": [0, 5]}, 561002, "active_expert_range"),
    "range below": ({"active_expert_range": [-1, 3]}, 561002, "active_expert_range"),
    "quant_mode 4": ({"quant_mode": 4}, 561002, "quant_mode"),
    "quant_mode 9": ({"quant_mode": 9}, 561002, "quant_mode"),
    "MX, padded": (PAD | {"quant_mode": 3}, 561002, "quant_mode"),
    "scale N + 1": ({"scale": torch.ones(4)}, 561002, "scale"),
    "offset alone": ({"offset": ONE}, 561002, "offset"),
    "static, no scale": (STATIC | {"scale": None}, 561002, "scale"),
    "static, no offset": (STATIC | {"offset": None}, 561002, "offset"),
    "static, two": (STATIC | {"scale": torch.ones(2)}, 561002, "scale"),
    "dynamic, (N,)": ({"quant_mode": 1, "scale": torch.ones(3)}, 561002, "scale"),
    "dynamic, (E + 1, H)": ({"quant_mode": 1, "scale": torch.ones(5, 1)}, 561002, "scale"),
    "dynamic, offset": ({"quant_mode": 1, "offset": ONE}, 561002, "offset"),
    "MX, scale": ({"quant_mode": 2, "scale": torch.ones(4, 1)}, 561002, "scale"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    changes, code, argument = BAD[name]
    init_routing(**GOOD)
    with pytest.raises(MoeError) as caught:
        init_routing(**GOOD | changes)
    assert (caught.value.code, caught.value.argument) == (code, argument)

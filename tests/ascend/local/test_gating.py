"""Gating: the worked example, a definition in loops, ties, NaN, refusals and compiled calls.

Softmax and sigmoid are computed in float32 by libraries that differ in the last bits, so scores are
compared with a tolerance; what follows from the scores is exact.
"""

from __future__ import annotations

import math

import compilers
import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import MoeError
from moe_triton.compat import torch_npu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SCORES = {"rtol": 2e-6, "atol": 1e-30}
EXAMPLE = torch.tensor([[1.0, 2, 3, 4], [4, 4, 1, 1]]).log()

gating = torch_npu.npu_moe_gating_top_k
softmax = torch_npu.npu_moe_gating_top_k_softmax
softmax_v2 = torch_npu.npu_moe_gating_top_k_softmax_v2


def best(values: list[float], k: int) -> list[int]:
    """Indices of the k largest values; ties go to the lower index, NaN comes first."""

    def key(place: int) -> tuple:
        value = values[place]
        return (not math.isnan(value), 0 if math.isnan(value) else -value, place)

    return sorted(range(len(values)), key=key)[:k]


def single(value: float) -> float:
    """``value`` rounded to float32."""
    return torch.tensor(value, dtype=torch.float64).float().item()


def choices(scores: list[float], bias, k, k_group, group_count, mode) -> list[int]:
    """The experts of one token, from its scores."""
    sums = scores if bias is None else [single(s + b) for s, b in zip(scores, bias, strict=True)]
    members = len(scores) // group_count
    groups = [sums[g * members : (g + 1) * members] for g in range(group_count)]
    goodness = []
    for group in groups:
        top = [group[i] for i in best(group, 2)]
        goodness.append(single(sum(top)) if mode == 1 and group_count > 1 else top[0])
    usable = best(goodness, k_group)
    allowed = [s if i // members in usable else -INF for i, s in enumerate(sums)]
    return best(allowed, k)


def test_worked_example(back_end):
    y, ids, rows = softmax(EXAMPLE, k=2)
    torch.testing.assert_close(y, torch.tensor([[0.4, 0.3], [0.4, 0.4]]))
    assert ids.tolist() == [[3, 2], [0, 1]]
    assert rows.tolist() == [[0, 2], [1, 3]]
    assert ids.dtype == rows.dtype == torch.int32


@hypothesis.given(data=st.data())
@pytest.mark.parametrize("bits", FLOATS)
def test_any_gating(back_end, bits, data):
    draw = data.draw
    group_count, members = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 6))
    num_experts = group_count * members
    mode = draw(st.integers(0, 1)) if members > 1 else 0
    k_group = draw(st.integers(1, group_count))
    k = draw(st.integers(1, min(k_group * members, 8)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(draw(st.integers(0, 5)), num_experts, generator=random)
    if draw(st.booleans()):
        x = x.round()
    x = x.to(bits)
    bias = torch.randn(num_experts, generator=random).to(bits) if draw(st.booleans()) else None
    norm, factor = draw(st.integers(0, 1)), draw(st.sampled_from([1.0, 2.5]))
    y, ids, out = gating(
        x,
        k,
        bias=bias,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=mode,
        norm_type=norm,
        out_flag=True,
        routed_scaling_factor=factor,
    )
    assert (y.dtype, ids.dtype, out.dtype) == (bits, torch.int32, torch.float32)
    exact = x.double()
    exact = torch.softmax(exact, dim=1) if norm == 0 else torch.sigmoid(exact)
    torch.testing.assert_close(out, exact.float(), **SCORES)
    for token, scores in enumerate(out.tolist()):
        chosen = choices(
            scores, None if bias is None else bias.tolist(), k, k_group, group_count, mode
        )
        assert ids[token].tolist() == chosen
        weights = [scores[expert] for expert in chosen]
        if norm == 1:
            total = 0.0
            for weight in weights:
                total = single(total + weight)
            weights = [single(weight / single(total + single(1e-20))) for weight in weights]
        expected = torch.tensor([single(weight * factor) for weight in weights]).to(bits)
        assert torch.equal(y[token], expected)


@hypothesis.given(data=st.data())
@pytest.mark.parametrize("version", ["v1", "v2", "renorm"])
def test_any_softmax_gating(back_end, version, data):
    """Logits are multiples of 1/8, so that unequal logits have unequal softmax."""
    draw = data.draw
    bits = draw(st.sampled_from(FLOATS))
    leading = draw(st.sampled_from([(0,), (3,), (2, 3), (2, 0)]))
    num_experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, num_experts))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = (torch.randint(-16, 17, (*leading, num_experts), generator=random) / 8).to(bits)
    done = torch.rand(leading, generator=random) < 0.3 if draw(st.booleans()) else None
    if version == "v1":
        y, ids, last = softmax(x, done, k)
        num_rows = x.shape[:-1].numel()
        wanted = [[j * num_rows + i for j in range(k)] for i in range(num_rows)]
        assert last.view(-1, k).tolist() == wanted
        assert last.shape == ids.shape
    else:
        full = draw(st.booleans())
        y, ids, last = softmax_v2(
            x, k=k, finished=done, renorm=int(version == "renorm"), output_softmax=full
        )
        if full and version == "v2":
            torch.testing.assert_close(last, torch.softmax(x.float(), dim=-1), **SCORES)
        else:
            assert last.shape == (0,)
        assert last.dtype == torch.float32
    assert y.dtype == bits
    assert y.shape == ids.shape == (*leading, k)
    rows = x.reshape(-1, num_experts).tolist()
    for token, logits in enumerate(rows):
        chosen = best(logits, k)
        ended = done is not None and bool(done.reshape(-1)[token])
        assert ids.reshape(-1, k)[token].tolist() == ([num_experts] * k if ended else chosen)
        over = chosen if version == "renorm" else range(num_experts)
        total = sum(math.exp(logits[expert]) for expert in over)
        expected = torch.tensor([math.exp(logits[expert]) / total for expert in chosen])
        eps = torch.finfo(bits).eps
        torch.testing.assert_close(
            y.reshape(-1, k)[token].float(), expected, rtol=max(eps, 2e-6), atol=0
        )


def test_nan_stays_with_its_token(back_end):
    x = torch.tensor([[0.0, NAN, 1.0], [0.0, 2.0, 1.0], [-INF, -INF, -INF], [0.0, INF, 1.0]])
    y, ids, _ = softmax(x, k=2)
    assert ids.tolist() == [[0, 1], [1, 2], [0, 1], [0, 1]]
    assert y.isnan().all(1).tolist() == [True, False, True, True]
    y, ids, _ = softmax_v2(x, k=2, renorm=1)
    assert ids.tolist() == [[1, 2], [1, 2], [0, 1], [1, 2]]
    assert y.isnan().all(1).tolist() == [True, False, True, True]
    y, ids, _ = gating(x, 2, norm_type=1)
    assert ids.tolist() == [[1, 2], [1, 2], [0, 1], [1, 2]]
    assert y.isnan().any(1).tolist() == [True, False, False, False]


def test_experts_by_the_ids_of_the_tokens(back_end):
    x = EXAMPLE.repeat(2, 1)
    table = torch.tensor([[3, 0], [1, 2]])
    ids = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    y, chosen, out = gating(x, 2, input_ids=ids, tid2eid=table, norm_type=1)
    assert chosen.tolist() == [[1, 2], [3, 0], [3, 0], [1, 2]]
    wanted = out.gather(1, chosen.long())
    torch.testing.assert_close(y, wanted / wanted.sum(1, keepdim=True))


@pytest.mark.parametrize("op", [lambda x: gating(x, 2), softmax, softmax_v2])
def test_strided_rows(op, back_end):
    wide = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for x in (wide.T, wide[::2], wide[:, 1:4]):
        for got, wanted in zip(op(x), op(x.contiguous()), strict=True):
            assert torch.equal(got, wanted)


X = torch.zeros(3, 8)
BAD = {
    "no x": (gating, {"x": None, "k": 1}, 161001, "x"),
    "x fp64": (gating, {"x": X.double(), "k": 1}, 161002, "x"),
    "x list": (gating, {"x": [1], "k": 1}, 161002, "x"),
    "bias of another dtype": (gating, {"k": 1, "bias": X[0].half()}, 161002, "bias"),
    "k a number": (gating, {"k": 1.5}, 161002, "k"),
    "flag a number": (gating, {"k": 1, "out_flag": 1}, 161002, "out_flag"),
    "eps a word": (gating, {"k": 1, "eps": "0"}, 161002, "eps"),
    "ids float": (gating, {"k": 1, "input_ids": X[:, 0]}, 161002, "input_ids"),
    "x 1-D": (gating, {"x": X[0], "k": 1}, 561002, "x"),
    "no experts": (gating, {"x": X[:, :0], "k": 1}, 561002, "x"),
    "2049 experts": (gating, {"x": torch.zeros(1, 2049), "k": 1}, 561002, "x"),
    "bias E + 1": (gating, {"k": 1, "bias": torch.zeros(9)}, 561002, "bias"),
    "k 0": (gating, {"k": 0}, 561002, "k"),
    "k above E": (gating, {"k": 9}, 561002, "k"),
    "k above the groups": (gating, {"k": 5, "group_count": 2}, 561002, "k"),
    "group_count 3": (gating, {"k": 1, "group_count": 3}, 561002, "group_count"),
    "group_count 0": (gating, {"k": 1, "group_count": 0}, 561002, "group_count"),
    "k_group 0": (gating, {"k": 1, "k_group": 0}, 561002, "k_group"),
    "k_group 3": (gating, {"k": 1, "k_group": 3, "group_count": 2}, 561002, "k_group"),
    "mode 2": (gating, {"k": 1, "group_select_mode": 2}, 561002, "group_select_mode"),
    "pairs of one": (
        gating,
        {"k": 1, "group_select_mode": 1, "group_count": 8},
        561002,
        "group_select_mode",
    ),
    "norm 2": (gating, {"k": 1, "norm_type": 2}, 561002, "norm_type"),
    "renorm": (gating, {"k": 1, "renorm": 1}, 561002, "renorm"),
    "ids alone": (gating, {"k": 1, "input_ids": X[:, 0].int()}, 561002, "tid2eid"),
    "table alone": (gating, {"k": 1, "tid2eid": X.int()[:, :1]}, 561002, "input_ids"),
    "table k + 1": (
        gating,
        {"k": 1, "input_ids": X[:, 0].int(), "tid2eid": X.int()[:, :2]},
        561002,
        "tid2eid",
    ),
    "id beyond the table": (
        gating,
        {"k": 1, "input_ids": X[:, 0].int() + 3, "tid2eid": X.int()[:, :1]},
        561002,
        "input_ids",
    ),
    "expert beyond E": (
        gating,
        {"k": 1, "input_ids": X[:, 0].int(), "tid2eid": X.int()[:, :1] + 8},
        561002,
        "tid2eid",
    ),
    "softmax: no x": (softmax, {"x": None}, 161001, "x"),
    "softmax: x int": (softmax, {"x": X.int()}, 161002, "x"),
    "softmax: finished int": (softmax, {"finished": X[:, 0].int()}, 161002, "finished"),
    "softmax: k a word": (softmax, {"k": "2"}, 161002, "k"),
    "softmax: x 1-D": (softmax, {"x": X[0]}, 561002, "x"),
    "softmax: x 4-D": (softmax, {"x": X[None, None]}, 561002, "x"),
    "softmax: finished 2-D": (softmax, {"finished": X > 0}, 561002, "finished"),
    "softmax: k 0": (softmax, {"k": 0}, 561002, "k"),
    "softmax: k above E": (softmax, {"k": 9}, 561002, "k"),
    "softmax: k 1025": (softmax, {"x": torch.zeros(1, 1100), "k": 1025}, 561002, "k"),
    "v2: no x": (softmax_v2, {"x": None}, 161001, "x"),
    "v2: output_softmax 1": (softmax_v2, {"output_softmax": 1}, 161002, "output_softmax"),
    "v2: renorm 2": (softmax_v2, {"renorm": 2}, 561002, "renorm"),
    "v2: k above E": (softmax_v2, {"k": 9}, 561002, "k"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    op, changes, code, argument = BAD[name]
    with pytest.raises(MoeError) as caught:
        op(**{"x": X} | changes)
    assert (caught.value.code, caught.value.argument) == (code, argument)


CALLS = {
    "gating": lambda x: gating(x, 2, out_flag=True),
    "gating without out": lambda x: gating(x, 2, norm_type=1),
    "softmax": lambda x: softmax(x, None, 2),
    "softmax_v2": lambda x: softmax_v2(x, k=3, output_softmax=True),
    "renorm": lambda x: softmax_v2(x, k=3, renorm=1),
}


@pytest.mark.parametrize("name", CALLS)
@compilers.usual
def test_compiled(name):
    """One graph, the eager bits, and opcheck passes."""
    compilers.check(CALLS[name], torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))

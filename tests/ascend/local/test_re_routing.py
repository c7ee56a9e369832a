"""Re-routing and the ends of experts' rows: worked example, definitions in loops, refusals."""

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

re_routing = torch_npu.npu_moe_re_routing
expert_tokens = torch_npu.npu_moe_compute_expert_tokens

TOKENS = torch.arange(1.0, 6)[:, None].half()
COUNTS = torch.tensor([[1, 2], [2, 0]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_worked_example(dtype, back_end):
    permuted, scales, index, numbers = re_routing(TOKENS, COUNTS.to(dtype))
    assert permuted[:, 0].tolist() == [1, 4, 5, 2, 3]
    assert index.tolist() == [0, 3, 4, 1, 2]
    assert numbers.tolist() == [3, 2]
    assert (index.dtype, numbers.dtype) == (torch.int32, dtype)
    assert scales.dtype == torch.float32 and scales.tolist() == [0] * 5


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_rows(dtype, scale_dtype, back_end):
    scales = torch.arange(120, 130, dtype=torch.uint8).view(5, 2)
    scales = scales[:, 0].float() if scale_dtype == torch.float32 else scales.view(scale_dtype)
    rows, moved, index, _ = re_routing(TOKENS.to(dtype), COUNTS, per_token_scales=scales)
    assert (rows.dtype, rows[:, 0].float().tolist()) == (dtype, [1, 4, 5, 2, 3])
    assert moved.dtype == scale_dtype
    moved, scales = (entry.view(torch.uint8).view(5, -1) for entry in (moved, scales))
    assert torch.equal(moved, scales[index])


@hypothesis.given(data=st.data())
def test_any_re_routing(back_end, data):
    draw = data.draw
    ranks, experts = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    counts = torch.randint(0, 4, (ranks, experts), generator=random)
    counts = counts.to(draw(st.sampled_from([torch.int32, torch.int64])))
    rows = int(counts.sum())
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.int8]))
    tokens = torch.randint(-99, 99, (rows, draw(st.integers(1, 9))), generator=random).to(dtype)
    scales = torch.rand(rows, generator=random) if draw(st.booleans()) else None
    kind = draw(st.sampled_from(harness.STRIDES))
    outputs = re_routing(
        harness.strided(tokens, kind),
        harness.strided(counts, kind),
        per_token_scales=scales,
        tokens_dtype=draw(st.sampled_from([None, dtype])),
    )
    rows_of, start = {}, 0
    for rank in range(ranks):
        for expert in range(experts):
            end = start + int(counts[rank, expert])
            rows_of[expert, rank] = range(start, end)
            start = end
    index = [row for pair in sorted(rows_of) for row in rows_of[pair]]
    assert outputs[2].tolist() == index
    assert torch.equal(outputs[0], tokens[index])
    assert outputs[0].dtype == dtype
    assert scales is None or torch.equal(outputs[1], scales[index])
    assert outputs[3].tolist() == [int(counts[:, expert].sum()) for expert in range(experts)]


def test_the_documented_ends(back_end):
    ids = torch.tensor([0, 0, 0, 1, 1, 2], dtype=torch.int32)
    ends = expert_tokens(ids, 3)
    assert (ends.tolist(), ends.dtype) == ([3, 5, 6], torch.int32)


@hypothesis.given(
    ids=st.lists(st.integers(0, 9), max_size=40).map(sorted), experts=st.integers(1, 9)
)
def test_any_ends(back_end, ids, experts):
    """Ids from num_expert on are not counted."""
    strided_ids = harness.strided(torch.tensor(ids, dtype=torch.int32), "columns")
    ends = expert_tokens(strided_ids, experts)
    assert ends.tolist() == [sum(entry <= expert for entry in ids) for expert in range(experts)]


def test_many_rows(back_end):
    """More rows than one tile of the plan compares."""
    ids = torch.randint(0, 50, (3000,), dtype=torch.int32).sort().values
    assert torch.equal(expert_tokens(ids, 50), ids.bincount(minlength=50).cumsum(0).int())


IDS = torch.tensor([0, 1, 1], dtype=torch.int32)
ROWS_NAME = "sorted_expert_for_source_row"
GOOD = {
    re_routing: {"tokens": TOKENS, "expert_token_num_per_rank": COUNTS},
    expert_tokens: {ROWS_NAME: IDS, "num_expert": 2},
}
COUNTS_NAME = "expert_token_num_per_rank"
BAD = {
    "no tokens": (re_routing, {"tokens": None}, 161001, "tokens"),
    "no counts": (re_routing, {COUNTS_NAME: None}, 161001, COUNTS_NAME),
    "tokens fp32": (re_routing, {"tokens": TOKENS.float()}, 161002, "tokens"),
    "counts float": (re_routing, {COUNTS_NAME: COUNTS.float()}, 161002, COUNTS_NAME),
    "scales half": (re_routing, {"per_token_scales": TOKENS[:, 0]}, 161002, "per_token_scales"),
    "scales E8M0": (
        re_routing,
        {"per_token_scales": torch.ones(5).to(torch.float8_e8m0fnu)},
        161002,
        "per_token_scales",
    ),
    "hifloat8": (re_routing, {"tokens_dtype": 290}, 161002, "tokens_dtype"),
    "another dtype": (re_routing, {"tokens_dtype": torch.int8}, 161002, "tokens_dtype"),
    "type a word": (re_routing, {"idx_type": "0"}, 161002, "idx_type"),
    "tokens 1-D": (re_routing, {"tokens": TOKENS[:, 0]}, 561002, "tokens"),
    "H 0": (re_routing, {"tokens": TOKENS[:, :0]}, 561002, "tokens"),
    "H 16384": (re_routing, {"tokens": TOKENS.expand(-1, 16384)}, 561002, "tokens"),
    "counts 1-D": (re_routing, {COUNTS_NAME: COUNTS[0]}, 561002, COUNTS_NAME),
    "counts of more": (re_routing, {COUNTS_NAME: COUNTS + 1}, 561002, COUNTS_NAME),
    "counts of fewer": (re_routing, {COUNTS_NAME: COUNTS[:1]}, 561002, COUNTS_NAME),
    "negative count": (
        re_routing,
        {COUNTS_NAME: torch.tensor([[6, -1]])},
        561002,
        COUNTS_NAME,
    ),
    "scales A + 1": (re_routing, {"per_token_scales": torch.ones(6)}, 561002, "per_token_scales"),
    "prefix sums": (re_routing, {"expert_token_num_type": 0}, 561002, "expert_token_num_type"),
    "scatter": (re_routing, {"idx_type": 1}, 561002, "idx_type"),
    "ends: no ids": (expert_tokens, {ROWS_NAME: None}, 161001, ROWS_NAME),
    "ends: int64": (expert_tokens, {ROWS_NAME: IDS.long()}, 161002, ROWS_NAME),
    "ends: a word": (expert_tokens, {"num_expert": "2"}, 161002, "num_expert"),
    "ends: 2-D": (expert_tokens, {ROWS_NAME: IDS[None]}, 561002, ROWS_NAME),
    "ends: E 0": (expert_tokens, {"num_expert": 0}, 561002, "num_expert"),
    "ends: E 2049": (expert_tokens, {"num_expert": 2049}, 561002, "num_expert"),
    "ends: negative": (expert_tokens, {ROWS_NAME: IDS - 1}, 561002, ROWS_NAME),
    "ends: descending": (expert_tokens, {ROWS_NAME: IDS.flip(0)}, 561002, ROWS_NAME),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    op, changes, code, argument = BAD[name]
    op(**GOOD[op])
    with pytest.raises(MoeError) as caught:
        op(**GOOD[op] | changes)
    assert (caught.value.code, caught.value.argument) == (code, argument)


@pytest.mark.parametrize("op", GOOD, ids=lambda op: op.__name__)
@compilers.usual
def test_compiled(op):
    first, *others = GOOD[op].items()
    compilers.check(lambda x: op(**{first[0]: x}, **dict(others)), first[1])


@compilers.usual
def test_compiled_with_scales():
    scales = torch.rand(5)
    compilers.check(lambda x: re_routing(x, COUNTS, per_token_scales=scales), TOKENS)

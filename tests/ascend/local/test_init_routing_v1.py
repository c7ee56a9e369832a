"""init_routing and init_routing_quant: the documented example, definitions in loops, refusals."""

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

init_routing = torch_npu.npu_moe_init_routing
init_routing_quant = torch_npu.npu_moe_init_routing_quant
init_routing_v2 = torch_npu.npu_moe_init_routing_v2

int32 = torch.int32
X = torch.tensor([[0.1] * 4, [0.2] * 4, [0.3] * 4])
ROWS = torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=int32)
IDS = torch.tensor([[1, 2], [0, 1], [0, 2]], dtype=int32)


def test_the_documented_example(back_end):
    expanded, row_idx, ids = init_routing(X, ROWS, IDS, 3)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert row_idx.tolist() == [2, 0, 1, 4, 3, 5]
    assert torch.equal(expanded, X[[1, 2, 0, 1, 0, 2]])


@hypothesis.given(data=st.data())
def test_any_init_routing(back_end, data):
    draw = data.draw
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    num_tokens, top_k = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    x = torch.randn(num_tokens, 3, generator=random).to(dtype)
    ids = torch.randint(0, 4, (num_tokens, top_k), generator=random).to(int32)
    rows = torch.randperm(num_tokens * top_k, generator=random).to(int32).view(num_tokens, top_k)
    active = draw(st.integers(0, 6))
    slots = [(int(e), int(r)) for e, r in zip(ids.flatten(), rows.flatten(), strict=True)]
    order = sorted(range(len(slots)), key=lambda slot: (slots[slot][0], slot))
    kind = draw(st.sampled_from(harness.STRIDES))
    expanded, row_idx, sorted_ids = init_routing(harness.strided(x, kind), rows, ids, active)
    assert sorted_ids.tolist() == [slots[slot][0] for slot in order]
    for place, slot in enumerate(order):
        assert int(row_idx[slots[slot][1]]) == place
    kept = min(num_tokens, active) * top_k
    assert torch.equal(expanded, x[[slots[slot][1] % num_tokens for slot in order[:kept]]])


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_quantised(back_end, mode, padded, quant_mode):
    """What version 2 gives, and the counts that are asked for."""
    x, ids = torch.randn(4, 6), torch.tensor([[1, 0], [0, 2], [1, 0], [3, 0]], dtype=int32)
    factors = {"scale": torch.rand(5, 6)}
    if quant_mode == 0:
        factors = {"scale": torch.tensor([3.0]), "offset": torch.tensor([0.5])}
    common = {**factors, "expert_num": 5, "quant_mode": quant_mode, "expert_capacity": 2}
    expanded, row_idx, counts, before, scales = init_routing_quant(
        x,
        ids,
        active_num=0,
        drop_pad_mode=int(padded),
        expert_tokens_num_mode=mode,
        expert_tokens_before_capacity_flag=True,
        **common,
    )
    wanted = init_routing_v2(x, ids, drop_pad_mode=int(padded), expert_tokens_num_type=1, **common)
    assert torch.equal(expanded, wanted[0])
    assert torch.equal(row_idx, wanted[1])
    of_experts = [4, 2, 1, 1, 0]
    if padded or mode == 0:
        assert counts is None
    else:
        assert counts.dtype == int32
        prefix = torch.tensor(of_experts).cumsum(0).tolist()
        assert counts.tolist() == (prefix if mode == 1 else of_experts)
    assert (before is None) == (not padded)
    if padded:
        assert before.tolist() == of_experts
        assert before.dtype == int32
    if quant_mode == 0:
        assert scales is None
    else:
        assert torch.equal(scales, wanted[3])


REFUSED = [
    (init_routing, {"row_idx": ROWS[:2]}, 561002, "row_idx must have shape"),
    (init_routing, {"row_idx": ROWS + 1}, 561002, r"row_idx must be in \[0, 6\)"),
    (init_routing, {"row_idx": ROWS // 2}, 561002, "row_idx must have N \\* K = 6 distinct"),
    (init_routing, {"row_idx": ROWS.long()}, 161002, "row_idx must be int32"),
    (init_routing, {"active_num": -1}, 561002, "active_num must not be negative"),
    (init_routing, {"x": None}, 161001, "x must be given"),
    (init_routing_quant, {"quant_mode": -1}, 561002, "quant_mode must be 0 or 1"),
    (init_routing_quant, {"quant_mode": 0}, 561002, "scale must be given"),
    (init_routing_quant, {"expert_tokens_num_mode": 3}, 561002, "expert_tokens_num_mode must be"),
    (init_routing_quant, {"expert_idx": IDS.long()}, 161002, "expert_idx must be int32"),
]


@pytest.mark.parametrize("call, changes, code, message", REFUSED)
def test_refusals(call, changes, code, message):
    arguments = {"x": X, "expert_idx": IDS}
    if call is init_routing:
        arguments |= {"row_idx": ROWS, "active_num": 3}
    with pytest.raises(MoeError, match=f"{call.__name__}: .*{message}") as raised:
        call(**arguments | changes)
    assert raised.value.code == code


@compilers.usual
def test_compiled():
    compilers.check(lambda x: init_routing(x, ROWS, IDS, 2), X)
    compilers.check(lambda x: init_routing_quant(x, IDS, expert_tokens_num_mode=2), X)

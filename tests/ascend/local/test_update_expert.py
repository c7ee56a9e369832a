"""Replicas of experts: the worked example, any table, refusals, and the chain around it."""

from __future__ import annotations

import harness
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from replica_calls import BAD, IDS, TABLE, WEIGHTS

from moe_triton import MoeError, set_profile
from moe_triton.compat import torch_npu

update = torch_npu.npu_moe_update_expert


# 13 #33: the replica depends on the rank; 13 #34: the output is its physical id.
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "ranks, expected",
    [
        ((0, 1, 2), [[5, 0], [1, 7], [0, 1]]),
        ((3,), [[5, 0], [3, 7], [0, 3]]),
        ((4, 5), [[5, 4], [3, 2], [4, 3]]),
        ((6, 7), [[5, 4], [6, 2], [4, 6]]),
    ],
)
def test_worked_example_by_rank(ranks, expected, dtype):
    for rank in ranks:
        ids, mask = update(IDS.to(dtype), TABLE, local_rank_id=rank, world_size=8)
        assert ids.dtype == dtype
        assert ids.tolist() == expected
        assert mask.all() and mask.dtype == torch.bool and mask.shape == ids.shape


def test_worked_example_by_token():
    ids, _ = update(IDS, TABLE, balance_mode=1)
    assert ids.tolist() == [[5, 0], [3, 2], [0, 6]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2,), (1, 2)])
def test_worked_example_of_pruning(shape, dtype):
    """13 #35: a weight equal to the threshold stays."""
    _, mask = update(
        IDS,
        TABLE,
        expert_scales=WEIGHTS.to(dtype),
        pruning_threshold=torch.tensor([0, 0.3]).view(shape),
        active_mask=torch.tensor([True, True, False]),
        balance_mode=1,
    )
    assert mask.tolist() == [[True, False], [True, True], [False, False]]
    _, mask = update(
        IDS,
        TABLE,
        expert_scales=WEIGHTS,
        pruning_threshold=torch.tensor([0.75, 0.5]),
        balance_mode=1,
    )
    assert mask.tolist() == [[True, False], [False, True], [True, False]]


def test_active_mask_without_pruning():
    _, mask = update(IDS, TABLE, active_mask=torch.tensor([True, False, False]), balance_mode=1)
    assert mask.tolist() == [[True, True], [False, False], [False, False]]


@hypothesis.given(st.data())
def test_any_table(data):
    """Against the formula, entry by entry."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31 - 1)))
    experts, world = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    columns = data.draw(st.integers(2, world + 1))
    tokens, top_k = data.draw(st.integers(0, 6)), data.draw(st.integers(1, experts))
    mode, rank = data.draw(st.integers(0, 1)), data.draw(st.integers(0, world - 1))
    table = rng.integers(0, 100, (experts, columns)).astype(np.int32)
    table[:, 0] = rng.integers(1, columns, experts)
    ids = rng.integers(0, experts, (tokens, top_k)).astype(np.int32)
    balanced, _ = update(
        harness.strided(torch.from_numpy(ids), "columns"),
        harness.strided(torch.from_numpy(table), "transposed"),
        local_rank_id=rank,
        world_size=world,
        balance_mode=mode,
    )
    for token in range(tokens):
        for slot in range(top_k):
            row = table[ids[token, slot]]
            number = rank // -(-world // row[0]) if mode == 0 else token % row[0]
            assert balanced[token, slot] == row[1 + number]


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    changes, code, argument = BAD[name]
    arguments = {
        "expert_ids": IDS,
        "eplb_table": TABLE,
        "local_rank_id": 3,
        "world_size": 8,
    } | changes
    with pytest.raises(MoeError) as caught:
        update(**arguments)
    assert (caught.value.code, caught.value.argument) == (code, argument)


@pytest.mark.parametrize(
    "changes, argument",
    [
        ({"world_size": 1, "eplb_table": TABLE[:, :2].clamp(max=1)}, "world_size"),
        ({"world_size": 769}, "world_size"),
        ({"expert_ids": torch.zeros(513, 2, dtype=torch.int32)}, "expert_ids"),
        ({"expert_ids": torch.zeros(0, 2, dtype=torch.int32)}, "expert_ids"),
        ({"eplb_table": torch.ones(1025, 4, dtype=torch.int32)}, "eplb_table"),
    ],
)
def test_refused_on_a3(changes, argument):
    arguments = {
        "expert_ids": IDS,
        "eplb_table": TABLE,
        "local_rank_id": 0,
        "world_size": 8,
    } | changes
    if "world_size" not in changes or changes["world_size"] > 1:
        update(**arguments)
    set_profile("a3")
    try:
        with pytest.raises(MoeError) as caught:
            update(**arguments)
    finally:
        set_profile(None)
    assert (caught.value.code, caught.value.argument) == (561002, argument)


def test_the_chain():
    """update_expert, dispatch_v2 and combine with RMSNorm give the result without replicas."""
    table = torch.tensor([[2, 0, 2], [2, 3, 1]], dtype=torch.int32)
    logical = [0, 1, 0, 1]  # what each of the 4 physical experts is a replica of
    x = torch.arange(1, 13).view(3, 4).bfloat16()
    ids, weights = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32), torch.ones(3, 2) / 2
    threshold = torch.tensor([0.0, 0.6])  # the second slot goes

    def fn(ctx):
        where = (ctx.ep_group, 2, ctx.ep_rank, 4)
        balanced, mask = update(
            ids,
            table,
            expert_scales=weights,
            pruning_threshold=threshold,
            local_rank_id=ctx.ep_rank,
            world_size=2,
        )
        rows, _, assist, nums, counts, *_ = torch_npu.npu_moe_distribute_dispatch_v2(
            x, balanced, *where, x_active_mask=mask
        )
        local = torch.arange(2).repeat_interleave(nums)
        factor = torch.tensor([logical[2 * ctx.ep_rank + int(i)] + 1 for i in local])
        rows[: len(local)] *= factor[:, None]
        residual, gamma = torch.zeros(3, 1, 4).bfloat16(), torch.ones(4).bfloat16()
        _, _, total = torch_npu.npu_moe_distribute_combine_add_rms_norm(
            rows, balanced, assist, counts, weights, residual, gamma, *where, x_active_mask=mask
        )
        return total[:, 0]

    expected = x * (ids[:, :1] + 1) / 2
    for total in harness.run_world("local", 2, fn):
        assert torch.equal(total, expected)

"""The load that a plan predicts is the load of ranks that use its table."""

from __future__ import annotations

import pytest
import torch

import moe_triton
from moe_triton import eplb, testing
from moe_triton.compat import torch_npu

EXPERTS, RANKS, SLOTS, TOP_K = 12, 4, 20, 3
# In 12 tokens, all remainders of the index modulo 1 to RANKS columns are equally frequent.
REPEATS = 12


def routing(balance_mode):
    """[T, K] ids; by token, each choice is repeated in REPEATS consecutive tokens."""
    ids = testing.routing_zipf(20, EXPERTS, TOP_K, seed=1, exponent=1.5)
    ids = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(3)).int()[ids.long()]
    return ids.repeat_interleave(REPEATS, 0) if balance_mode else ids


@pytest.mark.parametrize("make", [eplb.plan, eplb.plan_greedy])
@pytest.mark.parametrize("balance_mode", [0, 1])
def test_mapped_ids_give_the_predicted_load(balance_mode, make):
    ids = routing(balance_mode)
    load = ids.flatten().bincount(minlength=EXPERTS) * RANKS
    plan = make(load, num_ranks=RANKS, num_slots=SLOTS, num_nodes=2, balance_mode=balance_mode)
    received = torch.zeros(RANKS, dtype=torch.float64)
    for rank in range(RANKS):
        mapped, _ = torch_npu.npu_moe_update_expert(
            ids,
            plan.eplb_table,
            local_rank_id=rank,
            world_size=RANKS,
            balance_mode=balance_mode,
        )
        assert torch.equal(plan.placement[mapped.long()], ids.long())
        received += plan.ranks[mapped.long()].flatten().bincount(minlength=RANKS)
    torch.testing.assert_close(received, plan.load_after, rtol=1e-12, atol=0)


def test_by_token_any_choice_is_close_to_the_prediction():
    """Within one row for each source rank, expert and column that a rank has in the table."""
    plan = eplb.plan(torch.arange(EXPERTS), num_ranks=RANKS, num_slots=SLOTS, balance_mode=1)
    tokens = torch.arange(37)
    for expert in range(EXPERTS):
        # One expert chosen by all tokens of one rank.
        ids = torch.full((len(tokens), 1), expert, dtype=torch.int32)
        mapped, _ = torch_npu.npu_moe_update_expert(ids, plan.eplb_table, balance_mode=1)
        received = plan.ranks[mapped.long()].flatten().bincount(minlength=RANKS)
        load = torch.zeros(EXPERTS).index_fill(0, torch.tensor([expert]), len(tokens))
        expected = eplb.rank_load(
            load, plan.eplb_table, num_ranks=RANKS, num_slots=SLOTS, balance_mode=1
        )
        assert ((received - expected).abs() < 1).all()


def test_dispatch_delivers_the_predicted_load():
    ids = routing(0)
    load = ids.flatten().bincount(minlength=EXPERTS) * RANKS
    plan = eplb.plan(load, num_ranks=RANKS, num_slots=SLOTS)

    def received(ctx):
        mapped, _ = torch_npu.npu_moe_update_expert(
            ids, plan.eplb_table, local_rank_id=ctx.rank, world_size=RANKS
        )
        sizes = {"num_experts": SLOTS, "top_k": TOP_K, "hidden": 16, "max_tokens": len(ids)}
        with moe_triton.ExpertParallel(ctx.ep_group, **sizes) as layer:
            return int(layer.dispatch(torch.ones(len(ids), 16).bfloat16(), mapped).num_tokens)

    assert testing.run_local(RANKS, received) == plan.load_after.tolist()

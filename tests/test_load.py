"""``ExpertParallel(count_load=True)``: the rows of each expert, counted as they are numbered."""

from __future__ import annotations

import harness
import pytest
import torch

import moe_triton
from moe_triton import eplb, testing
from moe_triton.compat import torch_npu

RANKS, EXPERTS, TOP_K, HIDDEN, TOKENS = 4, 8, 2, 16, 12


def batch(rank, step):
    """Tokens and ids of a rank; another number of tokens in each step, one of them masked."""
    num_tokens = TOKENS - step
    ids = testing.routing_zipf(num_tokens, EXPERTS, TOP_K, seed=10 * rank + step)
    ids[0] = -1
    return testing.tokens(num_tokens, HIDDEN, seed=rank), ids


def rows(ranks, steps):
    """[E] rows for each expert, counted directly."""
    ids = torch.cat([batch(rank, step)[1].flatten() for rank in ranks for step in steps])
    return ids[ids >= 0].bincount(minlength=EXPERTS)


def layer(ctx=None, **options):
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": TOKENS}
    group = None if ctx is None else ctx.ep_group
    return moe_triton.ExpertParallel(group, **sizes | {"count_load": True} | options)


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("world", harness.WORLDS)
def test_load_over_steps(world, alignment):
    def work(ctx):
        with layer(ctx, alignment=alignment) as ep:
            assert ep.load.dtype == torch.int64 and not ep.load.any()
            for step in range(3):
                ep.dispatch(*batch(ctx.rank, step))
            counted, gathered = ep.load.clone(), ep.gather_load()
            ep.load.zero_()
            ep.dispatch(*batch(ctx.rank, 3))
            return ep.local_experts, counted, gathered, ep.gather_load()

    for local, counted, gathered, after in harness.run_world(world, RANKS, work):
        expected = rows(range(RANKS), range(3))
        assert torch.equal(counted, expected[local.start : local.stop])
        assert torch.equal(gathered, expected)
        assert torch.equal(after, rows(range(RANKS), [3]))


def test_one_rank():
    with layer() as ep:
        ep.dispatch(*batch(0, 0))
        assert torch.equal(ep.load, rows([0], [0]))
        assert torch.equal(ep.gather_load(), ep.load)


def test_shared_ranks_count_their_own():
    def work(ctx):
        with layer(ctx, shared_experts=1, shared_ranks=2) as ep:
            ep.dispatch(*batch(ctx.rank, 0))
            return ep.load, ep.gather_load()

    loads, gathered = zip(*testing.run_local(RANKS, work), strict=True)
    # Each shared rank receives the tokens of two ranks, all but one masked token of each.
    assert [load.tolist() for load in loads[:2]] == [[2 * (TOKENS - 1)]] * 2
    assert torch.equal(torch.cat(loads[2:]), rows(range(RANKS), [0]))
    assert all(torch.equal(load, rows(range(RANKS), [0])) for load in gathered)


def test_backward_is_not_counted():
    with layer(dtype=torch.float32) as ep:
        x, ids = batch(0, 0)
        x = x.float().requires_grad_()
        received = ep.dispatch(x, ids)
        ep.combine(received.x * 2, received.handle).sum().backward()
        assert torch.equal(ep.load, rows([0], [0]))


def test_rows_without_room_are_not_counted():
    with layer(max_recv_tokens=3) as ep:
        with pytest.raises(moe_triton.ReceiveOverflowError):
            ep.dispatch(*batch(0, 0))
        assert not ep.load.any()


def test_without_counting():
    with layer(count_load=False) as ep:
        ep.dispatch(*batch(0, 0))
        assert ep.load is None
        with pytest.raises(moe_triton.ArgumentValueError, match="gather_load: count_load must be"):
            ep.gather_load()


def test_peers_of_a_rank_that_does_not_count_abort():
    def work(ctx):
        with layer(ctx, count_load=ctx.rank != 1) as ep:
            kind = moe_triton.ArgumentValueError if ctx.rank == 1 else moe_triton.PeerAbortError
            with pytest.raises(kind, match="count_load must be True"):
                ep.gather_load()

    testing.run_local(RANKS, work)


def test_from_replicas_back_to_experts():
    """The loads of physical experts add up to those of the logical ones."""
    ids = testing.routing_zipf(TOKENS, EXPERTS, TOP_K, seed=5)
    load = ids.flatten().bincount(minlength=EXPERTS) * RANKS
    plan = eplb.plan(load, num_ranks=RANKS, num_slots=3 * RANKS)

    def work(ctx):
        mapped, _ = torch_npu.npu_moe_update_expert(
            ids, plan.eplb_table, local_rank_id=ctx.rank, world_size=RANKS
        )
        with layer(ctx, num_experts=3 * RANKS) as ep:
            ep.dispatch(testing.tokens(TOKENS, HIDDEN), mapped)
            return ep.gather_load()

    gathered = testing.run_local(RANKS, work)[0]
    assert torch.equal(plan.logical_load(gathered), load)
    assert torch.equal(gathered.view(RANKS, -1).sum(1).double(), plan.load_after)

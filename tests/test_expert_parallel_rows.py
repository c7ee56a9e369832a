"""Received rows of ExpertParallel: padding, ids of -1, wide dtypes, counts, profiler ranges."""

from __future__ import annotations

import harness
import pytest
import torch
from harness import run_world

from moe_triton import ExpertParallel, testing

worlds = pytest.mark.parametrize("world", harness.WORLDS)
SIZES = {"num_experts": 6, "top_k": 2, "hidden": 16, "max_tokens": 9}


def make(ctx, **options) -> ExpertParallel:
    return ExpertParallel(ctx.ep_group, rank=ctx.ep_rank, **{**SIZES, **options})


def inputs(rank: int, dtype=torch.bfloat16, seed: int = 0):
    """Tokens, ids and weights; ranks have different numbers of tokens."""
    count, seed = (9, 0, 4)[rank % 3], 10 * seed + rank
    ids = testing.routing_zipf(count, SIZES["num_experts"], SIZES["top_k"], seed=seed)
    weights = testing.weights(count, SIZES["top_k"], seed=seed)
    return testing.tokens(count, SIZES["hidden"], dtype, seed=seed), ids, weights


def expert_numbers(ep: ExpertParallel, offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[num_rows] the expert of each row."""
    rows = torch.arange(num_rows)
    return torch.searchsorted(offsets, rows, right=True) + ep.local_experts.start


@worlds
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("quant", [None, "int8"])
def test_aligned_rows_hold_the_same_tokens(world, exact, quant):
    def fn(ctx):
        x, ids, weights = inputs(ctx.rank)
        options = {"quant": quant, "exact": exact}
        with make(ctx, **options) as plain, make(ctx, **options, alignment=8) as padded:
            tight = plain.dispatch(x, ids, weights)
            aligned = padded.dispatch(x, ids, weights)
            counts = tight.tokens_per_expert
            assert torch.equal(aligned.tokens_per_expert, counts)
            assert aligned.num_tokens == tight.num_tokens == counts.sum()
            assert tight.offsets.tolist() == counts.cumsum(0).tolist()
            sizes = -(-counts // 8) * 8
            assert aligned.offsets.dtype == torch.int32
            assert aligned.offsets.tolist() == sizes.cumsum(0).tolist()
            total = int(aligned.offsets[-1])
            assert len(aligned.x) == (total if exact else padded.capacity)
            assert padded.capacity == plain.capacity + 7 * plain.num_local_experts
            starts = [0, *aligned.offsets.tolist()]
            first = 0
            for number, count in enumerate(counts.tolist()):
                real = slice(starts[number], starts[number] + count)
                padding = slice(starts[number] + count, starts[number + 1])
                for name in ("x", "weights") + (("scales",) if quant else ()):
                    rows = getattr(aligned, name)
                    assert torch.equal(rows[real], getattr(tight, name)[first : first + count])
                    assert not rows[padding].any()
                first += count

            def experts(received):
                y = received.x.to(torch.bfloat16)
                number = expert_numbers(padded, received.offsets, len(y))
                return y * (number[:, None] + 1)

            y = experts(aligned)
            y[total:] = float("nan")
            expected = plain.combine(experts(tight), tight.handle)
            assert torch.equal(padded.combine(y, aligned.handle), expected)

    run_world(world, 3, fn)


@pytest.mark.parametrize("shared", [{}, {"shared_experts": 1, "shared_ranks": 1}])
def test_aligned_rows_with_shared_ranks_and_a_limit(shared):
    def fn(ctx):
        x, ids, weights = inputs(ctx.rank)
        ids = ids % 4
        ids[:, 1] = (ids[:, 0] + 1) % 4
        options = {"num_experts": 6 if not shared else 4, **shared}
        sums = []
        for alignment in (1, 16):
            with make(ctx, alignment=alignment, max_recv_tokens=40, **options) as ep:
                received = ep.dispatch(x, ids, weights)
                y = ep.output_rows(received.handle)
                assert y.shape == received.x.shape == (ep.capacity, 16)
                y.copy_(received.x)
                sums.append(ep.combine(y, received.handle))
        assert torch.equal(*sums)

    run_world("local", 3, fn)


@worlds
def test_ids_of_minus_one(world):
    """Such a slot adds no row and no term; a token of such slots alone returns its addend."""

    def fn(ctx):
        x, ids, weights = inputs(ctx.rank)
        ids[::3, 0] = -1
        ids[::3, 1] = -1
        ids[1::3, 1] = -1
        weights[ids == -1] = float("nan")
        addend = testing.tokens(*x.shape, x.dtype, seed=99)
        for dtype in (torch.int32, torch.int64):
            with make(ctx, shared_experts=1, shared_ranks=1, num_experts=6) as ep:
                received = ep.dispatch(x, ids.to(dtype), weights)
                if ep.is_shared_rank:
                    assert int(received.num_tokens) == 6 + 2
                y = torch.full_like(received.x, float("nan"))
                rows = int(received.num_tokens)
                y[:rows] = received.x[:rows]
                out = ep.combine(y, received.handle, shared_expert_x=addend)
            expected = torch.zeros(x.shape)
            for slot in range(2):
                sent = ids[:, slot, None] >= 0
                term = x.float() * weights[:, slot, None]
                expected += term.where(sent, 0.0)
            expected += x.float().where((ids >= 0).any(1, keepdim=True), 0.0)  # the shared expert
            expected += addend.float()
            assert torch.equal(out, expected.to(x.dtype))
            assert ep.traffic.rows_sent == int((ids >= 0).any(1).sum()) + len(
                {(token, int(i) // 3) for token, row in enumerate(ids) for i in row if i >= 0}
            )

    run_world(world, 3, fn)


@worlds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_tokens(world, dtype):
    def fn(ctx):
        x, ids, weights = inputs(ctx.rank)
        x = x.to(dtype) / 3
        weights = weights.to(torch.promote_types(dtype, torch.float32)) / 7
        with make(ctx, dtype=dtype) as ep:
            received = ep.dispatch(x, ids, weights)
            assert received.x.dtype == dtype
            assert received.weights.dtype == weights.dtype
            out = ep.combine(received.x, received.handle)
        expected = torch.zeros_like(x)
        for slot in range(2):
            expected += x * weights[:, slot, None]
        assert torch.equal(out, expected)

    run_world(world, 3, fn)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counts_dtype(dtype):
    def fn(ctx):
        with make(ctx, counts_dtype=dtype) as ep:
            received = ep.dispatch(*inputs(ctx.rank))
            assert received.tokens_per_expert.dtype == dtype
            assert int(received.tokens_per_expert.sum()) == int(received.num_tokens)

    run_world("local", 3, fn)


def test_offsets_suit_grouped_matrix_products():
    """torch's grouped product on the received rows, against one product per expert."""

    def fn(ctx):
        x, ids, weights = inputs(ctx.rank)
        with make(ctx, alignment=8) as ep:
            received = ep.dispatch(x, ids, weights)
            matrices = torch.randn((2, 16, 16), generator=torch.Generator().manual_seed(ep.rank))
            matrices = matrices.bfloat16()
            y = torch._grouped_mm(received.x, matrices, offs=received.offsets)
            start = 0
            for matrix, end in zip(matrices, received.offsets.tolist(), strict=True):
                torch.testing.assert_close(y[start:end], received.x[start:end] @ matrix)
                start = end

    run_world("local", 3, fn)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_phases_are_ranges_of_the_profiler(world):
    """Each phase of each op and its wait, by the names of the op and of the group."""

    def fn(ctx):
        x, ids, weights = inputs(ctx.rank)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with make(ctx) as ep, torch.profiler.profile(activities=kinds) as trace:
            received = ep.dispatch(x, ids, weights)
            ep.combine(received.x, received.handle)
        names = {event.name for event in trace.events()}
        for kind in ("dispatch", "combine"):
            for phase in ("send", "wait", "recv"):
                assert f"ExpertParallel.{kind}/{kind} {phase} [{ctx.ep_group}]" in names

    run_world(world, 2, fn)

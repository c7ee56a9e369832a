"""``ElasticBuffer`` and ``EPBuffer`` against loops, exactly."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from deep_ep_definition import draw, fold, run

from moe_triton import ArgumentError, PeerAbortError, UnavailableError
from moe_triton.compat import deep_ep

CLASSES = {"v2": deep_ep.ElasticBuffer, "v2.5": deep_ep.EPBuffer}


def make(kind, ctx, world, **options):
    return CLASSES[kind](
        ctx.ep_group,
        num_max_tokens_per_rank=world.max_tokens,
        hidden=8,
        num_gpu_timeout_secs=5,
        **options,
    )


def partial(world, rank, source, token, scale):
    """The sum of a token's rows on a rank, in the order of its slots, rounded."""
    batch = world.batches[source]
    ids = batch.ids[token].tolist()
    rows = [batch.x[token] * scale(e) for e in ids if e >= 0 and world.owner(e) == rank]
    return fold([], rows, batch.x[token])


def scale(expert):
    return 1 + expert / 4


def check(world, kind, *, alignment=1, biases=0, cpu_sync=True, reduce_first=True, deferred=False):
    def work(ctx, batch):
        buffer = make(kind, ctx, world, allow_multiple_reduction=reduce_first)
        rank, top_k = ctx.rank, batch.ids.shape[1]
        local, arrivals = world.local_ids(rank), world.arrivals(rank)
        n, most = len(arrivals), world.size * world.max_tokens
        options = {"async_with_compute_stream": True, "defer_epilogue": True} if deferred else {}

        def call(name, *arguments, **more):
            result = getattr(buffer, name)(*arguments, **more, **options)
            return (*result.current_stream_wait(), result) if deferred else result

        stats = torch.zeros(world.local, dtype=torch.int32)
        common = {
            "num_experts": world.num_experts,
            "expert_alignment": alignment,
            "do_cpu_sync": cpu_sync,
        }
        counts = [int((local == e).sum()) for e in range(world.local)]
        padded = [-(-count // alignment) * alignment for count in counts]

        # One row per rank.
        x, ids, weights, handle, _ = call(
            "dispatch", batch.x, batch.ids, batch.weights,
            cumulative_local_expert_recv_stats=stats, **common,
        )  # fmt: skip
        assert len(x) == len(ids) == len(weights) == (n if cpu_sync else most)
        assert torch.equal(x[:n], world.rows(rank, "x"))
        assert torch.equal(ids[:n], local)
        assert (ids[n:] == -1).all()
        assert torch.equal(weights[:n], world.rows(rank, "weights"))
        assert stats.tolist() == counts
        assert handle.num_recv_tokens_per_expert_list == (padded if cpu_sync else [])
        sums = torch.tensor(padded).cumsum(0).tolist()
        assert handle.psum_num_recv_tokens_per_expert.tolist() == sums
        per_source = [sum(s <= source for s, _ in arrivals) for source in range(world.size)]
        assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == per_source
        numbers = [s * world.max_tokens + t for s, t in arrivals]
        assert handle.recv_src_metadata[:n, 0].tolist() == numbers
        again, _, no_weights, same, _ = call("dispatch", batch.x * 2, handle=handle)
        assert same is handle
        assert no_weights is None
        assert torch.equal(again[:n], x[:n] * 2)

        bias = tuple(torch.randn_like(batch.x) for _ in range(biases))
        y = x.clone()
        for row, (source, token) in enumerate(arrivals):
            y[row] = partial(world, rank, source, token, scale)
        out, out_weights, _ = call("combine", y, handle, weights, bias=bias or None)
        assert torch.equal(out_weights, batch.weights.masked_fill(batch.ids < 0, 0))

        # One row per expert.
        expanded, none, row_weights, handle, _ = call(
            "dispatch", batch.x, batch.ids, batch.weights,
            do_expand=True, do_zero_padding=True, **common,
        )  # fmt: skip
        assert none is None
        assert len(expanded) == len(row_weights) == handle.num_expanded_tokens
        assert handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
        y = expanded.clone()
        begin = 0
        slots = handle.recv_src_metadata[:n, 2:]
        assert slots.shape == (n, top_k)
        for expert, rows in enumerate(world.expert_rows(rank)):
            assert handle.psum_num_recv_tokens_per_expert[expert] == begin + len(rows)
            for row, (source, token, slot) in enumerate(rows, begin):
                sender = world.batches[source]
                assert torch.equal(expanded[row], sender.x[token])
                assert row_weights[row] == sender.weights[token, slot]
                assert slots[arrivals.index((source, token)), slot] == row
                y[row] = expanded[row] * scale(expert + rank * world.local)
            begin += padded[expert]
            assert not expanded[begin - padded[expert] + len(rows) : begin].any()
        assert (slots >= 0).sum() == sum(counts)
        returned = row_weights if reduce_first else None
        reduced, reduced_weights, _ = call("combine", y, handle, returned, bias=bias or None)
        if reduce_first:
            assert torch.equal(reduced_weights, out_weights)

        for token, row in enumerate(batch.ids.tolist()):
            start = [b[token] for b in bias]
            owners = [world.owner(e) for e in row]
            last = [k for k, o in enumerate(owners) if o >= 0 and o not in owners[k + 1 :]]
            parts = [partial(world, owners[k], rank, token, scale) for k in last]
            expected = fold(start, parts, batch.x[token])
            assert torch.equal(out[token], expected)
            if not reduce_first:
                parts = [batch.x[token] * scale(e) for e in row if e >= 0]
                expected = fold(start, parts, batch.x[token])
            assert torch.equal(reduced[token], expected)
        buffer.destroy()

    run(world, work)


@hypothesis.given(
    kind=st.sampled_from(list(CLASSES)),
    size=st.sampled_from([1, 2, 4]),
    local=st.integers(1, 3),
    top_k=st.integers(1, 4),
    hidden=st.integers(1, 20),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    alignment=st.integers(1, 5),
    biases=st.sampled_from([0, 2]),
    cpu_sync=st.booleans(),
    reduce_first=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_size(
    kind, size, local, top_k, hidden, dtype, alignment, biases, cpu_sync, reduce_first, seed
):
    top_k = min(top_k, size * local)
    world = draw(size, local=local, top_k=top_k, hidden=hidden, dtype=dtype, seed=seed)
    options = {"biases": biases, "cpu_sync": cpu_sync, "reduce_first": reduce_first}
    check(world, kind, alignment=alignment, **options)


def test_deferred_epilogues():
    check(draw(4, top_k=3, seed=2), "v2.5", alignment=4, biases=2, deferred=True)


@pytest.mark.parametrize("expand", [False, True])
def test_scales_come_along_column_by_column(expand):
    world = draw(2, most=4, hidden=16, seed=8)

    def work(ctx, batch):
        buffer = make("v2", ctx, world)
        x = batch.x.to(torch.float8_e4m3fn)
        scales = torch.stack([batch.weights[:, 0], batch.weights[:, 1], batch.weights[:, 0]], 1)
        received, *_ = buffer.dispatch(
            (x, scales), batch.ids, num_experts=world.num_experts, do_expand=expand,
            use_tma_aligned_col_major_sf=True,
        )  # fmt: skip
        rows, recv_scales = received
        assert recv_scales.shape == (len(rows), 3)
        assert recv_scales.stride() == (1, -(-len(rows) // 4) * 4)
        sources = world.arrivals(ctx.rank)
        if expand:
            sources = [(s, t) for part in world.expert_rows(ctx.rank) for s, t, _ in part]
        for row, (source, token) in enumerate(sources):
            sender = world.batches[source]
            assert torch.equal(recv_scales[row, :2], sender.weights[token])
            assert torch.equal(rows[row].float(), sender.x[token].to(rows.dtype).float())

    run(world, work)


def test_expert_ids_of_expanded_rows():
    world = draw(2, seed=8)

    def work(ctx, batch):
        buffer = make("v2.5", ctx, world)
        *_, handle, _ = buffer.dispatch(
            batch.x, batch.ids, num_experts=world.num_experts, expert_alignment=3,
            do_expand=True, emit_expert_ids=True,
        )  # fmt: skip
        expected = []
        for expert, rows in enumerate(world.expert_rows(ctx.rank)):
            expected += [expert] * len(rows) + [-1] * (-len(rows) % 3)
        assert handle.recv_expert_ids.tolist() == expected
        assert handle.topk_idx is batch.ids

    run(world, work)


def test_handles_copy_the_ids():
    world = draw(2, seed=8)

    def work(ctx, batch):
        buffer = make("v2", ctx, world)
        for copied in (True, False):
            *_, handle, _ = buffer.dispatch(
                batch.x, batch.ids, num_experts=world.num_experts, do_handle_copy=copied
            )
            assert (handle.topk_idx is not batch.ids) == copied

    run(world, work)


WRONG = {
    "x: too many tokens": {"num_max_tokens_per_rank": 1},
    "num_experts: ranks": {"num_experts": 7},
    "topk_idx: dtype": {"topk_idx": torch.zeros(3, 2)},
    "topk_weights: shape": {"topk_weights": torch.zeros(1, 2)},
    "do_zero_padding: not expanded": {"do_zero_padding": True},
    "handle: of another call": {"handle": 3, "topk_idx": None},
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_dispatch_raises_on_all_ranks(kind, case):
    world = draw(2, most=4, seed=11)

    def work(ctx, _):
        buffer = make(kind, ctx, world)
        arguments = {
            "x": torch.ones((3, 8), dtype=torch.bfloat16),
            "topk_idx": torch.arange(6).view(3, 2),
            "topk_weights": torch.ones(3, 2),
            "num_experts": 6,
        }
        if ctx.rank == 0:
            argument = case.split(":")[0]
            with pytest.raises(ArgumentError, match=rf"Buffer\.dispatch: {argument} must"):
                buffer.dispatch(**arguments | WRONG[case])
        else:
            with pytest.raises(PeerAbortError, match="rank 0 rejected this call"):
                buffer.dispatch(**arguments)
        x, *_ = buffer.dispatch(**arguments)
        assert len(x) in (3, 4)

    run(world, work)


def test_sizes_that_differ_raise_on_all_ranks():
    world = draw(2, most=4, seed=11)

    def work(ctx, batch):
        buffer = make("v2", ctx, world)
        with pytest.raises(ArgumentError, match="num_max_tokens_per_rank must be equal"):
            buffer.dispatch(batch.x, batch.ids, num_experts=6, num_max_tokens_per_rank=8 + ctx.rank)

    run(world, work)


def test_a_wrong_combine_raises_on_all_ranks():
    world = draw(2, most=4, seed=11)

    def work(ctx, batch):
        buffer = make("v2", ctx, world)
        x, *_, handle, _ = buffer.dispatch(batch.x, batch.ids, num_experts=6)
        if ctx.rank == 0:
            with pytest.raises(ArgumentError, match=r"ElasticBuffer\.combine: x must have"):
                buffer.combine(x[1:], handle)
        else:
            with pytest.raises(PeerAbortError, match="rank 0 rejected this call"):
                buffer.combine(x, handle)
        buffer.combine(x, handle)
        buffer.barrier()

    run(world, work)


def test_the_handle_of_another_group_raises_on_all_ranks():
    alone, world, handles = draw(1, most=4, seed=11), draw(2, most=4, seed=11), []

    def dispatch_alone(ctx, batch):
        buffer = make("v2", ctx, alone)
        handles.append(buffer.dispatch(batch.x, batch.ids, num_experts=alone.num_experts)[3])

    def work(ctx, batch):
        buffer = make("v2", ctx, world)
        x, *_, handle, _ = buffer.dispatch(batch.x, batch.ids, num_experts=world.num_experts)
        for call, rows in (("combine", x), ("dispatch", batch.x)):
            if ctx.rank == 0:
                match = r"handle must come from a dispatch between 2 ranks, got one between 1"
                with pytest.raises(ArgumentError, match=match):
                    getattr(buffer, call)(rows, handle=handles[0])
            else:
                with pytest.raises(PeerAbortError, match="rank 0 rejected this call"):
                    getattr(buffer, call)(rows, handle=handle)
        buffer.combine(x, handle)

    run(alone, dispatch_alone)
    run(world, work)


def test_what_is_not_available_says_so():
    world = draw(1)

    def work(ctx, batch):
        buffer = make("v2.5", ctx, world)
        assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, 1)
        for name in ("engram_write", "pp_send", "create_agrs_session", "lb_prefetch_weights"):
            with pytest.raises(UnavailableError, match=rf"deep_ep\.EPBuffer\.{name}"):
                getattr(buffer, name)
        with pytest.raises(AttributeError, match="no attribute 'other'"):
            _ = buffer.other
        with pytest.raises(ArgumentError, match="do_handle_copy must be False"):
            buffer.dispatch(batch.x, batch.ids, num_experts=3, do_handle_copy=True)
        with pytest.raises(ArgumentError, match="without async_with_compute_stream"):
            buffer.dispatch(batch.x, batch.ids, num_experts=3, defer_epilogue=True)
        with pytest.raises(UnavailableError, match="num_cpu_bytes"):
            deep_ep.ElasticBuffer(ctx.ep_group, num_cpu_bytes=1)
        with pytest.raises(UnavailableError, match="lb_allocation_plan"):
            deep_ep.EPBuffer(ctx.ep_group, lb_allocation_plan_or_num_bytes=1)

    run(world, work)

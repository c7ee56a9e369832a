"""High-throughput calls of ``Buffer`` against loops, exactly."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from deep_ep_definition import draw, fold, run

from moe_triton import ArgumentError, MoeError, PeerAbortError, UnavailableError
from moe_triton.compat import deep_ep


def layout_of(buffer, batch, world):
    per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        batch.ids, world.num_experts
    )
    assert per_rdma_rank is None
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }


def routed(batch):
    return {"topk_idx": batch.ids, "topk_weights": batch.weights}


def check(world, *, alignment=1, biases=0, scales=False, worst=0):
    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        layout = layout_of(buffer, batch, world)
        owners = [[world.owner(e) for e in ids] for ids in batch.ids.tolist()]
        for token, ranks in enumerate(owners):
            expected = [r in ranks for r in range(world.size)]
            assert layout["is_token_in_rank"][token].tolist() == expected
        assert torch.equal(layout["num_tokens_per_rank"], layout["is_token_in_rank"].sum(0).int())
        for expert, count in enumerate(layout["num_tokens_per_expert"].tolist()):
            assert count == (batch.ids == expert).sum()

        x = (batch.x.to(torch.float8_e4m3fn), batch.weights.T.contiguous().T) if scales else batch.x
        options = {"expert_alignment": alignment, "num_worst_tokens": worst}
        recv_x, ids, weights, counts, handle, _ = buffer.dispatch(
            x, **layout, **routed(batch), **options
        )
        rows, arrivals = world.rows(ctx.rank, "x"), world.arrivals(ctx.rank)
        n = len(rows)
        if scales:
            recv_x, recv_scales = recv_x
            assert torch.equal(recv_scales[:n], world.rows(ctx.rank, "weights"))
            assert torch.equal(recv_x[:n].float(), rows.to(recv_x.dtype).float())
            recv_x = rows.clone()
            if worst:
                recv_x = torch.cat([rows, rows.new_zeros(worst - n, rows.shape[1])])
        local = world.local_ids(ctx.rank)
        assert torch.equal(recv_x[:n], rows)
        assert torch.equal(ids[:n], local)
        assert torch.equal(weights[:n], world.rows(ctx.rank, "weights").masked_fill(local < 0, 0))
        assert handle.recv_src_idx.tolist() == [token for _, token in arrivals]
        for source in range(world.size):
            earlier = sum(s <= source for s, _ in arrivals)
            assert handle.rank_prefix_matrix[source, ctx.rank] == earlier
        if worst:
            assert counts == []
            assert len(recv_x) == len(ids) == len(weights) == worst
            assert (ids[n:] == -1).all()
        else:
            aligned = [-(-int((local == e).sum()) // alignment) for e in range(world.local)]
            assert counts == [blocks * alignment for blocks in aligned]

        again, *nothing, _ = buffer.dispatch(batch.x * 2, handle=handle)
        assert torch.equal(again, rows * 2)
        assert nothing == [None] * 4

        bias = tuple(torch.randn_like(batch.x) for _ in range(biases))
        out, out_weights, _ = buffer.combine(
            recv_x, handle, topk_weights=weights, bias=bias[0] if biases == 1 else bias or None
        )
        for token, ranks in enumerate(owners):
            found = sorted({r for r in ranks if r >= 0})
            start = [b[token] for b in bias]
            expected = fold(start, [batch.x[token]] * len(found), batch.x[token])
            assert torch.equal(out[token], expected)
        assert torch.equal(out_weights, batch.weights.masked_fill(batch.ids < 0, 0))
        out, no_weights, _ = buffer.combine(recv_x, handle)
        assert no_weights is None
        assert out.shape == batch.x.shape
        buffer.destroy()

    run(world, work)


@hypothesis.given(
    size=st.sampled_from([1, 2, 4]),
    local=st.integers(1, 4),
    top_k=st.integers(1, 3),
    hidden=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    alignment=st.integers(1, 5),
    biases=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_any_size(size, local, top_k, hidden, dtype, alignment, biases, seed):
    world = draw(
        size, local=local, top_k=min(top_k, size * local), hidden=hidden, dtype=dtype, seed=seed
    )
    check(world, alignment=alignment, biases=biases)


@pytest.mark.parametrize("worst", [0, 40])
def test_float8_tokens_with_scales(worst):
    check(draw(4, seed=3), scales=True, worst=worst)


def test_rows_of_the_worst_case():
    check(draw(2, seed=5), worst=11)


def test_without_ids_the_counts_come_along():
    world = draw(2, seed=1)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        _, ids, weights, counts, _, _ = buffer.dispatch(batch.x, **layout_of(buffer, batch, world))
        assert ids is None
        assert weights is None
        local = world.local_ids(ctx.rank)
        assert counts == [int((local == e).sum()) for e in range(world.local)]

    run(world, work)


def test_sums_add_the_ranks_in_order():
    """1e8 + 1 - 1e8 depends on the order in float32."""
    world = draw(4, local=1, top_k=4, most=3, dtype=torch.float32, seed=2)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        recv_x, *_, handle, _ = buffer.dispatch(batch.x, **layout_of(buffer, batch, world))
        own = [1e8, 1.0, -1e8, 1.0][ctx.rank]
        out, _, _ = buffer.combine(torch.full_like(recv_x, own), handle)
        for token, ids in enumerate(batch.ids.tolist()):
            terms = [torch.tensor([1e8, 1.0, -1e8, 1.0][e]) for e in sorted(ids) if e >= 0]
            expected = fold([], terms, torch.tensor(0.0))
            assert (out[token] == expected).all()

    run(world, work)


# Refusals: the peers raise too, and the buffer stays usable.


def change(**values):
    return lambda arguments, batch: arguments | {k: v(batch) for k, v in values.items()}


WRONG = {
    "x: dtype": change(x=lambda b: b.x.long()),
    "x: shape": change(x=lambda b: b.x[0]),
    "topk_idx: too large": change(topk_idx=lambda b: b.ids + 99),
    "topk_idx: dtype": change(topk_idx=lambda b: b.ids.float()),
    "topk_weights: shape": change(topk_weights=lambda b: b.weights[:, :1]),
    "topk_weights: missing": change(topk_weights=lambda _: None),
    "is_token_in_rank: missing": change(is_token_in_rank=lambda _: None),
    "is_token_in_rank: shape": change(is_token_in_rank=lambda b: torch.ones(len(b.x), 7).bool()),
    "num_tokens_per_expert: experts": change(
        num_tokens_per_expert=lambda _: torch.ones(7, dtype=torch.int32)
    ),
    "expert_alignment": change(expert_alignment=lambda _: 0),
    "handle": change(handle=lambda _: (1, 2)),
    "previous_event": change(previous_event=lambda _: "event"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_dispatch_raises_on_all_ranks(case):
    world = draw(2, top_k=2, most=4, seed=11)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        arguments = {"x": batch.x, **layout_of(buffer, batch, world), **routed(batch)}
        if ctx.rank == 0:
            with pytest.raises(
                ArgumentError, match=rf"^deep_ep\.Buffer\.dispatch: {case.split(':')[0]}"
            ):
                buffer.dispatch(**WRONG[case](arguments, batch))
        else:
            with pytest.raises(PeerAbortError, match="rank 0 rejected this call"):
                buffer.dispatch(**arguments)
        recv_x, *_ = buffer.dispatch(**arguments)
        assert torch.equal(recv_x, world.rows(ctx.rank, "x"))

    run(world, work)


@pytest.mark.parametrize("case", ["x: fewer rows", "bias: shape", "topk_weights: dtype", "handle"])
def test_a_wrong_combine_raises_on_all_ranks(case):
    world = draw(2, most=4, seed=11)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        x, _, weights, _, handle, _ = buffer.dispatch(
            batch.x, **layout_of(buffer, batch, world), **routed(batch)
        )
        wrong = {
            "x: fewer rows": {"x": x[:-1], "handle": handle},
            "bias: shape": {"x": x, "handle": handle, "bias": x.new_zeros(1, 1)},
            "topk_weights: dtype": {"x": x, "handle": handle, "topk_weights": weights.int()},
            "handle": {"x": x, "handle": None},
        }
        if ctx.rank == 0:
            with pytest.raises(
                ArgumentError, match=rf"^deep_ep\.Buffer\.combine: {case.split(':')[0]}"
            ):
                buffer.combine(**wrong[case])
        else:
            with pytest.raises(PeerAbortError, match="rank 0 rejected this call"):
                buffer.combine(x, handle)
        out, _, _ = buffer.combine(x, handle)
        assert out.shape == batch.x.shape

    run(world, work)


def test_rows_beyond_the_worst_case_raise_on_all_ranks():
    world = draw(2, most=5, seed=4)
    assert min(len(world.arrivals(rank)) for rank in range(2)) > 1

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        with pytest.raises(ArgumentError, match=r"num_worst_tokens must hold the .* rows for rank"):
            buffer.dispatch(
                batch.x, **layout_of(buffer, batch, world), **routed(batch), num_worst_tokens=1
            )

    run(world, work)


def test_ranks_with_other_hidden_sizes_raise():
    world = draw(2, most=4, seed=11)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        x = batch.x[:, : 8 - ctx.rank]
        with pytest.raises(MoeError, match="row_bytes must be equal on all ranks"):
            buffer.dispatch(x, **layout_of(buffer, batch, world), **routed(batch))

    run(world, work)


def test_a_closed_buffer_raises():
    world = draw(2, most=4, seed=11)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        buffer.destroy()
        with pytest.raises(MoeError, match="is closed"):
            buffer.dispatch(batch.x, **layout_of(buffer, batch, world))

    run(world, work)


@pytest.mark.parametrize("group", [7, "no group"])
def test_a_wrong_group_raises(group):
    with pytest.raises(ArgumentError, match=r"^deep_ep\.Buffer: group must"):
        deep_ep.Buffer(group)


def test_what_is_not_available_says_so():
    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        with pytest.raises(UnavailableError, match=r"Buffer\.get_local_buffer_tensor"):
            buffer.get_local_buffer_tensor(torch.bfloat16)
        if not torch.accelerator.is_available():
            with pytest.raises(UnavailableError, match=r"Buffer\.get_comm_stream"):
                buffer.get_comm_stream()

    run(draw(1), work)
    with pytest.raises(UnavailableError, match="mpi4py"):
        deep_ep.Buffer(None, comm=object())


def test_statics():
    assert deep_ep.topk_idx_t is torch.int64
    assert deep_ep.Buffer.is_sm90_compiled()
    before = deep_ep.Buffer.num_sms
    try:
        deep_ep.Buffer.set_num_sms(24)
        assert deep_ep.Buffer.get_dispatch_config(3).num_sms == 24
        assert deep_ep.Buffer.get_combine_config(3).num_sms == 24
        with pytest.raises(ArgumentError, match="new_num_sms must be even, got 7"):
            deep_ep.Buffer.set_num_sms(7)
    finally:
        deep_ep.Buffer.set_num_sms(before)
    config = deep_ep.Config(20, 6, 256)
    assert (
        config.get_nvl_buffer_size_hint(1024, 8) == config.get_rdma_buffer_size_hint(1024, 8) == 0
    )
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(16, 512, 2, 8) > 16 * 512 * 2 * 8


def test_events():
    event = deep_ep.Buffer.capture()
    with event(release_handle=True) as same:
        assert same is event
    with pytest.raises(MoeError, match="event must have been recorded"):
        event.current_stream_wait()
    event = deep_ep.EventOverlap(deep_ep.EventHandle())
    event.register_hook_after_wait(lambda: 5)
    with pytest.raises(MoeError, match="at most one hook"):
        event.register_hook_after_wait(lambda: 6)
    assert event.current_stream_wait() == 5
    assert event.current_stream_wait() is None

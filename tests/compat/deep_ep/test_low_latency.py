"""Low-latency calls of ``Buffer`` against loops, exactly."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from deep_ep_definition import draw, fold, run

from moe_triton import ArgumentError, PeerAbortError, UnavailableError, testing
from moe_triton.compat import deep_ep
from moe_triton.ref.quantize import quantize_groups, quantize_groups_pow2

FORMATS = {
    "bf16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "rounded": {"use_fp8": True, "round_scale": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


def coded(x, name):
    """Payload and scales of tokens [n, H], as an array of bytes and what the scales are."""
    if name == "bf16":
        return x, None
    if name == "fp8":
        return quantize_groups(x, 128)
    codes, scales = quantize_groups_pow2(x, 128)
    if name == "rounded":
        return codes, scales
    exponents = scales.log2().add_(127).to(torch.uint8)
    padded = torch.nn.functional.pad(exponents, (0, -exponents.shape[1] % 4))
    return codes, padded.clone().view(torch.int32)


def check(world, name, *, hook=False, out=False, zero_copy=False):
    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group, low_latency_mode=True)
        stats = torch.ones(world.local, dtype=torch.int32)
        waits = torch.zeros(world.size, dtype=torch.int64)
        for _ in range(2):
            packed, counts, handle, _, wait = buffer.low_latency_dispatch(
                batch.x,
                batch.ids,
                world.max_tokens,
                world.num_experts,
                cumulative_local_expert_recv_stats=stats,
                dispatch_wait_recv_cost_stats=waits,
                return_recv_hook=hook,
                **FORMATS[name],
            )
            assert (wait is not None) == hook
            if hook:
                wait()
        assert (waits >= 0).all()
        x, scales = packed if isinstance(packed, tuple) else (packed, None)
        hidden, places = batch.x.shape[1], world.max_tokens * world.size
        assert x.shape == (world.local, places, hidden)
        src_info, ranges, *sizes = handle
        assert sizes == [world.max_tokens, hidden, world.num_experts]
        if scales is not None:
            groups = -(-hidden // 128)
            width = -(-groups // 4) if name == "ue8m0" else groups
            assert scales.shape == (world.local, places, width)
            assert scales.transpose(1, 2).is_contiguous()
        y = torch.full((world.local, places, hidden), float("nan"), dtype=batch.x.dtype)
        for expert, rows in enumerate(world.expert_rows(ctx.rank)):
            n = len(rows)
            assert counts[expert] == n
            assert stats[expert] == 1 + 2 * n
            assert src_info[expert, :n].tolist() == [token for _, token, _ in rows]
            begin = 0
            for source in range(world.size):
                count = sum(s == source for s, _, _ in rows)
                assert ranges[expert, source] == (begin << 32) + count
                begin += count
            if n:
                tokens = torch.stack([world.batches[s].x[t] for s, t, _ in rows])
                codes, code_scales = coded(tokens, name)
                assert torch.equal(x[expert, :n].view(torch.uint8), codes.view(torch.uint8))
                if scales is not None:
                    assert torch.equal(scales[expert, :n], code_scales)
                y[expert, :n] = tokens * (expert + 1 + ctx.rank * world.local)
        result = torch.empty_like(batch.x) if out else None
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:] = y
            y = torch.zeros_like(y)
        combined, _, wait = buffer.low_latency_combine(
            y,
            batch.ids,
            batch.weights,
            handle,
            zero_copy=zero_copy,
            return_recv_hook=hook,
            out=result,
        )
        if hook:
            wait()
        if out:
            assert combined is result
        for token, ids in enumerate(batch.ids.tolist()):
            terms = [
                (batch.x[token] * (e + 1)).float() * batch.weights[token, k]
                for k, e in enumerate(ids)
                if e >= 0
            ]
            assert torch.equal(combined[token], fold([], terms, batch.x[token]))
        buffer.destroy()

    run(world, work)


@hypothesis.given(
    name=st.sampled_from(list(FORMATS)),
    size=st.sampled_from([1, 2, 4]),
    local=st.integers(1, 3),
    top_k=st.integers(1, 3),
    hidden=st.integers(1, 600),
    hook=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_size(name, size, local, top_k, hidden, hook, seed):
    world = draw(size, local=local, top_k=min(top_k, size * local), hidden=hidden, seed=seed)
    check(world, name, hook=hook)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name):
    check(draw(4, hidden=1024, seed=1), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype):
    check(draw(2, dtype=dtype, seed=1), "bf16")


def test_results_go_where_they_are_asked_for():
    check(draw(2, seed=2), "bf16", out=True)
    check(draw(2, seed=2), "bf16", zero_copy=True, hook=True)


def test_two_operations_may_be_in_flight():
    world = draw(2, seed=7)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        common = (batch.ids, world.max_tokens, world.num_experts)
        options = {"use_fp8": False, "return_recv_hook": True}
        first, _, handle, _, wait_first = buffer.low_latency_dispatch(batch.x, *common, **options)
        second, counts, _, _, wait = buffer.low_latency_dispatch(2 * batch.x, *common, **options)
        wait_first()
        wait()
        for expert, n in enumerate(counts.tolist()):
            assert torch.equal(second[expert, :n], 2 * first[expert, :n])
        one, _, wait_one = buffer.low_latency_combine(
            first, batch.ids, batch.weights, handle, return_recv_hook=True
        )
        two, _, wait_two = buffer.low_latency_combine(
            second, batch.ids, batch.weights, handle, return_recv_hook=True
        )
        wait_one()
        wait_two()
        assert torch.equal(two, 2 * one)

    run(world, work)


def test_masked_ranks_are_left_out():
    world = draw(4, most=4, seed=6)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        status = torch.full((4,), 9, dtype=torch.int32)
        if ctx.rank != 2:
            buffer.low_latency_update_mask_buffer(2, True)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0, 0, 1, 0]
            x, counts, handle, _, _ = buffer.low_latency_dispatch(
                batch.x, batch.ids, world.max_tokens, world.num_experts, use_fp8=False
            )
            for expert, rows in enumerate(world.expert_rows(ctx.rank)):
                kept = [world.batches[s].x[t] for s, t, _ in rows if s != 2]
                assert counts[expert] == len(kept)
                if kept:
                    assert torch.equal(x[expert, : len(kept)], torch.stack(kept))
            out, _, _ = buffer.low_latency_combine(x, batch.ids, batch.weights, handle)
            for token, ids in enumerate(batch.ids.tolist()):
                terms = [
                    batch.x[token].float() * batch.weights[token, k]
                    for k, e in enumerate(ids)
                    if e >= 0 and world.owner(e) != 2
                ]
                assert torch.equal(out[token], fold([], terms, batch.x[token]))
            buffer.low_latency_clean_mask_buffer()
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0, 0, 0, 0]
        _, counts, _, _, _ = buffer.low_latency_dispatch(
            batch.x, batch.ids, world.max_tokens, world.num_experts
        )
        assert counts.tolist() == [len(rows) for rows in world.expert_rows(ctx.rank)]
        with pytest.raises(ArgumentError, match="rank_to_mask must be another of 4 ranks"):
            buffer.low_latency_update_mask_buffer(ctx.rank, True)

    run(world, work)


def test_a_lost_rank_is_masked_with_shrink(monkeypatch):
    monkeypatch.setattr(deep_ep.Buffer, "timeout_secs", 0.5)
    world = draw(3, most=4, seed=9)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group, enable_shrink=True)
        arguments = (batch.x, batch.ids, world.max_tokens, world.num_experts)
        x, _, handle, _, _ = buffer.low_latency_dispatch(*arguments, use_fp8=False)
        if ctx.rank == 1:
            return
        out, _, _ = buffer.low_latency_combine(x, batch.ids, batch.weights, handle)
        status = torch.zeros(3, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 1, 0]
        for token, ids in enumerate(batch.ids.tolist()):
            terms = [
                batch.x[token].float() * batch.weights[token, k]
                for k, e in enumerate(ids)
                if e >= 0 and world.owner(e) != 1
            ]
            assert torch.equal(out[token], fold([], terms, batch.x[token]))

    run(world, work)


WRONG = {
    "x: too many tokens": {"num_max_dispatch_tokens_per_rank": 1},
    "x: dtype": {"x": torch.zeros((3, 8), dtype=torch.int32)},
    "topk_idx: shape": {"topk_idx": torch.zeros((1, 2), dtype=torch.int64)},
    "topk_idx: too large": {"topk_idx": torch.full((3, 2), 99)},
    "num_experts: ranks": {"num_experts": 7},
    "use_ue8m0: without rounding": {"use_ue8m0": True},
    "cumulative_local_expert_recv_stats: shape": {
        "cumulative_local_expert_recv_stats": torch.zeros(9, dtype=torch.int32)
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_dispatch_raises_on_all_ranks(case):
    def work(ctx):
        buffer = deep_ep.Buffer(ctx.ep_group)
        arguments = {
            "x": torch.ones((3, 8), dtype=torch.bfloat16),
            "topk_idx": torch.arange(6).view(3, 2),
            "num_max_dispatch_tokens_per_rank": 3,
            "num_experts": 6,
        }
        if ctx.rank == 0:
            argument = case.split(":")[0]
            match = rf"^deep_ep\.Buffer\.low_latency_dispatch: {argument} must"
            with pytest.raises(ArgumentError, match=match):
                buffer.low_latency_dispatch(**arguments | WRONG[case])
        else:
            with pytest.raises(PeerAbortError, match="rank 0 rejected this call"):
                buffer.low_latency_dispatch(**arguments)
        _, counts, _, _, _ = buffer.low_latency_dispatch(**arguments)
        assert counts.tolist() == [2, 2, 2]

    testing.run_local(2, work)


def test_a_wrong_combine_raises_on_all_ranks():
    world = draw(2, most=4, seed=11)

    def work(ctx, batch):
        buffer = deep_ep.Buffer(ctx.ep_group)
        x, _, handle, _, _ = buffer.low_latency_dispatch(
            batch.x, batch.ids, world.max_tokens, world.num_experts, use_fp8=False
        )
        routing = (batch.ids, batch.weights, handle)
        match = r"^deep_ep\.Buffer\.low_latency_combine: "
        if ctx.rank == 0:
            with pytest.raises(ArgumentError, match=match + "x must have shape"):
                buffer.low_latency_combine(x[:, 1:], *routing)
            with pytest.raises(ArgumentError, match=match + "handle must"):
                buffer.low_latency_combine(x, *routing[:2], (1, 2))
        else:
            for _ in range(2):
                with pytest.raises(PeerAbortError, match="rank 0 rejected this call"):
                    buffer.low_latency_combine(x, *routing)
        with pytest.raises(UnavailableError, match="get_next_low_latency_combine_buffer"):
            buffer.low_latency_combine(x, *routing, zero_copy=True)
        buffer.clean_low_latency_buffer(1, 2, 3)

    run(world, work)

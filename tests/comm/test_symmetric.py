"""Rows read from peers' windows, and experts that write their rows in place."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from moe_triton import (
    ArgumentValueError,
    ExpertParallel,
    PeerAbortError,
    RoutingMismatchError,
    testing,
)
from moe_triton.compat import torch_npu

TOKENS, HIDDEN, EXPERTS, TOP_K = 6, 10, 4, 2


def layer(ctx, **options):
    return ExpertParallel(
        ctx.ep_group,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        max_tokens=TOKENS,
        timeout=10,
        **options,
    )


def batch(rank, seed=0):
    x = testing.tokens(TOKENS, HIDDEN, torch.bfloat16, seed=seed + rank)
    ids = testing.routing_uniform(TOKENS, EXPERTS, TOP_K, seed=seed + rank)
    return x, ids, torch.full(ids.shape, 0.5)


@pytest.mark.parametrize("world", ["local", "shm", "collective"])
def test_combining_different_dispatches_raises(world):
    """Rows of another dispatch are never read."""

    def fn(ctx):
        with layer(ctx, exact=True) as ep:
            x, _, weights = batch(ctx.rank)
            everywhere = torch.tensor([[0, 2]] * TOKENS)
            first = ep.dispatch(x, everywhere, weights)
            here = torch.tensor([[0, 1]] * TOKENS)
            second = ep.dispatch(x, here, weights)
            mine = first if ctx.rank == 0 else second
            with pytest.raises(RoutingMismatchError, match="from the same dispatch") as caught:
                ep.combine(mine.x, mine.handle)
            assert caught.value.code == 561002
            out = ep.combine(first.x, first.handle)
            assert torch.equal(out, x)

    run(world, fn)


def run(world, fn):
    if world == "local":
        return testing.run_local(2, fn)
    return testing.run_processes(2, fn, transport=world)


@pytest.mark.parametrize("world", ["local", "shm"])
def test_wrong_counts_of_a_peer_raise(world):
    """ep_send_counts that are plausible but differ from dispatch's."""

    def fn(ctx):
        x, ids, weights = batch(ctx.rank)
        arguments = (ctx.ep_group, 2, ctx.rank, EXPERTS)
        out = torch_npu.npu_moe_distribute_dispatch(x, ids, *arguments)
        expand_x, _, position_in_expert, _, counts = out[:5]
        wrong = counts.clone()
        if ctx.rank == 1:
            wrong[0] += 1 if wrong[0] < wrong[1] else -1
        combine = torch_npu.npu_moe_distribute_combine
        caught = None
        try:
            combine(expand_x, ids, position_in_expert, wrong, weights, *arguments)
        except RoutingMismatchError as error:
            caught = error
        assert torch.equal(
            combine(expand_x, ids, position_in_expert, counts, weights, *arguments), x
        )
        return caught and caught.rank

    assert run(world, fn) == [1, 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_refilled_routing_buffer_changes_nothing(dtype):
    def fn(ctx):
        with layer(ctx) as ep:
            x, ids, weights = batch(ctx.rank)
            ids = ids.to(dtype)
            received = ep.dispatch(x, ids, weights)
            ids.zero_()
            weights.zero_()
            assert torch.equal(ep.combine(received.x, received.handle), x)

    testing.run_local(2, fn)


def test_output_rows_are_sent_without_a_copy():
    def fn(ctx):
        with layer(ctx, exact=True) as ep:
            x, ids, weights = batch(ctx.rank)
            weights.requires_grad_()
            for _ in range(3):
                received = ep.dispatch(x, ids, weights)
                rows = ep.output_rows(received.handle)
                assert rows.shape == received.x.shape
                assert ep.output_rows(received.handle) is rows
                scale = torch.ones((), dtype=rows.dtype, requires_grad=True)
                with torch.no_grad():
                    rows[:] = received.x * scale
                assert torch.equal(ep.combine(rows, received.handle), x)

    testing.run_processes(2, fn, transport="shm")


def test_other_views_of_output_rows_are_copied():
    """They have the same address and other strides."""

    def fn(ctx):
        with layer(ctx, exact=True) as ep:
            x = torch.arange(TOKENS, dtype=torch.bfloat16)[:, None].expand(-1, HIDDEN).contiguous()
            ids = torch.tensor([[0, 2]] * TOKENS)
            received = ep.dispatch(x, ids)
            rows = ep.output_rows(received.handle)
            rows.copy_(received.x)
            rows[0] = 7.0
            out = ep.combine(rows[:1].expand(len(rows), -1), received.handle)
            assert (out == 14.0).all()

    testing.run_local(2, fn)


def test_output_rows_stay_valid_after_a_peer_aborted():
    def fn(ctx):
        with layer(ctx, exact=True) as ep:
            x, ids, weights = batch(ctx.rank)
            received = ep.dispatch(x, ids, weights)
            rows = ep.output_rows(received.handle)
            rows.copy_(received.x)
            if ctx.rank == 0:
                with pytest.raises(ArgumentValueError):
                    ep.combine(rows[:-1], received.handle)
            else:
                with pytest.raises(PeerAbortError):
                    ep.combine(rows, received.handle)
            assert torch.equal(ep.combine(rows, received.handle), x)

    testing.run_local(2, fn)


def test_numpy_integers_are_integers_between_processes():
    def fn(ctx):
        number = np.int64
        with ExpertParallel(
            ctx.ep_group,
            num_experts=number(EXPERTS),
            top_k=number(TOP_K),
            hidden=number(HIDDEN),
            max_tokens=number(TOKENS),
            in_flight=number(1),
            max_recv_tokens=number(24),
        ) as ep:
            x, ids, weights = batch(ctx.rank)
            received = ep.dispatch(x, ids, weights)
            assert torch.equal(ep.combine(received.x, received.handle), x)
        arguments = (ctx.ep_group, number(2), number(ctx.rank), number(EXPERTS))
        out = torch_npu.npu_moe_distribute_dispatch(x, ids, *arguments)
        assert out[0].shape[1] == HIDDEN

    testing.run_processes(2, fn, transport="shm")


def test_window_bytes_are_those_allocated():
    def fn(ctx):
        with layer(ctx, quant="int8") as ep:
            x, ids, weights = batch(ctx.rank)
            before = ep.window_bytes
            scales = torch.ones((EXPERTS, HIDDEN))
            ep.dispatch(x, ids, weights, scales=scales)
            after = ep.window_bytes
            assert after.dispatch > before.dispatch
            assert after.combine == before.combine

    testing.run_local(2, fn)


def test_an_aborted_combine_keeps_the_next_output_rows():
    """Two micro-batches: a rank aborts the first combine while the second has its output rows."""

    def fn(ctx):
        with layer(ctx, exact=True, in_flight=2) as ep:
            x, ids, weights = batch(ctx.rank)
            first, second = ep.dispatch(x, ids, weights), ep.dispatch(x, ids, weights)
            if ctx.rank == 0:
                with pytest.raises(ArgumentValueError):
                    ep.combine_setup(first.x[:-1], first.handle)
                pending = ep.combine_setup(second.x, second.handle)
            else:
                rows = ep.output_rows(first.handle)
                rows.copy_(first.x)
                refused = ep.combine_setup(rows, first.handle)
                rows = ep.output_rows(second.handle)
                rows.copy_(second.x)
                with pytest.raises(PeerAbortError):
                    ep.combine_teardown(refused)
                pending = ep.combine_setup(rows, second.handle)
            assert torch.equal(ep.combine_teardown(pending), x)

    testing.run_local(4, fn)


def test_a_dropped_object_frees_its_windows_at_once():
    """Descriptors and memory would pile up until the garbage collector finds a cycle."""

    def fn(ctx):
        sizes = {"num_experts": 4, "top_k": 2, "hidden": 16, "max_tokens": 4}
        ep = ExpertParallel(ctx.ep_group, **sizes)
        x, ids = torch.ones(4, 16).bfloat16(), torch.tensor([[0, 3], [1, 2], [2, 0], [3, 1]])
        received = ep.dispatch(x, ids, torch.ones(4, 2))
        ep.combine(received.x, received.handle)
        protocol = ep._exchange.communicator.transport("test")._protocol
        windows = [protocol._kinds[kind].windows for kind in ("dispatch", "combine")]
        windows = [weakref.ref(found) for found in windows]
        del ep, received, protocol
        return [found() for found in windows]

    gc.disable()
    try:
        assert testing.run_local(2, fn) == [[None] * 2] * 2
    finally:
        gc.enable()

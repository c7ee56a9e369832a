"""ExpertExchange: rows, experts, weights; idle ranks, growing windows, sharing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import describe, run_world

from moe_triton import UnavailableError, comm
from moe_triton.integrations.expert_rows import (
    ExpertExchange,
    Options,
    close_exchanges,
    exchange_for,
)

worlds = pytest.mark.parametrize("world", ["symmetric", "collective"])
EXPERTS, TOP_K, HIDDEN = 6, 2, 16


def factor(experts):
    """The factor of an expert."""
    return 1 + experts / 4


def inputs(count, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((count, HIDDEN), generator=generator).to(dtype)
    ids = torch.rand((count, EXPERTS), generator=generator).argsort(dim=1)[:, :TOP_K]
    return x, ids, torch.rand((count, TOP_K), generator=generator)


def layer(exchange, x, ids, weights=None, *, weighted=False):
    """Run an MoE layer; returns its output and the rows."""
    rows = exchange.dispatch(x, ids, weights)
    y = rows.x.float() * factor(rows.experts + rows.layer.local_experts.start)[:, None]
    if weighted:
        y = y * rows.weights[:, None]
    return exchange.combine(y.to(x.dtype), rows, weighted=weighted), rows


def dense(x, ids, weights=None):
    weights = torch.ones(ids.shape) if weights is None else weights.float()
    scale = (factor(ids) * weights * (ids >= 0)).sum(dim=1, keepdim=True)
    return (x.float() * scale).to(x.dtype)


def group():
    return dist.group.WORLD


@worlds
@pytest.mark.parametrize("weighted", [False, True], ids=["by combine", "by the experts"])
def test_layer_is_the_dense_one(world, weighted):
    def work(ctx):
        exchange = ExpertExchange(group(), EXPERTS, Options())
        x, ids, weights = inputs(5 + ctx.rank, ctx.rank)
        ids[0, 1] = -1  # slot without an expert
        out, rows = layer(exchange, x, ids, weights.to(torch.bfloat16), weighted=weighted)
        exchange.close()
        assert rows.weights.dtype == torch.bfloat16
        assert rows.experts.tolist() == sorted(rows.experts.tolist())
        torch.testing.assert_close(out, dense(x, ids, weights.to(torch.bfloat16)))
        return len(rows.x)

    assert sum(run_world(world, 3, work)) == (5 + 6 + 7) * TOP_K - 3


@worlds
def test_rank_without_rows_has_a_row_of_zeros(world):
    def work(ctx):
        exchange = ExpertExchange(group(), EXPERTS, Options())
        count = 0 if ctx.rank == 0 else 4  # rank 0 is idle, rank 1 has no expert that is asked for
        x, ids, weights = inputs(count, ctx.rank)
        ids = ids % 2 if ctx.rank == 0 else torch.tensor([[0, 4]] * count)
        out, rows = layer(exchange, x, ids, weights, weighted=True)
        torch.testing.assert_close(out, dense(x, ids, weights))
        exchange.close()
        return rows.x, rows.experts, rows.weights, out.shape

    (_, _, _, idle), (x, experts, weights, _), (rows, *_) = run_world(world, 3, work)
    assert idle == (0, HIDDEN)
    assert torch.equal(x, torch.zeros(1, HIDDEN))
    assert experts.tolist() == [0]
    assert weights.tolist() == [0]
    assert len(rows) == 8


@worlds
def test_windows_grow_with_the_largest_rank(world):
    def work(ctx):
        exchange = ExpertExchange(group(), EXPERTS, Options())
        layers = []
        # Only one rank outgrows the windows, and all get new ones.
        for counts in ((3, 2), (4, 1), (1, 5), (8, 0), (2, 2)):
            x, ids, weights = inputs(counts[ctx.rank], ctx.rank)
            out, rows = layer(exchange, x, ids, weights)
            torch.testing.assert_close(out, dense(x, ids, weights))
            layers.append(rows.layer)
        exchange.close()
        return [layers.index(one) for one in layers]

    assert run_world(world, 2, work) == [[0, 0, 2, 2, 2]] * 2


def test_dispatch_before_windows_grew_can_be_combined():
    def work(ctx):
        exchange = ExpertExchange(group(), EXPERTS, Options())
        x, ids, _ = inputs(2, ctx.rank)
        small = exchange.dispatch(x, ids)
        layer(exchange, *inputs(50, ctx.rank))
        out = exchange.combine(small.x, small)
        torch.testing.assert_close(out, TOP_K * x)
        exchange.close()

    run_world("symmetric", 2, work)


@worlds
@pytest.mark.parametrize("weighted", [False, True], ids=["by combine", "by the experts"])
def test_gradients_reach_tokens_weights_and_experts_on_every_rank(world, weighted):
    """Rank 0 has no token and rank 1 gets no row: both take part in the backward pass."""
    tokens = [inputs(count, seed, torch.float64) for seed, count in enumerate((0, 4, 5))]
    for x, ids, weights in tokens:
        ids[:, 0], ids[:, 1] = 0, 4  # of experts 0 to 5, two on a rank
        x.requires_grad_()
        weights.requires_grad_()

    def dense_gradients():
        factors = torch.arange(1.0, EXPERTS + 1).double().requires_grad_()
        outputs = [
            x * (factors[ids] * weights).sum(dim=1, keepdim=True) for x, ids, weights in tokens
        ]
        sum((out**2).sum() for out in outputs).backward()
        return [(x.grad, weights.grad) for x, _, weights in tokens], factors.grad

    def work(ctx):
        exchange = ExpertExchange(group(), EXPERTS, Options())
        x, ids, weights = (one.detach() for one in tokens[ctx.rank])
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        factors = torch.arange(1.0, EXPERTS + 1).double().requires_grad_()
        rows = exchange.dispatch(x, ids, weights)
        y = rows.x * factors[rows.experts + rows.layer.local_experts.start][:, None]
        if weighted:
            y = y * rows.weights[:, None]
        (exchange.combine(y, rows, weighted=weighted) ** 2).sum().backward()
        exchange.close()
        return x.grad, weights.grad, factors.grad

    results = run_world(world, 3, work)
    of_tokens, of_factors = dense_gradients()
    for (x, weights, _), expected in zip(results, of_tokens, strict=True):
        torch.testing.assert_close((x, weights.double()), (expected[0], expected[1].double()))
    torch.testing.assert_close(sum(factors for *_, factors in results), of_factors)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("quant_gradient", [None, "straight_through"])
def test_gradients_of_int8_rows(quant_gradient, weighted):
    """Raised in the backward pass, so that inference without no_grad works; or straight through."""
    options = Options(quant="int8", quant_gradient=quant_gradient)
    exchange = ExpertExchange(None, EXPERTS, options)
    x, ids, weights = inputs(2, 0, torch.float32)
    x.requires_grad_()
    rows = exchange.dispatch(x, ids, weights)
    y = 3 * rows.x * (rows.weights[:, None] if weighted else 1)
    out = exchange.combine(y, rows, weighted=weighted)
    if quant_gradient is None:
        with pytest.raises(UnavailableError, match=r"dispatch x\.detach\(\)"):
            out.sum().backward()
    else:
        out.sum().backward()
        expected = 3 * weights.sum(1, keepdim=True).expand_as(x)
        torch.testing.assert_close(x.grad, expected)


def test_more_than_max_tokens_is_refused_on_all_ranks():
    def work(ctx):
        exchange = ExpertExchange(group(), EXPERTS, Options(max_tokens=4))
        first, rows = layer(exchange, *inputs(4, ctx.rank))
        try:
            layer(exchange, *inputs(5 if ctx.rank else 1, ctx.rank))
        except Exception as error:
            results = describe(error)
        again, later = layer(exchange, *inputs(4, ctx.rank))
        assert later.layer is rows.layer
        assert torch.equal(first, again)
        exchange.close()
        return results

    peer, refusing = run_world("symmetric", 2, work)
    assert refusing["types"][0] == "ArgumentValueError"
    assert "max_tokens = 4" in refusing["text"]
    assert peer["types"][0] == "PeerAbortError"


def test_int8_rows_come_dequantised():
    def work(ctx):
        exchange = ExpertExchange(group(), EXPERTS, Options(quant="int8"))
        x, ids, _ = inputs(6, ctx.rank, torch.bfloat16)
        rows = exchange.dispatch(x, ids)
        out = exchange.combine(rows.x, rows)
        exchange.close()
        assert rows.x.dtype == torch.bfloat16
        # Half a step of int8, and the rounding of each row and of the sum.
        step = x.float().abs().amax(dim=1, keepdim=True) / 127
        error = (out.float() / TOP_K - x.float()).abs()
        assert (error <= 0.5 * step + x.float().abs() * 2**-7).all()
        assert error.any()

    run_world("symmetric", 2, work)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes_keep_their_precision(dtype):
    exchange = ExpertExchange(None, EXPERTS, Options())
    x, ids, weights = inputs(5, 0, dtype)
    rows = exchange.dispatch(x, ids, weights.to(dtype))
    assert rows.x.dtype == rows.weights.dtype == dtype
    out = exchange.combine(rows.x, rows)
    wide = torch.promote_types(dtype, torch.float32)
    expected = x.to(wide) * weights.to(dtype).to(wide).sum(dim=1, keepdim=True)
    torch.testing.assert_close(out, expected.to(dtype))


def test_alone_rows_are_grouped_by_expert():
    x, ids, weights = inputs(5, 0)
    out, rows = layer(ExpertExchange(None, EXPERTS, Options()), x, ids, weights)
    torch.testing.assert_close(out, dense(x, ids, weights))
    expected = [[token, expert] for expert in range(EXPERTS) for token in range(5)]
    expected = [pair for pair in expected if pair[1] in ids[pair[0]]]
    assert torch.equal(rows.x, x[[token for token, _ in expected]])
    assert rows.experts.tolist() == [expert for _, expert in expected]


def test_exchange_is_shared_until_the_options_or_the_group_change():
    def work(ctx):
        results = exchange_for(None, EXPERTS, Options())
        assert results is exchange_for(group(), EXPERTS, Options())
        assert results is not exchange_for(group(), EXPERTS, Options(quant="int8"))
        assert results is not exchange_for(group(), 2 * EXPERTS, Options())
        assert results is not exchange_for(dist.new_group(), EXPERTS, Options())
        close_exchanges()
        assert results is not exchange_for(group(), EXPERTS, Options())
        close_exchanges()

    run_world("symmetric", 2, work)


def test_new_group_of_the_same_name_gets_another_exchange(tmp_path):
    results = []
    for attempt in range(2):
        store = dist.FileStore(str(tmp_path / str(attempt)), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        results.append((dist.group.WORLD.group_name, exchange_for(None, EXPERTS, Options())))
        dist.destroy_process_group()
    close_exchanges()
    (first_name, first), (second_name, second) = results
    assert first_name == second_name
    assert first is not second


@pytest.mark.parametrize("close", [close_exchanges, comm.close_all], ids=["ours", "everything"])
def test_layers_continue_after_windows_were_freed(close):
    def work(ctx):
        for _ in range(2):
            x, ids, weights = inputs(3, ctx.rank)
            out, _ = layer(exchange_for(None, EXPERTS, Options()), x, ids, weights)
            torch.testing.assert_close(out, dense(x, ids, weights))
            dist.barrier()  # close only after every rank has finished
            close()
        close_exchanges()

    run_world("symmetric", 2, work)

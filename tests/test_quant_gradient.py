"""Gradients of tokens that are sent quantised: refused, or straight through the rounding."""

from __future__ import annotations

import contextlib
import dataclasses

import compilers
import harness
import pytest
import torch
from trained_layer import TrainedLayer, apply_experts, assert_gradients, dense_gradients

from moe_triton import ArgumentValueError, ExpertParallel, UnavailableError, testing

QUANTS = [
    "int8",
    "e4m3",
    "e5m2",
    "group_e4m3",
    "group_e5m2",
    "pow2_e4m3",
    "mx_e4m3",
    "mx_e5m2",
]
LAYER = TrainedLayer(tokens=(3, 2), dtype=torch.float32)
STRAIGHT = {"quant_gradient": "straight_through"}
REFUSED = r"dispatch x\.detach\(\), or construct the object with quant_gradient"


def dequantised(received):
    return received.dequantized(torch.float32)


def by_hand(received):
    return received.x.float() * received.scales[:, None]


def sums(ep, ids, matrices, x, weights, rows=dequantised):
    received = ep.dispatch(x, ids, weights)
    y = apply_experts(dataclasses.replace(received, x=rows(received)), matrices)
    return ep.combine(y, received.handle)


@contextlib.contextmanager
def refused():
    with pytest.raises(UnavailableError, match=REFUSED) as caught:
        yield
    assert "quant='" in str(caught.value)


@pytest.mark.parametrize("rows", [dequantised, by_hand])
@pytest.mark.parametrize("world", ["local", "shm", "collective"])
def test_a_backward_pass_that_reaches_the_tokens_raises(world, rows):
    """On all ranks, and the object stays usable."""

    def fn(ctx):
        with LAYER.make(ctx.ep_group, quant="int8") as ep:
            inputs = LAYER.inputs(ep.rank)
            arguments = ep, LAYER.ids(ep.rank), LAYER.matrices()[LAYER.local(ep)]
            inputs["x"].requires_grad_()
            out = sums(*arguments, **inputs, rows=rows)
            with refused():
                out.sum().backward()
            with torch.no_grad():
                return torch.equal(sums(*arguments, **inputs, rows=rows), out)

    assert harness.run_world(world, 2, fn) == [True, True]


@compilers.usual
@pytest.mark.parametrize("backend", [None, *compilers.BACKENDS])
@pytest.mark.parametrize("quant", QUANTS)
def test_one_rank_raises(quant, backend):
    layer = dataclasses.replace(LAYER, tokens=(3,))
    run = sums if backend is None else torch.compile(sums, backend=backend, fullgraph=True)
    with layer.make(None, quant=quant) as ep:
        inputs = {name: value.requires_grad_() for name, value in layer.inputs(0).items()}
        out = run(ep, layer.ids(0), layer.matrices(), **inputs)
        with refused():
            out.sum().backward()


def test_dispatch_alone_raises():
    layer = dataclasses.replace(LAYER, tokens=(3,))
    with layer.make(None, quant="e4m3") as ep:
        received = ep.dispatch(layer.inputs(0)["x"].requires_grad_(), layer.ids(0))
        with refused():
            received.dequantized().sum().backward()


@pytest.mark.parametrize("world", ["local", "shm", "collective"])
def test_straight_through_is_the_dense_gradient(world):
    """To the error of int8: experts see rounded rows, so tanh's derivative is off by their step."""
    expected = dense_gradients(LAYER)

    def fn(ctx):
        with LAYER.make(ctx.ep_group, quant="int8", **STRAIGHT) as ep:
            inputs = {k: v.requires_grad_() for k, v in LAYER.inputs(ep.rank).items()}
            matrices = LAYER.matrices()[LAYER.local(ep)].requires_grad_()
            out = sums(ep, LAYER.ids(ep.rank), matrices, **inputs)
            (out * LAYER.cotangent(ep.rank)).sum().backward()
            gradients = {name: value.grad for name, value in inputs.items()}
            return {
                "out": out.detach(),
                "matrices": matrices.grad,
                **gradients,
                "local": LAYER.local(ep),
            }

    assert_gradients(harness.run_world(world, 2, fn), expected, rtol=0.1, atol=0.1)


@compilers.usual
@pytest.mark.parametrize("backend", [None, *compilers.BACKENDS])
@pytest.mark.parametrize("steps", ["cpu", "interpret"])
@pytest.mark.parametrize("quant", QUANTS)
def test_straight_through_leaves_out_the_rounding(quant, steps, backend, monkeypatch):
    """Experts that multiply by 3 and weights of 0.5 and 0.25: 3 * 0.75, whatever the format."""
    monkeypatch.setenv("MOE_TRITON_BACKEND", steps)
    options = {"num_experts": 4, "top_k": 2, "hidden": 64, "max_tokens": 3, "alignment": 2}

    def forward(ep, x, weights):
        received = ep.dispatch(x, torch.tensor([[0, 1], [2, 3], [1, 2]]), weights)
        return ep.combine(3 * received.dequantized(torch.float32), received.handle)

    run = forward
    if backend is not None:
        run = torch.compile(forward, backend=backend, fullgraph=True)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.tensor([[0.5, 0.25]]).repeat(3, 1).requires_grad_()
    with ExpertParallel(None, **options, dtype=torch.float32, quant=quant, **STRAIGHT) as ep:
        run(ep, x, weights).sum().backward()
        assert torch.equal(x.grad, torch.full((3, 64), 2.25))
        received = ep.dispatch(x.detach(), torch.tensor([[0, 1], [2, 3], [1, 2]]))
        rows = received.dequantized(torch.float32)[: int(received.offsets[0])]
        # Expert 0 has row 0, whose sum over 3 times its elements is the gradient of its weight.
        expected = 3 * rows[0].sum()
    torch.testing.assert_close(weights.grad[0, 0], expected)


def test_a_rank_without_rows_takes_part():
    def fn(ctx):
        with LAYER.make(ctx.ep_group, quant="int8", **STRAIGHT) as ep:
            x = LAYER.inputs(ep.rank)["x"].requires_grad_()
            received = ep.dispatch(x, torch.tensor([[0, 1]] * len(x)))
            y = torch.zeros(received.x.shape)
            if ep.rank == 0:
                y = 3 * received.dequantized(torch.float32)
            ep.combine(y, received.handle).sum().backward()
            return x.grad

    for x_grad in testing.run_local(2, fn):
        assert torch.equal(x_grad, torch.full_like(x_grad, 6.0))


def test_straight_through_of_rows_dequantised_by_hand_raises():
    layer = dataclasses.replace(LAYER, tokens=(3,))
    with layer.make(None, quant="int8", **STRAIGHT) as ep:
        inputs = {name: value.requires_grad_() for name, value in layer.inputs(0).items()}
        out = sums(ep, layer.ids(0), layer.matrices(), **inputs, rows=by_hand)
        with pytest.raises(UnavailableError, match=r"come through Dispatched\.dequantized\(\)"):
            out.sum().backward()


@pytest.mark.parametrize(
    "options, text",
    [
        ({"quant": "int8", "quant_gradient": "ste"}, "\"straight_through\", got 'ste'"),
        (STRAIGHT, "without scales per row, got 'straight_through' with quant=None"),
        ({"quant": "int8_static", **STRAIGHT}, "with quant='int8_static'"),
    ],
)
def test_arguments(options, text):
    with pytest.raises(ArgumentValueError, match=text):
        LAYER.make(None, **options)


def test_factors_are_refused():
    """The gradient would have to be multiplied by them."""
    with LAYER.make(None, quant="int8", **STRAIGHT) as ep:
        factors = torch.ones(LAYER.num_experts, LAYER.hidden)
        with pytest.raises(ArgumentValueError, match="scales must be None with quant_gradient"):
            ep.dispatch(LAYER.inputs(0)["x"], LAYER.ids(0), scales=factors)

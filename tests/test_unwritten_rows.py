"""Gradients enabled: rows after the last one, their scales and their weights are zeros."""

from __future__ import annotations

import dataclasses

import compilers
import harness
import pytest
import torch
from trained_layer import TrainedLayer, apply_experts, dense_gradients

from moe_triton import ExpertParallel, testing

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
LAYERS = {
    "a token a rank": TrainedLayer(tokens=(1, 1)),
    "aligned": TrainedLayer(tokens=(3, 2), options=(("alignment", 4),)),
}


def sums(ep, ids, matrices, x, weights):
    received = ep.dispatch(x, ids, weights)
    return ep.combine(apply_experts(received, matrices), received.handle)


def expert_gradients(layer, ep, forward=sums):
    """Gradients of this rank's matrices, while tokens and router are frozen."""
    matrices = layer.matrices()[layer.local(ep)].requires_grad_()
    out = forward(ep, layer.ids(ep.rank), matrices, **layer.inputs(ep.rank))
    (out * layer.cotangent(ep.rank)).sum().backward()
    return matrices.grad


@pytest.mark.parametrize("world", ["local", "shm", "collective"])
@pytest.mark.parametrize("name", LAYERS)
def test_only_experts_train(name, world):
    """Every row goes through the experts, as in one batched product."""
    layer = LAYERS[name]

    def fn(ctx):
        return expert_gradients(layer, layer.make(ctx.ep_group))

    got = torch.cat(harness.run_world(world, 2, fn))
    torch.testing.assert_close(got, dense_gradients(layer)[0]["matrices"])


@compilers.usual
@pytest.mark.parametrize("backend", [None, *compilers.BACKENDS])
def test_only_experts_train_on_one_rank(backend):
    layer = dataclasses.replace(LAYERS["aligned"], tokens=(3,))
    run = sums if backend is None else torch.compile(sums, backend=backend, fullgraph=True)
    with layer.make(None) as ep:
        got = expert_gradients(layer, ep, run)
    torch.testing.assert_close(got, dense_gradients(layer)[0]["matrices"])


def received_bytes(received):
    tensors = received.x, received.scales, received.weights
    return [t.reshape(len(t), -1).view(torch.uint8).clone() for t in tensors if t is not None]


@pytest.mark.parametrize("steps", ["cpu", "interpret"])
@pytest.mark.parametrize("quant", [None, *QUANTS])
def test_rows_scales_and_weights_are_zeros(quant, steps, monkeypatch):
    monkeypatch.setenv("MOE_TRITON_BACKEND", steps)

    def fn(ctx):
        options = {"num_experts": 4, "top_k": 2, "hidden": 64, "max_tokens": 3, "alignment": 2}
        with ExpertParallel(ctx.ep_group, **options, dtype=torch.float32, quant=quant) as ep:
            x = torch.full((1, 64), 3.0)
            received = ep.dispatch(x, torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]]))
            return int(received.offsets[-1]), received_bytes(received)

    for last, tensors in testing.run_local(2, fn):
        assert last == 2
        assert len(tensors) == (2 if quant is None else 3)
        for rows in tensors:
            assert len(rows) > last
            assert rows[:last].any() and not rows[last:].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_clears_nothing(mode, monkeypatch):
    """Decided by the mode, at no cost in inference."""
    with LAYERS["aligned"].make(None) as ep, mode():
        inputs, ids = LAYERS["aligned"].inputs(0), LAYERS["aligned"].ids(0)
        pending = ep.dispatch_setup(inputs["x"], ids, inputs["weights"])
        monkeypatch.setattr(ep._exchange._steps, "zero_padding", None)
        assert not ep.dispatch_teardown(pending).x.requires_grad


@compilers.usual
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("needs", ["x", "weights", None])
@pytest.mark.parametrize("quant", QUANTS)
def test_quantised_dispatch_outside_no_grad(quant, needs, backend):
    """The forward pass runs, whichever input requires gradients."""
    options = {"num_experts": 4, "top_k": 2, "hidden": 64, "max_tokens": 3}
    inputs = {"x": torch.full((3, 64), 2.0), "weights": torch.full((3, 2), 0.25)}
    if needs is not None:
        inputs[needs].requires_grad_()

    def forward(ep, x, weights):
        received = ep.dispatch(x, torch.tensor([[0, 1], [2, 3], [1, 2]]), weights)
        return ep.combine(received.dequantized(torch.float32), received.handle)

    run = forward
    if backend is not None:
        run = torch.compile(forward, backend=backend, fullgraph=True)
    with ExpertParallel(None, **options, dtype=torch.float32, quant=quant) as ep:
        out = run(ep, **inputs)
        # 2 has a code of its own in all formats but int8, where 127 steps of 2 / 127 come close.
        torch.testing.assert_close(out.detach(), torch.ones(3, 64))
        if needs == "weights":
            out.sum().backward()
            torch.testing.assert_close(inputs["weights"].grad, torch.full((3, 2), 128.0))


@pytest.mark.parametrize("steps", ["cpu", "interpret"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("quant", [None, *QUANTS])
def test_no_rows(quant, exact, steps, monkeypatch):
    """An aligned layer of one rank that has no tokens."""
    monkeypatch.setenv("MOE_TRITON_BACKEND", steps)
    options = {"num_experts": 4, "top_k": 2, "hidden": 64, "max_tokens": 0, "alignment": 4}
    with ExpertParallel(None, **options, dtype=torch.float32, quant=quant, exact=exact) as ep:
        x = torch.zeros(0, 64).requires_grad_()
        received = ep.dispatch(x, torch.zeros(0, 2, dtype=torch.int64))
        assert received.offsets.tolist() == [0] * 4
        out = ep.combine(torch.zeros(received.x.shape), received.handle)
        assert out.shape == (0, 64)

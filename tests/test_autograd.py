"""Gradients of ExpertParallel: finite differences, a dense layer, unusual uses, edge cases."""

from __future__ import annotations

import dataclasses
import gc

import harness
import pytest
import torch
from trained_layer import (
    TrainedLayer,
    apply_experts,
    assert_gradients,
    dense,
    dense_gradients,
    in_halves,
    over_ranks,
    rank_gradients,
)

from moe_triton import ArgumentMismatchError, ArgumentValueError, testing

LAYERS = {
    "plain": TrainedLayer(),
    "unweighted": TrainedLayer(weighted=False),
    "addend": TrainedLayer(addend=True),
    "ids of -1": TrainedLayer(nowhere=True, addend=True),
    "aligned": TrainedLayer(options=(("alignment", 4),)),
    "exact": TrainedLayer(options=(("exact", True),)),
    "unequal, one idle": TrainedLayer(tokens=(5, 0, 3), num_experts=6),
    "shared expert": TrainedLayer(
        tokens=(4, 4, 4), shared_experts=1, shared_ranks=1, nowhere=True, addend=True
    ),
    "two replicas of a shared expert": TrainedLayer(
        tokens=(3, 2, 3, 1), shared_experts=1, shared_ranks=2, options=(("alignment", 3),)
    ),
}
# Both sides add the same numbers in float64, in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


# By finite differences.


@pytest.mark.parametrize("name", ["plain", "unweighted", "ids of -1", "aligned"])
def test_gradcheck_alone(name):
    layer = dataclasses.replace(LAYERS[name], tokens=(5,))
    with layer.make(None) as ep:
        inputs = {k: v.requires_grad_() for k, v in layer.inputs(0).items()}
        matrices = layer.matrices().requires_grad_()

        def forward(matrices, *values):
            named = dict(zip(inputs, values, strict=True))
            return over_ranks(ep, layer.ids(0), matrices, **named)

        assert torch.autograd.gradcheck(forward, (matrices, *inputs.values()))


@pytest.mark.parametrize("name", ["plain", "shared expert"])
def test_finite_differences_on_several_ranks(name):
    """Along random directions, in which the inputs of all ranks change together."""
    layer, step, directions = LAYERS[name], 1e-5, 6

    def fn(ctx):
        ep = layer.make(ctx.ep_group)
        gradients = rank_gradients(layer, ep)
        inputs = layer.inputs(ep.rank)
        matrices = layer.matrices()[layer.local(ep)]
        random = torch.Generator().manual_seed(ep.rank)
        analytic, numeric = [], []
        for _ in range(directions):
            change = {
                name: torch.randn(value.shape, generator=random, dtype=value.dtype)
                for name, value in {**inputs, "matrices": matrices}.items()
            }
            analytic.append(sum((gradients[name] * change[name]).sum() for name in change))

            def loss(size, change=change):
                changed = {name: inputs[name] + size * change[name] for name in inputs}
                local = matrices + size * change["matrices"]
                out = over_ranks(ep, layer.ids(ep.rank), local, **changed)
                return (out * layer.cotangent(ep.rank)).sum()

            numeric.append((loss(step) - loss(-step)) / (2 * step))
        return torch.stack(analytic), torch.stack(numeric)

    # The loss is the sum of those of all ranks.
    analytic, numeric = map(sum, zip(*testing.run_local(len(layer.tokens), fn), strict=True))
    # The errors of the step's curvature and of rounding are about 1e-9.
    torch.testing.assert_close(analytic, numeric, rtol=1e-7, atol=1e-7)


# Against a dense layer.


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_a_dense_layer(name):
    layer = LAYERS[name]
    got = testing.run_local(
        len(layer.tokens), lambda ctx: rank_gradients(layer, layer.make(ctx.ep_group))
    )
    assert_gradients(got, dense_gradients(layer), **EXACT)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_gradients_in_processes(world):
    layers = [LAYERS["unequal, one idle"], LAYERS["shared expert"]]

    def fn(ctx):
        return [rank_gradients(layer, layer.make(ctx.ep_group)) for layer in layers]

    for layer, got in zip(layers, zip(*harness.run_world(world, 3, fn), strict=True), strict=True):
        assert_gradients(got, dense_gradients(layer), **EXACT)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        # Everything is computed in float32.
        (torch.float32, {"rtol": 1e-5, "atol": 1e-5}),
        # A few roundings, each of half a unit in the last place: 2**-12 and 2**-9 relative.
        (torch.float16, {"rtol": 1e-2, "atol": 1e-2}),
        (torch.bfloat16, {"rtol": 5e-2, "atol": 5e-2}),
    ],
    ids=["float32", "float16", "bfloat16"],
)
def test_gradients_have_the_dtype_of_their_tensors(dtype, tolerance):
    layer = TrainedLayer(dtype=dtype, addend=True, tokens=(4, 3))
    got = testing.run_local(2, lambda ctx: rank_gradients(layer, layer.make(ctx.ep_group)))
    assert got[0]["x"].dtype == got[0]["addend"].dtype == dtype
    assert got[0]["weights"].dtype == torch.float32
    assert_gradients(got, dense_gradients(layer), **tolerance)


# Uses of a layer.


def through_own_weights(ep, ids, matrices, x, weights):
    """The experts apply the weights, and combine only sums."""
    received = ep.dispatch(x, ids, weights)
    y = apply_experts(received, matrices) * received.weights[:, None]
    return ep.combine(y, received.handle.unweighted())


def combined_twice(ep, ids, matrices, x, weights):
    """One handle, two combines: 3 times the rows minus 2 times the rows."""
    received = ep.dispatch(x, ids, weights)
    y = apply_experts(received, matrices)
    return ep.combine(3 * y, received.handle) - ep.combine(2 * y, received.handle)


def in_the_combine_buffer(ep, ids, matrices, x, weights):
    """The outputs lie in the zero-copy buffer, which the next combine overwrites."""
    received = ep.dispatch(x, ids, weights)
    y = apply_experts(received, matrices)
    rows = ep.output_rows(received.handle)
    rows.copy_(y[: len(rows)])
    out = ep.combine(rows, received.handle)
    other = ep.dispatch(x.detach(), ids)
    ep.combine(torch.zeros_like(other.x), other.handle)
    return out


def with_more_rows(ep, ids, matrices, x, weights):
    """Combine takes more rows than dispatch delivered."""
    received = ep.dispatch(x, ids, weights)
    y = apply_experts(received, matrices)
    return ep.combine(torch.cat([y, y]), received.handle)


def with_as_many_rows(ep, ids, matrices, x, weights):
    received = ep.dispatch(x, ids, weights)
    y = apply_experts(received, matrices)
    return ep.combine(y[: int(received.num_tokens)], received.handle)


def with_garbage_after_the_rows(ep, ids, matrices, x, weights):
    """An expert's output of unwritten rows is ignored."""
    received = ep.dispatch(x, ids, weights)
    y = apply_experts(received, matrices)
    real = torch.arange(len(y)) < received.num_tokens
    return ep.combine(y.where(real[:, None], float("nan")), received.handle)


@pytest.mark.parametrize(
    "forward",
    [
        in_halves,
        through_own_weights,
        combined_twice,
        in_the_combine_buffer,
        with_more_rows,
        with_as_many_rows,
        with_garbage_after_the_rows,
    ],
    ids=lambda forward: forward.__name__,
)
def test_uses_of_a_layer(forward):
    layer = LAYERS["plain"]

    def fn(ctx):
        return rank_gradients(layer, layer.make(ctx.ep_group, in_flight=2), forward)

    assert_gradients(testing.run_local(2, fn), dense_gradients(layer), **EXACT)


def test_two_layers_share_an_object():
    """The backward of the second layer runs between the forward of the first and its backward."""
    layer = LAYERS["plain"]

    def twice(ep, ids, matrices, x, weights):
        return over_ranks(ep, ids, matrices, over_ranks(ep, ids, matrices, x, weights), weights)

    got = testing.run_local(2, lambda ctx: rank_gradients(layer, layer.make(ctx.ep_group), twice))

    def dense_twice(layer, ids, matrices, x, weights):
        return dense(layer, ids, matrices, dense(layer, ids, matrices, x, weights), weights)

    assert_gradients(got, dense_gradients(layer, forward=dense_twice), **EXACT)


@pytest.mark.parametrize("weighted", ["by combine", "by the experts"])
def test_a_rank_whose_experts_receive_no_row_takes_part(weighted):
    """Its outputs need not depend on its received rows."""
    layer = TrainedLayer(tokens=(3, 3), num_experts=2, top_k=1)

    def fn(ctx):
        ep = layer.make(ctx.ep_group)
        inputs = {name: value.requires_grad_() for name, value in layer.inputs(ep.rank).items()}
        matrix = layer.matrices()[:1].requires_grad_()
        received = ep.dispatch(inputs["x"], torch.zeros(3, 1, dtype=torch.int64), inputs["weights"])
        y, handle = torch.zeros_like(received.x), received.handle
        if ep.rank == 0:
            y = apply_experts(received, matrix)
        if weighted == "by the experts":
            handle = handle.unweighted()
            y = y * received.weights.detach()[:, None] if ep.rank else y * received.weights[:, None]
        out = ep.combine(y, handle)
        (out * layer.cotangent(ep.rank)).sum().backward()
        return out.detach(), inputs["x"].grad, inputs["weights"].grad

    for rank, (out, x_grad, weights_grad) in enumerate(testing.run_local(2, fn)):
        inputs = {name: value.requires_grad_() for name, value in layer.inputs(rank).items()}
        expected = (inputs["x"] @ layer.matrices()[0]).tanh() * inputs["weights"]
        (expected * layer.cotangent(rank)).sum().backward()
        torch.testing.assert_close(out, expected.detach(), **EXACT)
        torch.testing.assert_close(x_grad, inputs["x"].grad, **EXACT)
        torch.testing.assert_close(weights_grad, inputs["weights"].grad, **EXACT)


def test_weights_have_gradients_where_rows_are_quantised():
    layer = TrainedLayer(dtype=torch.bfloat16, options=(("quant", "int8"),))

    def fn(ctx):
        ep = layer.make(ctx.ep_group)
        inputs = {name: value.requires_grad_() for name, value in layer.inputs(ep.rank).items()}
        received = ep.dispatch(inputs["x"].detach(), layer.ids(ep.rank), inputs["weights"])
        assert not received.x.requires_grad and not received.scales.requires_grad
        y = (received.x.float() * received.scales[:, None]).bfloat16().requires_grad_()
        (ep.combine(y, received.handle) * layer.cotangent(ep.rank)).sum().backward()
        return inputs["weights"].grad, inputs["x"].grad, y.grad

    for rank, (weights_grad, x_grad, y_grad) in enumerate(testing.run_local(2, fn)):
        x, cotangent = layer.inputs(rank)["x"].float(), layer.cotangent(rank).float()
        # Every expert returns its row, so that all weights of a token have the same gradient. The
        # row returns with an error of half a step of its int8 scale, and of bfloat16.
        expected = (x * cotangent).sum(1, keepdim=True).expand(-1, layer.top_k)
        torch.testing.assert_close(weights_grad, expected, rtol=0.05, atol=0.1)
        assert x_grad is None
        assert torch.isfinite(y_grad).all() and y_grad.any()


# With and without gradients.


def test_unwritten_rows_are_zeros():
    layer = LAYERS["plain"]

    def fn(ctx):
        ep = layer.make(ctx.ep_group)
        x, ids = layer.inputs(ep.rank)["x"].requires_grad_(), layer.ids(ep.rank)
        received = ep.dispatch(x, ids, layer.inputs(ep.rank)["weights"])
        unwritten = slice(int(received.num_tokens), None)
        return received.x[unwritten].detach(), received.weights[unwritten].detach()

    for rows, weights in testing.run_local(2, fn):
        assert len(rows) > 0
        assert not rows.any() and not weights.any()


def test_no_gradients_unless_required():
    layer = LAYERS["plain"]
    with layer.make(None) as ep:
        inputs = layer.inputs(0)
        matrices = layer.matrices()
        assert not over_ranks(ep, layer.ids(0), matrices, **inputs).requires_grad
        inputs["x"].requires_grad_()
        with torch.no_grad():
            assert not over_ranks(ep, layer.ids(0), matrices, **inputs).requires_grad
        with torch.inference_mode():
            assert not over_ranks(ep, layer.ids(0), matrices, **inputs).requires_grad
        assert over_ranks(ep, layer.ids(0), matrices, **inputs).requires_grad


def only_dispatched(ep, ids, matrices, x):
    return ep.dispatch(x, ids).x


def only_combined(ep, ids, matrices, x):
    received = ep.dispatch(x.detach(), ids)
    return ep.combine(received.x * x.sum(), received.handle)


@pytest.mark.parametrize("forward", [only_dispatched, only_combined, over_ranks])
def test_the_object_lives_until_the_backward(forward):
    layer = LAYERS["plain"]
    x = layer.inputs(0)["x"].requires_grad_()
    out = forward(layer.make(None), layer.ids(0), layer.matrices(), x)
    gc.collect()
    out.sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("trained", ["experts", "router"])
def test_combine_saves_rows_for_the_gradient_of_the_weights_alone(trained):
    layer = dataclasses.replace(LAYERS["plain"], tokens=(5,))
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with layer.make(None) as ep:
        inputs = layer.inputs(0)
        if trained == "router":
            inputs = {name: value.requires_grad_() for name, value in inputs.items()}
        recv = ep.dispatch(inputs["x"], layer.ids(0), inputs["weights"])
        y = recv.x.detach().clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = ep.combine(y, recv.handle)
        assert any(tensor.shape == y.shape for tensor in saved) == (trained == "router")
        out.sum().backward()
    weights = recv.handle.row_weights[: len(y)].detach()
    assert torch.equal(y.grad, weights[:, None].to(y.dtype).expand_as(y))


def test_a_loss_that_is_a_sum():
    """Its gradient is one number, expanded."""
    layer = LAYERS["plain"]

    def fn(ctx):
        ep = layer.make(ctx.ep_group)
        inputs = {name: value.requires_grad_() for name, value in layer.inputs(ep.rank).items()}
        received = ep.dispatch(inputs["x"], layer.ids(ep.rank), inputs["weights"])
        out = ep.combine(received.x, received.handle)
        (out.sum() + received.x.sum() + received.weights.sum()).backward()
        return inputs["x"].grad, inputs["weights"].grad

    for rank, (x_grad, weights_grad) in enumerate(testing.run_local(2, fn)):
        x, weights = (layer.inputs(rank)[name] for name in ("x", "weights"))
        expected = (weights.sum(1, keepdim=True) + layer.top_k).expand_as(x)
        torch.testing.assert_close(x_grad, expected, **EXACT)
        expected = (x.sum(1, keepdim=True) + 1).expand_as(weights)
        torch.testing.assert_close(weights_grad, expected, **EXACT)


def test_backward_voids_the_combine_buffer():
    layer = LAYERS["plain"]

    def fn(ctx):
        ep = layer.make(ctx.ep_group)
        x, ids = layer.inputs(ep.rank)["x"].requires_grad_(), layer.ids(ep.rank)
        first, second = ep.dispatch(x, ids), ep.dispatch(x, ids)
        rows = ep.output_rows(second.handle)
        first.x.sum().backward()
        with pytest.raises(ArgumentValueError, match="output_rows"):
            ep.combine(rows, second.handle)

    testing.run_local(2, fn)


def test_no_second_derivatives():
    layer = LAYERS["plain"]
    with layer.make(None) as ep:
        inputs = {name: value.requires_grad_() for name, value in layer.inputs(0).items()}
        out = over_ranks(ep, layer.ids(0), layer.matrices(), **inputs)
        (gradient,) = torch.autograd.grad(out.sum(), inputs["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_a_backward_on_one_rank_alone_is_a_mismatch():
    layer = LAYERS["plain"]

    def fn(ctx):
        ep = layer.make(ctx.ep_group)
        inputs = {name: value.requires_grad_() for name, value in layer.inputs(ep.rank).items()}
        out = over_ranks(ep, layer.ids(ep.rank), layer.matrices()[layer.local(ep)], **inputs)
        try:
            if ep.rank == 0:
                out.sum().backward()
            else:
                ep.dispatch(layer.inputs(1)["x"], layer.ids(1))
        except ArgumentMismatchError as error:
            return error.argument
        return None

    assert testing.run_local(2, fn) == ["gradient", "gradient"]

"""ExpertParallel under ``torch.compile(fullgraph=True)``: same bits, same order, and training."""

from __future__ import annotations

import dataclasses
import functools
import gc
import threading

import compilers
import harness
import pytest
import torch
import torch.distributed as dist
from trained_layer import (
    TrainedLayer,
    apply_experts,
    dense,
    in_halves,
    over_ranks,
    rank_gradients,
)

from moe_triton import (
    ArgumentTypeError,
    ArgumentValueError,
    MoeError,
    PeerAbortError,
    SequenceError,
    UnavailableError,
    testing,
)
from moe_triton.expert_parallel.exchange import Exchange

pytestmark = compilers.MARKS
backends = pytest.mark.parametrize("backend", compilers.BACKENDS)

ALONE = TrainedLayer(tokens=(5,))
LAYERS = {
    "plain": ALONE,
    "unweighted": dataclasses.replace(ALONE, weighted=False),
    "aligned": dataclasses.replace(
        ALONE, nowhere=True, addend=True, options=(("alignment", 4), ("counts_dtype", torch.int32))
    ),
}
# The compiler sums and multiplies in another order, in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def outputs(ep, dtype, x, ids, weights):
    """The results of dispatch and combine, around experts that multiply by -2."""
    received = ep.dispatch(x, ids, weights)
    y = received.x
    if received.scales is not None:
        y = (y.float() * received.scales[:, None]).to(dtype)
    written = torch.arange(len(y)) < received.offsets[-1]
    return (
        received.x.where(written[:, None], 0),
        None if received.weights is None else received.weights.where(written, 0),
        received.tokens_per_expert,
        received.offsets,
        received.num_tokens,
        ep.combine(-2 * y, received.handle, shared_expert_x=x),
    )


@backends
@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_eager_bits(name, quant, backend):
    layer = dataclasses.replace(LAYERS[name], dtype=torch.bfloat16)
    with layer.make(None, quant=quant) as ep:
        inputs = layer.inputs(0)
        arguments = inputs["x"], layer.ids(0), inputs.get("weights")
        run = functools.partial(outputs, ep, layer.dtype)
        compiled = torch.compile(run, backend=backend, fullgraph=True)
        for _ in range(2):  # the second call compiles nothing
            for got, expected in zip(compiled(*arguments), run(*arguments), strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=0)


@backends
@pytest.mark.parametrize("name", LAYERS)
def test_the_eager_gradients(name, backend):
    layer = LAYERS[name]
    with layer.make(None) as ep:
        expected = rank_gradients(layer, ep)
        compiled = torch.compile(over_ranks, backend=backend, fullgraph=True)
        for _ in range(2):
            got = rank_gradients(layer, ep, compiled)
            for key in expected.keys() - {"local"}:
                torch.testing.assert_close(got[key], expected[key], **CLOSE, msg=key)


def test_gradients_of_quantised_layers():
    """The weights have gradients; the tokens have none."""
    layer = dataclasses.replace(ALONE, dtype=torch.float32, options=(("quant", "int8"),))

    def forward(ep, ids, matrices, x, weights):
        received = ep.dispatch(x.detach(), ids, weights)
        y = (received.x.float() * received.scales[:, None]) * matrices.mean()
        return ep.combine(y, received.handle)

    with layer.make(None) as ep:
        expected = rank_gradients(layer, ep, forward)
        compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
        got = rank_gradients(layer, ep, compiled)
    assert got["x"] is expected["x"] is None
    for key in ("weights", "matrices", "out"):
        torch.testing.assert_close(got[key], expected[key], msg=key)
        assert got[key].any()


@backends
def test_setup_and_teardown(backend):
    with ALONE.make(None, in_flight=2) as ep:
        expected = rank_gradients(ALONE, ep, in_halves)
        compiled = torch.compile(in_halves, backend=backend, fullgraph=True)
        got = rank_gradients(ALONE, ep, compiled)
        for key in expected.keys() - {"local"}:
            torch.testing.assert_close(got[key], expected[key], **CLOSE, msg=key)


@backends
def test_all_operations_run_in_the_eager_order(backend, monkeypatch):
    """Forward and backward, with two independent branches and a layer without use."""
    issued = []
    for name in ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv"):
        record(monkeypatch, issued, name, lambda x, *rest: name_of(x))
    record(monkeypatch, issued, "send_gradients", lambda gradient, *rest: tuple(gradient.shape))
    record(monkeypatch, issued, "return_gradients", lambda rows, *rest: tuple(rows.shape))

    def branches(ep, ids, matrices, x, weights):
        first = over_ranks(ep, ids, matrices, x, weights)
        over_ranks(ep, ids, matrices, x, weights)  # unused, and equal to the first
        second = over_ranks(ep, ids[:3], matrices, x[:3], weights[:3])
        return first + torch.nn.functional.pad(second, (0, 0, 0, len(x) - 3))

    with ALONE.make(None) as ep:
        rank_gradients(ALONE, ep, branches)
        expected = issued.copy()
        compiled = torch.compile(branches, backend=backend, fullgraph=True)
        for _ in range(2):
            issued.clear()
            rank_gradients(ALONE, ep, compiled)
            assert issued == expected
    assert len(expected) == 3 * 4 + 2 * 2


def name_of(value) -> object:
    return tuple(value.shape) if torch.is_tensor(value) else "operation"


def record(monkeypatch, issued, name, describe) -> None:
    method = getattr(Exchange, name)

    def recorded(self, *args, **options):
        issued.append((name, describe(*args)))
        return method(self, *args, **options)

    monkeypatch.setattr(Exchange, name, recorded)


# Compiled and eager code together.


def test_a_handle_from_compiled_code():
    """Eager code can use it, also after the caller overwrites its routing."""
    with ALONE.make(None) as ep:
        inputs, ids = ALONE.inputs(0), ALONE.ids(0).int()
        expected = over_ranks(ep, ids, ALONE.matrices(), **inputs)
        dispatch = torch.compile(ep.dispatch, backend="aot_eager", fullgraph=True)
        received = dispatch(inputs["x"], ids, inputs["weights"])
        ids.zero_()
        inputs["weights"].zero_()
        rows = ep.output_rows(received.handle)
        rows.copy_(apply_experts(received, ALONE.matrices())[: len(rows)])
        out = ep.combine(rows, received.handle)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_pending_operations_from_compiled_code():
    """Eager code can tear them down, once."""
    with ALONE.make(None) as ep:
        inputs, ids = ALONE.inputs(0), ALONE.ids(0)
        expected = over_ranks(ep, ids, ALONE.matrices(), **inputs)
        start, go_on = (
            torch.compile(setup, backend="aot_eager", fullgraph=True)
            for setup in (ep.dispatch_setup, ep.combine_setup)
        )
        dispatching = start(inputs["x"], ids, inputs["weights"])
        received = ep.dispatch_teardown(dispatching)
        combining = go_on(apply_experts(received, ALONE.matrices()), received.handle)
        torch.testing.assert_close(ep.combine_teardown(combining), expected, rtol=0, atol=0)
        for teardown, pending in (
            (ep.dispatch_teardown, dispatching),
            (ep.combine_teardown, combining),
        ):
            with pytest.raises(SequenceError, match="torn down once"):
                teardown(pending)
        over_ranks(ep, ids, ALONE.matrices(), **inputs)


def test_errors_are_the_same():
    with ALONE.make(None) as ep:
        inputs, ids = ALONE.inputs(0), ALONE.ids(0)
        compiled = torch.compile(ep.dispatch, backend="aot_eager", fullgraph=True)
        for error, x, wrong in (
            (ArgumentValueError, inputs["x"], ids + 100),
            (ArgumentValueError, inputs["x"][:3], ids),
            (ArgumentTypeError, inputs["x"].float(), ids),
        ):
            with pytest.raises(error) as caught:
                compiled(x, wrong)
            with pytest.raises(error) as eager:
                ep.dispatch(x, wrong)
            assert str(caught.value) == str(eager.value)
        received = compiled(inputs["x"], ids)
        assert received.num_tokens == ids.numel()
        with ALONE.make(None) as other:
            combine = torch.compile(other.combine, backend="aot_eager", fullgraph=True)
            with pytest.raises(ArgumentValueError, match="come from a dispatch of this object"):
                combine(received.x, received.handle)


def test_exact_rows_cannot_be_compiled(monkeypatch):
    """The peers abort, although they are neither exact nor compiled."""
    compiled = threading.local()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: hasattr(compiled, "here"))
    layer = TrainedLayer()

    def fn(ctx):
        ep = layer.make(ctx.ep_group, exact=ctx.rank == 0)
        if ctx.rank == 0:
            compiled.here = True
        with pytest.raises([UnavailableError, PeerAbortError][ctx.rank], match="exact"):
            ep.dispatch(layer.inputs(ctx.rank)["x"], layer.ids(ctx.rank))

    testing.run_local(2, fn)


# Registered ops.


def calls_of(ep, monkeypatch) -> list[tuple]:
    """The ops of a layer, forward and backward, with their arguments."""
    layer = dataclasses.replace(ALONE, addend=True)
    with monkeypatch.context() as patch, compilers.Recorded() as recorded:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        rank_gradients(layer, ep)
    return recorded.calls


def test_opcheck(monkeypatch):
    """Teardowns are left out: each call needs a setup of its own, and opcheck calls many times."""
    checked = set()
    with ALONE.make(None, in_flight=64) as ep:
        # Setups come last, since the operations that they leave in flight would block the others.
        calls = sorted(calls_of(ep, monkeypatch), key=lambda call: call[0].name().endswith("setup"))
        for op, args, kwargs in calls:
            name = op.name().removeprefix("moe_triton::expert_parallel_")
            if name.endswith("teardown"):
                continue
            utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
            if not name.endswith("setup"):  # its number differs from call to call
                utilities += ("test_aot_dispatch_dynamic",)
            torch.library.opcheck(op, args, kwargs, test_utils=utilities)
            checked.add(name)
    assert checked == {"dispatch_setup", "combine_setup", "send_gradients", "return_gradients"}


def test_an_error_names_a_deleted_object(monkeypatch):
    op, args, kwargs = calls_of(ALONE.make(None), monkeypatch)[0]
    gc.collect()
    with pytest.raises(MoeError, match="must be alive, got one that was deleted"):
        op(*args, **kwargs)


# A model.

STEPS, TOKENS, HIDDEN, EXPERTS, TOP_K = 20, 8, 12, 4, 2


class Model(torch.nn.Module):
    """A linear layer and two MoE layers, each on top of its input.

    Args:
        moe: the MoE layer, a function of ids, matrices, tokens and weights.
        local: the experts of this rank.
    """

    def __init__(self, moe, local: slice) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(5)

        def draw(*shape):
            return torch.randn(shape, generator=random) / HIDDEN**0.5

        self.moe = moe
        self.first = torch.nn.Parameter(draw(HIDDEN, HIDDEN))
        self.gates = torch.nn.Parameter(draw(2, HIDDEN, EXPERTS))
        experts = draw(2, EXPERTS, HIDDEN, HIDDEN)
        self.experts = torch.nn.Parameter(experts[:, local].clone())

    def forward(self, x, target) -> torch.Tensor:
        """The squared error of the outputs."""
        h = (x @ self.first).relu()
        for gate, matrices in zip(self.gates, self.experts, strict=True):
            weights, ids = torch.topk((h @ gate).softmax(1), TOP_K)
            h = h + self.moe(ids, matrices, h, weights)
        return ((h - target) ** 2).sum()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of both ranks and their targets; the same tokens every other step."""
    random = torch.Generator().manual_seed(step % 2)
    x = torch.randn(2 * TOKENS, HIDDEN, generator=random)
    return x, x.roll(1, dims=1)


def train(model, forward, reduce, local: slice) -> list[float]:
    """The losses of 20 steps; ``reduce`` sums over the ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for step in range(STEPS):
        x, target = (part[local] for part in batch(step))
        optimizer.zero_grad()
        loss = forward(x, target) / (2 * TOKENS)
        loss.backward()
        # The gradients of a rank's experts cover the tokens of all ranks, the others do not.
        for shared in (model.first.grad, model.gates.grad):
            reduce(shared)
        optimizer.step()
        losses.append(loss.detach())
        reduce(losses[-1])
    return torch.stack(losses)


@compilers.needed
def test_a_compiled_model_trains_like_the_dense_one():
    layer = TrainedLayer(
        tokens=(TOKENS, TOKENS),
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        dtype=torch.float32,
    )

    def fn(ctx):
        torch.set_num_threads(1)
        losses = []
        for backend in ("aot_eager", "inductor"):
            with layer.make(dist.group.WORLD) as ep:
                model = Model(functools.partial(over_ranks, ep), layer.local(ep))
                compiled = torch.compile(model, backend=backend, fullgraph=True)
                tokens = slice(TOKENS * ep.rank, TOKENS * (ep.rank + 1))
                losses.append(train(model, compiled, dist.all_reduce, tokens))
        return losses

    model = Model(functools.partial(dense, layer), slice(None))
    expected = train(model, model, lambda _: None, slice(None))
    assert expected[-1] < 0.5 * expected[0]
    for losses in harness.run_world("symmetric", 2, fn, limit=240):
        for got in losses:
            # float32 sums in another order, over 20 steps.
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)

"""ExpertParallel: the layer it computes, micro-batches, zero-copy buffers, random sequences."""

from __future__ import annotations

import dataclasses
import time

import definition
import harness
import pytest
import torch
from expert_layer import LARGER, LAYERS, Layer, error_of, make, run_experts
from harness import run_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_triton import ExpertParallel, MoeError

worlds = pytest.mark.parametrize("world", harness.WORLDS)


@pytest.mark.parametrize("name", [*LAYERS, *LARGER])
def test_a_layer_in_threads(name):
    layer = (LAYERS | LARGER)[name]

    def fn(ctx):
        with make(ctx, **layer.options()) as ep:
            assert ep.transport == "local"
            assert ep.local_experts == (range(0) if ep.is_shared_rank else layer.numbers(ep.rank))
            assert ep.num_local_experts == len(layer.numbers(ep.rank))
            for seed in range(3):
                layer.check(ep, seed)

    run_world("local", layer.world, fn)


@pytest.mark.parametrize("world", ["shm", "collective"])
def test_layers_in_processes(world):
    """All in one world, each with an object of its own."""

    def fn(ctx):
        for layer in LAYERS.values():
            with make(ctx, **layer.options()) as ep:
                assert ep.transport == world
                for seed in range(3):
                    layer.check(ep, seed)

    run_world(world, 3, fn, limit=240)  # all layers, also on kernels that are interpreted


@pytest.mark.parametrize("name", ["W 5, NS 2, R 2", "W 5, S 2"])
@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_larger_layers_in_processes(world, name):
    def fn(ctx):
        with make(ctx, **LARGER[name].options()) as ep:
            LARGER[name].check(ep)

    run_world(world, 5, fn)


@pytest.mark.parametrize("name", [name for name in LAYERS if not LAYERS[name].shared_ranks])
def test_a_layer_on_one_rank_alone(name):
    """Without torch.distributed, and without windows."""
    layer = LAYERS[name]
    layer = dataclasses.replace(layer, world=1, tokens=(max(layer.tokens),))
    if layer.max_recv_tokens is not None:
        layer = dataclasses.replace(layer, max_recv_tokens=2)
    with ExpertParallel(**layer.options()) as ep:
        assert (ep.rank, ep.world_size, ep.transport) == (0, 1, "single")
        assert ep.window_bytes.total == 0
        for seed in range(2):
            layer.check(ep, seed)
        ep.check()
        ep.recover()
        layer.check(ep)


def test_received_rows():
    """Rows by (local expert, source, flat position), with their weights and counts."""
    layer = Layer(tokens=(5, 0, 7), routing="zipf")
    group = definition.Group(3, 6, 2, 24)
    inputs = [layer.inputs(rank) for rank in range(3)]
    expected = definition.dispatch(
        group,
        [
            definition.Tokens(
                definition.to_bits(batch["x"]),
                batch["topk_ids"].numpy(),
                batch["topk_weights"].numpy(),
            )
            for batch in inputs
        ],
    )

    def fn(ctx):
        results = []
        for exact in (False, True):
            with make(ctx, exact=exact) as ep:
                results.append((ep.capacity, ep.dispatch(**inputs[ctx.rank])))
        return results

    for rank, results in enumerate(run_world("local", 3, fn)):
        rows = len(expected[rank].rows)
        for exact, (capacity, received) in zip((False, True), results, strict=True):
            assert capacity == 7 * 3 * 2
            assert len(received.x) == (rows if exact else capacity)
            assert received.scales is None
            assert received.num_tokens.dtype == torch.int32
            assert received.num_tokens.shape == ()
            assert int(received.num_tokens) == rows
            definition.same_bits(received.x[:rows], expected[rank].expand_x, "x")
            definition.same_bits(received.weights[:rows], expected[rank].expand_scales, "weights")
            assert received.tokens_per_expert.dtype == torch.int64
            assert received.tokens_per_expert.tolist() == expected[rank].token_nums


def test_weights_on_some_ranks_only():
    """A rank without weights receives none, and its tokens have the weight 1 in the sum."""
    weighted, unweighted = Layer(), Layer(weighted=False)

    def fn(ctx):
        layer = weighted if ctx.rank == 1 else unweighted
        with make(ctx) as ep:
            layer.check(ep)
            received = ep.dispatch(**layer.inputs(ctx.rank))
            return None if received.weights is None else received.weights[: received.num_tokens]

    weights = run_world("local", 3, fn)
    assert weights[0] is None
    assert weights[2] is None
    ids = [weighted.inputs(rank)["topk_ids"].flatten() for rank in range(3)]
    own = weighted.inputs(1)["topk_weights"].flatten()
    expected = []
    for number in weighted.numbers(1):
        for rank in range(3):
            slots = (ids[rank] == number).nonzero()[:, 0]
            expected += own[slots].tolist() if rank == 1 else [1.0] * len(slots)
    assert weights[1].tolist() == expected


@worlds
def test_a_handle_is_good_for_many_combines(world):
    layer = Layer()

    def fn(ctx):
        inputs = [layer.inputs(ctx.rank, seed) for seed in range(2)]
        expected = [layer.dense(batch, None) for batch in inputs]
        with make(ctx) as ep:
            batches = [ep.dispatch(**batch) for batch in inputs]
            for received, out in list(zip(batches, expected, strict=True)) * 2:
                y = run_experts(ep, received, layer.numbers(ctx.rank), layer.dtype)
                assert torch.equal(ep.combine(y, received.handle), out)
                assert torch.equal(ep.combine(y[: received.num_tokens], received.handle), out)

    run_world(world, 3, fn)


@worlds
@pytest.mark.parametrize("quant", [None, "int8"])
def test_micro_batches(world, quant):
    """Setup A, setup B, teardown A, combine A, ...: equal to one after the other, to the bit."""
    layer = Layer(quant=quant, routing="zipf", tokens=(7, 0, 5))
    batches = 6

    def fn(ctx):
        numbers = layer.numbers(ctx.rank)
        inputs = [layer.inputs(ctx.rank, seed) for seed in range(batches)]
        with make(ctx, **layer.options()) as ep:
            expected = [layer.forward(ep, batch) for batch in inputs]
        with make(ctx, **layer.options(), in_flight=2) as ep:
            results = []
            dispatches = [ep.dispatch_setup(**inputs[0])]
            combines = []
            for seed in range(batches):
                if seed + 1 < batches:
                    dispatches.append(ep.dispatch_setup(**inputs[seed + 1]))
                received = ep.dispatch_teardown(dispatches.pop(0))
                y = run_experts(ep, received, numbers, layer.dtype)
                combines.append(ep.combine_setup(y, received.handle))
                if len(combines) == 2:
                    results.append(ep.combine_teardown(combines.pop(0)))
            results.append(ep.combine_teardown(combines.pop(0)))
        return [torch.equal(a, b) for a, b in zip(results, expected, strict=True)]

    assert run_world(world, 3, fn) == [[True] * batches] * 3


# The zero-copy combine buffer.


@worlds
def test_experts_write_to_the_combine_buffer(world):
    layer = Layer(routing="zipf")

    def fn(ctx):
        numbers = layer.numbers(ctx.rank)
        with make(ctx, in_flight=2) as ep:
            for seed in range(5):
                inputs = layer.inputs(ctx.rank, seed)
                received = ep.dispatch(**inputs)
                rows = ep.output_rows(received.handle)
                assert rows.shape == received.x.shape == (ep.capacity, layer.hidden)
                assert rows.dtype == layer.dtype
                rows.fill_(float("nan"))
                run_experts(ep, received, numbers, layer.dtype, out=rows)
                out = ep.combine(rows, received.handle)
                assert torch.equal(out, layer.dense(inputs, None))

    run_world(world, 3, fn)


@worlds
@pytest.mark.parametrize("exact", [False, True])
def test_the_combine_buffer_has_the_shape_of_the_received_rows(world, exact):
    """So that an elementwise expert can write to it; a handle without weights has the same."""
    layer = Layer()

    def fn(ctx):
        with make(ctx, exact=exact) as ep:
            for _ in range(3):
                received = ep.dispatch(**layer.inputs(ctx.rank))
                for handle in (received.handle, received.handle.unweighted()):
                    wanted = ep.combine(received.x * 2, handle)
                    rows = torch.mul(received.x, 2, out=ep.output_rows(received.handle))
                    assert torch.equal(ep.combine(rows, handle), wanted)

    run_world(world, 3, fn)


@worlds
def test_combine_buffers_of_two_batches(world):
    layer = Layer()

    def fn(ctx):
        numbers = layer.numbers(ctx.rank)
        inputs = [layer.inputs(ctx.rank, seed) for seed in range(2)]
        with make(ctx, in_flight=2) as ep:
            for _ in range(4):
                batches = [ep.dispatch(**batch) for batch in inputs]
                buffers = [ep.output_rows(received.handle) for received in batches]
                pending = []
                for received, rows in zip(batches, buffers, strict=True):
                    run_experts(ep, received, numbers, layer.dtype, out=rows)
                    pending.append(ep.combine_setup(rows, received.handle))
                for batch, operation in zip(inputs, pending, strict=True):
                    assert torch.equal(ep.combine_teardown(operation), layer.dense(batch, None))

    run_world(world, 3, fn)


@worlds
def test_a_combine_buffer_is_void_after_another_combine(world):
    layer = Layer()

    def fn(ctx):
        numbers = layer.numbers(ctx.rank)
        with make(ctx) as ep:
            inputs = layer.inputs(ctx.rank)
            received = ep.dispatch(**inputs)
            rows = run_experts(
                ep, received, numbers, layer.dtype, out=ep.output_rows(received.handle)
            )
            error_of(ep.combine, rows, None)
            assert torch.equal(ep.combine(rows, received.handle), layer.dense(inputs, None))
            # Collectives have no such buffer: there the rows are ordinary memory, and stay valid.
            other = ep.dispatch(**layer.inputs(ctx.rank, seed=1))
            rows = run_experts(ep, other, numbers, layer.dtype, out=ep.output_rows(other.handle))
            y = run_experts(ep, received, numbers, layer.dtype)
            assert torch.equal(ep.combine(y, received.handle), layer.dense(inputs, None))
            try:
                actual = ep.combine(rows, other.handle)
                assert torch.equal(actual, layer.dense(layer.inputs(ctx.rank, seed=1), None))
                text = None
            except MoeError as error:
                text = str(error)
            layer.check(ep)
        return text

    for text in run_world(world, 3, fn):
        if world == "collective":
            assert text is None
        else:
            assert "y must not be output_rows() from before another combine" in text


# Random sequences of calls.

some_ranks = st.sampled_from([(), (), (), (0,), (1,), (2,), (0, 2), (0, 1, 2)]).map(frozenset)


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer on all ranks, with possible faults on some of them."""

    seed: int
    smooth: bool
    heavy: bool  # above max_recv_tokens on some rank
    unlike: frozenset[int]  # ranks that pass scales where the others do not, or the reverse
    bad_dispatch: frozenset[int]
    bad_combine: frozenset[int]
    in_place: frozenset[int]
    delays: tuple[float, float, float]


delays = st.sampled_from([0, 0, 0.002])
steps = st.builds(
    Step,
    seed=st.integers(0, 50),
    smooth=st.sampled_from([False, False, True]),
    heavy=st.sampled_from([False, False, False, True]),
    unlike=st.sampled_from([(), (), (), (1,), (0, 2)]).map(frozenset),
    bad_dispatch=some_ranks,
    bad_combine=some_ranks,
    in_place=some_ranks,
    delays=st.tuples(delays, delays, delays),
)


def take(ep: ExpertParallel, step: Step) -> str:
    """Run the step on one rank; returns its end."""
    time.sleep(step.delays[ep.rank])
    smooth = step.smooth != (ep.rank in step.unlike)
    routing = "hot" if step.heavy else "uniform"
    tokens = (7, 7, 7) if step.heavy else (3, 0, 2)
    layer = Layer(quant="int8", smooth=smooth, routing=routing, tokens=tokens)
    inputs = layer.inputs(ep.rank, step.seed)
    try:
        if ep.rank in step.bad_dispatch:
            ep.dispatch(**inputs | {"x": None})
        received = ep.dispatch(**inputs)
    except MoeError as error:
        return f"dispatch: {type(error).__name__}"
    out = None
    if ep.rank in step.in_place:
        out = ep.output_rows(received.handle)
    y = run_experts(ep, received, layer.numbers(ep.rank), layer.dtype, out=out)
    try:
        if ep.rank in step.bad_combine:
            ep.combine(y, None)
        out = ep.combine(y, received.handle)
    except MoeError as error:
        return f"combine: {type(error).__name__}"
    assert torch.equal(out, layer.dense(inputs, None)), f"{step} on rank {ep.rank}"
    return "exact"


def may_end(step: Step, rank: int) -> set[str]:
    """Possible ends of a step on a rank: of several faults, any may come first."""
    if rank in step.bad_dispatch:
        return {"dispatch: MissingArgumentError"}
    ends = set()
    if step.bad_dispatch:
        ends.add("dispatch: PeerAbortError")
    if step.unlike:
        ends.add("dispatch: ArgumentMismatchError")
    if ends:
        return ends
    if step.heavy:
        return {"dispatch: ReceiveOverflowError"}
    if rank in step.bad_combine:
        return {"combine: MissingArgumentError"}
    return {"combine: PeerAbortError"} if step.bad_combine else {"exact"}


def check_sequence(world: str, sequence: list[Step]) -> None:
    def fn(ctx):
        with make(ctx, quant="int8", max_recv_tokens=14) as ep:
            return [take(ep, step) for step in sequence]

    for rank, ends in enumerate(run_world(world, 3, fn)):
        for number, (step, end) in enumerate(zip(sequence, ends, strict=True)):
            assert end in may_end(step, rank), f"rank {rank}, step {number}: {end}, {step}"


@settings(suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=1, max_size=15))
def test_any_sequence_of_calls(sequence):
    check_sequence("local", sequence)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_any_sequence_of_calls_in_processes(world):
    @settings(max_examples=3, suppress_health_check=list(HealthCheck))
    @given(st.lists(steps, min_size=40, max_size=40))
    def run(sequence):
        check_sequence(world, sequence)

    run()

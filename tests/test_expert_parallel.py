"""ExpertParallel: the layer it makes, halves in flight, limits, refusals, life and death.

A layer is compared with one that has no ranks: its experts work element by element, so that the
result is the same to the bit whatever rows they get together.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import definition
import harness
import numpy as np
import pytest
import torch
from definition_numbers import ROW_DTYPES
from harness import run_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_triton import (
    ArgumentMismatchError,
    ArgumentTypeError,
    ArgumentValueError,
    BrokenGroupError,
    ExpertParallel,
    MissingArgumentError,
    MoeError,
    PeerAbortError,
    ReceiveOverflowError,
    SequenceError,
    UnavailableError,
    testing,
    window_bytes,
)
from moe_triton.comm.local import LocalMemory

worlds = pytest.mark.parametrize("world", harness.WORLDS)
SIZES = {"num_experts": 6, "top_k": 2, "hidden": 24, "max_tokens": 7}
AT_ONCE = 5.0  # seconds, far below the 30 s that a silent peer is waited for


def make(ctx, **options) -> ExpertParallel:
    return ExpertParallel(ctx.ep_group, rank=ctx.ep_rank, **{**SIZES, **options})


def expert(x: torch.Tensor, number: int) -> torch.Tensor:
    """What an expert does; shared experts have the numbers after the routed ones."""
    return (x.float() * (1 + number / 8) + number / 4).to(x.dtype)


def run_experts(ep: ExpertParallel, received, numbers, dtype, *, out=None) -> torch.Tensor:
    """The outputs of this rank's experts; the rows of nobody are poisoned."""
    if out is None:
        out = torch.full(received.x.shape, float("nan"), dtype=dtype)
    start = 0
    for number, count in zip(numbers, received.tokens_per_expert.tolist(), strict=True):
        rows = slice(start, start + count)
        x = received.x[rows]
        if x.dtype != dtype:
            scales = received.scales
            x = dequantised(x, None if scales is None else scales[rows]).to(dtype)
        out[rows] = expert(x, number)
        start += count
    assert start == int(received.num_tokens)
    return out


# What definition.quantise calls them: quant_mode and rows.
QUANTS = {
    "int8_static": (1, "int8"),
    "int8": (2, "int8"),
    "e4m3": (2, "e4m3"),
    "e5m2": (2, "e5m2"),
    "group_e4m3": (3, "e4m3"),
    "group_e5m2": (3, "e5m2"),
    "mx_e4m3": (4, "e4m3"),
    "mx_e5m2": (4, "e5m2"),
}


def dequantised(codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """float32 values of [n, H] codes with one scale a row, or one for so many elements."""
    if scales is None:
        return codes.float()
    if scales.dim() == 1:
        return codes.float() * scales[:, None]
    block = 32 if scales.dtype == torch.float8_e8m0fnu else 128
    return codes.float() * scales.float().repeat_interleave(block, 1)[:, : codes.shape[1]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of a layer, what each rank brings, and what comes of it without any ranks."""

    world: int = 3
    num_experts: int = 6
    top_k: int = 2
    hidden: int = 24
    tokens: tuple[int, ...] = (7, 7, 7)
    max_tokens: int = 7
    dtype: torch.dtype = torch.bfloat16
    quant: str | None = None
    smooth: bool = False
    shared_experts: int = 0
    shared_ranks: int = 0
    exact: bool = False
    routing: str = "uniform"
    weighted: bool = True
    id_dtype: torch.dtype = torch.int32
    addend: bool = False
    max_recv_tokens: int | None = None

    def options(self) -> dict[str, Any]:
        names = ("num_experts", "top_k", "hidden", "max_tokens", "dtype", "quant")
        names += ("shared_experts", "shared_ranks", "exact", "max_recv_tokens")
        return {name: getattr(self, name) for name in names}

    def numbers(self, rank: int) -> range:
        """The experts on ``rank``."""
        if rank < self.shared_ranks:
            first = self.num_experts + rank // (self.shared_ranks // self.shared_experts)
            return range(first, first + 1)
        local = self.num_experts // (self.world - self.shared_ranks)
        first = (rank - self.shared_ranks) * local
        return range(first, first + local)

    def inputs(self, rank: int, seed: int = 0) -> dict[str, Any]:
        """Arguments of dispatch."""
        count, seed = self.tokens[rank], 100 * seed + rank
        draw = getattr(testing, f"routing_{self.routing}")
        ids = draw(count, self.num_experts, self.top_k, seed=seed).to(self.id_dtype)
        weights = testing.weights(count, self.top_k, seed=seed)
        found = {
            "x": testing.tokens(count, self.hidden, self.dtype, seed=seed),
            "topk_ids": ids,
            "topk_weights": weights if self.weighted else None,
        }
        if self.smooth:
            rows = self.shared_experts + self.num_experts
            found["scales"] = 0.5 + testing.weights(rows, self.hidden, seed=seed)
        return found

    def rows_of(self, inputs, token: int, number: int) -> torch.Tensor:
        """[1, H] the token as expert ``number`` gets it."""
        x = inputs["x"][token]
        if self.quant is None:
            return x[None]
        smooth = inputs.get("scales")
        if smooth is not None:
            first = number - self.num_experts
            row = first if first >= 0 else self.shared_experts + number
            smooth = smooth[row].numpy()
        mode, rows = QUANTS[self.quant]
        codes, scales = definition.quantise(x.float().numpy(), smooth, mode, rows)
        codes = torch.from_numpy(codes)[None].view(ROW_DTYPES[rows])
        if scales is not None:
            scales = torch.from_numpy(np.array(scales)[None])
            scales = scales.view(torch.float8_e8m0fnu) if mode == 4 else scales
        return dequantised(codes, scales).to(self.dtype)

    def dense(self, inputs, addend: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty_like(inputs["x"])
        shared = range(self.num_experts, self.num_experts + self.shared_experts)
        for token, ids in enumerate(inputs["topk_ids"].tolist()):
            total = torch.zeros(self.hidden)
            for slot, number in enumerate(ids):
                y = expert(self.rows_of(inputs, token, number), number)[0].float()
                weights = inputs["topk_weights"]
                total = total + (y if weights is None else y * weights[token, slot])
            for number in shared if self.shared_ranks else ():
                total = total + expert(self.rows_of(inputs, token, number), number)[0].float()
            if addend is not None:
                total = total + addend[token].float()
            out[token] = total.to(self.dtype)
        return out

    def forward(self, ep: ExpertParallel, inputs, addend=None) -> torch.Tensor:
        received = ep.dispatch(**inputs)
        y = run_experts(ep, received, self.numbers(ep.rank), self.dtype)
        return ep.combine(y, received.handle, shared_expert_x=addend)

    def check(self, ep: ExpertParallel, seed: int = 0) -> None:
        """One layer on one rank equals the dense one."""
        inputs = self.inputs(ep.rank, seed)
        addend = testing.tokens(len(inputs["x"]), self.hidden, self.dtype, seed=seed + 7)
        addend = addend if self.addend else None
        before = {name: value if value is None else value.clone() for name, value in inputs.items()}
        out = self.forward(ep, inputs, addend)
        assert out.dtype == self.dtype
        assert torch.equal(out, self.dense(inputs, addend)), f"layer {self}"
        for name, value in before.items():
            assert value is None or torch.equal(inputs[name], value), f"{name} was changed"


LAYERS = {
    "bf16": Layer(),
    "fp16": Layer(dtype=torch.float16),
    "shared_expert_x": Layer(addend=True),
    "no weights": Layer(weighted=False, addend=True),
    "int64 ids": Layer(id_dtype=torch.int64),
    "int8 with scales": Layer(quant="int8", smooth=True),
    "int8": Layer(quant="int8"),
    **{name: Layer(quant=name, hidden=130) for name in QUANTS if not name.startswith("int8")},
    "int8_static": Layer(quant="int8_static", smooth=True, shared_experts=1, shared_ranks=1),
    "group_e5m2 with scales": Layer(quant="group_e5m2", hidden=129, smooth=True, exact=True),
    "odd sizes": Layer(hidden=1, num_experts=3, top_k=3),
    "exact": Layer(exact=True),
    "hot": Layer(routing="hot", tokens=(7, 7, 7)),
    "skewed": Layer(routing="zipf", num_experts=12, top_k=5),
    "all experts": Layer(top_k=6),
    "one idle rank": Layer(tokens=(7, 0, 4)),
    "idle but one": Layer(tokens=(0, 0, 1)),
    "all idle": Layer(tokens=(0, 0, 0), addend=True),
    "all idle, exact": Layer(tokens=(0, 0, 0), exact=True),
    "no tokens at all": Layer(tokens=(0, 0, 0), max_tokens=0),
    "limit": Layer(tokens=(1, 1, 1), max_recv_tokens=6),
    "one shared rank": Layer(shared_experts=1, shared_ranks=1, addend=True),
    "two shared ranks, one routed": Layer(shared_experts=1, shared_ranks=2, tokens=(3, 7, 5)),
    "two shared experts, one routed": Layer(shared_experts=2, shared_ranks=2, quant="int8"),
    "shared, scales, idle": Layer(
        shared_experts=1, shared_ranks=1, quant="int8", smooth=True, tokens=(0, 7, 2), exact=True
    ),
}
LARGER = {
    "W 5, NS 2, R 2": Layer(world=5, tokens=(3, 1, 0, 5, 2), shared_experts=2, shared_ranks=4),
    "W 5, S 2": Layer(
        world=5, tokens=(4, 4, 4, 4, 4), shared_experts=1, shared_ranks=2, quant="int8"
    ),
    "W 4, NS 3": Layer(world=4, tokens=(1, 2, 3, 4), shared_experts=3, shared_ranks=3, exact=True),
    "W 6": Layer(world=6, tokens=(1, 2, 3, 4, 5, 6), num_experts=12, top_k=4, routing="zipf"),
}


@pytest.mark.parametrize("name", [*LAYERS, *LARGER])
def test_a_layer_in_threads(name):
    layer = (LAYERS | LARGER)[name]

    def fn(ctx):
        with make(ctx, **layer.options()) as ep:
            assert ep.transport == "symmetric"
            assert ep.local_experts == (range(0) if ep.is_shared_rank else layer.numbers(ep.rank))
            assert ep.num_local_experts == len(layer.numbers(ep.rank))
            for seed in range(3):
                layer.check(ep, seed)

    run_world("local", layer.world, fn)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_layers_in_processes(world):
    """One after the other in one world, each with an object of its own."""

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


def test_what_a_rank_receives():
    """Rows by (local expert, source, flat position), with their weights and counts."""
    layer = Layer(tokens=(5, 0, 7), routing="zipf")
    group = definition.Group(3, 6, 2, 24)
    inputs = [layer.inputs(rank) for rank in range(3)]
    expected = definition.dispatch(
        group,
        [
            definition.Tokens(
                definition.to_bits(one["x"]),
                one["topk_ids"].numpy(),
                one["topk_weights"].numpy(),
            )
            for one in inputs
        ],
    )

    def fn(ctx):
        found = []
        for exact in (False, True):
            with make(ctx, exact=exact) as ep:
                found.append((ep.capacity, ep.dispatch(**inputs[ctx.rank])))
        return found

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
    """A rank that gives none gets none, and its tokens have the weight 1 in the sum."""
    given, none = Layer(), Layer(weighted=False)

    def fn(ctx):
        mine = given if ctx.rank == 1 else none
        with make(ctx) as ep:
            mine.check(ep)
            received = ep.dispatch(**mine.inputs(ctx.rank))
            return None if received.weights is None else received.weights[: received.num_tokens]

    weights = run_world("local", 3, fn)
    assert weights[0] is None
    assert weights[2] is None
    ids = [given.inputs(rank)["topk_ids"].flatten() for rank in range(3)]
    own = given.inputs(1)["topk_weights"].flatten()
    expected = []
    for number in given.numbers(1):
        for rank in range(3):
            places = (ids[rank] == number).nonzero()[:, 0]
            expected += own[places].tolist() if rank == 1 else [1.0] * len(places)
    assert weights[1].tolist() == expected


@worlds
def test_a_handle_is_good_for_many_combines(world):
    layer = Layer()

    def fn(ctx):
        inputs = [layer.inputs(ctx.rank, seed) for seed in range(2)]
        expected = [layer.dense(one, None) for one in inputs]
        with make(ctx) as ep:
            received = [ep.dispatch(**one) for one in inputs]
            for one, out in list(zip(received, expected, strict=True)) * 2:
                y = run_experts(ep, one, layer.numbers(ctx.rank), layer.dtype)
                assert torch.equal(ep.combine(y, one.handle), out)
                assert torch.equal(ep.combine(y[: one.num_tokens], one.handle), out)

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
            expected = [layer.forward(ep, one) for one in inputs]
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


@worlds
@pytest.mark.parametrize("in_flight", [1, 3])
def test_halves_in_the_wrong_order(world, in_flight):
    layer = Layer()

    def fn(ctx):
        errors = []
        with make(ctx, in_flight=in_flight) as ep:
            inputs = layer.inputs(ctx.rank)
            pending = [ep.dispatch_setup(**inputs) for _ in range(in_flight)]
            errors.append(error_of(ep.dispatch_setup, **inputs))
            if in_flight > 1:
                errors.append(error_of(ep.dispatch_teardown, pending[1]))
            received = [ep.dispatch_teardown(one) for one in pending]
            errors.append(error_of(ep.dispatch_teardown, pending[0]))
            y = run_experts(ep, received[0], layer.numbers(ctx.rank), layer.dtype)
            pending = [ep.combine_setup(y, received[0].handle) for _ in range(in_flight)]
            errors.append(error_of(ep.combine_setup, y, received[0].handle))
            if in_flight > 1:
                errors.append(error_of(ep.combine_teardown, pending[1]))
            for one in pending:
                assert torch.equal(ep.combine_teardown(one), layer.dense(inputs, None))
            errors.append(error_of(ep.combine_teardown, pending[0]))
            layer.check(ep)
        return [(type(error), str(error)) for error in errors]

    full = f"at most {in_flight} {{}} operations may be in flight"
    order = "{} operations must be torn down in the order of their setup"
    texts = [full, order, order] if in_flight > 1 else [full, order]
    texts = [text.format(kind) for kind in ("dispatch", "combine") for text in texts]
    for errors in run_world(world, 3, fn):
        for (kind, text), expected in zip(errors, texts, strict=True):
            assert kind is SequenceError
            assert expected in text


def error_of(call, *args, **options) -> Exception:
    with pytest.raises(MoeError) as caught:
        call(*args, **options)
    return caught.value


# Limits.


@worlds
@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
def test_more_rows_than_the_limit(world, exact):
    """All ranks raise the same, also those that have room; then the group goes on."""
    fits, overflows = Layer(tokens=(2, 2, 2)), Layer(tokens=(7, 7, 7), routing="hot")

    def fn(ctx):
        with make(ctx, max_recv_tokens=12, exact=exact) as ep:
            assert ep.capacity == 12
            for _ in range(3):
                fits.check(ep)
                error = error_of(ep.dispatch, **overflows.inputs(ctx.rank))
                fits.check(ep)
            received = ep.dispatch(**fits.inputs(ctx.rank))
            assert len(received.x) == (int(received.num_tokens) if exact else 12)
        return type(error), error.rank, str(error)

    loads = [0, 0, 0]
    for rank in range(3):
        for number in overflows.inputs(rank)["topk_ids"].flatten().tolist():
            loads[number // 2] += 1
    assert loads[0] > 12
    for kind, rank, text in run_world(world, 3, fn):
        assert kind is ReceiveOverflowError
        assert rank == 0
        assert f"got 12 with {loads[0]} rows for rank 0" in text


def test_exactly_as_many_rows_as_the_limit():
    layer = Layer(tokens=(2, 2, 2), routing="hot", top_k=1, max_recv_tokens=6)

    def fn(ctx):
        with make(ctx, **layer.options()) as ep:
            layer.check(ep)
            return int(ep.dispatch(**layer.inputs(ctx.rank)).num_tokens)

    assert run_world("local", 3, fn) == [6, 0, 0]


def test_the_limit_on_a_shared_rank():
    layer = Layer(tokens=(5, 5, 5), shared_experts=1, shared_ranks=1, max_recv_tokens=14)

    def fn(ctx):
        with make(ctx, **layer.options()) as ep:
            return error_of(ep.dispatch, **layer.inputs(ctx.rank)).rank

    assert run_world("local", 3, fn) == [0, 0, 0]


# Rows that experts write where combine sends them from.


@worlds
def test_outputs_written_in_place(world):
    layer = Layer(routing="zipf")

    def fn(ctx):
        numbers = layer.numbers(ctx.rank)
        with make(ctx, in_flight=2) as ep:
            for seed in range(5):
                inputs = layer.inputs(ctx.rank, seed)
                received = ep.dispatch(**inputs)
                rows = ep.output_rows(received.handle)
                assert rows.shape == (int(received.num_tokens), layer.hidden)
                assert rows.dtype == layer.dtype
                rows.fill_(float("nan"))
                run_experts(ep, received, numbers, layer.dtype, out=rows)
                out = ep.combine(rows, received.handle)
                assert torch.equal(out, layer.dense(inputs, None))

    run_world(world, 3, fn)


@worlds
def test_places_for_two_batches_at_once(world):
    layer = Layer()

    def fn(ctx):
        numbers = layer.numbers(ctx.rank)
        inputs = [layer.inputs(ctx.rank, seed) for seed in range(2)]
        with make(ctx, in_flight=2) as ep:
            for _ in range(4):
                received = [ep.dispatch(**one) for one in inputs]
                rows = [ep.output_rows(one.handle) for one in received]
                for one, out in zip(received, rows, strict=True):
                    run_experts(ep, one, numbers, layer.dtype, out=out)
                pending = [
                    ep.combine_setup(out, one.handle)
                    for one, out in zip(received, rows, strict=True)
                ]
                for one, half in zip(inputs, pending, strict=True):
                    assert torch.equal(ep.combine_teardown(half), layer.dense(one, None))

    run_world(world, 3, fn)


@worlds
def test_a_place_survives_a_refused_combine_and_not_another_one(world):
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
            # In collective and single worlds the rows are nobody's place, and stay good.
            other = ep.dispatch(**layer.inputs(ctx.rank, seed=1))
            rows = run_experts(ep, other, numbers, layer.dtype, out=ep.output_rows(other.handle))
            y = run_experts(ep, received, numbers, layer.dtype)
            assert torch.equal(ep.combine(y, received.handle), layer.dense(inputs, None))
            try:
                ep.combine(rows, other.handle)
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


# Refusals.

BAD_OPTIONS: dict[str, tuple[dict, type, str, str]] = {
    # name: options, error, argument, what came
    "num_experts": ({"num_experts": 7}, ArgumentValueError, "num_experts", "got 7"),
    "num_experts 0": ({"num_experts": 0}, ArgumentValueError, "num_experts", "got 0"),
    "num_experts str": ({"num_experts": "6"}, ArgumentTypeError, "num_experts", "got '6'"),
    "top_k 0": ({"top_k": 0}, ArgumentValueError, "top_k", "got 0"),
    "top_k > E": ({"top_k": 7}, ArgumentValueError, "top_k", "got 7"),
    "top_k float": ({"top_k": 2.0}, ArgumentTypeError, "top_k", "got 2.0"),
    "hidden": ({"hidden": 0}, ArgumentValueError, "hidden", "got 0"),
    "max_tokens": ({"max_tokens": -1}, ArgumentValueError, "max_tokens", "got -1"),
    "max_tokens bool": ({"max_tokens": True}, ArgumentTypeError, "max_tokens", "got True"),
    "dtype": ({"dtype": torch.int32}, ArgumentValueError, "dtype", "got torch.int32"),
    "alignment": ({"alignment": 0}, ArgumentValueError, "alignment", "got 0"),
    "counts_dtype": (
        {"counts_dtype": torch.int16},
        ArgumentValueError,
        "counts_dtype",
        "got torch.int16",
    ),
    "quant": ({"quant": "int4"}, ArgumentValueError, "quant", "got 'int4'"),
    "shared_ranks": ({"shared_ranks": 3, "shared_experts": 1}, ArgumentValueError, "", "got 3"),
    "shared_ranks -1": ({"shared_ranks": -1}, ArgumentValueError, "shared_ranks", "got -1"),
    "shared_experts": (
        {"shared_ranks": 1, "shared_experts": 2},
        ArgumentValueError,
        "shared_ranks",
        "got 1",
    ),
    "shared_experts 0": ({"shared_ranks": 1}, ArgumentValueError, "shared_experts", "got 0"),
    "max_recv_tokens": ({"max_recv_tokens": -1}, ArgumentValueError, "max_recv_tokens", "got -1"),
    "max_recv_tokens float": (
        {"max_recv_tokens": 1.5},
        ArgumentTypeError,
        "max_recv_tokens",
        "got 1.5",
    ),
    "in_flight": ({"in_flight": 0}, ArgumentValueError, "in_flight", "got 0"),
    "in_flight str": ({"in_flight": "1"}, ArgumentTypeError, "in_flight", "got '1'"),
    "timeout": ({"timeout": 0}, ArgumentValueError, "timeout", "got 0"),
    "timeout nan": ({"timeout": float("nan")}, ArgumentValueError, "timeout", "got nan"),
    "timeout inf": ({"timeout": float("inf")}, ArgumentValueError, "timeout", "got inf"),
    "timeout str": ({"timeout": "30"}, ArgumentTypeError, "timeout", "got '30'"),
    "transport": ({"transport": "smoke"}, ArgumentValueError, "transport", "got 'smoke'"),
    "device": ({"device": "toaster"}, ArgumentValueError, "device", "got 'toaster'"),
    "device float": ({"device": 2.5}, ArgumentTypeError, "device", "got 2.5"),
}


def check_refusal(error: MoeError, expected: tuple[dict, type, str, str]) -> None:
    _, kind, argument, got = expected
    assert type(error) is kind
    assert error.code == kind.code
    assert not argument or error.argument == argument
    assert got in str(error)
    assert str(error).startswith(f"{error.op}: ")


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_constructor_refuses(name):
    """On all ranks, then on one: its peers hear why. Then the group makes an object as before."""
    options = BAD_OPTIONS[name][0]

    def fn(ctx):
        errors = [error_of(make, ctx, **options)]
        began = time.monotonic()
        errors.append(error_of(make, ctx, **(options if ctx.rank == 1 else {})))
        assert time.monotonic() - began < AT_ONCE
        with make(ctx) as ep:
            Layer().check(ep)
        return errors

    for rank, errors in enumerate(run_world("local", 3, fn)):
        check_refusal(errors[0], BAD_OPTIONS[name])
        if rank == 1:
            check_refusal(errors[1], BAD_OPTIONS[name])
        else:
            assert type(errors[1]) is PeerAbortError
            assert errors[1].rank == 1
            assert BAD_OPTIONS[name][3] in errors[1].reason


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_constructors_refuse_in_processes(world):
    def fn(ctx):
        texts = []
        for name, (options, *_) in BAD_OPTIONS.items():
            late = list(BAD_OPTIONS).index(name) % 3
            if ctx.rank == late:
                time.sleep(0.02)
            texts.append(str(error_of(make, ctx, **(options if ctx.rank == 1 else {}))))
        with make(ctx) as ep:
            Layer().check(ep)
        return texts

    for texts in run_world(world, 3, fn):
        for (*_, got), text in zip(BAD_OPTIONS.values(), texts, strict=True):
            assert got in text


def test_a_rank_that_is_not_this_one_is_refused():
    """Where a group says itself which rank this is, another one is not taken for it."""

    def fn(ctx):
        errors = [error_of(ExpertParallel, ctx.ep_group, rank=1 - ctx.rank, **SIZES)]
        with ExpertParallel(ctx.ep_group, rank=ctx.rank, **SIZES):
            pass
        return errors

    for rank, (error,) in enumerate(run_world("symmetric", 2, fn)):
        assert type(error) is ArgumentValueError
        assert f"rank must be {rank}, this rank of the group, or None, got {1 - rank}" in str(error)
    alone = error_of(ExpertParallel, rank=1, **SIZES)
    assert "rank must be 0, this rank of the group, or None, got 1" in str(alone)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to use")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_that_is_not_there(device):
    error = error_of(ExpertParallel, device=device, **SIZES)
    assert type(error) is UnavailableError
    assert "cannot run here: " in str(error)


def test_the_number_of_the_cpu_does_not_matter():
    with ExpertParallel(device="cpu:0", **SIZES) as ep:
        x = torch.ones(1, SIZES["hidden"], dtype=torch.bfloat16)
        assert torch.equal(ep.dispatch(x, torch.tensor([[0, 5]])).x[:2], x.repeat(2, 1))


def test_alone_a_constructor_refuses_too():
    for name, (options, kind, _, got) in BAD_OPTIONS.items():
        if name == "num_experts" or name.startswith("shared"):
            continue  # any number is a multiple of one rank, which cannot be a shared one
        error = error_of(ExpertParallel, **{**SIZES, **options})
        assert type(error) is kind
        assert got in str(error)


@pytest.mark.parametrize(
    "option, value, usual",
    [
        ("num_experts", 12, 6),
        ("top_k", 3, 2),
        ("hidden", 32, 24),
        ("max_tokens", 8, 7),
        ("dtype", torch.float16, "torch.bfloat16"),
        ("quant", "int8", None),
        ("max_recv_tokens", 5, None),
        ("in_flight", 2, 1),
        ("transport", "symmetric", "auto"),
    ],
)
def test_constructors_that_disagree(option, value, usual):
    def fn(ctx):
        error = error_of(make, ctx, **({option: value} if ctx.rank == 1 else {}))
        with make(ctx) as ep:
            Layer().check(ep)
        return error

    for rank, error in enumerate(run_world("local", 3, fn)):
        assert type(error) is ArgumentMismatchError
        assert error.argument == option
        mine, theirs = (value, usual) if rank == 1 else (usual, value)
        assert f"got {mine} on this rank and {theirs} on rank" in str(error)
        assert error.rank in ((0, 2) if rank == 1 else (1,))


def with_id(place, value):
    def change(ids):
        ids = ids.clone()
        ids[place] = value
        return ids

    return change


def bad(name, change, kind, got):
    return (name, change, kind, got)


VALUE, KIND, MISSING = ArgumentValueError, ArgumentTypeError, MissingArgumentError
FULL = Layer()  # 7 tokens on each rank
BAD_DISPATCHES = {
    "x None": bad("x", lambda x: None, MISSING, "got None"),
    "ids None": bad("topk_ids", lambda ids: None, MISSING, "got None"),
    "x list": bad("x", lambda x: [1], KIND, "got list"),
    "x dtype": bad("x", torch.Tensor.float, KIND, "got torch.float32"),
    "ids dtype": bad("topk_ids", torch.Tensor.short, KIND, "got torch.int16"),
    "weights dtype": bad("topk_weights", torch.Tensor.double, KIND, "got torch.float64"),
    "scales dtype": bad("scales", lambda _: torch.ones(6, 24).double(), KIND, "torch.float64"),
    "x dim": bad("x", lambda x: x[None], VALUE, "got shape (1, 7, 24)"),
    "x columns": bad("x", lambda x: x[:, 1:], VALUE, "got shape (7, 23)"),
    "x rows": bad("x", lambda x: x.repeat(2, 1), VALUE, "got shape (14, 24)"),
    "ids rows": bad("topk_ids", lambda ids: ids[1:], VALUE, "got shape (6, 2)"),
    "ids columns": bad("topk_ids", lambda ids: ids[:, 1:], VALUE, "got shape (7, 1)"),
    "weights shape": bad("topk_weights", lambda w: w.T, VALUE, "got shape (2, 7)"),
    "scales": bad("scales", lambda _: torch.ones(6, 24), VALUE, "got (6, 24)"),
    "id too large": bad(
        "topk_ids", with_id((1, 1), 6), VALUE, "-1 for none, got 6 for token 1, slot 1"
    ),
    "id negative": bad("topk_ids", with_id((0, 0), -2), VALUE, "got -2 for token 0, slot 0"),
    "id twice": bad("topk_ids", with_id((2, slice(None)), 3), VALUE, "got 3 twice for token 2"),
}
BAD_COMBINES = {
    "y None": bad("y", lambda y: None, MISSING, "got None"),
    "handle None": bad("handle", lambda handle: None, MISSING, "got None"),
    "handle": bad("handle", lambda handle: handle.recv_counts_cumsum, KIND, "got Tensor"),
    "y dtype": bad("y", torch.Tensor.float, KIND, "got torch.float32"),
    "y columns": bad("y", lambda y: y[:, 1:], VALUE, "got shape (42, 23)"),
    "y rows": bad("y", lambda y: y[:1], VALUE, "got shape (1, 24)"),
    "addend dtype": bad("shared_expert_x", lambda _: torch.ones(7, 24), KIND, "got torch.float32"),
    "addend shape": bad(
        "shared_expert_x",
        lambda _: torch.ones(6, 24, dtype=torch.bfloat16),
        VALUE,
        "got shape (6, 24)",
    ),
}


def refused(call, arguments: dict[str, Any], case) -> MoeError:
    """The error of a call with one argument changed; the case None leaves all as they are."""
    if case is not None:
        name, change, _, _ = case
        arguments = arguments | {name: change(arguments.get(name))}
    began = time.monotonic()
    error = error_of(call, **arguments)
    assert time.monotonic() - began < AT_ONCE
    return error


@worlds
@pytest.mark.parametrize("rounds", [0, 9], ids=["first call", "tenth call"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["one rank", "all ranks"])
def test_calls_are_refused(world, rounds, everywhere):
    """The peers of a rank that refuses hear why at once; the next correct call is right."""

    def fn(ctx):
        mine = ctx.rank == 1 or everywhere
        found = {}
        with make(ctx) as ep:
            for seed in range(rounds):
                FULL.check(ep, seed)
            inputs = FULL.inputs(ctx.rank)
            for name, case in BAD_DISPATCHES.items():
                found[name] = refused(ep.dispatch, inputs, case if mine else None)
                if name in ("x None", "id twice"):
                    FULL.check(ep)
            received = ep.dispatch(**inputs)
            outputs = {"y": received.x, "handle": received.handle}
            for name, case in BAD_COMBINES.items():
                found[name] = refused(ep.combine, outputs, case if mine else None)
                if name in ("y None", "addend shape"):
                    FULL.check(ep)
        return found

    cases = BAD_DISPATCHES | BAD_COMBINES
    for rank, found in enumerate(run_world(world, 3, fn)):
        for name, (argument, _, kind, got) in cases.items():
            error = found[name]
            if rank == 1 or everywhere:
                assert type(error) is kind, name
                assert error.argument == argument
                assert error.code == kind.code
                assert got in str(error)
            else:
                assert type(error) is PeerAbortError, name
                assert error.rank == 1
                assert got in error.reason
            op = "dispatch" if name in BAD_DISPATCHES else "combine"
            assert str(error).startswith(f"ExpertParallel.{op}: ")


@pytest.mark.parametrize("name", [*BAD_DISPATCHES, *BAD_COMBINES])
def test_calls_are_refused_alone(name):
    with ExpertParallel(**SIZES) as ep:
        inputs = FULL.inputs(0)
        received = ep.dispatch(**inputs)
        if name in BAD_DISPATCHES:
            error = refused(ep.dispatch, inputs, BAD_DISPATCHES[name])
        else:
            outputs = {"y": received.x, "handle": received.handle}
            error = refused(ep.combine, outputs, BAD_COMBINES[name])
        assert type(error) is (BAD_DISPATCHES | BAD_COMBINES)[name][2]
        dataclasses.replace(FULL, world=1, tokens=(7,)).check(ep)


@worlds
def test_scales_on_some_ranks_only(world):
    """Copies of a token differ with scales and do not without: the ranks have to agree."""
    plain, smooth = Layer(quant="int8"), Layer(quant="int8", smooth=True)

    def fn(ctx):
        errors = []
        with make(ctx, quant="int8") as ep:
            for before in (plain, smooth):
                before.check(ep)
                layer = smooth if ctx.rank == 1 else plain
                errors.append(error_of(ep.dispatch, **layer.inputs(ctx.rank)))
                plain.check(ep)
                smooth.check(ep)
        return errors

    for rank, errors in enumerate(run_world(world, 3, fn)):
        for error in errors:
            assert type(error) is ArgumentMismatchError
            assert error.argument == "scales"
            mine, theirs = ("given", "None") if rank == 1 else ("None", "given")
            assert f"got {mine} on this rank and {theirs} on rank" in str(error)


def test_a_wrong_addend_leaves_the_half_in_flight():
    """Nothing was lost: the peers need nothing of this rank, and it may try again."""

    def fn(ctx):
        with make(ctx) as ep:
            inputs = FULL.inputs(ctx.rank)
            received = ep.dispatch(**inputs)
            y = run_experts(ep, received, FULL.numbers(ctx.rank), FULL.dtype)
            pending = ep.combine_setup(y, received.handle)
            error_of(ep.combine_teardown, pending, shared_expert_x=torch.ones(7, 24))
            assert torch.equal(ep.combine_teardown(pending), FULL.dense(inputs, None))
            FULL.check(ep)

    run_world("local", 3, fn)


# Life and death.


@worlds
def test_two_objects_on_one_group(world):
    small, large = Layer(tokens=(2, 0, 3)), Layer(hidden=40, num_experts=12, top_k=4, quant="int8")

    def fn(ctx):
        with make(ctx, **small.options()) as first, make(ctx, **large.options()) as second:
            for seed in range(3):
                one, two = small.inputs(ctx.rank, seed), large.inputs(ctx.rank, seed)
                halves = first.dispatch_setup(**one), second.dispatch_setup(**two)
                received = second.dispatch_teardown(halves[1]), first.dispatch_teardown(halves[0])
                y = run_experts(second, received[0], large.numbers(ctx.rank), large.dtype)
                out = second.combine(y, received[0].handle)
                assert torch.equal(out, large.dense(two, None))
                y = run_experts(first, received[1], small.numbers(ctx.rank), small.dtype)
                assert torch.equal(first.combine(y, received[1].handle), small.dense(one, None))
            first.close()
            large.check(second)

    run_world(world, 3, fn)


def test_a_half_belongs_to_the_object_that_set_it_up():
    def fn(ctx):
        with make(ctx) as first, make(ctx) as second:
            inputs = FULL.inputs(ctx.rank)
            halves = first.dispatch_setup(**inputs), second.dispatch_setup(**inputs)
            texts = [str(error_of(first.dispatch_teardown, halves[1]))]
            received = first.dispatch_teardown(halves[0]), second.dispatch_teardown(halves[1])
            halves = [
                ep.combine_setup(one.x, one.handle)
                for ep, one in zip((first, second), received, strict=True)
            ]
            texts.append(str(error_of(second.combine_teardown, halves[0])))
            first.combine_teardown(halves[0])
            second.combine_teardown(halves[1])
        return texts

    for texts in run_world("local", 2, fn):
        for text in texts:
            assert "from this object's setup since recover()" in text


@worlds
@pytest.mark.parametrize("everywhere", [False, True], ids=["one rank", "all ranks"])
def test_a_handle_belongs_to_the_object_that_dispatched(world, everywhere):
    """Nothing is sent; the peers of a rank that mixes up its handles abort, too."""

    def fn(ctx):
        with make(ctx) as first, make(ctx) as second:
            inputs = FULL.inputs(ctx.rank)
            own, other = first.dispatch(**inputs), second.dispatch(**inputs)
            mine = everywhere or ctx.rank == 1
            error = error_of(first.combine, own.x, (other if mine else own).handle)
            FULL.check(first)
            FULL.check(second)
            if mine:
                error_of(first.output_rows, other.handle)
        return type(error), str(error)

    for rank, (kind, text) in enumerate(run_world(world, 3, fn)):
        assert kind is (ArgumentValueError if everywhere or rank == 1 else PeerAbortError)
        assert "handle must come from a dispatch of this object" in text


def test_alone_a_handle_belongs_to_its_object_too():
    with ExpertParallel(**SIZES) as first, ExpertParallel(**SIZES) as second:
        received = second.dispatch(**FULL.inputs(0))
        error = error_of(first.combine, received.x, received.handle)
        assert type(error) is ArgumentValueError


@worlds
def test_recover_starts_over(world):
    """What was in flight is lost, and cannot be mistaken for what comes after."""

    def fn(ctx):
        with make(ctx, in_flight=2) as ep:
            FULL.check(ep)
            lost = [ep.dispatch_setup(**FULL.inputs(ctx.rank)) for _ in range(2)]
            handle = ep.dispatch_teardown(lost.pop(0)).handle
            place = ep.output_rows(handle)
            ep.recover()
            fresh = [ep.dispatch_setup(**FULL.inputs(ctx.rank, seed)) for seed in (1, 2)]
            error = error_of(ep.dispatch_teardown, lost[0])
            for half, seed in zip(fresh, (1, 2), strict=True):
                received = ep.dispatch_teardown(half)
                y = run_experts(ep, received, FULL.numbers(ctx.rank), FULL.dtype)
                expected = FULL.dense(FULL.inputs(ctx.rank, seed), None)
                assert torch.equal(ep.combine(y, received.handle), expected)
            ep.recover()
            ep.check()
            FULL.check(ep)
            del place
        return str(error)

    for text in run_world(world, 3, fn):
        assert "from this object's setup since recover()" in text


@worlds
def test_a_closed_object(world):
    def fn(ctx):
        with make(ctx) as ep:
            inputs = FULL.inputs(ctx.rank)
            received = ep.dispatch(**inputs)
            pending = ep.dispatch_setup(**inputs)
            assert ep.traffic is not None
        ep.close()  # once more does no harm
        assert ep.transport is None
        assert ep.window_bytes.total == 0
        calls = [
            lambda: ep.dispatch(**inputs),
            lambda: ep.dispatch(None, None),
            lambda: ep.dispatch_teardown(pending),
            lambda: ep.combine(received.x, received.handle),
            lambda: ep.output_rows(received.handle),
            ep.check,
            ep.recover,
        ]
        texts = [str(error_of(call)) for call in calls]
        with make(ctx) as other:
            FULL.check(other)
        return texts

    for texts in run_world(world, 3, fn):
        assert "x must be given" in texts.pop(1)
        for text in texts:
            assert "is closed" in text


def test_a_closed_object_alone():
    ep = ExpertParallel(**SIZES)
    ep.close()
    for call in (lambda: ep.dispatch(**FULL.inputs(0)), ep.check, ep.recover):
        assert "is closed" in str(error_of(call))


def test_an_error_in_the_block_closes_the_object():
    with pytest.raises(ZeroDivisionError), ExpertParallel(**SIZES) as ep:
        _ = 1 / 0
    assert ep.transport is None


def test_peers_of_a_rank_that_closed_do_not_wait_for_it():
    def fn(ctx):
        with make(ctx) as ep:
            FULL.check(ep)
            if ctx.rank == 1:
                return None
            began = time.monotonic()
            error = error_of(ep.dispatch, **FULL.inputs(ctx.rank))
            assert time.monotonic() - began < AT_ONCE
            assert type(error_of(ep.check)) is BrokenGroupError
            return error.ranks

    assert run_world("local", 3, fn) == [(1,), None, (1,)]


# Sizes and traffic.


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("name", ["bf16", "int8", "limit", "one shared rank", "skewed"])
def test_window_bytes(name, in_flight):
    """What an object says it takes is what the formula says, and what the allocator gives."""
    layer = LAYERS[name]
    taken = []
    allocate = LocalMemory.allocate

    def counted(memory, num_bytes, *rest):
        taken.append(num_bytes)
        return allocate(memory, num_bytes, *rest)

    def build(ctx):
        with make(ctx, **layer.options(), in_flight=in_flight) as ep:
            layer.check(ep)
            return ep.window_bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalMemory, "allocate", counted)
        found = run_world("local", layer.world, build)
    assert found == found[:1] * layer.world
    windows = [found[0].dispatch, found[0].combine] * layer.world
    control = [4 * 4096 * (2, 4, 8)[in_flight - 1] + 16] * layer.world
    assert sorted(taken) == sorted(windows + control)
    if layer.max_recv_tokens is None:
        options = layer.options()
        del options["exact"], options["max_recv_tokens"]
        assert found[0] == window_bytes(world_size=3, in_flight=in_flight, **options)


@worlds
@pytest.mark.parametrize("name", ["bf16", "skewed", "int8", "int8 with scales", "one shared rank"])
def test_traffic(world, name):
    """Counted token by token: one row for each rank that wants it, with scales one per copy."""
    layer = LAYERS[name]

    def fn(ctx):
        with make(ctx, **layer.options()) as ep:
            assert ep.traffic is None
            layer.check(ep, seed=3)
            return ep.traffic

    stride = layer.hidden * 2 if layer.quant is None else 32 + 16
    for rank, traffic in enumerate(run_world(world, 3, fn)):
        sent = copies = 0
        for ids in layer.inputs(rank, seed=3)["topk_ids"].tolist():
            local = layer.num_experts // (3 - layer.shared_ranks)
            ranks = {number // local for number in ids}
            sent += len(ids) if layer.smooth else len(ranks)
            copies += len(ids)
        shared = len(layer.inputs(rank)["x"]) * layer.shared_experts
        assert traffic.rows_sent == sent + shared
        assert traffic.rows_saved == copies - sent
        assert traffic.bytes_sent == (sent + shared) * stride
        assert traffic.bytes_saved == (copies - sent) * stride


# Anything in any order.

some_ranks = st.sampled_from([(), (), (), (0,), (1,), (2,), (0, 2), (0, 1, 2)]).map(frozenset)


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer on all ranks, in which something may be wrong somewhere."""

    seed: int
    smooth: bool
    heavy: bool  # too many rows for some rank
    unlike: frozenset[int]  # ranks that differ in whether they give scales
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
    """Do the step on one rank; how it ended."""
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
    """How a step may end on a rank: of several things wrong, any may be heard of first."""
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

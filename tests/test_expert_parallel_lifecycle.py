"""ExpertParallel: objects side by side, recovery, closing, copies, sizes and traffic."""

from __future__ import annotations

import copy
import pickle
import time
import typing

import harness
import pytest
import torch
from expert_layer import AT_ONCE, FULL, LAYERS, SIZES, Layer, error_of, make, run_experts
from harness import run_world

from moe_triton import (
    ArgumentTypeError,
    ArgumentValueError,
    BrokenGroupError,
    ExpertParallel,
    PeerAbortError,
    UnavailableError,
    comm,
    window_bytes,
)
from moe_triton.comm.control_blocks import control_bytes
from moe_triton.comm.local import LocalMemory
from moe_triton.layout import QUANTS
from moe_triton.ops.layer_config import QuantName

worlds = pytest.mark.parametrize("world", harness.WORLDS)


@worlds
def test_two_objects_on_one_group(world):
    small, large = Layer(tokens=(2, 0, 3)), Layer(hidden=40, num_experts=12, top_k=4, quant="int8")

    def fn(ctx):
        with make(ctx, **small.options()) as first, make(ctx, **large.options()) as second:
            for seed in range(3):
                pairs = [(first, small), (second, large)]
                inputs = [layer.inputs(ctx.rank, seed) for _, layer in pairs]
                pending = [
                    ep.dispatch_setup(**batch) for (ep, _), batch in zip(pairs, inputs, strict=True)
                ]
                for (ep, layer), batch, operation in zip(pairs, inputs, pending, strict=True):
                    received = ep.dispatch_teardown(operation)
                    y = run_experts(ep, received, layer.numbers(ctx.rank), layer.dtype)
                    assert torch.equal(ep.combine(y, received.handle), layer.dense(batch, None))
            first.close()
            large.check(second)

    run_world(world, 3, fn)


def test_a_pending_operation_belongs_to_its_object():
    def fn(ctx):
        with make(ctx) as first, make(ctx) as second:
            inputs = FULL.inputs(ctx.rank)
            own, other = first.dispatch_setup(**inputs), second.dispatch_setup(**inputs)
            texts = [str(error_of(first.dispatch_teardown, other))]
            own, other = first.dispatch_teardown(own), second.dispatch_teardown(other)
            own = first.combine_setup(own.x, own.handle)
            other = second.combine_setup(other.x, other.handle)
            texts.append(str(error_of(second.combine_teardown, own)))
            first.combine_teardown(own)
            second.combine_teardown(other)
        return texts

    for texts in run_world("local", 2, fn):
        for text in texts:
            assert "from this object's setup since recover()" in text


@worlds
@pytest.mark.parametrize("everywhere", [False, True], ids=["one rank", "all ranks"])
def test_a_handle_belongs_to_its_object(world, everywhere):
    """Nothing is sent; the peers of a rank that mixes up its handles abort with the reason."""

    def fn(ctx):
        with make(ctx) as first, make(ctx) as second:
            inputs = FULL.inputs(ctx.rank)
            own, other = first.dispatch(**inputs), second.dispatch(**inputs)
            wrong = everywhere or ctx.rank == 1
            error = error_of(first.combine, own.x, (other if wrong else own).handle)
            FULL.check(first)
            FULL.check(second)
            if wrong:
                error_of(first.output_rows, other.handle)
        return type(error), str(error)

    for rank, (kind, text) in enumerate(run_world(world, 3, fn)):
        assert kind is (ArgumentValueError if everywhere or rank == 1 else PeerAbortError)
        assert "handle must come from a dispatch of this object" in text


def test_a_handle_belongs_to_its_object_of_one_rank():
    with ExpertParallel(**SIZES) as first, ExpertParallel(**SIZES) as second:
        received = second.dispatch(**FULL.inputs(0))
        error = error_of(first.combine, received.x, received.handle)
        assert type(error) is ArgumentValueError


@worlds
def test_recover_starts_over(world):
    """Operations in flight are lost, and are not mistaken for later ones."""

    def fn(ctx):
        with make(ctx, in_flight=2) as ep:
            FULL.check(ep)
            lost = [ep.dispatch_setup(**FULL.inputs(ctx.rank)) for _ in range(2)]
            handle = ep.dispatch_teardown(lost.pop(0)).handle
            rows = ep.output_rows(handle)
            ep.recover()
            fresh = [ep.dispatch_setup(**FULL.inputs(ctx.rank, seed)) for seed in (1, 2)]
            error = error_of(ep.dispatch_teardown, lost[0])
            for operation, seed in zip(fresh, (1, 2), strict=True):
                received = ep.dispatch_teardown(operation)
                y = run_experts(ep, received, FULL.numbers(ctx.rank), FULL.dtype)
                expected = FULL.dense(FULL.inputs(ctx.rank, seed), None)
                assert torch.equal(ep.combine(y, received.handle), expected)
            ep.recover()
            ep.check()
            FULL.check(ep)
            del rows
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
        ep.close()  # a second close has no effect
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


def test_a_closed_object_of_one_rank():
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
    """The object, the formula and the allocator agree."""
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
        results = run_world("local", layer.world, build)
    assert results == results[:1] * layer.world
    windows = [results[0].dispatch, results[0].combine] * layer.world
    control = [control_bytes(in_flight)] * layer.world
    assert sorted(taken) == sorted(windows + control)
    if layer.max_recv_tokens is None:
        options = layer.options()
        del options["exact"], options["max_recv_tokens"]
        assert results[0] == window_bytes(world_size=3, in_flight=in_flight, **options)


@worlds
@pytest.mark.parametrize("name", ["bf16", "skewed", "int8", "int8 with scales", "one shared rank"])
def test_traffic(world, name):
    """Counted token by token: one row for each rank that wants it, with scales one per slot."""
    layer = LAYERS[name]

    def fn(ctx):
        with make(ctx, **layer.options()) as ep:
            assert ep.traffic is None
            layer.check(ep, seed=3)
            return ep.traffic

    stride = layer.hidden * 2 if layer.quant is None else 32 + 16
    for rank, traffic in enumerate(run_world(world, 3, fn)):
        sent = slots = 0
        for ids in layer.inputs(rank, seed=3)["topk_ids"].tolist():
            local = layer.num_experts // (3 - layer.shared_ranks)
            ranks = {number // local for number in ids}
            sent += len(ids) if layer.smooth else len(ranks)
            slots += len(ids)
        shared = len(layer.inputs(rank)["x"]) * layer.shared_experts
        assert traffic.rows_sent == sent + shared
        assert traffic.rows_saved == slots - sent
        assert traffic.bytes_sent == (sent + shared) * stride
        assert traffic.bytes_saved == (slots - sent) * stride


# One rank.


@pytest.mark.parametrize("ranks", ["2", "64"])
def test_one_rank_where_the_launcher_started_more(monkeypatch, ranks):
    """Else every process would compute with its own tokens, and all results would look right."""
    monkeypatch.setenv("WORLD_SIZE", ranks)
    text = str(error_of(ExpertParallel, **SIZES))
    assert f"group must be a process group where the environment's WORLD_SIZE is {ranks}" in text
    assert "init_process_group()" in text and "group='single'" in text
    with ExpertParallel("single", **SIZES) as ep:
        assert (ep.rank, ep.world_size, ep.transport) == (0, 1, "single")
    monkeypatch.setenv("WORLD_SIZE", "1")
    ExpertParallel(**SIZES).close()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda ep: pickle.loads(pickle.dumps(ep))], ids=["copy", "pickle"]
)
def test_an_object_of_one_rank_can_be_copied(copied):
    layer = Layer(world=1, tokens=(7,), quant="int8")
    with ExpertParallel(**layer.options(), count_load=True) as ep, copied(ep) as other:
        layer.check(other)
        assert other.load.any() and not ep.load.any()
        assert repr(other) == repr(ep)


def test_an_object_of_a_group_cannot_be_copied():
    def fn(ctx):
        with make(ctx) as ep:
            model = torch.nn.Module()
            model.layer = ep
            errors = [error_of(copy.deepcopy, model), error_of(pickle.dumps, ep)]
            FULL.check(ep)
        return errors

    for errors in run_world("local", 3, fn):
        for error in errors:
            assert type(error) is UnavailableError
            assert "got one of 3 ranks, whose windows are shared with peers" in str(error)


# Names and values for users.


def test_short_reprs():
    with ExpertParallel(**SIZES, quant="mx_e4m3") as ep:
        received = ep.dispatch(**FULL.inputs(0))
        assert repr(ep) == (
            "ExpertParallel(rank 0 of 1, transport=single, num_experts=6, top_k=2, hidden=24, "
            "max_tokens=7, dtype=torch.bfloat16, quant=mx_e4m3, device=cpu)"
        )
        handle = f"Handle(expert_ids=[7, 2] int32, weights=[7, 2] float32, owner={ep._name!r})"
        assert repr(received.handle) == handle
        assert repr(received) == (
            "Dispatched(x=[14, 24] float8_e4m3fn, scales=[14, 2] float8_e8m0fnu, "
            f"local experts=6, {handle})"
        )


def test_names_for_type_checkers():
    assert typing.get_args(QuantName) == tuple(QUANTS)
    assert typing.get_args(comm.TransportName) == comm.TRANSPORTS


@pytest.mark.parametrize("quant", [None, *QUANTS])
def test_dequantized_dtypes(quant):
    """The layers of `test_expert_parallel.py` compare its values with the definition."""
    scales = torch.ones(1) if quant == "int8_static" else None
    with ExpertParallel(**SIZES, quant=quant) as ep:
        received = ep.dispatch(**FULL.inputs(0), scales=scales)
        if quant == "int8_static":
            assert type(error_of(received.dequantized)) is ArgumentValueError
            return
        wide = received.dequantized(torch.float32)
        assert wide.dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(received.dequantized(dtype), wide.to(dtype))
        assert type(error_of(received.dequantized, torch.int8)) is ArgumentTypeError

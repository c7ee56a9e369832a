"""ExpertParallel: rejected constructors and calls, limits, operations out of order."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import harness
import pytest
import torch
from expert_layer import AT_ONCE, FULL, SIZES, Layer, error_of, make, run_experts
from harness import run_world

from moe_triton import (
    ArgumentMismatchError,
    ArgumentTypeError,
    ArgumentValueError,
    ExpertParallel,
    MissingArgumentError,
    MoeError,
    PeerAbortError,
    ReceiveOverflowError,
    SequenceError,
    UnavailableError,
)

worlds = pytest.mark.parametrize("world", harness.WORLDS)


@worlds
@pytest.mark.parametrize("in_flight", [1, 3])
def test_operations_in_the_wrong_order(world, in_flight):
    layer = Layer()

    def fn(ctx):
        errors = []
        with make(ctx, in_flight=in_flight) as ep:
            inputs = layer.inputs(ctx.rank)
            pending = [ep.dispatch_setup(**inputs) for _ in range(in_flight)]
            errors.append(error_of(ep.dispatch_setup, **inputs))
            if in_flight > 1:
                errors.append(error_of(ep.dispatch_teardown, pending[1]))
            received = [ep.dispatch_teardown(operation) for operation in pending]
            errors.append(error_of(ep.dispatch_teardown, pending[0]))
            y = run_experts(ep, received[0], layer.numbers(ctx.rank), layer.dtype)
            pending = [ep.combine_setup(y, received[0].handle) for _ in range(in_flight)]
            errors.append(error_of(ep.combine_setup, y, received[0].handle))
            if in_flight > 1:
                errors.append(error_of(ep.combine_teardown, pending[1]))
            for operation in pending:
                assert torch.equal(ep.combine_teardown(operation), layer.dense(inputs, None))
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


# max_recv_tokens.


@worlds
@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
def test_more_rows_than_the_limit(world, exact):
    """All ranks raise the same error, those below the limit too; then the group goes on."""
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


def test_the_limit_on_a_shared_rank():
    layer = Layer(tokens=(5, 5, 5), shared_experts=1, shared_ranks=1, max_recv_tokens=14)

    def fn(ctx):
        with make(ctx, **layer.options()) as ep:
            return error_of(ep.dispatch, **layer.inputs(ctx.rank)).rank

    assert run_world("local", 3, fn) == [0, 0, 0]


# Rejected constructors.

VALUE, KIND, MISSING = ArgumentValueError, ArgumentTypeError, MissingArgumentError
# argument, its wrong value, error; further options
BAD_OPTIONS = {
    f"{argument} {value}": (argument, value, kind, {argument: value} | dict(*more))
    for argument, value, kind, *more in [
        ("num_experts", 7, VALUE),
        ("num_experts", 0, VALUE),
        ("num_experts", "6", KIND),
        ("top_k", 0, VALUE),
        ("top_k", 7, VALUE),
        ("top_k", 2.0, KIND),
        ("hidden", 0, VALUE),
        ("max_tokens", -1, VALUE),
        ("max_tokens", True, KIND),
        ("dtype", torch.int32, VALUE),
        ("alignment", 0, VALUE),
        ("counts_dtype", torch.int16, VALUE),
        ("quant", "int4", VALUE),
        ("shared_ranks", 3, VALUE, {"shared_experts": 1}),
        ("shared_ranks", -1, VALUE),
        ("shared_ranks", 1, VALUE, {"shared_experts": 2}),
        ("shared_experts", 0, VALUE, {"shared_ranks": 1}),
        ("max_recv_tokens", -1, VALUE),
        ("max_recv_tokens", 1.5, KIND),
        ("in_flight", 0, VALUE),
        ("in_flight", "1", KIND),
        ("timeout", 0, VALUE),
        ("timeout", float("nan"), VALUE),
        ("timeout", float("inf"), VALUE),
        ("timeout", "30", KIND),
        ("transport", "smoke", VALUE),
        ("device", "toaster", VALUE),
        ("device", 2.5, KIND),
    ]
}


def check_error(error: MoeError, name: str) -> None:
    argument, value, kind, _ = BAD_OPTIONS[name]
    assert type(error) is kind
    assert (error.code, error.argument) == (kind.code, argument)
    assert str(error).startswith(f"ExpertParallel: {argument} must ")
    assert str(error).split("\n")[0].endswith(f", got {value!r}")


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_constructor_rejects(name):
    """On all ranks, then on one, whose peers abort with the reason. Then the group constructs."""
    *_, options = BAD_OPTIONS[name]

    def fn(ctx):
        errors = [error_of(make, ctx, **options)]
        began = time.monotonic()
        errors.append(error_of(make, ctx, **(options if ctx.rank == 1 else {})))
        assert time.monotonic() - began < AT_ONCE
        with make(ctx) as ep:
            Layer().check(ep)
        return errors

    for rank, errors in enumerate(run_world("local", 3, fn)):
        check_error(errors[0], name)
        if rank == 1:
            check_error(errors[1], name)
        else:
            assert type(errors[1]) is PeerAbortError
            assert errors[1].rank == 1
            assert f"got {BAD_OPTIONS[name][1]!r}" in errors[1].reason


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_constructors_reject_in_processes(world):
    def fn(ctx):
        texts = []
        for number, (*_, options) in enumerate(BAD_OPTIONS.values()):
            if ctx.rank == number % 3:
                time.sleep(0.02)
            texts.append(str(error_of(make, ctx, **(options if ctx.rank == 1 else {}))))
        with make(ctx) as ep:
            Layer().check(ep)
        return texts

    for texts in run_world(world, 3, fn):
        for (_, value, *_), text in zip(BAD_OPTIONS.values(), texts, strict=True):
            assert f"got {value!r}" in text


def test_a_rank_of_another_process():
    """A process group knows this rank, and rejects another."""

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
def test_a_device_that_does_not_exist(device):
    error = error_of(ExpertParallel, device=device, **SIZES)
    assert type(error) is UnavailableError
    assert "cannot run here: " in str(error)


def test_the_number_of_the_cpu_does_not_matter():
    with ExpertParallel(device="cpu:0", **SIZES) as ep:
        x = torch.ones(1, SIZES["hidden"], dtype=torch.bfloat16)
        assert torch.equal(ep.dispatch(x, torch.tensor([[0, 5]])).x[:2], x.repeat(2, 1))


def test_a_constructor_of_one_rank_rejects():
    for name, (argument, *_, options) in BAD_OPTIONS.items():
        if name == "num_experts 7" or argument.startswith("shared"):
            continue  # one rank takes any number of experts, and cannot be a shared rank
        check_error(error_of(ExpertParallel, **{**SIZES, **options}), name)


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


# Rejected calls.

# name: argument, its wrong value, error, the value in the message
BAD_DISPATCHES = {
    "x None": ("x", lambda x: None, MISSING, "got None"),
    "ids None": ("topk_ids", lambda ids: None, MISSING, "got None"),
    "x list": ("x", lambda x: [1], KIND, "got list"),
    "x dtype": ("x", torch.Tensor.float, KIND, "got torch.float32"),
    "ids dtype": ("topk_ids", torch.Tensor.short, KIND, "got torch.int16"),
    "weights dtype": ("topk_weights", torch.Tensor.double, KIND, "got torch.float64"),
    "scales dtype": ("scales", lambda _: torch.ones(6, 24).double(), KIND, "torch.float64"),
    "x dim": ("x", lambda x: x[None], VALUE, "got shape (1, 7, 24)"),
    "x columns": ("x", lambda x: x[:, 1:], VALUE, "got shape (7, 23)"),
    "x rows": ("x", lambda x: x.repeat(2, 1), VALUE, "got shape (14, 24)"),
    "ids rows": ("topk_ids", lambda ids: ids[1:], VALUE, "got shape (6, 2)"),
    "ids columns": ("topk_ids", lambda ids: ids[:, 1:], VALUE, "got shape (7, 1)"),
    "weights shape": ("topk_weights", lambda w: w.T, VALUE, "got shape (2, 7)"),
    "scales": ("scales", lambda _: torch.ones(6, 24), VALUE, "got (6, 24)"),
    "id too large": (
        "topk_ids",
        with_id((1, 1), 6),
        VALUE,
        "-1 for none, got 6 for token 1, slot 1",
    ),
    "id negative": ("topk_ids", with_id((0, 0), -2), VALUE, "got -2 for token 0, slot 0"),
    "id twice": ("topk_ids", with_id((2, slice(None)), 3), VALUE, "got 3 twice for token 2"),
}
BAD_COMBINES = {
    "y None": ("y", lambda y: None, MISSING, "got None"),
    "handle None": ("handle", lambda handle: None, MISSING, "got None"),
    "handle": ("handle", lambda handle: handle.recv_counts_cumsum, KIND, "got Tensor"),
    "y dtype": ("y", torch.Tensor.float, KIND, "got torch.float32"),
    "y columns": ("y", lambda y: y[:, 1:], VALUE, "got shape (42, 23)"),
    "y rows": ("y", lambda y: y[:1], VALUE, "got shape (1, 24)"),
    "addend dtype": ("shared_expert_x", lambda _: torch.ones(7, 24), KIND, "got torch.float32"),
    "addend shape": (
        "shared_expert_x",
        lambda _: torch.ones(6, 24, dtype=torch.bfloat16),
        VALUE,
        "got shape (6, 24)",
    ),
}


def rejected(call, arguments: dict[str, Any], case) -> MoeError:
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
def test_calls_are_rejected(world, rounds, everywhere):
    """The peers of a rank that rejects abort with its reason; the next correct call is right."""

    def fn(ctx):
        wrong = ctx.rank == 1 or everywhere
        errors = {}
        with make(ctx) as ep:
            for seed in range(rounds):
                FULL.check(ep, seed)
            inputs = FULL.inputs(ctx.rank)
            for name, case in BAD_DISPATCHES.items():
                errors[name] = rejected(ep.dispatch, inputs, case if wrong else None)
                if name in ("x None", "id twice"):
                    FULL.check(ep)
            received = ep.dispatch(**inputs)
            outputs = {"y": received.x, "handle": received.handle}
            for name, case in BAD_COMBINES.items():
                errors[name] = rejected(ep.combine, outputs, case if wrong else None)
                if name in ("y None", "addend shape"):
                    FULL.check(ep)
        return errors

    cases = BAD_DISPATCHES | BAD_COMBINES
    for rank, errors in enumerate(run_world(world, 3, fn)):
        for name, (argument, _, kind, got) in cases.items():
            error = errors[name]
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
def test_calls_are_rejected_alone(name):
    with ExpertParallel(**SIZES) as ep:
        inputs = FULL.inputs(0)
        received = ep.dispatch(**inputs)
        if name in BAD_DISPATCHES:
            error = rejected(ep.dispatch, inputs, BAD_DISPATCHES[name])
        else:
            outputs = {"y": received.x, "handle": received.handle}
            error = rejected(ep.combine, outputs, BAD_COMBINES[name])
        assert type(error) is (BAD_DISPATCHES | BAD_COMBINES)[name][2]
        dataclasses.replace(FULL, world=1, tokens=(7,)).check(ep)


@worlds
def test_scales_on_some_ranks_only(world):
    """With scales each slot is a row, without them each token is: ranks must agree."""
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


def test_a_wrong_addend_leaves_the_combine_in_flight():
    """The peers need nothing of this rank any more, so that it may try again."""

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

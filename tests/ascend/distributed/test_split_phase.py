"""Dispatch and combine in two phases: worked examples, order, refusals, shapes in advance.

Drawn configurations are compared with the definition in test_hypothesis_split.
"""

from __future__ import annotations

import inspect
import time

import harness
import invalid_calls
import pytest
import split_phase_calls
import torch
from split_phase_calls import round_trip
from split_phase_rows import INVALID, SETUPS, TEARDOWNS
from worked_examples import BASIC, EXAMPLES, PLAIN, SHARED, example_calls

from moe_triton import set_profile
from moe_triton.compat import torch_npu


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("name", [name for name in PLAIN if name != "quantised"])
def test_worked_examples(name, world):
    """13 #9, #10, #31, #32: shared ranks by modulo, several experts a rank."""
    example = EXAMPLES[name]
    calls = example_calls(example)
    results = harness.run_world(world, example.group.world_size, lambda ctx: round_trip(ctx, calls))
    for rank, actual in enumerate(results):
        n, counts = len(example.expand_x[rank]), example.ep_recv_counts[rank]
        rows, scales, assist, nums = actual["received"]
        assert rows[:n].tolist() == example.expand_x[rank]
        assert scales.shape == (example.capacity[rank],) and not scales.any()
        assert len(assist) == example.capacity[rank] * 128
        assert assist[: len(counts)].tolist() == counts
        assert nums.tolist() == example.token_nums[rank]
        _, expand_idx, _ = actual["sent"]
        assert expand_idx.tolist() == example.expand_idx[rank]
        assert actual["combined"].tolist() == example.combined[rank]


@pytest.mark.parametrize("world", harness.WORLDS)
def test_expand_idx_may_have_any_shape(world):
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank])
        sent = halves.dispatch_setup()
        returned = halves.combine_setup(halves.dispatch_teardown(sent))
        return halves.combine_teardown(sent, returned, expand_idx=sent[1].view(3, 2)).tolist()

    assert harness.run_world(world, 2, fn) == BASIC.combined


def test_worked_example_of_y():
    calls = example_calls(BASIC)
    for rank, actual in enumerate(
        harness.run_world("local", 2, lambda ctx: round_trip(ctx, calls))
    ):
        y, _, info = actual["sent"]
        assert (y.shape, y.dtype) == ((6, 256), torch.bfloat16)
        x = calls[rank]["dispatch"]["x"]
        assert torch.equal(y[:, :2], x.repeat_interleave(2, 0))
        assert (info.shape, info.dtype) == (((6 + 4) * 16,), torch.int32)
        sent, back = actual["returned"]
        assert (sent.shape, sent.dtype) == ((12, 512), torch.int8)
        assert back.shape == ((12 + 2) * 16,)
        assert actual["received"][2][:4].tolist() == [[2, 5, 6, 7], [2, 3, 4, 5]][rank]


def test_rows_of_y_are_quantised_with_the_factors_of_their_expert():
    """13 #30: y has the documented shape; the scale is at the next multiple of 32 bytes."""
    x = torch.tensor([[1.0, -2.0, 0.5, 4.0]]).bfloat16()
    scales = torch.tensor([[1.0, 1, 1, 1], [2, 0.5, 1, 4], [1, 1, 1, 1]])

    def fn(ctx):
        ids = torch.tensor([[1, 0]], dtype=torch.int32)
        where = (ctx.ep_group, 1, 0, 2)
        actual = torch_npu.npu_moe_distribute_dispatch_setup(
            x, ids, *where, scales=scales, quant_mode=2
        )
        torch_npu.npu_moe_distribute_dispatch_teardown(
            x, actual[0], ids, actual[2], *where, quant_mode=2
        )
        return actual[0]

    # (E + 1, H) without shared ranks: row e is expert e's.
    (y,) = harness.run_world("local", 1, fn)
    assert (y.shape, y.dtype) == ((2, 512), torch.int8)
    assert y[:, :4].tolist() == [[16, -8, 4, 127], [32, -64, 16, 127]]
    factors = y[:, 32:36].contiguous().view(torch.float32)
    assert factors.tolist() == [
        [float.fromhex("0x1.020408p-3")],
        [float.fromhex("0x1.020408p-5")],
    ]


@pytest.mark.parametrize(
    "mode, dtype, size", [(1, torch.int8, 512), (3, None, 512), (4, None, 1024)]
)
def test_size_of_y(mode, dtype, size):
    """H 300: 13 #30 for the other modes. Scales at 384 of 3 groups, at 512 of 10 blocks."""
    calls = example_calls(BASIC)
    x = torch.ones(3, 300).bfloat16()
    factors = {"scales": torch.ones(1)} if mode == 1 else {}

    def fn(ctx):
        ids = calls[ctx.rank]["dispatch"]["expert_ids"]
        where = (ctx.ep_group, 2, ctx.ep_rank, 4)
        setup = torch_npu.npu_moe_distribute_dispatch_setup
        y, _, info = setup(x, ids, *where, quant_mode=mode, **factors)
        back = torch_npu.npu_moe_distribute_dispatch_teardown
        scales = back(x, y, ids, info, *where, quant_mode=mode)[1]
        return y.view(torch.uint8), y.dtype, scales[0]

    for y, kind, scales in harness.run_world("local", 2, fn):
        assert y.shape == (6, size)
        assert kind == (dtype or torch.float8_e4m3fn)
        if mode == 3:
            assert torch.equal(y[0, 384:396].view(torch.float32), scales)
        if mode == 4:
            assert torch.equal(y[0, 512:522], scales.view(torch.uint8))


def test_signatures():
    """13 #29: the document's teardown is without a star; names may always be given."""
    kinds = inspect.Parameter
    for half in ("dispatch_setup", "combine_setup", "combine_teardown"):
        function = getattr(torch_npu, f"npu_moe_distribute_{half}")
        assert any(
            p.kind is kinds.KEYWORD_ONLY for p in inspect.signature(function).parameters.values()
        )
    parameters = inspect.signature(torch_npu.npu_moe_distribute_dispatch_teardown).parameters
    assert all(p.kind is kinds.POSITIONAL_OR_KEYWORD for p in parameters.values())


def test_all_positional():
    calls = example_calls(BASIC)

    def fn(ctx):
        args = calls[ctx.rank]["dispatch"]
        x, ids, where = args["x"], args["expert_ids"], (ctx.ep_group, 2, ctx.ep_rank, 4)
        y, _, info = torch_npu.npu_moe_distribute_dispatch_setup(x, ids, *where)
        back = torch_npu.npu_moe_distribute_dispatch_teardown
        return back(x, y, ids, info, *where, 0, 1, 0, 0, 0, 0, 0, "")

    for rank, actual in enumerate(harness.run_world("local", 2, fn)):
        assert actual[3].tolist() == BASIC.token_nums_running[rank]


# Order.


@pytest.mark.parametrize("world", harness.WORLDS)
def test_order(world):
    """A second setup, a second teardown and a teardown without setup are refused at once."""
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank])
        errors = [
            invalid_calls.attempt(lambda: halves.dispatch_teardown(halves.no_setup()))["error"]
        ]
        sent = halves.dispatch_setup()
        errors.append(invalid_calls.attempt(halves.dispatch_setup)["error"])
        received = halves.dispatch_teardown(sent)
        errors.append(invalid_calls.attempt(lambda: halves.dispatch_teardown(sent))["error"])
        returned = halves.combine_setup(received)
        errors.append(invalid_calls.attempt(lambda: halves.combine_setup(received))["error"])
        combined = halves.combine_teardown(sent, returned)
        errors.append(
            invalid_calls.attempt(lambda: halves.combine_teardown(sent, returned))["error"]
        )
        # Outputs of an older setup are refused by a new one's teardown.
        again = halves.dispatch_setup()
        errors.append(invalid_calls.attempt(lambda: halves.dispatch_teardown(sent))["error"])
        halves.dispatch_teardown(again)
        return combined.tolist(), errors

    for rank, (combined, errors) in enumerate(harness.run_world(world, 2, fn)):
        assert combined == BASIC.combined[rank]
        assert [error["types"][0] for error in errors] == ["SequenceError"] * 5 + [
            "ArgumentValueError"
        ]
        assert errors[-1]["argument"] == "comm_cmd_info"


def test_setups_do_not_wait():
    """Rank 0 sets up, and works, before rank 1 has come."""
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank])
        halves.dispatch_teardown(halves.dispatch_setup())  # from now on the arguments are known
        if ctx.rank == 0:
            sent = halves.dispatch_setup()
            ctx_done.append("set up")
        else:
            while not ctx_done:
                time.sleep(0.001)
            sent = halves.dispatch_setup()
        return halves.dispatch_teardown(sent)[3].tolist()

    ctx_done: list[str] = []
    assert harness.run_world("local", 2, fn) == BASIC.token_nums


# Refusals.


@pytest.mark.parametrize("half, name", [(half, n) for half in SETUPS for n in INVALID[half]])
def test_a_setup_is_refused(half, name):
    """By one rank; the other is aborted in its teardown, and both go on."""
    changes, code, argument = INVALID[half][name]
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank])
        halves.round_trip()
        bad = changes if ctx.rank == 1 else {}

        def attempt():
            if half == "dispatch_setup":
                return halves.dispatch_teardown(halves.dispatch_setup(**bad))
            sent = halves.dispatch_setup()
            return halves.combine_teardown(
                sent, halves.combine_setup(halves.dispatch_teardown(sent), **bad)
            )

        error = invalid_calls.attempt(attempt)["error"]
        return error, halves.round_trip()["combined"].tolist()

    actual = harness.run_world("local", 2, fn)
    (peer, _), (culprit, _) = actual
    assert culprit["code"] == code, culprit["traceback"]
    assert culprit["argument"] == argument, culprit["traceback"]
    assert peer["types"][0] == "PeerAbortError", peer["traceback"]
    assert [combined for _, combined in actual] == BASIC.combined


@pytest.mark.parametrize("half, name", [(half, n) for half in TEARDOWNS for n in INVALID[half]])
def test_a_teardown_is_refused(half, name):
    """Only on the culprit, which repeats the correct call."""
    changes, code, argument = INVALID[half][name]
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank])
        bad = changes if ctx.rank == 1 else {}
        errors, sent = [], halves.dispatch_setup()
        if half == "dispatch_teardown" and bad:
            errors.append(
                invalid_calls.attempt(lambda: halves.dispatch_teardown(sent, **bad))["error"]
            )
        returned = halves.combine_setup(halves.dispatch_teardown(sent))
        if half == "combine_teardown" and bad:
            errors.append(
                invalid_calls.attempt(lambda: halves.combine_teardown(sent, returned, **bad))[
                    "error"
                ]
            )
        return errors, halves.combine_teardown(sent, returned).tolist()

    (none, first), ((error,), second) = harness.run_world("local", 2, fn)
    assert none == []
    assert (error["code"], error["argument"]) == (code, argument), error["traceback"]
    assert [first, second] == BASIC.combined


def test_shared_ranks_are_half_of_the_group_at_most():
    """Row 10, and 13 #13."""
    x, ids = torch.ones(1, 4).bfloat16(), torch.zeros(1, 1, dtype=torch.int32)

    def fn(ctx):
        setup = torch_npu.npu_moe_distribute_dispatch_setup
        where = (ctx.ep_group, 3, ctx.ep_rank, 1)
        return invalid_calls.attempt(lambda: setup(x, ids, *where, shared_expert_rank_num=2))[
            "error"
        ]

    actual = harness.run_world("local", 3, fn)
    culprits = [error for error in actual if error["types"][0] != "PeerAbortError"]
    assert {(error["code"], error["argument"]) for error in culprits} == {
        (561002, "shared_expert_rank_num")
    }


@pytest.mark.parametrize(
    "profile, changes, argument",
    [
        ("a3", {"scales": torch.ones(5, 1024), "quant_mode": 2}, "scales"),
        ("a3", {"quant_mode": 4}, "quant_mode"),
        ("a3", {"comm_type": 2}, "comm_type"),
        ("950", {"quant_mode": 2, "comm_type": 2}, "quant_mode"),
        ("950", {"comm_type": 0}, "comm_type"),
        ("a2", {}, None),
    ],
)
def test_refused_on_a_product(profile, changes, argument):
    x, ids = torch.ones(1, 1024).bfloat16(), torch.zeros(1, 1, dtype=torch.int32)

    def fn(ctx):
        where = (ctx.ep_group, 2, ctx.ep_rank, 4)
        setup = torch_npu.npu_moe_distribute_dispatch_setup
        return invalid_calls.attempt(lambda: setup(x, ids, *where, **changes))["error"]

    set_profile(profile)
    try:
        actual = harness.run_world("local", 2, fn)
    finally:
        set_profile(None)
    assert all(error is not None for error in actual)
    culprits = [error for error in actual if error["types"][0] != "PeerAbortError"]
    assert {error["argument"] for error in culprits} == {argument}


# Compiled.


def test_shapes_are_known_in_advance():
    calls = example_calls(SHARED)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank], record=True)
        halves.round_trip()
        wrong = []
        for name, given, real in halves.made:
            moved = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in given.items()}
            meta = getattr(torch.ops.moe_triton, name)(torch.zeros((), device="meta"), **moved)
            for one, other in zip(as_tuple(real), as_tuple(meta), strict=True):
                if (one is None) != (other is None):
                    wrong.append(name)
                elif one is not None and (one.shape, one.dtype) != (other.shape, other.dtype):
                    wrong.append((name, one.shape, other.shape))
        return len(halves.made), wrong

    for actual in harness.run_world("local", 4, fn):
        assert actual == (4, [])


def as_tuple(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)

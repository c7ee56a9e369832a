"""Dispatch and combine in two halves each: worked examples, order, refusals, shapes in advance.

That any drawn configuration equals the definition is the business of test_hypothesis_split.
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
    for rank, found in enumerate(results):
        n, counts = len(example.expand_x[rank]), example.ep_recv_counts[rank]
        rows, scales, assist, nums = found["received"]
        assert rows[:n].tolist() == example.expand_x[rank]
        assert scales is None
        assert len(assist) == example.capacity[rank] * 128
        assert assist[: len(counts)].tolist() == counts
        assert nums.tolist() == example.token_nums[rank]
        _, expand_idx, _ = found["sent"]
        assert expand_idx.tolist() == example.expand_idx[rank]
        assert found["combined"].tolist() == example.combined[rank]


def test_worked_example_of_y():
    calls = example_calls(BASIC)
    for rank, found in enumerate(harness.run_world("local", 2, lambda ctx: round_trip(ctx, calls))):
        y, _, info = found["sent"]
        assert (y.shape, y.dtype) == ((6, 256), torch.bfloat16)
        x = calls[rank]["dispatch"]["x"]
        assert torch.equal(y[:, :2], x.repeat_interleave(2, 0))
        assert (info.shape, info.dtype) == (((6 + 4) * 16,), torch.int32)
        sent, back = found["returned"]
        assert (sent.shape, sent.dtype) == ((12, 512), torch.int8)
        assert back.shape == ((12 + 2) * 16,)
        assert found["received"][2][:4].tolist() == [[2, 5, 6, 7], [2, 3, 4, 5]][rank]


def test_rows_of_y_are_quantised_with_the_factors_of_their_expert():
    """13 #30: y has the documented shape; the scale is at the next multiple of 32 bytes."""
    x = torch.tensor([[1.0, -2.0, 0.5, 4.0]]).bfloat16()
    scales = torch.tensor([[1.0, 1, 1, 1], [2, 0.5, 1, 4], [1, 1, 1, 1]])

    def fn(ctx):
        ids = torch.tensor([[1, 0]], dtype=torch.int32)
        where = (ctx.ep_group, 1, 0, 2)
        found = torch_npu.npu_moe_distribute_dispatch_setup(
            x, ids, *where, scales=scales, quant_mode=2
        )
        torch_npu.npu_moe_distribute_dispatch_teardown(
            x, found[0], ids, found[2], *where, quant_mode=2
        )
        return found[0]

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
        return y.view(torch.uint8), y.dtype, None if scales is None else scales[0]

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

    for rank, found in enumerate(harness.run_world("local", 2, fn)):
        assert found[3].tolist() == BASIC.token_nums_running[rank]


# Order.


@pytest.mark.parametrize("world", harness.WORLDS)
def test_order(world):
    """A second setup, a second teardown and a teardown without setup are refused at once."""
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank])
        errors = [invalid_calls.attempt(lambda: halves.receive(halves.nothing_sent()))["error"]]
        sent = halves.send()
        errors.append(invalid_calls.attempt(halves.send)["error"])
        received = halves.receive(sent)
        errors.append(invalid_calls.attempt(lambda: halves.receive(sent))["error"])
        returned = halves.give_back(received)
        errors.append(invalid_calls.attempt(lambda: halves.give_back(received))["error"])
        combined = halves.sum_up(sent, returned)
        errors.append(invalid_calls.attempt(lambda: halves.sum_up(sent, returned))["error"])
        # An older setup's answer is not taken for that of a new one.
        again = halves.send()
        errors.append(invalid_calls.attempt(lambda: halves.receive(sent))["error"])
        halves.receive(again)
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
        halves.receive(halves.send())  # from now on the arguments are known
        if ctx.rank == 0:
            sent = halves.send()
            ctx_done.append("set up")
        else:
            while not ctx_done:
                time.sleep(0.001)
            sent = halves.send()
        return halves.receive(sent)[3].tolist()

    ctx_done: list[str] = []
    assert harness.run_world("local", 2, fn) == BASIC.token_nums


# Refusals.

SETUP = {
    "x None": ({"x": None}, 161001, "x"),
    "x float8": ({"x": torch.ones(3, 2).to(torch.float8_e5m2)}, 161002, "x"),
    "ids int64": ({"expert_ids": torch.zeros(3, 2, dtype=torch.int64)}, 161002, "expert_ids"),
    "y_dtype HiFloat8": ({"y_dtype": 290, "quant_mode": 2}, 161002, "y_dtype"),
    "comm_type text": ({"comm_type": "0"}, 161002, "comm_type"),
    "comm_type 3": ({"comm_type": 3}, 561002, "comm_type"),
    "comm_alg": ({"comm_alg": "fullmesh"}, 561002, "comm_alg"),
    "row 14": ({"quant_mode": 2, "scales": torch.ones(6, 2)}, 561002, "scales"),
}
TEARDOWN = {
    "y None": ({"y": None}, 161001, "y"),
    "info int64": ({"comm_cmd_info": torch.zeros(8, dtype=torch.int64)}, 161002, "comm_cmd_info"),
    "x of another shape": ({"x": torch.ones(2, 2).bfloat16()}, 561002, "x"),
    "y of another dtype": ({"y": torch.zeros(6, 256).char()}, 561002, "y"),
    "quant_mode": ({"quant_mode": 2}, 561002, "quant_mode"),
    "global_bs": ({"global_bs": 6}, 561002, "global_bs"),
    "moe_expert_num": ({"moe_expert_num": 8}, 561002, "moe_expert_num"),
    "token_nums_type": ({"expert_token_nums_type": 2}, 561002, "expert_token_nums_type"),
}
COMBINE_SETUP = {
    "assist None": ({"assist_info_for_combine": None}, 161001, "assist_info_for_combine"),
    "assist short": (
        {"assist_info_for_combine": torch.zeros(9, dtype=torch.int32)},
        561002,
        "assist_info_for_combine",
    ),
    "assist wrong": (
        {"assist_info_for_combine": torch.full((1536,), -1, dtype=torch.int32)},
        561002,
        "assist_info_for_combine",
    ),
    "expand_x rows": ({"expand_x": torch.ones(3, 2).bfloat16()}, 561002, "expand_x"),
    "mode 1": ({"comm_quant_mode": 1}, 561002, "comm_quant_mode"),
}
COMBINE_TEARDOWN = {
    "weights None": ({"expert_scales": None}, 161001, "expert_scales"),
    "weights half": ({"expert_scales": torch.ones(3, 2).half()}, 161002, "expert_scales"),
    "idx of other ids": (
        {"expand_idx": torch.full((6,), 5, dtype=torch.int32)},
        561002,
        "expand_idx",
    ),
    "mask rows": ({"x_active_mask": torch.ones(2, dtype=torch.bool)}, 561002, "x_active_mask"),
    "addend": ({"shared_expert_x": torch.ones(2, 2).bfloat16()}, 561002, "shared_expert_x"),
}


@pytest.mark.parametrize(
    "half, name", [("send", n) for n in SETUP] + [("give_back", n) for n in COMBINE_SETUP]
)
def test_a_setup_is_refused(half, name):
    """By one rank; the other hears of it in its teardown, and both go on."""
    changes, code, argument = (SETUP | COMBINE_SETUP)[name]
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank])
        halves.round_trip()
        bad = changes if ctx.rank == 1 else {}

        def attempt():
            if half == "send":
                return halves.receive(halves.send(**bad))
            sent = halves.send()
            return halves.sum_up(sent, halves.give_back(halves.receive(sent), **bad))

        error = invalid_calls.attempt(attempt)["error"]
        return error, halves.round_trip()["combined"].tolist()

    found = harness.run_world("local", 2, fn)
    (heard, _), (said, _) = found
    assert said["code"] == code, said["traceback"]
    assert said["argument"] == argument, said["traceback"]
    assert heard["types"][0] == "PeerAbortError", heard["traceback"]
    assert [combined for _, combined in found] == BASIC.combined


@pytest.mark.parametrize(
    "half, name", [("receive", n) for n in TEARDOWN] + [("sum_up", n) for n in COMBINE_TEARDOWN]
)
def test_a_teardown_is_refused(half, name):
    """Only on the rank that is wrong, which repeats it right."""
    changes, code, argument = (TEARDOWN | COMBINE_TEARDOWN)[name]
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = split_phase_calls.Halves(ctx, calls[ctx.rank])
        bad = changes if ctx.rank == 1 else {}
        errors, sent = [], halves.send()
        if half == "receive" and bad:
            errors.append(invalid_calls.attempt(lambda: halves.receive(sent, **bad))["error"])
        returned = halves.give_back(halves.receive(sent))
        if half == "sum_up" and bad:
            errors.append(
                invalid_calls.attempt(lambda: halves.sum_up(sent, returned, **bad))["error"]
            )
        return errors, halves.sum_up(sent, returned).tolist()

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

    found = harness.run_world("local", 3, fn)
    said = [one for one in found if one["types"][0] != "PeerAbortError"]
    assert {(one["code"], one["argument"]) for one in said} == {(561002, "shared_expert_rank_num")}


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
        found = harness.run_world("local", 2, fn)
    finally:
        set_profile(None)
    assert all(one is not None for one in found)
    said = [one for one in found if one["types"][0] != "PeerAbortError"]
    assert {one["argument"] for one in said} == {argument}


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

    for found in harness.run_world("local", 4, fn):
        assert found == (4, [])


def as_tuple(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)

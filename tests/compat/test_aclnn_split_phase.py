"""The split-phase operators through the aclnn interface: worked examples, sizes, refusals."""

from __future__ import annotations

import inspect
import re
from typing import Any

import aclnn_calls
import harness
import invalid_calls
import pytest
import split_phase_calls
import torch
from aclnn_calls import ROWS, poisoned
from split_phase_rows import INVALID, SETUPS, TEARDOWNS
from worked_examples import BASIC, EXAMPLES, PLAIN, example_calls

from moe_triton import set_profile
from moe_triton.compat import aclnn

NAMES = {
    "dispatch_setup": "aclnnMoeDistributeDispatchSetup",
    "dispatch_teardown": "aclnnMoeDistributeDispatchTeardown",
    "combine_setup": "aclnnMoeDistributeCombineSetup",
    "combine_teardown": "aclnnMoeDistributeCombineTeardown",
}
CALC = {
    "dispatch": aclnn.aclnnMoeDistributeDispatchSetupTeardownCalcOutputSize,
    "combine": aclnn.aclnnMoeDistributeCombineSetupTeardownCalcOutputSize,
}
RUNTIME = aclnn.ACLNN_ERR_RUNTIME_ERROR


class Refused(Exception):
    """A call that ended with an error status, described by ``ending``."""

    def __init__(self, ending: dict) -> None:
        super().__init__(str(ending))
        self.ending = ending


def sizes_of(kind: str, call: dict) -> list[int]:
    """The sizes that the helper returns, without the status."""
    values = []
    for parameter in inspect.signature(CALC[kind]).parameters:
        name = aclnn_calls.keyword("", parameter)
        rest = {"shared_expert_num": 1, "expert_token_nums_type": 1, "comm_alg": ""}
        tensors = ("x", "expert_ids", "scales", "x_active_mask", "assist_info_for_combine")
        values.append(call.get(name, rest.get(name, None if name in tensors else 0)))
    status, *sizes = CALC[kind](*values)
    assert status == 0, aclnn.aclnn_last_error()
    return sizes


def outputs_of(half: str, call: dict) -> list[torch.Tensor | None]:
    """Tensors for the outputs of a correct call."""
    rows, local = aclnn_calls.place(call)
    int32, mode = torch.int32, call.get("quant_mode", 0)
    tokens, top_k = call["expert_ids"].shape
    if half == "dispatch_setup":
        width, index, _, info = sizes_of("dispatch", call)
        shared = call["shared_expert_num"] if call["shared_expert_rank_num"] else 0
        y = poisoned((tokens * (top_k + shared), width), ROWS.get(mode, call["x"].dtype))
        return [y, poisoned((index,), int32), poisoned((info,), int32)]
    if half == "dispatch_teardown":
        _, _, assist, _ = sizes_of("dispatch", call)
        hidden = call["x"].shape[1]
        scales = poisoned((rows,), torch.float32)  # also where none are written
        x = poisoned((rows, hidden), call["y"].dtype)
        return [x, scales, poisoned((assist,), int32), poisoned((local,), torch.int64)]
    if half == "combine_setup":
        width, info = sizes_of("combine", call)
        return [poisoned((rows, width), torch.int8), poisoned((info,), int32)]
    return aclnn_calls.combine_outputs(call)


class Halves(split_phase_calls.Halves):
    """The four operators of one rank, in two phases each."""

    def _op(self, half: str, given: dict, changes: dict) -> Any:
        right = {**self._agreed, **self._ids, **given}
        # The outputs fit what is asked for, right or wrong.
        sized = {
            name: changes[name] for name in ("quant_mode", "moe_expert_num") if name in changes
        }
        outputs = outputs_of(half, right | sized)
        ending = aclnn_calls.ending(NAMES[half], right | changes, outputs)
        if ending["status"]:
            raise Refused(ending)
        return outputs[0] if half == "combine_teardown" else tuple(outputs)


def attempt(fn: Any) -> dict | None:
    """How a refused call ended; None if it was accepted."""
    try:
        fn()
    except Refused as refused:
        return refused.ending
    return None


@pytest.mark.parametrize("name", PLAIN)
def test_worked_examples(name):
    example = EXAMPLES[name]
    calls = example_calls(example)

    def fn(ctx):
        return Halves(ctx, calls[ctx.rank]).round_trip()

    for rank, actual in enumerate(harness.run_world("local", example.group.world_size, fn)):
        n, counts = len(example.expand_x[rank]), example.ep_recv_counts[rank]
        rows, _, assist, nums = actual["received"]
        assert rows[:n].tolist() == example.expand_x[rank]
        assert assist[: len(counts)].tolist() == counts
        assert nums.tolist() == example.token_nums[rank]
        assert actual["sent"][1].tolist() == example.expand_idx[rank]
        assert actual["combined"].tolist() == example.combined[rank]


def test_sizes():
    """BS 3, K 2, W 2, L 2, H 2: A = 12."""
    call = example_calls(BASIC)[0]["dispatch"] | {"ep_rank_id": 0}
    assert sizes_of("dispatch", call) == [256, 6, 12 * 128, (6 + 4) * 16]
    # Rows of 1 byte an element, and a scale at the next multiple of 32.
    assert sizes_of("dispatch", call | {"quant_mode": 2})[0] == 512
    call["expand_x"] = torch.zeros(12, 2).bfloat16()
    assert sizes_of("combine", call) == [512, (12 + 2) * 16]


def test_sizes_refused():
    x, ids = torch.ones(3, 2).bfloat16(), torch.zeros(3, 2, dtype=torch.int32)
    dispatch, combine = CALC["dispatch"], CALC["combine"]
    where, rest = ("not resolved", 2, 0, 4), (0, 0, 0, 0, 0, 1, 0, None)
    assert dispatch(x, ids, None, None, *where, *rest)[0] == 0
    assert dispatch(None, ids, None, None, *where, *rest) == (161001, 0, 0, 0, 0)
    assert "CalcOutputSize: x must be given" in aclnn.aclnn_last_error()
    assert dispatch(x[0], ids, None, None, *where, *rest)[0] == 561002
    assert dispatch(x, ids, None, None, "", 2, 0, 3, *rest)[0] == 561002
    assert "moeExpertNum" in aclnn.aclnn_last_error()
    assert combine(x, ids.float(), None, *where, *rest[1:]) == (161002, 0, 0)
    assert combine(x, ids, None, "", "2", 0, 4, *rest[1:])[0] == 161002


VALUES = ("assist wrong", "idx of other ids")  # where a value of a tensor is wrong
# Arguments that only the setup can refute, which may not have run yet.
OF_SETUP = ("y of another dtype", "quant_mode", "global_bs", "moe_expert_num")


def check(ending: dict, name: str, row: tuple) -> None:
    _, code, argument = row
    if name == "x of another shape":
        argument = "expert_ids"  # which does not fit x either
    assert ending["status"] == code, ending
    parameters = (
        parameter
        for function in NAMES.values()
        for parameter in aclnn_calls.parameters(function)
        if aclnn_calls.keyword(function, parameter) == argument
    )
    assert any(f": {parameter} must" in ending["sentence"] for parameter in parameters), ending
    assert ending["phase"] == (2 if name in VALUES + OF_SETUP else 1), ending


@pytest.mark.parametrize(
    "half, name",
    # In C the dtype of yOut stands for y_dtype.
    [(half, n) for half in SETUPS for n in INVALID[half] if not n.startswith("y_dtype")],
)
def test_a_setup_is_refused(half, name):
    """By one rank; the other is aborted in its teardown, and both go on."""
    row = INVALID[half][name]
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = Halves(ctx, calls[ctx.rank])
        halves.round_trip()
        bad = row[0] if ctx.rank == 1 else {}

        def calls_of_one():
            if half == "dispatch_setup":
                return halves.dispatch_teardown(halves.dispatch_setup(**bad))
            sent = halves.dispatch_setup()
            return halves.combine_teardown(
                sent, halves.combine_setup(halves.dispatch_teardown(sent), **bad)
            )

        return attempt(calls_of_one), halves.round_trip()["combined"].tolist()

    actual = harness.run_world("local", 2, fn, limit=20.0)
    (peer, _), (culprit, _) = actual
    check(culprit, name, row)
    assert (peer["phase"], peer["status"]) == (2, RUNTIME)
    assert peer["seconds"] < invalid_calls.AT_ONCE
    assert [combined for _, combined in actual] == BASIC.combined


@pytest.mark.parametrize(
    "half, name",
    [(half, n) for half in TEARDOWNS for n in INVALID[half]],
)
def test_a_teardown_is_refused(half, name):
    """Only on the culprit, which repeats the correct call."""
    row = INVALID[half][name]
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = Halves(ctx, calls[ctx.rank])
        bad = row[0] if ctx.rank == 1 else {}
        endings, sent = [], halves.dispatch_setup()
        if half == "dispatch_teardown" and bad:
            endings.append(attempt(lambda: halves.dispatch_teardown(sent, **bad)))
        returned = halves.combine_setup(halves.dispatch_teardown(sent))
        if half == "combine_teardown" and bad:
            endings.append(attempt(lambda: halves.combine_teardown(sent, returned, **bad)))
        return endings, halves.combine_teardown(sent, returned).tolist()

    (none, first), ((ending,), second) = harness.run_world("local", 2, fn, limit=20.0)
    assert none == []
    check(ending, name, row)
    assert [first, second] == BASIC.combined


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize("position", range(4))
def test_a_dispatch_teardown_needs_all_outputs(position, mode):
    """Also the tensor for scales if rows are not quantised."""
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = Halves(ctx, calls[ctx.rank])
        ending = {}

        def plan_only(half: str, given: dict, changes: dict) -> Any:
            right = {**halves._agreed, **halves._ids, **given} | {"quant_mode": mode}
            outputs = outputs_of(half, right)
            outputs[position] = None
            ending.update(aclnn_calls.ending(NAMES[half], right, outputs))
            raise Refused(ending)

        nothing = halves.no_setup()
        halves._op = plan_only
        attempt(lambda: halves.dispatch_teardown(nothing))
        return ending

    for ending in harness.run_world("local", 2, fn):
        assert (ending["phase"], ending["status"]) == (1, 161001), ending
        assert "Out must be given" in ending["sentence"]


def test_a_teardown_without_setup():
    """It may be planned; the second phase refuses it."""
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = Halves(ctx, calls[ctx.rank])
        ending = attempt(lambda: halves.dispatch_teardown(halves.no_setup()))
        return ending, halves.round_trip()["combined"].tolist()

    actual = harness.run_world("local", 2, fn)
    for ending, _ in actual:
        assert (ending["phase"], ending["status"]) == (2, RUNTIME), ending
        assert "got none in flight" in ending["sentence"]
    assert [combined for _, combined in actual] == BASIC.combined


def test_all_four_planned_ahead():
    calls = example_calls(BASIC)

    def fn(ctx):
        halves = Halves(ctx, calls[ctx.rank])
        plans = []

        def plan_only(half: str, given: dict, changes: dict) -> Any:
            right = {**halves._agreed, **halves._ids, **given}
            outputs = outputs_of(half, right)
            plans.append((NAMES[half], aclnn_calls.plan(NAMES[half], right, outputs)))
            return outputs[0] if half == "combine_teardown" else tuple(outputs)

        halves._op = plan_only
        combined = halves.round_trip()["combined"]
        return [aclnn_calls.launch(*one) for one in plans], combined.tolist()

    actual = harness.run_world("local", 2, fn)
    assert [statuses for statuses, _ in actual] == [[0] * 4] * 2
    assert [combined for _, combined in actual] == BASIC.combined


@pytest.mark.parametrize("half", NAMES)
@pytest.mark.parametrize(
    "name, changes, parameter",
    [
        ("row 7", {"expert_shard_type": 1}, "expertShardType"),
        ("row 10", {"shared_expert_rank_num": 2}, "sharedExpertRankNum"),
        ("row 25", {"comm_type": 3}, "commType"),
        ("row 25 comm_alg", {"comm_alg": "fullmesh"}, "commAlg"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_of_all_halves(half, name, changes, parameter):
    """The first phase of a teardown refuses them with or without a setup."""
    example = EXAMPLES["basic"]
    calls = example_calls(example)

    def fn(ctx):
        halves = Halves(ctx, calls[ctx.rank])
        steps = {
            "dispatch_setup": halves.dispatch_setup,
            "dispatch_teardown": lambda **bad: halves.dispatch_teardown(halves.no_setup(), **bad),
            "combine_setup": lambda **bad: halves.combine_setup(
                (None, None, torch.zeros(12 * 128, dtype=torch.int32)), **bad
            ),
            "combine_teardown": lambda **bad: halves.combine_teardown(
                (None, torch.zeros(6, dtype=torch.int32)),
                (torch.zeros(12, 512).char(), torch.zeros(224, dtype=torch.int32)),
                **bad,
            ),
        }
        return attempt(lambda: steps[half](**changes))

    for ending in harness.run_world("local", 2, fn, limit=20.0):
        assert (ending["phase"], ending["status"]) == (1, 561002), ending
        assert parameter in ending["sentence"]


@pytest.mark.parametrize(
    "product, changes, parameter",
    [
        ("a3", {"quant_mode": 4}, "quantMode"),
        ("a3", {"comm_type": 2}, "commType"),
        ("950", {"comm_type": 0}, "commType"),
        ("a2", {}, None),
    ],
)
@pytest.mark.parametrize("half", ["dispatch_setup", "dispatch_teardown"])
def test_refused_on_a_product(half, product, changes, parameter):
    x, ids = torch.ones(1, 1024).bfloat16(), torch.zeros(1, 1, dtype=torch.int32)

    def fn(ctx):
        call = {"x": x, "expert_ids": ids, "ep_world_size": 2, "moe_expert_num": 4}
        call |= {"shared_expert_num": 1, "shared_expert_rank_num": 0, "global_bs": 0}
        call |= {"group_ep": ctx.ep_group, "ep_rank_id": ctx.ep_rank, **changes}
        if half == "dispatch_teardown":
            call |= {"y": torch.zeros(1, 1024).bfloat16()}
            call |= {"comm_cmd_info": torch.zeros(80, dtype=torch.int32)}
        outputs = outputs_of(half, call)
        return aclnn_calls.ending(NAMES[half], call, outputs)

    set_profile(product)
    try:
        actual = harness.run_world("local", 2, fn, limit=20.0)
    finally:
        set_profile(None)
    for ending in actual:
        assert ending["phase"] == 1, ending
        assert ending["status"] == (561002 if parameter else RUNTIME)
        assert re.search(rf"{parameter}\b.* on {product}|operator of a2", ending["sentence"]), (
            ending
        )

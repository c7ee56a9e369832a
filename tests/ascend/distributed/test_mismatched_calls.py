"""Ranks whose calls are each right but do not fit together: every rank raises, with both values.

At the first call of a group and at a later one; after each, the next correct call of the same group
must return the right bits.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

import harness
import pytest
import torch
from constraint_rows import BASES, PLAIN, Base, prepare
from definition import Group
from harness import call_combine, call_dispatch
from invalid_calls import ANYTHING, AT_ONCE, DOORS, VALUE, Change, attempt, put

V1 = DOORS["torch_npu v1"]
NOTHING = put()


@dataclass(frozen=True)
class Mismatch:
    """Two calls, each right by itself, on ranks of one group.

    Attributes:
        usual: the call of all ranks but one.
        other: that of the dissenting rank.
        argument: pattern of the argument's name.
        values: patterns of the two values, usual and other.
        change: edits the dissenter's dispatch.
    """

    usual: Base
    other: Base
    argument: str
    values: tuple[str, str]
    change: Change = NOTHING

    def prepare(self) -> tuple:
        """The usual calls with their outputs, and the dissenting call of every rank."""
        dissent = [
            {op: dict(args) for op, args in call.items()} for call in prepare(self.other, 1).calls
        ]
        for call in dissent:
            self.change(call["dispatch"])
        return prepare(self.usual, 1), dissent

    def check(self, refusal: dict) -> None:
        """Any rank raises at once, and names the argument and both values."""
        error = refusal["error"]
        assert error is not None, "the call was accepted"
        assert "ArgumentMismatchError" in error["types"], error["traceback"]
        assert error["code"] == VALUE
        assert re.search(self.argument, error["argument"] or ""), error["traceback"]
        text = error["text"]
        for pattern in (self.argument, *self.values, "rank"):
            assert re.search(pattern, text), text
        assert refusal["seconds"] < AT_ONCE


BASE = BASES["plain"]
WIDE = Group(world_size=4, num_experts=4, top_k=2, hidden=4, shared_ranks=2)
INT8 = Base(replace(PLAIN, quant_mode=2))


def unlike(**changes) -> Base:
    return Base(replace(PLAIN, **changes))


MISMATCHES = {
    "moe_expert_num": Mismatch(
        BASE, unlike(num_experts=9), r"moe_expert_num", (r"\b6\b", r"\b9\b")
    ),
    "quant_mode": Mismatch(BASE, INT8, r"quant_mode", (r"\b0\b", r"\b2\b")),
    "global_bs": Mismatch(
        unlike(global_bs=9), unlike(global_bs=12), r"global_bs", (r"\b9\b", r"\b12\b")
    ),
    "global_bs 0": Mismatch(BASE, unlike(global_bs=12), r"global_bs", (r"\b0\b", r"\b12\b")),
    "hidden size": Mismatch(BASE, unlike(hidden=8), r"\bx\b|expand_x", (r"\b4\b", r"\b8\b")),
    "top-k": Mismatch(BASE, unlike(top_k=1), r"expert_ids", (r"\b2\b", r"\b1\b")),
    "dtype": Mismatch(
        BASE, unlike(dtype="float16"), r"\bx\b|expand_x", (r"bfloat16", r"\bfloat16|\.float16")
    ),
    "shared_expert_rank_num": Mismatch(
        BASE, unlike(shared_ranks=1), r"shared_expert_rank_num", (r"\b0\b", r"\b1\b")
    ),
    "shared_expert_num": Mismatch(
        Base(WIDE), Base(replace(WIDE, shared_experts=2)), r"shared_expert_num", (r"\b1\b", r"2")
    ),
    "BS with global_bs 0": Mismatch(BASE, Base(PLAIN, 5), r"\bBS\b", (r"\b3\b", r"\b5\b")),
    "no tokens with global_bs 0": Mismatch(BASE, Base(PLAIN, 0), r"\bBS\b", (r"\b3\b", r"\b0\b")),
    "scales present": Mismatch(
        INT8, INT8, r"scales", (ANYTHING, ANYTHING), put(scales=torch.ones(6, 4))
    ),
}


def run(case, world, fn):
    """``fn(ctx, mine)`` -> refusals and round trips on every rank; check both."""
    prepared, dissent = case.prepare()
    results = prepared.run(world, lambda ctx, call: fn(ctx, call, dissent[ctx.rank]))
    for rank, (refusals, rounds) in enumerate(results):
        for refusal in refusals:
            case.check(refusal)
        for result in rounds:
            prepared.check(rank, result)


@pytest.mark.parametrize("dissenter", [0, -1], ids=["first rank", "last rank"])
@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_disagree_in_dispatch(name, dissenter):
    case = MISMATCHES[name]
    culprit = dissenter % case.usual.group.world_size

    def fn(ctx, call, dissent):
        mine = dissent if ctx.rank == culprit else call
        refusals, rounds = [], []
        for count in (8, 1):
            refusals.append(attempt(lambda: call_dispatch(ctx, mine)))
            rounds += [V1.round_trip(ctx, call) for _ in range(count)]
        return refusals, rounds

    run(case, "local", fn)


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("world", harness.WORLDS)
def test_disagreement_before_and_after_the_peers_came(world, late):
    def fn(ctx, call, dissent):
        mine = dissent if ctx.rank == 1 else call
        refusals, rounds = [], []
        for count in (3, 1):
            if ctx.rank == late:
                time.sleep(0.3)
            refusals.append(attempt(lambda: call_dispatch(ctx, mine)))
            rounds += [V1.round_trip(ctx, call) for _ in range(count)]
        return refusals, rounds

    run(MISMATCHES["moe_expert_num"], world, fn)


def test_every_rank_disagrees():
    """Three ranks, three numbers of experts; then they agree on a fourth."""
    numbers = (6, 9, 12)
    each = [prepare(unlike(num_experts=number), 1) for number in numbers]
    agreed = prepare(unlike(num_experts=15), 1)

    def fn(ctx, call):
        refusal = attempt(lambda: call_dispatch(ctx, each[ctx.rank].calls[ctx.rank]))
        return refusal, [V1.round_trip(ctx, call) for _ in range(2)]

    for rank, (refusal, rounds) in enumerate(agreed.run("local", fn)):
        error = refusal["error"]
        assert error is not None
        assert "ArgumentMismatchError" in error["types"], error["traceback"]
        assert error["argument"] == "moe_expert_num"
        assert str(numbers[rank]) in error["text"], error["traceback"]
        for result in rounds:
            agreed.check(rank, result)


# Edits of a combine that leave it right by itself. Nine experts: three local ones, nine sums.
IN_COMBINE = {
    "hidden size": Change(lambda args: args.update(expand_x=args["expand_x"].repeat(1, 2))),
    "dtype": Change(lambda args: args.update(expand_x=args["expand_x"].half())),
    "global_bs 0": put(global_bs=12)
    | Change(lambda args: args.update(expand_x=args["expand_x"].repeat(2, 1))),
    "moe_expert_num": put(moe_expert_num=9, ep_send_counts=torch.arange(1, 10, dtype=torch.int32)),
}


@pytest.mark.parametrize("name", IN_COMBINE)
def test_ranks_disagree_in_combine(name):
    case = MISMATCHES[name]

    def fn(ctx, call, _):
        mine = dict(call["combine"])
        if ctx.rank == 1:
            IN_COMBINE[name](mine)
        refusals, rounds = [], []
        for count in (8, 1):
            outputs = call_dispatch(ctx, call)
            refusals.append(attempt(lambda o=outputs: call_combine(ctx, call, o, **mine)))
            rounds += [V1.round_trip(ctx, call) for _ in range(count)]
        return refusals, rounds

    run(replace(case, usual=BASE, other=BASE), "local", fn)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_processes_disagree(world):
    """One case after the other, each by another rank."""
    cases = [case for case in MISMATCHES.values() if case.usual.group.world_size == 3]
    prepared = [case.prepare() for case in cases]

    def fn(ctx, _):
        results = []
        for i, (usual, dissent) in enumerate(prepared):
            call = usual.calls[ctx.rank]
            mine = dissent[ctx.rank] if ctx.rank == i % 3 else call
            refusal = attempt(lambda mine=mine: call_dispatch(ctx, mine))
            results.append((refusal, [V1.round_trip(ctx, call) for _ in range(2)]))
        return results

    for rank, results in enumerate(prepare(BASE, 1).run(world, fn)):
        for case, (usual, _), (refusal, rounds) in zip(cases, prepared, results, strict=True):
            case.check(refusal)
            for result in rounds:
                usual.check(rank, result)

"""Every row of the table of invalid calls, through torch_npu's functions and the aclnn interface.

After each refusal the next correct call of the same group must return the right bits. Rows of a
product run under its profile, and so do the correct calls around them. A call that hangs fails its
test with the stacks of all threads.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace

import definition
import harness
import numpy as np
import pytest
from constraint_rows import BASES, MIXED_EXPERTS, ROWS, Base, Prepared, prepare
from definition import Tokens
from invalid_calls import DOORS, VALUE, Change, InvalidCall, attempt, put

import moe_triton

TORCH_NPU = [name for name in DOORS if name.startswith("torch_npu")]
V1 = DOORS["torch_npu v1"]
V1_ROWS = ROWS["torch_npu v1"]


@pytest.fixture
def profile(request):
    moe_triton.set_profile(request.param)
    yield
    moe_triton.set_profile(None)


def check_ending(door, bad, ending, rank, culprit) -> None:
    """World rank ``rank`` is the ``culprit``, or is aborted by it."""
    if rank == culprit:
        door.check_refusal(bad, ending)
    else:
        # In pairs a rank is aborted by one that shares its experts, or by one of its plane.
        tp_world_size = BASES[bad.base].group.tp_world_size
        door.check_peer(bad, ending, *divmod(culprit, tp_world_size))


def refuse(door, world, rounds, prepared):
    """Run rounds of (invalid call, culprits) on a world, each followed by a correct round trip."""

    def fn(ctx, call):
        results = []
        for bad, culprits in rounds:
            change = bad.change if ctx.rank in culprits else put()
            ending = door.bad_call(ctx, call, bad.op, change)
            results.append((ending, door.round_trip(ctx, call)))
        return results

    for rank, results in enumerate(prepared.run(world, fn)):
        for (bad, culprits), (ending, result) in zip(rounds, results, strict=True):
            check_ending(door, bad, ending, rank, rank if rank in culprits else culprits[0])
            prepared.check(rank, result, bad.profile)


def culprits_of(bad, index, world_size):
    """The ranks that call wrongly: one, then all; or all where peers cannot be aborted."""
    every_rank = range(world_size)
    if bad.reaches_peers:
        return [[index % world_size], every_rank]
    if bad.base == "pairs":
        return [[0, 1], every_rank]  # a pair, of which neither could abort the other
    return [every_rank]


@pytest.mark.parametrize(
    "door, name, profile",
    [
        pytest.param(door, name, bad.profile, id=f"{door}-{name}")
        for door, rows in ROWS.items()
        for name, bad in rows.items()
    ],
    indirect=["profile"],
)
@pytest.mark.usefixtures("profile")
def test_refused(door, name):
    """By one rank, whose peers are aborted at once; and by all, each with its own error."""
    rows = ROWS[door]
    bad, index = rows[name], list(rows).index(name)
    prepared = prepare(BASES[bad.base], DOORS[door].version)
    wrong = culprits_of(bad, index, len(prepared.calls))
    refuse(DOORS[door], "local", [(bad, culprits) for culprits in wrong], prepared)


@pytest.mark.parametrize("who", ["one rank", "every rank"])
@pytest.mark.parametrize(
    "name",
    [
        "null-x-dispatch",
        "dtype-expert-ids-combine",
        "row13-mode-7-dispatch",
        "row21-expand-x-combine",
        "value-id-e-dispatch",
    ],
)
@pytest.mark.parametrize("door", TORCH_NPU)
def test_refused_at_the_first_and_at_the_tenth_call(door, name, who):
    bad, prepared = ROWS[door][name], prepare(BASES["plain"], DOORS[door].version)
    culprits = [1] if who == "one rank" else range(3)

    def fn(ctx, call):
        change = bad.change if ctx.rank in culprits else put()
        endings, rounds = [], []
        for count in (8, 1):
            endings.append(DOORS[door].bad_call(ctx, call, bad.op, change))
            rounds += [DOORS[door].round_trip(ctx, call) for _ in range(count)]
        return endings, rounds

    for rank, (endings, rounds) in enumerate(prepared.run("local", fn)):
        for ending in endings:
            check_ending(DOORS[door], bad, ending, rank, rank if rank in culprits else 1)
        for result in rounds:
            prepared.check(rank, result)


IN_PROCESSES = {
    "plain": [
        "null-x-dispatch",
        "dtype-expert-ids-dispatch",
        "dtype-assist_info_for_combine-combine",
        "dtype-shared-expert-x-combine",
        "row02-fewer-rows-in-x-dispatch",
        "row09-ns-without-ranks-dispatch",
        "row11-e-not-a-multiple-combine",
        "row13-mode-7-dispatch",
        "row14-scales-of-7-experts-dispatch",
        "row19-g-below-bs-times-w-combine",
        "row21-expand-x-combine",
        "row21-assist-of-54-combine",
        "row24-unknown-dispatch",
        "row27-without-me-combine",
        "value-id-e-dispatch",
        "value-id-twice-dispatch",
    ],
    "zero computation": [
        "row26-const-without-ori_x-combine",
        "row26-zero_expert_num-negative-dispatch",
    ],
    "pairs": ["row06-l-2-dispatch", "row21-tp-send-counts-missing-combine"],
}


@pytest.mark.parametrize(
    "door, base",
    [
        (door, base)
        for door in ("torch_npu v1", "torch_npu v2", "aclnn")
        for base in IN_PROCESSES
        if DOORS[door].version in BASES[base].versions
    ],
)
@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_refused_on_processes(world, door, base):
    """One row after the other, each by another rank and then by all."""
    prepared = prepare(BASES[base], DOORS[door].version)
    rows = [ROWS[door][name] for name in IN_PROCESSES[base] if name in ROWS[door]]
    size = len(prepared.calls)
    rounds = [
        (bad, culprits) for i, bad in enumerate(rows) for culprits in culprits_of(bad, i, size)
    ]
    refuse(DOORS[door], world, rounds, prepared)


def test_two_ranks_refuse_for_different_reasons():
    """Each raises its own error; the third is aborted with one of them."""
    prepared = prepare(BASES["plain"], 1)
    reasons = [V1_ROWS["row13-mode-7-dispatch"], V1_ROWS["value-id-negative-dispatch"]]

    def fn(ctx, call):
        change = reasons[ctx.rank].change if ctx.rank < 2 else put()
        ending = V1.bad_call(ctx, call, "dispatch", change)
        return ending, [V1.round_trip(ctx, call) for _ in range(2)]

    results = prepared.run("local", fn)
    for rank in range(2):
        V1.check_refusal(reasons[rank], results[rank][0])
    culprit = results[2][0]["error"]["rank"]
    assert culprit in (0, 1)
    V1.check_peer(reasons[culprit], results[2][0], culprit)
    for rank, (_, rounds) in enumerate(results):
        for result in rounds:
            prepared.check(rank, result)


MIXED = ["row13-mode-7", "value-id-e", "null-x", "row02-scales-columns", "row16-h-0"]


@pytest.mark.parametrize(
    "world, rounds_before, ahead",
    [("local", 0, False)]
    + [(world, before, True) for world in harness.WORLDS for before in (0, 3)],
)
def test_refusals_in_a_row(world, rounds_before, ahead):
    """By one rank after the other without a correct call; or by one ahead of its peers.

    The latter issues a correct call too before its peers begin the first of them.
    """
    prepared = prepare(BASES["plain"], 1)
    rows = [V1_ROWS[f"{name}-dispatch"] for name in MIXED * (1 if ahead else 4)]
    culprits = [1 if ahead else i % 3 for i in range(len(rows))]

    def fn(ctx, call):
        rounds = [V1.round_trip(ctx, call) for _ in range(rounds_before)]
        if ahead and ctx.rank != 1:
            time.sleep(0.5)
        endings = [
            V1.bad_call(ctx, call, "dispatch", bad.change if culprit == ctx.rank else put())
            for bad, culprit in zip(rows, culprits, strict=True)
        ]
        return endings, rounds + [V1.round_trip(ctx, call) for _ in range(2)]

    for rank, (endings, rounds) in enumerate(prepared.run(world, fn)):
        for bad, ending, culprit in zip(rows, endings, culprits, strict=True):
            check_ending(V1, bad, ending, rank, culprit)
        for result in rounds:
            prepared.check(rank, result)


@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("late", ["culprit", "peers", "one peer"])
@pytest.mark.parametrize("world", harness.WORLDS)
def test_refusal_before_and_after_the_peers_came(world, late, op):
    """Peers that wait already, and peers that come later, are both aborted."""
    prepared = prepare(BASES["plain"], 1)
    bad = V1_ROWS["row13-mode-7-dispatch" if op == "dispatch" else "row21-expand-x-combine"]
    delayed = {"culprit": [1], "peers": [0, 2], "one peer": [2]}[late]

    def fn(ctx, call):
        endings, rounds = [], []
        for count in (3, 1):
            if ctx.rank in delayed:
                time.sleep(0.3)
            change = bad.change if ctx.rank == 1 else put()
            endings.append(V1.bad_call(ctx, call, op, change))
            rounds += [V1.round_trip(ctx, call) for _ in range(count)]
        return endings, rounds

    for rank, (endings, rounds) in enumerate(prepared.run(world, fn)):
        for ending in endings:
            check_ending(V1, bad, ending, rank, 1)
        for result in rounds:
            prepared.check(rank, result)


def test_an_unknown_group_is_named():
    prepared = prepare(BASES["plain"], 1)

    def fn(ctx, call):
        return attempt(lambda: harness.call_dispatch(ctx, call, group_ep="never registered"))

    for refusal in prepared.run("local", fn):
        assert "MoeError" in refusal["error"]["types"]
        assert refusal["error"]["argument"] == "group_ep"
        assert "never registered" in refusal["error"]["text"]


def test_the_rank_of_another_is_refused():
    """A rank that calls under its neighbour's number is at fault."""
    bad = InvalidCall(
        "row04", "dispatch", put(ep_rank_id=0), VALUE, "ep_rank_id", ("ep_rank_id",), r"\b0\b"
    )
    refuse(V1, "local", [(bad, [1])], prepare(BASES["plain"], 1))


def test_a_profile_in_processes():
    """A profile holds in its process alone: rank 1 refuses the sizes that rank 0 would take."""
    bad, door = ROWS["torch_npu v2"]["row16-h-1040-on-a2-dispatch"], DOORS["torch_npu v2"]
    prepared = prepare(BASES["plain"], 2)

    def fn(ctx, call):
        if ctx.rank == 1:
            moe_triton.set_profile("a2")
        try:
            ending = door.bad_call(ctx, call, "dispatch", put())
        finally:
            moe_triton.set_profile(None)
        return ending, door.round_trip(ctx, call)

    for rank, (ending, result) in enumerate(prepared.run("symmetric", fn)):
        check_ending(door, replace(bad, got=r"\b4\b"), ending, rank, 1)
        prepared.check(rank, result)


def test_as_many_experts_as_there_may_be():
    """Row 26 at its edge: 2**31 - 2 experts of all kinds are accepted."""
    group = replace(MIXED_EXPERTS, zero_experts=2**31 - 6, copy_experts=0, const_experts=0)
    tokens = [
        Tokens(
            x=np.zeros((1, 4), np.uint16),
            ids=np.array([[0, 2**31 - 3, 2**31 - 3]], np.int32),
            weights=np.ones((1, 3), np.float32),
        )
        for _ in range(2)
    ]
    received = definition.dispatch(group, tokens)
    rows = [mine.expand_x for mine in received]
    calls = harness.make_calls(group, tokens, rows, version=2)
    combined = definition.combine(group, tokens, received, rows)
    prepared = Prepared(Base(group, 1), 2, calls, received, combined)
    for rank, result in enumerate(prepared.run("local", DOORS["torch_npu v2"].round_trip)):
        prepared.check(rank, result)


# W 2, L 2, BS 2, K 2, H 1024: 52 KB by the formula of A3 and 950, 4 MB and a little by A2's.
@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("door", ["torch_npu v2", "aclnn V4"])
@pytest.mark.parametrize("product, least", [("a2", 5), ("a3", 1), ("950", 1)])
def test_row22_a_buffer_too_small(product, least, door, op):
    """One process has too small an HCCL_BUFFSIZE, or no number; a large enough one is accepted."""
    door, prepared = DOORS[door], prepare(BASES["strict"], 2)
    values = (str(least - 1), "many")

    def fn(ctx, call):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOE_TRITON_PROFILE", product)
            patch.setenv("HCCL_BUFFSIZE", str(least))
            results = []
            for value in values:
                change = put()
                if ctx.rank == 1:
                    change = Change(lambda _, value=value: patch.setenv("HCCL_BUFFSIZE", value))
                ending = door.bad_call(ctx, call, op, change)
                patch.setenv("HCCL_BUFFSIZE", str(least))
                results.append((ending, door.round_trip(ctx, call)))
            return results

    for rank, results in enumerate(prepared.run("symmetric", fn)):
        for value, (ending, result) in zip(values, results, strict=True):
            bad = InvalidCall(
                "row22", op, put(), VALUE, "HCCL_BUFFSIZE", ("HCCL_BUFFSIZE",), re.escape(value)
            )
            check_ending(door, replace(bad, profile=product, base="strict"), ending, rank, 1)
            prepared.check(rank, result, product)

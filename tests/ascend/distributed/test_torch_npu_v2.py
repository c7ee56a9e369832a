"""What version 2 adds: triples, zero-computation experts, elastic groups, waiting times; and TP."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import definition
import harness
import numpy as np
import pytest
import torch
import torch.distributed as dist
from definition import Group, Remaining
from harness import call_combine, call_dispatch, describe, round_trip, run_example, run_world
from random_cases import case_of, check_round, random_tokens
from worked_examples import (
    BASIC,
    SHARED,
    TENSOR_PARALLEL,
    ZERO_COMPUTATION,
    bits,
    check_literal,
    example_calls,
)

import moe_triton


@pytest.mark.parametrize("comm_alg", ["", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy"])
def test_comm_alg_has_no_effect(comm_alg):
    calls = example_calls(SHARED, version=2, comm_alg=comm_alg)
    results = run_world("local", 4, lambda ctx: round_trip(ctx, calls, version=2))
    for rank, (outputs, combined) in enumerate(results):
        check_literal(SHARED, rank, outputs, combined, version=2)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
@pytest.mark.parametrize("version", [1, 2])
def test_process_groups_may_stand_for_their_names(version, world):
    calls = example_calls(TENSOR_PARALLEL, version=version)

    def fn(ctx):
        groups = {
            "group_ep": dist.distributed_c10d._resolve_process_group(ctx.ep_group),
            "group_tp": dist.distributed_c10d._resolve_process_group(ctx.tp_group),
        }
        call = calls[ctx.rank]
        outputs = call_dispatch(ctx, call, version=version, **groups)
        return outputs, call_combine(ctx, call, outputs, version=version, **groups)

    for rank, (outputs, combined) in enumerate(run_example(TENSOR_PARALLEL, world, fn)):
        check_literal(TENSOR_PARALLEL, rank, outputs, combined, version=version)


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize(
    "group",
    [
        pytest.param(Group(3, 6, 3, 5), id="plain"),
        pytest.param(Group(4, 6, 2, 16, "float16", 2, 2, 2, comm_quant_mode=2), id="all int8"),
        pytest.param(Group(2, 2, 2, 5, tp_world_size=2), id="TP"),
    ],
)
def test_both_versions_agree(group, world):
    """Except for the third output, which differs."""
    rng = np.random.default_rng(0)
    tokens = [random_tokens(rng, group, 4) for _ in range(group.world_size * group.tp_world_size)]
    for mine in tokens:
        mine.mask = rng.random((4, group.top_k)) < 0.7
    first, received, combined = case_of(rng, group, tokens, version=1)
    rng = np.random.default_rng(0)
    second, *_ = case_of(rng, group, tokens, version=2)
    for a, b in zip(first, second, strict=True):
        b["combine"]["expand_x"] = a["combine"]["expand_x"]

    def fn(ctx):
        return round_trip(ctx, first), round_trip(ctx, second, version=2)

    results = run_world(world, len(tokens), fn, tp_world_size=group.tp_world_size)
    for rank, by_version in enumerate(results):
        for version, actual in enumerate(by_version, start=1):
            check_round(group, received, combined, rank, actual, version)


@pytest.mark.parametrize("world", harness.WORLDS)
def test_triples_lead_back_to_the_tokens(world):
    rng = np.random.default_rng(1)
    group = Group(3, 4, 2, 8, shared_ranks=1, zero_experts=1)
    tokens = [random_tokens(rng, group, 5) for _ in range(3)]
    for mine in tokens:
        mine.mask = rng.random((5, 2)) < 0.7
    calls, *_ = case_of(rng, group, tokens, version=2)
    results = run_world(world, 3, lambda ctx: call_dispatch(ctx, calls[ctx.rank], version=2))
    actual = set()
    for rank, outputs in enumerate(results):
        n = int(outputs[4][-1])
        for row, (source, token, slot) in enumerate(outputs[2][: 3 * n].view(-1, 3).tolist()):
            definition.same_bits(outputs[0][row], tokens[source].x[token], f"row {row}")
            assert (source, token, slot) not in actual
            actual.add((source, token, slot))
            if slot == 2:
                assert rank == 0
            else:
                assert group.home(int(tokens[source].ids[token, slot]))[0] == rank
    wanted = {
        (source, token, slot)
        for source, mine in enumerate(tokens)
        for token in range(5)
        for slot in range(3)
        if (mine.takes_part(token) if slot == 2 else mine.is_active(token, slot))
        and (slot == 2 or mine.ids[token, slot] < 4)
    }
    assert actual == wanted


MASKS = {
    "1-D, all": np.ones(4, bool),
    "1-D, some": np.arange(4) < 2,
    "1-D, none": np.zeros(4, bool),
    "2-D, some": np.array([[1, 0], [0, 0], [1, 1], [0, 1]], bool),
    "2-D, none": np.zeros((4, 2), bool),
}


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_inactive_tokens_come_back_as_zeros(mask, version, world):
    """Also on a rank that sends no row, but holds experts of the others."""
    rng = np.random.default_rng(2)
    group = Group(3, 4, 2, 8, quant_mode=2, shared_ranks=1)
    tokens = [random_tokens(rng, group, 4) for _ in range(3)]
    tokens[1].mask = MASKS[mask]
    for mine in (tokens[0], tokens[2]):
        mine.mask = np.ones_like(MASKS[mask])
    shared_x = [definition.encode(rng.normal(size=(4, 8)), group.dtype) for _ in range(3)]
    calls, received, combined = case_of(rng, group, tokens, version=version, shared_x=shared_x)
    results = run_world(world, 3, lambda ctx: round_trip(ctx, calls, version=version))
    for rank, actual in enumerate(results):
        check_round(group, received, combined, rank, actual, version)
        for token, row in enumerate(actual[1]):
            assert bool(row.count_nonzero()) == tokens[rank].takes_part(token)


@pytest.mark.parametrize("world", harness.WORLDS)
def test_a_rank_that_chooses_zero_computation_experts_only(world):
    """It sends no row, takes part in the call, and computes its output alone."""
    rng = np.random.default_rng(3)
    group = Group(2, 2, 3, 4, zero_experts=2, copy_experts=1, const_experts=1)
    tokens = [random_tokens(rng, group, 3) for _ in range(2)]
    # Two zeros; the same expert three times; a constant between copies.
    tokens[0].ids = np.array([[2, 4, 3], [4, 4, 4], [4, 5, 4]], np.int32)
    tokens[0].weights = np.array([[7, 2, 7], [1, 2, 4], [0.5, 2, 0.25]], np.float32)
    tokens[0].ori_x = bits([[1, 2, 3, 4], [1, 0, -1, 2], [4, 8, 0, -4]])
    tokens[0].alpha_1, tokens[0].alpha_2 = bits([2]), bits([-1])
    tokens[0].const_v = bits([[1, 1, 2, 2]])
    calls, received, combined = case_of(rng, group, tokens, version=2)
    results = run_world(world, 2, lambda ctx: round_trip(ctx, calls, version=2))
    for rank, actual in enumerate(results):
        check_round(group, received, combined, rank, actual, 2)
    assert results[0][1].tolist() == [[2, 4, 6, 8], [7, 0, -7, 14], [17, 36, -4, -23]]
    for outputs, _ in results:
        assert outputs[4][0] == 0


@pytest.mark.parametrize("world", harness.WORLDS)
def test_inactive_values_are_ignored(world):
    """NaN in tokens and weights, and invalid ids, change no number of the example."""
    calls = example_calls(ZERO_COMPUTATION, version=2)
    for call, mine in zip(calls, ZERO_COMPUTATION.tokens, strict=True):
        inactive = torch.from_numpy(~mine.mask)
        for arguments in call.values():
            senseless = torch.tensor([-(2**31), 2**31 - 1, -1], dtype=torch.int32)[:, None]
            arguments["expert_ids"] = arguments["expert_ids"].where(~inactive, senseless)
            weights = arguments["expert_scales"]
            arguments["expert_scales"] = weights.masked_fill(inactive, torch.nan)
        silent = inactive.all(dim=1)
        call["dispatch"]["x"] = call["dispatch"]["x"].clone()
        call["dispatch"]["x"][silent] = torch.nan
        for name in ("ori_x", "shared_expert_x"):
            rows = torch.zeros_like(call["dispatch"]["x"])
            if name == "ori_x":
                rows = call["combine"][name].clone()
            rows[silent] = torch.nan
            call["combine"][name] = rows
    results = run_world(world, 2, lambda ctx: round_trip(ctx, calls, version=2))
    for rank, (outputs, combined) in enumerate(results):
        check_literal(ZERO_COMPUTATION, rank, outputs, combined, version=2)


def test_the_weight_of_a_zero_expert_is_ignored():
    calls = example_calls(ZERO_COMPUTATION, version=2)
    for arguments in calls[0].values():
        arguments["expert_scales"][1, 1] = torch.nan
    results = run_world("local", 2, lambda ctx: round_trip(ctx, calls, version=2)[1])
    assert results[0].tolist() == ZERO_COMPUTATION.combined[0]


def elastic_cases(rng, group, remaining, batch=3):
    """The whole group and its remaining ranks, with as many tokens per rank."""
    whole = [random_tokens(rng, group, batch) for _ in range(group.world_size)]
    smaller = replace(group, remaining=remaining)
    left = [random_tokens(rng, smaller.scaled_down(), batch) for _ in range(group.world_size)]
    return (group, *case_of(rng, group, whole, version=2)), (
        smaller,
        *case_of(rng, smaller, left, version=2),
    )


ELASTIC = [
    pytest.param(Group(4, 8, 2, 6), Remaining((0, 1, 2), 0, 6), id="the last is lost"),
    pytest.param(Group(4, 8, 2, 6, quant_mode=2), Remaining((2, 3, 0), 0, 6), id="renumbered"),
    pytest.param(
        Group(4, 6, 2, 8, shared_ranks=1, comm_quant_mode=2),
        Remaining((0, 2, 3), 1, 4),
        id="shared rank stays",
    ),
    pytest.param(
        Group(4, 6, 2, 8, shared_ranks=1), Remaining((1, 2, 3), 0, 6), id="shared rank is lost"
    ),
    pytest.param(
        Group(4, 2, 2, 8, shared_ranks=3), Remaining((1, 2, 3), 2, 2), id="a replica is lost"
    ),
]


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("group, remaining", ELASTIC)
def test_a_group_goes_on_without_a_rank_and_with_it_again(group, remaining, world):
    """The lost rank makes no call; then it is back, and lost again."""
    rng = np.random.default_rng(4)
    whole, left = elastic_cases(rng, group, remaining)
    order = (left, left, whole, left, whole, whole)

    def fn(ctx):
        return [round_trip(ctx, calls, version=2) for _, calls, _, _ in order]

    for rank, rounds in enumerate(run_world(world, 4, fn)):
        for (agreed, _, received, combined), actual in zip(order, rounds, strict=True):
            if received[rank] is None:
                assert actual is None
            else:
                check_round(agreed, received, combined, rank, actual, 2)


@pytest.mark.parametrize("world", harness.WORLDS)
def test_elastic_info_without_its_flag_is_ignored(world):
    calls = example_calls(BASIC, version=2)
    for call in calls:
        for arguments in call.values():
            arguments["elastic_info"] = torch.tensor([0, 9, -3, 7, 5, 5, -1, 12]).int()
    results = run_world(world, 2, lambda ctx: round_trip(ctx, calls, version=2))
    for rank, (outputs, combined) in enumerate(results):
        check_literal(BASIC, rank, outputs, combined, version=2)


SLOW = 2
# Seconds, far more than a loaded machine keeps a rank that is not slow.
PAUSE = 1.0 if moe_triton.get_backend() == "cpu" else 4.0


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("slow_op", ["dispatch", "combine"])
def test_performance_info_shows_the_slow_rank(slow_op, world):
    """Every call adds to it; the rank that others waited for stands out."""
    rng = np.random.default_rng(5)
    group = Group(4, 4, 2, 8)
    calls, received, combined = case_of(rng, group, [random_tokens(rng, group, 3)] * 4, version=2)

    def fn(ctx):
        call = calls[ctx.rank]
        round_trip(ctx, calls, version=2)  # the first call of a group opens its windows
        waited = torch.arange(4)
        history = [waited.clone()]
        options = {"version": 2, "performance_info": waited}
        actual = None
        for op in ("dispatch", "combine"):
            if op == slow_op and ctx.rank == SLOW:
                time.sleep(PAUSE)
            if op == "dispatch":
                outputs = call_dispatch(ctx, call, **options)
            else:
                actual = outputs, call_combine(ctx, call, outputs, **options)
            history.append(waited.clone())
        return history, actual

    for rank, (history, actual) in enumerate(run_world(world, 4, fn)):
        check_round(group, received, combined, rank, actual, 2)
        for before, after in itertools.pairwise(history):
            assert (after - before >= 1).all()
        if rank != SLOW:
            step = ("dispatch", "combine").index(slow_op)
            added = history[step + 1] - history[step]
            # Microseconds; the others do the same work in far less time.
            assert added[SLOW] >= PAUSE * 1e6 / 2, added
            others = [added[other] for other in range(4) if other != SLOW]
            assert max(others) < added[SLOW] / 2, added


def break_call(op, arguments, early):
    """Arguments that ``op`` refuses, before or after it has found the pair of its rank."""
    if early:
        return {"expert_scales": arguments["expert_scales"].double()}
    if op == "dispatch":
        return {"expert_ids": torch.full_like(arguments["expert_ids"], 99)}
    return {"tp_send_counts": torch.tensor([9, 9], dtype=torch.int32)}


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("culprit", range(4))
@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_one_refusal_ends_the_call_in_both_groups(op, culprit, world):
    """It aborts its own groups, and these the fourth rank; then all ranks go on."""
    calls = example_calls(TENSOR_PARALLEL, version=2)

    def attempt(call, *args, **kwargs):
        start = time.monotonic()
        try:
            call(*args, version=2, **kwargs)
        except Exception as error:
            return describe(error), time.monotonic() - start
        return None, time.monotonic() - start

    def fn(ctx):
        call, attempts, rounds = calls[ctx.rank], [], []
        for early in (True, False, False, True):
            changes = break_call(op, call[op], early) if ctx.rank == culprit else {}
            if op == "dispatch":
                attempts.append(attempt(call_dispatch, ctx, call, **changes))
            else:
                outputs = call_dispatch(ctx, call, version=2)
                attempts.append(attempt(call_combine, ctx, call, outputs, **changes))
            rounds.append(round_trip(ctx, calls, version=2))
        return attempts, rounds

    results = run_world(world, 4, fn, tp_world_size=2)
    for rank, (attempts, rounds) in enumerate(results):
        for error, seconds in attempts:
            assert error is not None, f"rank {rank} was not aborted"
            expected = "ArgumentError" if rank == culprit else "PeerAbortError"
            assert expected in error["types"], error["traceback"]
            assert seconds < 5  # aborted, not timed out
        for outputs, combined in rounds:
            check_literal(TENSOR_PARALLEL, rank, outputs, combined, version=2)

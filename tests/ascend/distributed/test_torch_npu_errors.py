"""Calls that must be refused, through the torch_npu names.

Two kinds. A call that breaks the contract by itself, on all ranks or on one while its peers called
correctly; these rows carry the number of the contract's table in their id. And ranks whose calls
are each right but do not fit together. Both at the first call of a group and at the tenth, and
after each refusal the next correct call of the same group must return the right bits.

Nothing may hang: a world that does not return in time fails its test with the stacks of all
threads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import definition
import harness
import numpy as np
import pytest
import torch
from definition import Group, Tokens
from definition_checks import check_dispatch, without_spare
from harness import call_combine, call_dispatch, make_calls, run_world
from invalid_calls import (
    ANYTHING,
    AT_ONCE,
    MISSING,
    TYPE,
    VALUE,
    Bad,
    attempt,
    bad_call,
    both,
    check_peer,
    check_refusal,
    edit,
    put,
    with_value,
)

import moe_triton

WORLD, BATCH = 3, 3
LIMIT = 20.0

BASE = Group(world_size=WORLD, num_experts=6, top_k=2, hidden=4)


def smooth(*shape, dtype=torch.float32):
    return put(quant_mode=2, scales=torch.ones(shape, dtype=dtype))


def dispatch(change, code, argument, got, **options):
    return Bad("dispatch", change, code, argument, got, **options)


def combine(change, code, argument, got, **options):
    return Bad("combine", change, code, argument, got, **options)


def on_both(name, change, code, argument, got, **options):
    return {
        f"{name} dispatch": dispatch(change, code, argument, got, **options),
        f"{name} combine": combine(change, code, argument, got, **options),
    }


def nameless(name, group_ep, code, got):
    return on_both(name, put(group_ep=group_ep), code, "group_ep", got, reaches_peers=False)


def named_like_ep(call):
    call["group_tp"] = call["group_ep"]


BAD: dict[str, Bad] = {
    # 9.2: required tensors and the group's name.
    "9.2 x None": dispatch(put(x=None), MISSING, "x", "None"),
    "9.2 expert_ids None": dispatch(put(expert_ids=None), MISSING, "expert_ids", "None"),
    "9.2 expand_x None": combine(put(expand_x=None), MISSING, "expand_x", "None"),
    "9.2 combine expert_ids None": combine(put(expert_ids=None), MISSING, "expert_ids", "None"),
    "9.2 expand_idx None": combine(put(expand_idx=None), MISSING, "expand_idx", "None"),
    "9.2 ep_send_counts None": combine(put(ep_send_counts=None), MISSING, "ep_send_counts", "None"),
    "9.2 expert_scales None": combine(put(expert_scales=None), MISSING, "expert_scales", "None"),
    **nameless("9.2 group_ep None", None, MISSING, "None"),
    **nameless("9.2 group_ep empty", "", MISSING, ANYTHING),
    **nameless("9.2 group_ep long", "g" * 128, TYPE, "128"),
    **nameless("9.2 group_ep of another type", 5, TYPE, r"\b5\b|int"),
    # 9.1: the lower code wins.
    "9.1 missing before dtype and value": dispatch(
        both(put(x=None, quant_mode=7), edit("expert_ids", torch.Tensor.long)), MISSING, "x", "None"
    ),
    "9.1 dtype before value": dispatch(
        both(put(quant_mode=7), edit("expert_ids", torch.Tensor.long)), TYPE, "expert_ids", "int64"
    ),
    # 9.3: dtypes.
    "9.3 x float32": dispatch(edit("x", torch.Tensor.float), TYPE, "x", "float32"),
    "9.3 x int8": dispatch(edit("x", torch.Tensor.char), TYPE, "x", "int8"),
    "9.3 x no tensor": dispatch(edit("x", torch.Tensor.tolist), TYPE, "x", "list"),
    "9.3 expert_ids int64": dispatch(
        edit("expert_ids", torch.Tensor.long), TYPE, "expert_ids", "int64"
    ),
    "9.3 scales float16": dispatch(smooth(6, 4, dtype=torch.float16), TYPE, "scales", "float16"),
    "9.3 scales float64": dispatch(smooth(6, 4, dtype=torch.float64), TYPE, "scales", "float64"),
    "9.3 expert_scales bfloat16": dispatch(
        edit("expert_scales", torch.Tensor.bfloat16), TYPE, "expert_scales", "bfloat16"
    ),
    "9.3 x_active_mask int32": dispatch(
        put(x_active_mask=torch.ones(BATCH, dtype=torch.int32)), TYPE, "x_active_mask", "int32"
    ),
    "9.3 expand_x float32": combine(
        edit("expand_x", torch.Tensor.float), TYPE, "expand_x", "float32"
    ),
    "9.3 expand_x int8": combine(
        put(expand_x=torch.zeros(18, 4, dtype=torch.int8)), TYPE, "expand_x", "int8"
    ),
    "9.3 combine expert_ids int64": combine(
        edit("expert_ids", torch.Tensor.long), TYPE, "expert_ids", "int64"
    ),
    "9.3 expand_idx int64": combine(
        edit("expand_idx", torch.Tensor.long), TYPE, "expand_idx", "int64"
    ),
    "9.3 ep_send_counts int64": combine(
        edit("ep_send_counts", torch.Tensor.long), TYPE, "ep_send_counts", "int64"
    ),
    "9.3 combine expert_scales float16": combine(
        edit("expert_scales", torch.Tensor.half), TYPE, "expert_scales", "float16"
    ),
    "9.3 expand_scales float16": combine(
        edit("expand_scales", torch.Tensor.half), TYPE, "expand_scales", "float16"
    ),
    "9.3 shared_expert_x unlike expand_x": combine(
        put(shared_expert_x=torch.zeros(BATCH, 4, dtype=torch.float16)),
        TYPE,
        "shared_expert_x",
        "float16",
    ),
    # 9.4: shapes and values.
    "1 x 1-D": dispatch(edit("x", lambda x: x[:, 0]), VALUE, "x", r"3"),
    "1 x 3-D": dispatch(edit("x", lambda x: x[None]), VALUE, "x", r"1, 3, 4"),
    "1 expert_ids 1-D": dispatch(edit("expert_ids", lambda x: x[:, 0]), VALUE, "expert_ids", "3"),
    "1 scales 1-D": dispatch(smooth(4), VALUE, "scales", "4"),
    "1 scales 3-D": dispatch(smooth(1, 6, 4), VALUE, "scales", "1, 6, 4"),
    "1 expert_scales 1-D": dispatch(
        edit("expert_scales", lambda x: x[:, 0]), VALUE, "expert_scales", "3"
    ),
    "1 expand_x 1-D": combine(edit("expand_x", lambda x: x[:, 0]), VALUE, "expand_x", "18"),
    "1 expand_idx 2-D": combine(
        edit("expand_idx", lambda x: x.view(3, 2)), VALUE, "expand_idx", "3, 2"
    ),
    "1 ep_send_counts 2-D": combine(
        edit("ep_send_counts", lambda x: x.view(2, 3)), VALUE, "ep_send_counts", "2, 3"
    ),
    "2 more rows in x": dispatch(
        edit("x", lambda x: torch.cat([x, x[:1]])), VALUE, ("x", "expert_ids"), r"\b3\b|\b4\b"
    ),
    "2 fewer rows in x": dispatch(
        edit("x", lambda x: x[:2]), VALUE, ("x", "expert_ids"), r"\b3\b|\b2\b"
    ),
    "2 expert_scales rows": dispatch(
        edit("expert_scales", lambda x: x[:2]), VALUE, "expert_scales", "2, 2"
    ),
    "2 expert_scales columns": dispatch(
        edit("expert_scales", lambda x: x[:, :1]), VALUE, "expert_scales", "3, 1"
    ),
    "2 scales columns": dispatch(smooth(6, 5), VALUE, "scales", "6, 5"),
    "2 combine expert_scales columns": combine(
        edit("expert_scales", lambda x: torch.cat([x, x], 1)), VALUE, "expert_scales", "3, 4"
    ),
    **on_both("3 W 0", put(ep_world_size=0), VALUE, "ep_world_size", r"\b0\b"),
    **on_both("3 W -1", put(ep_world_size=-1), VALUE, "ep_world_size", "-1"),
    **on_both("3 W not the group's", put(ep_world_size=2), VALUE, "ep_world_size", r"\b2\b"),
    **on_both("4 rank -1", put(ep_rank_id=-1), VALUE, "ep_rank_id", "-1"),
    **on_both("4 rank W", put(ep_rank_id=WORLD), VALUE, "ep_rank_id", r"\b3\b"),
    **on_both("5 T 3", put(tp_world_size=3), VALUE, "tp_world_size", r"\b3\b"),
    **on_both("5 T -1", put(tp_world_size=-1), VALUE, "tp_world_size", "-1"),
    **on_both("5 q without TP", put(tp_rank_id=1), VALUE, "tp_rank_id", r"\b1\b"),
    "5 q without TP, T 1": dispatch(
        put(tp_world_size=1, tp_rank_id=1), VALUE, "tp_rank_id", r"\b1\b"
    ),
    **on_both("5 q -1", put(tp_rank_id=-1), VALUE, "tp_rank_id", "-1"),
    **on_both(
        "6 T 2 with L 2",
        put(tp_world_size=2, group_tp="pair"),
        VALUE,
        ("tp_world_size", "moe_expert_num", "group_tp"),
        r"\b2\b|pair",
    ),
    **on_both("7 shard type", put(expert_shard_type=1), VALUE, "expert_shard_type", r"\b1\b"),
    **on_both("8 S -1", put(shared_expert_rank_num=-1), VALUE, "shared_expert_rank_num", "-1"),
    **on_both("8 S W", put(shared_expert_rank_num=3), VALUE, "shared_expert_rank_num", r"\b3\b"),
    **on_both(
        "8 W not a multiple of S",
        put(shared_expert_rank_num=2),
        VALUE,
        ("shared_expert_rank_num", "ep_world_size"),
        r"\b[23]\b",
    ),
    **on_both("8 S 0 with NS 2", put(shared_expert_num=2), VALUE, "shared_expert_num", r"\b2\b"),
    **on_both("8 NS -1", put(shared_expert_num=-1), VALUE, "shared_expert_num", "-1"),
    **on_both(
        "8 S 1 with NS 0",
        put(shared_expert_rank_num=1, shared_expert_num=0),
        VALUE,
        ("shared_expert_num", "shared_expert_rank_num"),
        r"\b0\b",
    ),
    **on_both(
        "9 S not a multiple of NS",
        put(shared_expert_rank_num=1, shared_expert_num=2),
        VALUE,
        ("shared_expert_num", "shared_expert_rank_num"),
        r"\b[12]\b",
    ),
    **on_both("11 E 0", put(moe_expert_num=0), VALUE, "moe_expert_num", r"\b0\b"),
    **on_both("11 E -3", put(moe_expert_num=-3), VALUE, "moe_expert_num", "-3"),
    **on_both("11 E not a multiple", put(moe_expert_num=7), VALUE, "moe_expert_num", r"\b7\b"),
    **on_both(
        "11 E not a multiple with S",
        put(moe_expert_num=9, shared_expert_rank_num=1),
        VALUE,
        "moe_expert_num",
        r"\b9\b",
    ),
    "13 quant_mode 7": dispatch(put(quant_mode=7), VALUE, "quant_mode", r"\b7\b"),
    "13 quant_mode -1": dispatch(put(quant_mode=-1), VALUE, "quant_mode", "-1"),
    "14 scales without quantisation": dispatch(
        put(scales=torch.ones(6, 4)), VALUE, "scales", r"6, 4"
    ),
    "14 scales rows": dispatch(smooth(7, 4), VALUE, "scales", r"7, 4"),
    "14 scales rows with S": dispatch(
        both(smooth(6, 4), put(shared_expert_rank_num=1)), VALUE, "scales", r"6, 4"
    ),
    "16 H 0": dispatch(edit("x", lambda x: x[:, :0]), VALUE, "x", r"3, 0|\b0\b"),
    "16 combine H 0": combine(edit("expand_x", lambda x: x[:, :0]), VALUE, "expand_x", r"\b0\b"),
    "18 K 0": dispatch(
        both(edit("expert_ids", lambda x: x[:, :0]), edit("expert_scales", lambda x: x[:, :0])),
        VALUE,
        "expert_ids",
        r"\b0\b",
    ),
    "18 K above E": dispatch(
        both(
            edit("expert_ids", lambda x: torch.arange(7, dtype=torch.int32).repeat(3, 1)),
            edit("expert_scales", lambda x: torch.ones(3, 7)),
        ),
        VALUE,
        ("expert_ids", "moe_expert_num"),
        r"\b7\b",
    ),
    "18 K above E without tokens": dispatch(
        both(
            edit("x", lambda x: x[:0]),
            edit("expert_ids", lambda x: torch.zeros(0, 7, dtype=torch.int32)),
            edit("expert_scales", lambda x: torch.ones(0, 7)),
            put(global_bs=9),
        ),
        VALUE,
        ("expert_ids", "moe_expert_num"),
        r"\b7\b",
    ),
    **on_both("19 G below BS*W", put(global_bs=6), VALUE, "global_bs", r"\b6\b"),
    **on_both("19 G not a multiple of W", put(global_bs=10), VALUE, "global_bs", r"\b10\b"),
    **on_both("19 G -9", put(global_bs=-9), VALUE, "global_bs", "-9"),
    "20 mask shape": dispatch(
        put(x_active_mask=torch.ones(BATCH + 1, dtype=torch.bool)), VALUE, "x_active_mask", ANYTHING
    ),
    "20 combine mask shape": combine(
        put(x_active_mask=torch.ones(BATCH + 1, dtype=torch.bool)), VALUE, "x_active_mask", ANYTHING
    ),
    "21 expand_x rows": combine(edit("expand_x", lambda x: x[:17]), VALUE, "expand_x", r"\b17\b"),
    "21 expand_x rows with G": combine(put(global_bs=12), VALUE, "expand_x", r"\b18\b"),
    "21 expand_idx short": combine(
        edit("expand_idx", lambda x: x[:5]), VALUE, "expand_idx", r"\b5\b"
    ),
    "21 expand_idx long": combine(
        edit("expand_idx", lambda x: torch.cat([x, x[:1]])), VALUE, "expand_idx", r"\b7\b"
    ),
    "21 ep_send_counts short": combine(
        edit("ep_send_counts", lambda x: x[:5]), VALUE, "ep_send_counts", r"\b5\b"
    ),
    "23 comm_quant_mode 1": combine(put(comm_quant_mode=1), VALUE, "comm_quant_mode", r"\b1\b"),
    "23 comm_quant_mode -2": combine(put(comm_quant_mode=-2), VALUE, "comm_quant_mode", "-2"),
    **on_both("29 group_tp equals group_ep", named_like_ep, VALUE, "group_tp", ANYTHING),
    "30 shared_expert_x rows": combine(
        put(shared_expert_x=torch.zeros(4, 4).bfloat16()), VALUE, "shared_expert_x", r"4, 4"
    ),
    "30 shared_expert_x columns": combine(
        put(shared_expert_x=torch.zeros(3, 8).bfloat16()), VALUE, "shared_expert_x", r"3, 8"
    ),
    "30 shared_expert_x 1-D": combine(
        put(shared_expert_x=torch.zeros(12).bfloat16()), VALUE, "shared_expert_x", r"12"
    ),
    "30 shared_expert_x 3-D": combine(
        put(shared_expert_x=torch.zeros(2, 2, 4).bfloat16()), VALUE, "shared_expert_x", r"2, 2, 4"
    ),
    "30 shared_expert_x other H, same size": combine(
        put(shared_expert_x=torch.zeros(4, 3).bfloat16()), VALUE, "shared_expert_x", r"4, 3"
    ),
    "31 token_nums_type 2": dispatch(
        put(expert_token_nums_type=2), VALUE, "expert_token_nums_type", r"\b2\b"
    ),
    "31 token_nums_type -1": dispatch(
        put(expert_token_nums_type=-1), VALUE, "expert_token_nums_type", "-1"
    ),
    "32 x sparse": dispatch(edit("x", torch.Tensor.to_sparse), VALUE, "x", "sparse"),
    "32 expand_x sparse": combine(
        edit("expand_x", torch.Tensor.to_sparse), VALUE, "expand_x", "sparse"
    ),
    # Reserved arguments of combine.
    "reserved out_dtype": combine(put(out_dtype=1), VALUE, "out_dtype", r"\b1\b"),
    "reserved group_list_type": combine(put(group_list_type=1), VALUE, "group_list_type", r"\b1\b"),
    "reserved activation_scale": combine(
        put(activation_scale=torch.ones(18)), VALUE, "activation_scale", ANYTHING
    ),
    "reserved weight_scale": combine(
        put(weight_scale=torch.ones(2, 4)), VALUE, "weight_scale", ANYTHING
    ),
    "reserved group_list": combine(
        put(group_list=torch.ones(2, dtype=torch.int64)), VALUE, "group_list", ANYTHING
    ),
    # Values.
    "value id E": dispatch(with_value("expert_ids", (1, 1), 6), VALUE, "expert_ids", r"\b6\b"),
    "value id -1": dispatch(with_value("expert_ids", (2, 0), -1), VALUE, "expert_ids", "-1"),
    "value id repeated": dispatch(
        put(expert_ids=torch.tensor([[0, 1], [5, 5], [2, 3]], dtype=torch.int32)),
        VALUE,
        "expert_ids",
        r"\b5\b",
    ),
    "value combine id E": combine(
        with_value("expert_ids", (1, 1), 6), VALUE, "expert_ids", r"\b6\b"
    ),
    "value combine id -1": combine(with_value("expert_ids", (0, 0), -1), VALUE, "expert_ids", "-1"),
    "value combine id repeated": combine(
        put(expert_ids=torch.tensor([[0, 1], [5, 5], [2, 3]], dtype=torch.int32)),
        VALUE,
        "expert_ids",
        r"\b5\b",
    ),
}


def random_tokens(group: Group, batches: list[int], seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    return [
        Tokens(
            x=definition.encode(rng.normal(size=(batch, group.hidden)), group.dtype),
            ids=np.array(
                [rng.permutation(group.num_experts)[: group.top_k] for _ in range(batch)], np.int32
            ).reshape(batch, group.top_k),
            weights=rng.normal(size=(batch, group.top_k)).astype(np.float32),
        )
        for batch in batches
    ]


def prepare(group: Group, batches: list[int]) -> tuple[list[dict], list, list]:
    """Calls of every rank, and what dispatch and combine must return."""
    tokens = random_tokens(group, batches)
    received = definition.dispatch(group, tokens)
    rows = [mine.expand_x for mine in received]
    if group.quant_mode:
        rows = [definition.encode(row, group.dtype) for row in rows]
    combined = definition.combine(group, tokens, received, rows)
    return make_calls(group, tokens, rows), received, combined


def good_rounds(ctx, calls, count):
    return [harness.round_trip(ctx, calls) for _ in range(count)]


def check_rounds(rounds, group, received, combined, rank):
    for outputs, result in rounds:
        check_dispatch(group, received[rank], outputs, rank=rank)
        definition.same_bits(result, combined[rank], f"rank {rank} x")


def scenario(bad, culprits, calls):
    """First call wrong, eight right ones, the tenth wrong, one right."""

    def fn(ctx):
        change = bad.change if ctx.ep_rank in culprits else put()
        refusals, rounds = [], []
        for count in (8, 1):
            refusals.append(bad_call(ctx, calls[ctx.ep_rank], bad.op, change))
            rounds += good_rounds(ctx, calls, count)
        return refusals, rounds

    return fn


@pytest.fixture(scope="module")
def base():
    return prepare(BASE, [BATCH] * WORLD)


@pytest.mark.parametrize("name", BAD)
def test_refused_on_every_rank(name, base):
    calls, received, combined = base
    fn = scenario(BAD[name], range(WORLD), calls)
    for rank, (refusals, rounds) in enumerate(run_world("local", WORLD, fn, limit=LIMIT)):
        for refusal in refusals:
            check_refusal(BAD[name], refusal)
        check_rounds(rounds, BASE, received, combined, rank)


@pytest.mark.parametrize("name", [name for name, bad in BAD.items() if bad.reaches_peers])
def test_refused_on_one_rank(name, base):
    """The peers called correctly; they raise at once with the reason and the rank."""
    calls, received, combined = base
    bad = BAD[name]
    culprit = list(BAD).index(name) % WORLD
    fn = scenario(bad, [culprit], calls)
    for rank, (refusals, rounds) in enumerate(run_world("local", WORLD, fn, limit=LIMIT)):
        for refusal in refusals:
            if rank == culprit:
                check_refusal(bad, refusal)
            else:
                check_peer(bad, refusal, culprit)
        check_rounds(rounds, BASE, received, combined, rank)


def test_two_ranks_refuse_for_different_reasons(base):
    """Each raises its own error; the third hears of one of them."""
    calls, received, combined = base
    reasons = [BAD["13 quant_mode 7"], BAD["value id -1"]]

    def fn(ctx):
        change = reasons[ctx.ep_rank].change if ctx.ep_rank < 2 else put()
        refusal = bad_call(ctx, calls[ctx.ep_rank], "dispatch", change)
        return refusal, good_rounds(ctx, calls, 2)

    results = run_world("local", WORLD, fn, limit=LIMIT)
    for rank in range(2):
        check_refusal(reasons[rank], results[rank][0])
    culprit = results[2][0]["error"]["rank"]
    assert culprit in (0, 1)
    check_peer(reasons[culprit], results[2][0], culprit)
    for rank, (_, rounds) in enumerate(results):
        check_rounds(rounds, BASE, received, combined, rank)


def test_refusals_in_a_row(base):
    """Nothing piles up: refusals of different ranks follow one another without a correct call."""
    calls, received, combined = base
    names = ["13 quant_mode 7", "value id E", "9.2 x None", "2 scales columns"] * 5

    def fn(ctx):
        refusals = []
        for i, name in enumerate(names):
            change = BAD[name].change if i % WORLD == ctx.ep_rank else put()
            refusals.append(bad_call(ctx, calls[ctx.ep_rank], "dispatch", change))
        return refusals, good_rounds(ctx, calls, 2)

    for rank, (refusals, rounds) in enumerate(run_world("local", WORLD, fn, limit=LIMIT)):
        for i, (name, refusal) in enumerate(zip(names, refusals, strict=True)):
            if i % WORLD == rank:
                check_refusal(BAD[name], refusal)
            else:
                check_peer(BAD[name], refusal, i % WORLD)
        check_rounds(rounds, BASE, received, combined, rank)


@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("late", ["culprit", "peers", "one peer"])
@pytest.mark.parametrize("world", harness.WORLDS)
def test_refusal_before_and_after_the_peers_came(world, late, op, base):
    """Peers already wait, or are not there yet: they hear of it all the same."""
    calls, received, combined = base
    bad = BAD["13 quant_mode 7" if op == "dispatch" else "23 comm_quant_mode 1"]
    delayed = {"culprit": [1], "peers": [0, 2], "one peer": [2]}[late]

    def fn(ctx):
        refusals, rounds = [], []
        for count in (3, 1):
            if ctx.ep_rank in delayed:
                time.sleep(0.3)
            change = bad.change if ctx.ep_rank == 1 else put()
            refusals.append(bad_call(ctx, calls[ctx.ep_rank], op, change))
            rounds += good_rounds(ctx, calls, count)
        return refusals, rounds

    for rank, (refusals, rounds) in enumerate(run_world(world, WORLD, fn, limit=LIMIT)):
        for refusal in refusals:
            if rank == 1:
                check_refusal(bad, refusal)
            else:
                check_peer(bad, refusal, 1)
        check_rounds(rounds, BASE, received, combined, rank)


@pytest.mark.parametrize("rounds_before", [0, 3], ids=["first call", "later call"])
@pytest.mark.parametrize("world", harness.WORLDS)
def test_a_rank_refuses_ahead_of_its_peers(world, rounds_before, base):
    """It refuses five calls and issues a correct one before its peers begin the first of them."""
    calls, received, combined = base
    names = ["13 quant_mode 7", "value id E", "9.2 x None", "2 scales columns", "16 H 0"]

    def fn(ctx):
        rounds = good_rounds(ctx, calls, rounds_before)
        if ctx.ep_rank != 1:
            time.sleep(0.5)
        refusals = []
        for name in names:
            change = BAD[name].change if ctx.ep_rank == 1 else put()
            refusals.append(bad_call(ctx, calls[ctx.ep_rank], "dispatch", change))
        return refusals, rounds + good_rounds(ctx, calls, 2)

    for rank, (refusals, rounds) in enumerate(run_world(world, WORLD, fn, limit=LIMIT)):
        for name, refusal in zip(names, refusals, strict=True):
            if rank == 1:
                check_refusal(BAD[name], refusal)
            else:
                check_peer(BAD[name], refusal, 1)
        check_rounds(rounds, BASE, received, combined, rank)


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("world", harness.WORLDS)
def test_disagreement_before_and_after_the_peers_came(world, late):
    case = MISMATCHES["moe_expert_num"]
    (calls, received, combined), dissent = mismatch_calls(case)

    def fn(ctx):
        mine = dissent if ctx.ep_rank == 1 else calls
        refusals, rounds = [], []
        for count in (3, 1):
            if ctx.ep_rank == late:
                time.sleep(0.3)
            refusals.append(attempt(lambda: call_dispatch(ctx, mine[ctx.ep_rank])))
            rounds += good_rounds(ctx, calls, count)
        return refusals, rounds

    for rank, (refusals, rounds) in enumerate(run_world(world, WORLD, fn, limit=LIMIT)):
        for refusal in refusals:
            check_mismatch(case, refusal)
        check_rounds(rounds, case.usual, received, combined, rank)


IN_PROCESSES = [
    "9.2 x None",
    "9.3 expert_ids int64",
    "2 fewer rows in x",
    "11 E not a multiple combine",
    "13 quant_mode 7",
    "14 scales rows",
    "19 G below BS*W dispatch",
    "21 expand_x rows",
    "9.3 shared_expert_x unlike expand_x",
    "value id E",
    "value id repeated",
]


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_refused_on_one_process(world, base):
    calls, received, combined = base

    def fn(ctx):
        results = []
        for i, name in enumerate(IN_PROCESSES):
            change = BAD[name].change if i % WORLD == ctx.ep_rank else put()
            refusal = bad_call(ctx, calls[ctx.ep_rank], BAD[name].op, change)
            results.append((refusal, good_rounds(ctx, calls, 2)))
        return results

    for rank, results in enumerate(run_world(world, WORLD, fn)):
        for i, (name, (refusal, rounds)) in enumerate(zip(IN_PROCESSES, results, strict=True)):
            if i % WORLD == rank:
                check_refusal(BAD[name], refusal)
            else:
                check_peer(BAD[name], refusal, i % WORLD)
            check_rounds(rounds, BASE, received, combined, rank)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_refused_on_every_process(world, base):
    calls, received, combined = base

    def fn(ctx):
        results = []
        for name in IN_PROCESSES:
            refusal = bad_call(ctx, calls[ctx.ep_rank], BAD[name].op, BAD[name].change)
            results.append((refusal, good_rounds(ctx, calls, 1)))
        return results

    for rank, results in enumerate(run_world(world, WORLD, fn)):
        for name, (refusal, rounds) in zip(IN_PROCESSES, results, strict=True):
            check_refusal(BAD[name], refusal)
            check_rounds(rounds, BASE, received, combined, rank)


@dataclass(frozen=True)
class Mismatch:
    """Two calls, each right by itself, on ranks of one group.

    Attributes:
        usual: the group and the batch of all ranks but one.
        other: those of the dissenting rank.
        argument: pattern of the argument's name.
        values: patterns of the two values, usual and other.
        ops: where the disagreement shows; combine gets outputs of a dispatch in agreement.
        change: edits the dissenter's call instead of ``other``.
    """

    usual: Group
    other: Group
    argument: str
    values: tuple[str, str]
    usual_batch: int = BATCH
    other_batch: int = BATCH
    change: Callable[[dict], None] | None = None


WIDE = Group(world_size=4, num_experts=4, top_k=2, hidden=4, shared_ranks=2)
INT8 = replace(BASE, quant_mode=2)

MISMATCHES = {
    "moe_expert_num": Mismatch(
        BASE, replace(BASE, num_experts=9), r"moe_expert_num", (r"\b6\b", r"\b9\b")
    ),
    "quant_mode": Mismatch(BASE, INT8, r"quant_mode", (r"\b0\b", r"\b2\b")),
    "global_bs": Mismatch(
        replace(BASE, global_bs=9), replace(BASE, global_bs=12), r"global_bs", (r"\b9\b", r"\b12\b")
    ),
    "global_bs 0": Mismatch(BASE, replace(BASE, global_bs=12), r"global_bs", (r"\b0\b", r"\b12\b")),
    "hidden size": Mismatch(
        BASE, replace(BASE, hidden=8), r"hidden|\bH\b|\bx\b|expand_x", (r"\b4\b", r"\b8\b")
    ),
    "top-k": Mismatch(
        BASE, replace(BASE, top_k=1), r"top_k|\bK\b|expert_ids", (r"\b2\b", r"\b1\b")
    ),
    "dtype": Mismatch(
        BASE,
        replace(BASE, dtype="float16"),
        r"dtype|\bx\b|expand_x",
        (r"bfloat16|bf16", r"\bfloat16|fp16"),
    ),
    "shared_expert_rank_num": Mismatch(
        BASE, replace(BASE, shared_ranks=1), r"shared_expert_rank_num", (r"\b0\b", r"\b1\b")
    ),
    "shared_expert_num": Mismatch(
        WIDE, replace(WIDE, shared_experts=2), r"shared_expert_num", (r"\b1\b", r"\b2\b")
    ),
    "BS with global_bs 0": Mismatch(
        BASE, BASE, r"\bBS\b|batch|\bx\b|expert_ids", (r"\b3\b", r"\b5\b"), other_batch=5
    ),
    "no tokens with global_bs 0": Mismatch(
        BASE, BASE, r"\bBS\b|batch|\bx\b|expert_ids", (r"\b3\b", r"\b0\b"), other_batch=0
    ),
    "scales present": Mismatch(
        INT8, INT8, r"scales", (ANYTHING, ANYTHING), change=put(scales=torch.ones(6, 4))
    ),
}


def mismatch_calls(case):
    world = case.usual.world_size
    dissent = prepare(case.other, [case.other_batch] * world)[0]
    if case.change is not None:
        for call in dissent:
            case.change(call["dispatch"])
    good = prepare(case.usual, [case.usual_batch] * world)
    return good, dissent


def check_mismatch(case, refusal):
    error = refusal["error"]
    assert error is not None, "the call was accepted"
    assert "ArgumentMismatchError" in error["types"], error["traceback"]
    assert error["code"] == VALUE
    assert re.search(case.argument, error["argument"] or ""), error["traceback"]
    text = error["text"]
    assert re.search(case.argument, text), text
    for value in case.values:
        assert re.search(value, text), text
    assert "rank" in text
    assert refusal["seconds"] < AT_ONCE


@pytest.mark.parametrize("dissenter", [0, -1], ids=["first rank", "last rank"])
@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_disagree_in_dispatch(name, dissenter):
    case = MISMATCHES[name]
    world = case.usual.world_size
    (calls, received, combined), dissent = mismatch_calls(case)

    def fn(ctx):
        mine = dissent if ctx.ep_rank == dissenter % world else calls
        refusals, rounds = [], []
        for count in (8, 1):
            refusals.append(attempt(lambda: call_dispatch(ctx, mine[ctx.ep_rank])))
            rounds += good_rounds(ctx, calls, count)
        return refusals, rounds

    for rank, (refusals, rounds) in enumerate(run_world("local", world, fn, limit=LIMIT)):
        for refusal in refusals:
            check_mismatch(case, refusal)
        check_rounds(rounds, case.usual, received, combined, rank)


def test_every_rank_disagrees():
    """Three ranks, three numbers of experts; then they agree on a fourth."""
    groups = [replace(BASE, num_experts=number) for number in (6, 9, 12)]
    each = [prepare(group, [BATCH] * WORLD) for group in groups]
    agreed = replace(BASE, num_experts=15)
    calls, received, combined = prepare(agreed, [BATCH] * WORLD)

    def fn(ctx):
        mine = each[ctx.ep_rank][0][ctx.ep_rank]
        return attempt(lambda: call_dispatch(ctx, mine)), good_rounds(ctx, calls, 2)

    for rank, (refusal, rounds) in enumerate(run_world("local", WORLD, fn, limit=LIMIT)):
        error = refusal["error"]
        assert error is not None
        assert "ArgumentMismatchError" in error["types"], error["traceback"]
        assert error["argument"] == "moe_expert_num"
        assert str(groups[rank].num_experts) in error["text"], error["traceback"]
        check_rounds(rounds, agreed, received, combined, rank)


def combine_dissent(name, call):
    """A combine that is right by itself and differs from its peers' in one argument."""
    args = call["combine"]
    if name == "hidden size":
        args["expand_x"] = args["expand_x"].repeat(1, 2)
    elif name == "dtype":
        args["expand_x"] = args["expand_x"].half()
    elif name == "global_bs":
        args["global_bs"] = 12
        args["expand_x"] = args["expand_x"].repeat(2, 1)
    elif name == "moe_expert_num":
        # Nine experts on three ranks: three local ones, nine prefix sums.
        args["moe_expert_num"] = 9
        args["ep_send_counts"] = torch.arange(1, 10, dtype=torch.int32)


COMBINE_MISMATCHES = ["hidden size", "dtype", "global_bs", "moe_expert_num"]


@pytest.mark.parametrize("name", COMBINE_MISMATCHES)
def test_ranks_disagree_in_combine(name):
    case = MISMATCHES["global_bs 0" if name == "global_bs" else name]
    calls, received, combined = prepare(BASE, [BATCH] * WORLD)

    def fn(ctx):
        call = calls[ctx.ep_rank]
        if ctx.ep_rank == 1:
            call = {op: dict(args) for op, args in call.items()}
            combine_dissent(name, call)
        refusals, rounds = [], []
        for count in (8, 1):
            outputs = call_dispatch(ctx, calls[ctx.ep_rank])
            changes = {"ep_send_counts": outputs[4], **call["combine"]}
            refusals.append(attempt(lambda c=changes, o=outputs: call_combine(ctx, call, o, **c)))
            rounds += good_rounds(ctx, calls, count)
        return refusals, rounds

    for rank, (refusals, rounds) in enumerate(run_world("local", WORLD, fn, limit=LIMIT)):
        for refusal in refusals:
            check_mismatch(case, refusal)
        check_rounds(rounds, BASE, received, combined, rank)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_processes_disagree(world):
    names = [name for name, case in MISMATCHES.items() if case.usual.world_size == WORLD]
    cases = {name: mismatch_calls(MISMATCHES[name]) for name in names}

    def fn(ctx):
        results = []
        for i, ((calls, _, _), dissent) in enumerate(cases.values()):
            mine = dissent if ctx.ep_rank == i % WORLD else calls
            refusal = attempt(lambda mine=mine: call_dispatch(ctx, mine[ctx.ep_rank]))
            results.append((refusal, good_rounds(ctx, calls, 2)))
        return results

    for rank, results in enumerate(run_world(world, WORLD, fn)):
        for name, (refusal, rounds) in zip(names, results, strict=True):
            check_mismatch(MISMATCHES[name], refusal)
            (_, received, combined), _ = cases[name]
            check_rounds(rounds, MISMATCHES[name].usual, received, combined, rank)


def test_an_unknown_group_is_named():
    calls, _, _ = prepare(replace(BASE, world_size=1), [BATCH])

    def fn(ctx):
        return attempt(lambda: call_dispatch(ctx, calls[0], group_ep="nobody knows it"))

    (refusal,) = run_world("local", 1, fn, limit=LIMIT)
    assert "MoeError" in refusal["error"]["types"]
    assert refusal["error"]["argument"] == "group_ep"
    assert "nobody knows it" in refusal["error"]["text"]


def test_the_rank_of_another_is_refused(base):
    """Each rank of a group has one number; a rank that calls under its neighbour's is at fault."""
    calls, received, combined = base

    def fn(ctx):
        change = put(ep_rank_id=0) if ctx.ep_rank == 1 else put()
        refusal = bad_call(ctx, calls[ctx.ep_rank], "dispatch", change)
        return refusal, good_rounds(ctx, calls, 2)

    bad = dispatch(put(), VALUE, "ep_rank_id", r"\b0\b")
    for rank, (refusal, rounds) in enumerate(run_world("local", WORLD, fn, limit=LIMIT)):
        if rank == 1:
            check_refusal(bad, refusal)
        else:
            check_peer(bad, refusal, 1)
        check_rounds(rounds, BASE, received, combined, rank)


# A correct call on each product is wrong on the others: W, H and expert_scales exclude each other.
ON_PRODUCTS = {
    "a2": Group(world_size=16, num_experts=16, top_k=1, hidden=32),
    "a3": Group(world_size=8, num_experts=8, top_k=1, hidden=7168),
    "950": Group(world_size=4, num_experts=4, top_k=1, hidden=64),
}
MASK = torch.ones(1, dtype=torch.bool)
WEIGHTS = torch.ones(1, 1)
BY_PRODUCT = {
    "8 S": (
        ["a2"],
        dispatch(
            put(shared_expert_rank_num=4, moe_expert_num=12), VALUE, "shared_expert_rank_num", "4"
        ),
    ),
    "8 NS 2": (
        ["a3"],
        dispatch(
            put(shared_expert_num=2, shared_expert_rank_num=2, moe_expert_num=6),
            VALUE,
            "shared_expert_num",
            "2",
        ),
    ),
    "11 E 528": (
        ["a3", "950"],
        dispatch(put(moe_expert_num=528), VALUE, "moe_expert_num", "528"),
    ),
    "12 L 25": (["a2"], dispatch(put(moe_expert_num=400), VALUE, "moe_expert_num", "25")),
    "13 quant_mode 1": (
        ["a2", "a3"],
        dispatch(put(quant_mode=1), VALUE, "quant_mode", r"\b1\b"),
    ),
    "16 H": (
        ["a2", "a3"],
        dispatch(edit("x", lambda x: x[:, :-1]), VALUE, "x", r"\b(31|7167)\b"),
    ),
    "20 mask": (
        [*ON_PRODUCTS],
        dispatch(put(x_active_mask=MASK), VALUE, "x_active_mask", ANYTHING),
    ),
    "20 combine mask": (
        [*ON_PRODUCTS],
        combine(put(x_active_mask=MASK), VALUE, "x_active_mask", ANYTHING),
    ),
    "expert_scales": (
        ["a3", "950"],
        dispatch(put(expert_scales=WEIGHTS), VALUE, "expert_scales", ANYTHING),
    ),
    "expand_scales missing": (
        ["a2"],
        combine(put(expand_scales=None), VALUE, "expand_scales", "None"),
    ),
    "expand_scales given": (
        ["a3", "950"],
        combine(put(expand_scales=torch.ones(8)), VALUE, "expand_scales", ANYTHING),
    ),
    "23 comm_quant_mode 2": (
        ["a2", "950"],
        combine(put(comm_quant_mode=2), VALUE, "comm_quant_mode", r"\b2\b"),
    ),
}


@pytest.mark.parametrize(
    "product, name", [(product, name) for name, row in BY_PRODUCT.items() for product in row[0]]
)
def test_refused_under_the_profile_of_a_product(product, name):
    bad, group = BY_PRODUCT[name][1], ON_PRODUCTS[product]
    calls, received, combined = prepare(group, [1] * group.world_size)
    if product != "a2":
        for call in calls:
            call["dispatch"]["expert_scales"] = None

    def fn(ctx):
        change = bad.change if ctx.rank == 1 else put()
        refusal = bad_call(ctx, calls[ctx.rank], bad.op, change)
        return refusal, harness.round_trip(ctx, calls)

    moe_triton.set_profile(product)
    try:
        results = run_world("local", group.world_size, fn, limit=LIMIT)
    finally:
        moe_triton.set_profile(None)
    for rank, (refusal, (outputs, result)) in enumerate(results):
        if rank == 1:
            check_refusal(bad, refusal)
            assert f"on {product}" in refusal["error"]["text"]
        else:
            check_peer(bad, refusal, 1)
        weights_given = product == "a2"
        plain = without_spare(group, outputs, 1) if product == "a2" else outputs
        check_dispatch(group, received[rank], plain, rank=rank, weights_given=weights_given)
        definition.same_bits(result, combined[rank], f"rank {rank} x")

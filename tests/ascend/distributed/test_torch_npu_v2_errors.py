"""Calls of version 2 that must be refused, row by row of the contract's table of constraints.

The id of a row starts with its number in that table; "null" and "dtype" are the lists before it.
In one world each row is called wrongly by one rank and then by all, each time followed by a correct
call that must return the right bits. Rows of a product run under its profile, and so do the correct
calls around them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import definition
import harness
import numpy as np
import pytest
import torch
from definition import Group, Remaining, Tokens
from definition_checks import check_dispatch, without_spare
from harness import run_world
from invalid_calls import (
    ANYTHING,
    MISSING,
    TYPE,
    VALUE,
    Bad,
    Change,
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

LIMIT = 20.0


@dataclass(frozen=True)
class Base:
    """A correct call.

    Attributes:
        group: what all ranks agree on.
        batch: BS.
        mask: number of dimensions of the mask, 0 for none.
        comm_alg: the algorithm.
    """

    group: Group
    batch: int = 3
    mask: int = 0
    comm_alg: str = ""


PLAIN = Group(world_size=3, num_experts=6, top_k=2, hidden=4)
SPECIAL = Group(2, 4, 3, 4, zero_experts=1, copy_experts=1, const_experts=2)
STRICT = Group(world_size=2, num_experts=4, top_k=2, hidden=1024)
HIERARCHY = Group(world_size=16, num_experts=16, top_k=1, hidden=1024)
BASES = {
    "plain": Base(PLAIN),
    "hidden 8": Base(replace(PLAIN, hidden=8)),
    "unequal": Base(replace(PLAIN, global_bs=12)),
    "mask": Base(PLAIN, mask=1),
    "mask by slot": Base(PLAIN, mask=2),
    "shared": Base(Group(4, 4, 2, 4, shared_ranks=2)),
    "six": Base(Group(6, 6, 1, 4, shared_ranks=4, shared_experts=4), batch=1),
    "zero": Base(Group(2, 4, 3, 4, zero_experts=2), batch=2),
    "copy": Base(Group(2, 4, 3, 4, copy_experts=2), batch=2),
    "special": Base(SPECIAL, batch=2),
    "elastic": Base(replace(PLAIN, remaining=Remaining((0, 1, 2), 0, 6))),
    "pairs": Base(Group(2, 2, 1, 8, tp_world_size=2)),
    "fullmesh_v2": Base(PLAIN, comm_alg="fullmesh_v2"),
    "strict": Base(STRICT, batch=2),
    "strict shared": Base(Group(4, 4, 2, 1024, shared_ranks=2), batch=2),
    "strict hierarchy": Base(HIERARCHY, batch=1, comm_alg="hierarchy"),
}


def sized(group: Group, batch: int) -> Change:
    """Turn a call into one of other sizes, whose tensors fit each other."""

    def change(call: dict) -> None:
        rank = call["ep_rank_id"]
        capacity = group.capacity(rank, batch)
        slots = (batch, group.top_k)
        call.update(
            expert_ids=torch.arange(group.top_k, dtype=torch.int32).expand(slots),
            expert_scales=torch.ones(slots),
            moe_expert_num=group.num_experts,
            shared_expert_num=group.shared_experts,
            shared_expert_rank_num=group.shared_ranks,
            global_bs=group.global_bs,
        )
        if "x" in call:
            call.update(x=torch.zeros(batch, group.hidden, dtype=torch.bfloat16))
        else:
            words = max(batch * group.top_k, 128 * capacity)
            counts = group.world_size * group.num_local(rank)
            call.update(
                expand_x=torch.zeros(capacity, group.hidden, dtype=torch.bfloat16),
                assist_info_for_combine=torch.zeros(words, dtype=torch.int32),
                ep_send_counts=torch.zeros(counts, dtype=torch.int32),
                expand_scales=torch.zeros(capacity),
            )

    return change


def smooth(*shape: int, dtype: torch.dtype = torch.float32) -> Change:
    """Ask for int8 with factors of this shape."""
    return put(quant_mode=2, scales=torch.ones(shape, dtype=dtype))


def halve(name: str) -> Change:
    """Make an argument float16."""
    return edit(name, torch.Tensor.half)


def lengthen(name: str) -> Change:
    """Make an argument int64."""
    return edit(name, torch.Tensor.long)


def named_like_ep(call: dict) -> None:
    """Give both groups one name."""
    call["group_tp"] = call["group_ep"]


def without_me(call: dict) -> None:
    """Pass a table without the rank that calls."""
    world, rank = call["ep_world_size"], call["ep_rank_id"]
    left = [old for old in range(world) if old != rank]
    to_new = [left.index(old) if old in left else -1 for old in range(world)]
    head = [1, len(left), 0, call["moe_expert_num"] // world * len(left)]
    call["elastic_info"] = torch.tensor([*head, *to_new, *left, -1], dtype=torch.int32)


def tables(*words: int) -> Change:
    """Pass these words as elastic_info."""
    return put(elastic_info=torch.tensor(words, dtype=torch.int32))


DISPATCH, COMBINE = ("dispatch",), ("combine",)
PRODUCTS = ("a2", "a3", "950")
NULL = {"code": MISSING}
DTYPE = {"code": TYPE}
UNKNOWN_GROUP = {"reaches_peers": False}
ASSIST = "assist_info_for_combine"
KINDS = ("zero_expert_num", "copy_expert_num", "const_expert_num")
CONSTANTS = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")


def row(
    name: str,
    change: Change,
    argument: str | Sequence[str],
    got: str = ANYTHING,
    *,
    code: int = VALUE,
    ops: Sequence[str] = ("dispatch", "combine"),
    on: Sequence[str] = ("portable",),
    base: str = "plain",
    reaches_peers: bool = True,
) -> dict[str, Bad]:
    """The cases of one row: for each op, under each profile."""
    argument = argument if isinstance(argument, str) else tuple(argument)
    return {
        f"{name}{'' if profile == 'portable' else f'-on-{profile}'}-{op}": Bad(
            op, change, code, argument, got, reaches_peers, base, profile
        )
        for op in ops
        for profile in on
    }


REQUIRED = [
    row("null-x", put(x=None), "x", "None", **NULL, ops=DISPATCH),
    row("null-expert-ids", put(expert_ids=None), "expert_ids", "None", **NULL),
    *(
        row(f"null-{name}", put(**{name: None}), name, "None", **NULL, ops=COMBINE)
        for name in ("expand_x", ASSIST, "ep_send_counts", "expert_scales")
    ),
    row("null-group", put(group_ep=None), "group_ep", "None", **NULL, **UNKNOWN_GROUP),
    row("null-group-empty", put(group_ep=""), "group_ep", **NULL, **UNKNOWN_GROUP),
    row("null-group-long", put(group_ep="g" * 128), "group_ep", "128", **DTYPE, **UNKNOWN_GROUP),
    # Without the name of the pair, a rank cannot tell the other one.
    row(
        "null-group-tp-long",
        put(group_tp="g" * 128),
        "group_tp",
        "128",
        **DTYPE,
        **UNKNOWN_GROUP,
        base="pairs",
    ),
    # The lower code wins.
    row(
        "null-before-dtype-and-value",
        both(put(x=None, quant_mode=7), lengthen("expert_ids")),
        "x",
        "None",
        **NULL,
        ops=DISPATCH,
    ),
    row(
        "dtype-before-value",
        both(put(comm_quant_mode=7, comm_alg="ring"), lengthen(ASSIST)),
        ASSIST,
        "int64",
        **DTYPE,
        ops=COMBINE,
    ),
]

DTYPES = [
    row("dtype-x-float32", edit("x", torch.Tensor.float), "x", "float32", **DTYPE, ops=DISPATCH),
    row("dtype-x-int8", edit("x", torch.Tensor.char), "x", "int8", **DTYPE, ops=DISPATCH),
    row("dtype-x-int32", edit("x", torch.Tensor.int), "x", "int32", **DTYPE, ops=DISPATCH),
    row("dtype-x-list", edit("x", torch.Tensor.tolist), "x", "list", **DTYPE, ops=DISPATCH),
    row("dtype-expert-ids", lengthen("expert_ids"), "expert_ids", "int64", **DTYPE),
    row(
        "dtype-scales",
        smooth(6, 4, dtype=torch.float16),
        "scales",
        "float16",
        **DTYPE,
        ops=DISPATCH,
    ),
    row("dtype-expert-scales", halve("expert_scales"), "expert_scales", "float16", **DTYPE),
    row(
        "dtype-mask",
        edit("x_active_mask", torch.Tensor.byte),
        "x_active_mask",
        "uint8",
        **DTYPE,
        base="mask",
    ),
    row(
        "dtype-elastic",
        lengthen("elastic_info"),
        "elastic_info",
        "int64",
        **DTYPE,
        base="elastic",
    ),
    row(
        "dtype-performance",
        put(performance_info=torch.zeros(3, dtype=torch.int32)),
        "performance_info",
        "int32",
        **DTYPE,
    ),
    row(
        "dtype-expand-x-float32",
        edit("expand_x", torch.Tensor.float),
        "expand_x",
        "float32",
        **DTYPE,
        ops=COMBINE,
    ),
    row(
        "dtype-expand-x-int8",
        edit("expand_x", torch.Tensor.char),
        "expand_x",
        "int8",
        **DTYPE,
        ops=COMBINE,
    ),
    row("dtype-assist", lengthen(ASSIST), ASSIST, "int64", **DTYPE, ops=COMBINE),
    row(
        "dtype-ep-send-counts",
        lengthen("ep_send_counts"),
        "ep_send_counts",
        "int64",
        **DTYPE,
        ops=COMBINE,
    ),
    row(
        "dtype-tp-send-counts",
        lengthen("tp_send_counts"),
        "tp_send_counts",
        "int64",
        **DTYPE,
        ops=COMBINE,
        base="pairs",
    ),
    row(
        "dtype-expand-scales",
        halve("expand_scales"),
        "expand_scales",
        "float16",
        **DTYPE,
        ops=COMBINE,
    ),
    row(
        "dtype-shared-expert-x",
        put(shared_expert_x=torch.zeros(3, 4).half()),
        "shared_expert_x",
        "float16",
        **DTYPE,
        ops=COMBINE,
    ),
    *(
        row(f"dtype-{name}", halve(name), name, "float16", **DTYPE, ops=COMBINE, base="special")
        for name in ("ori_x", *CONSTANTS)
    ),
]

FLOAT8_X = edit("x", lambda x: x.to(torch.float8_e4m3fn))
# A row of one scale for each of 3 tokens.
GIVEN = both(FLOAT8_X, put(scales=torch.ones(3, 1)))
OF_FORMATS = {**DTYPE, "ops": DISPATCH}
STRICT_A3 = {"base": "strict", "on": ("a3",)}

# Formats that there are not, or not in the mode.
FORMATS = [
    row("format-y-hifloat8", put(quant_mode=2, y_dtype=290), "y_dtype", "HiFloat8", **OF_FORMATS),
    row("format-y-fp4", put(quant_mode=4, y_dtype=296), "y_dtype", "fp4", **OF_FORMATS),
    row("format-y-unknown", put(quant_mode=2, y_dtype=77), "y_dtype", "77", **OF_FORMATS),
    row("format-y-word", put(quant_mode=2, y_dtype="int8"), "y_dtype", "int8", **OF_FORMATS),
    row("format-y-fp32", put(y_dtype=torch.float32), "y_dtype", "float32", **OF_FORMATS),
    row("format-x-hifloat8", put(x_dtype=290), "x_dtype", "HiFloat8", **OF_FORMATS),
    row("format-x-fp4", put(x_dtype=297), "x_dtype", "fp4", **OF_FORMATS),
    row("format-x-other", put(x_dtype=torch.float8_e5m2), "x", "bfloat16", **OF_FORMATS),
    row("format-x-int4", edit("x", torch.Tensor.int), "x", "packed int4", **OF_FORMATS),
    row("format-scales-fp4", put(scales_dtype=296), "scales_dtype", "fp4", **OF_FORMATS),
    *(
        row(f"format-y-mode-{mode}", put(quant_mode=mode, y_dtype=kind), "y_dtype", **OF_FORMATS)
        for mode, kind in ((0, 24), (1, 23), (2, 15), (3, torch.int8), (4, 258))
    ),
    row("format-x-quantised-twice", both(GIVEN, put(quant_mode=2)), "x", "float8", **OF_FORMATS),
    row("format-scales-of-bytes", put(scales=torch.ones(6, 4).byte()), "scales", **OF_FORMATS),
    row(
        "format-float8-on-a3",
        both(FLOAT8_X, put(scales=torch.ones(2, 1))),
        "x",
        **OF_FORMATS,
        **STRICT_A3,
    ),
    row(
        "format-y-float8-on-a3",
        put(quant_mode=2, y_dtype=torch.float8_e4m3fn),
        "y_dtype",
        **OF_FORMATS,
        **STRICT_A3,
    ),
]

SHAPES = [
    row("row01-x-1d", edit("x", lambda x: x[:, 0]), "x", r"\(3,\)", ops=DISPATCH),
    row("row01-x-3d", edit("x", lambda x: x[None]), "x", "1, 3, 4", ops=DISPATCH),
    row("row01-expert-ids-1d", edit("expert_ids", lambda ids: ids[:, 0]), "expert_ids", r"\(3,\)"),
    row(
        "row01-expert-scales-3d",
        edit("expert_scales", lambda weights: weights[None]),
        "expert_scales",
        "1, 3, 2",
    ),
    row("row01-scales-1d", smooth(4), "scales", r"\(4,\)", ops=DISPATCH),
    row("row01-scales-3d", smooth(1, 6, 4), "scales", "1, 6, 4", ops=DISPATCH),
    row("row01-expand-x-1d", edit("expand_x", lambda x: x[:, 0]), "expand_x", "18", ops=COMBINE),
    row("row01-expand-x-3d", edit("expand_x", lambda x: x[None]), "expand_x", "1, 18", ops=COMBINE),
    row(
        "row01-assist-2d",
        edit(ASSIST, lambda words: words.view(-1, 128)),
        ASSIST,
        "18, 128",
        ops=COMBINE,
    ),
    row(
        "row01-ep-send-counts-2d",
        edit("ep_send_counts", lambda counts: counts.view(2, 3)),
        "ep_send_counts",
        "2, 3",
        ops=COMBINE,
    ),
    row(
        "row02-more-rows-in-x",
        edit("x", lambda x: torch.cat([x, x[:1]])),
        ("x", "expert_ids"),
        r"\b[34]\b",
        ops=DISPATCH,
    ),
    row(
        "row02-fewer-rows-in-x",
        edit("x", lambda x: x[:2]),
        ("x", "expert_ids"),
        r"\b[32]\b",
        ops=DISPATCH,
    ),
    row(
        "row02-expert-scales-rows",
        edit("expert_scales", lambda weights: weights[:2]),
        "expert_scales",
        "2, 2",
    ),
    row(
        "row02-expert-scales-columns",
        edit("expert_scales", lambda weights: weights[:, :1]),
        "expert_scales",
        "3, 1",
    ),
    row("row02-scales-columns", smooth(6, 5), "scales", "6, 5", ops=DISPATCH),
]

GROUPS = [
    row("row03-w-0", put(ep_world_size=0), "ep_world_size", r"\b0\b"),
    row("row03-w-negative", put(ep_world_size=-1), "ep_world_size", "-1"),
    row("row03-w-not-the-groups", put(ep_world_size=2), "ep_world_size", r"\b2\b"),
    row(
        "row03-hierarchy-of-two",
        put(comm_alg="hierarchy"),
        "ep_world_size",
        r"\b2\b",
        base="strict",
        on=("a2", "a3"),
    ),
    row("row04-rank-negative", put(ep_rank_id=-1), "ep_rank_id", "-1"),
    row("row04-rank-w", put(ep_rank_id=3), "ep_rank_id", r"\b3\b"),
    row("row05-t-3", put(tp_world_size=3), "tp_world_size", r"\b3\b"),
    row("row05-t-negative", put(tp_world_size=-1), "tp_world_size", "-1"),
    row("row05-rank-without-tp", put(tp_rank_id=1), "tp_rank_id", r"\b1\b"),
    row("row05-rank-with-t-1", put(tp_world_size=1, tp_rank_id=1), "tp_rank_id", r"\b1\b"),
    row("row05-rank-negative", put(tp_rank_id=-1), "tp_rank_id", "-1"),
    row("row05-rank-2-of-2", put(tp_rank_id=2), "tp_rank_id", r"\b2\b", base="pairs"),
    row(
        "row05-t-2-without-group",
        put(group_tp=""),
        ("group_tp", "tp_world_size"),
        **UNKNOWN_GROUP,
        base="pairs",
    ),
    row("row06-l-2", put(moe_expert_num=4), ("moe_expert_num", "tp_world_size"), base="pairs"),
    row("row07-shard-type", put(expert_shard_type=1), "expert_shard_type", r"\b1\b"),
    row("row29-one-name-for-both", named_like_ep, "group_tp"),
    row(
        "row29-one-name-for-both-with-t-2",
        named_like_ep,
        "group_tp",
        **UNKNOWN_GROUP,
        base="pairs",
    ),
]

SHARED = ("shared_expert_num", "shared_expert_rank_num")
EXPERTS = [
    row("row09-s-negative", put(shared_expert_rank_num=-1), SHARED[1], "-1"),
    row("row09-s-w", put(shared_expert_rank_num=3), SHARED[1], r"\b3\b"),
    row("row09-ns-negative", put(shared_expert_num=-1), SHARED[0], "-1"),
    row("row09-ns-negative-with-ranks", put(shared_expert_num=-1), SHARED[0], "-1", base="shared"),
    row("row09-ns-without-ranks", put(shared_expert_num=2), SHARED[0], r"\b2\b"),
    row("row09-ranks-without-ns", put(shared_expert_num=0), SHARED, r"\b0\b", base="shared"),
    row(
        "row09-s-not-a-multiple-of-ns",
        put(shared_expert_rank_num=3, shared_expert_num=2),
        SHARED,
        r"\b[23]\b",
        base="shared",
    ),
    row("row09-ns-above-s", put(shared_expert_num=4), SHARED, r"\b[24]\b", base="shared"),
    row(
        "row09-ns-5",
        put(shared_expert_num=5, shared_expert_rank_num=5),
        SHARED[0],
        r"\b5\b",
        base="six",
    ),
    row(
        "row09-shared-ranks",
        put(shared_expert_rank_num=1),
        SHARED[1],
        r"\b1\b",
        base="strict",
        on=("a2",),
    ),
    row("row11-e-0", put(moe_expert_num=0), "moe_expert_num", r"\b0\b"),
    row("row11-e-negative", put(moe_expert_num=-3), "moe_expert_num", "-3"),
    row("row11-e-not-a-multiple", put(moe_expert_num=7), "moe_expert_num", r"\b7\b"),
    row(
        "row11-e-not-a-multiple-with-s",
        put(moe_expert_num=5),
        "moe_expert_num",
        r"\b5\b",
        base="shared",
    ),
    row(
        "row11-e-1026",
        sized(replace(STRICT, num_experts=1026), 2),
        "moe_expert_num",
        "1026",
        base="strict",
        on=PRODUCTS,
    ),
    row(
        "row11-e-528-in-hierarchy",
        sized(replace(HIERARCHY, num_experts=528), 1),
        "moe_expert_num",
        "528",
        base="strict hierarchy",
        on=("a2", "a3"),
    ),
    row(
        "row11-l-times-w-4096",
        sized(Group(4, 1024, 2, 1024, shared_ranks=3, shared_experts=3), 2),
        "moe_expert_num",
        "4096",
        base="strict shared",
        on=("a3", "950"),
    ),
]

QUANTISATION = [
    row("row13-mode-7", put(quant_mode=7), "quant_mode", r"\b7\b", ops=DISPATCH),
    row("row13-mode-negative", put(quant_mode=-1), "quant_mode", "-1", ops=DISPATCH),
    *(
        row(
            f"row13-mode-{mode}",
            put(quant_mode=mode),
            "quant_mode",
            str(mode),
            ops=DISPATCH,
            base="strict",
            on=("a2", "a3"),
        )
        for mode in (1, 3, 4)
    ),
    row(
        "row14-scales-without-quantisation",
        put(scales=torch.ones(6, 4)),
        "scales",
        "6, 4",
        ops=DISPATCH,
    ),
    row("row15-mode-4", put(quant_mode=4, scales=torch.ones(6, 4)), "scales", ops=DISPATCH),
    row("row15-mode-1", put(quant_mode=1), "scales", "None", ops=DISPATCH),
    row("row15-mode-1-3", put(quant_mode=1, scales=torch.ones(3)), "scales", "3", ops=DISPATCH),
    row("row15-given", FLOAT8_X, "scales", "None", ops=DISPATCH),
    row("row15-given-2", both(GIVEN, put(scales=torch.ones(2))), "scales", "2", ops=DISPATCH),
    row("row15-given-5", both(GIVEN, put(scales=torch.ones(3, 5))), "scales", "5", ops=DISPATCH),
    row("row14-scales-of-7-experts", smooth(7, 4), "scales", "7, 4", ops=DISPATCH),
    row("row14-scales-without-ns", smooth(4, 4), "scales", "4, 4", ops=DISPATCH, base="shared"),
    row("row14-scales-with-s", smooth(6, 4), "scales", "6, 4", ops=DISPATCH, base="shared"),
    row(
        "row14-scales-in-hierarchy",
        smooth(16, 1024),
        "scales",
        ops=DISPATCH,
        base="strict hierarchy",
        on=("a2",),
    ),
    *(
        row(
            f"row23-mode-{mode}",
            put(comm_quant_mode=mode),
            "comm_quant_mode",
            str(mode),
            ops=COMBINE,
            base="hidden 8",
        )
        for mode in (1, 3, -2)
    ),
    row(
        "row23-mode-2-with-t-2",
        put(comm_quant_mode=2),
        ("comm_quant_mode", "tp_world_size"),
        r"\b2\b",
        ops=COMBINE,
        base="pairs",
    ),
    row(
        "row23-mode-2-with-h-4",
        put(comm_quant_mode=2),
        ("comm_quant_mode", "expand_x"),
        r"\b[24]\b",
        ops=COMBINE,
    ),
    row(
        "row23-mode-2-in-fullmesh",
        put(comm_quant_mode=2),
        "comm_quant_mode",
        r"\b2\b",
        ops=COMBINE,
        base="strict",
        on=("a2",),
    ),
]

SIZES = [
    row("row16-h-0", edit("x", lambda x: x[:, :0]), "x", r"\b0\b", ops=DISPATCH),
    row("row16-h-0", edit("expand_x", lambda x: x[:, :0]), "expand_x", r"\b0\b", ops=COMBINE),
    *(
        row(
            f"row16-h-{hidden}",
            sized(replace(STRICT, hidden=hidden), 2),
            ("x", "expand_x"),
            str(hidden),
            base="strict",
            on=products,
        )
        for hidden, products in (
            (1040, ("a2",)),
            (7200, ("a2",)),
            (1023, ("a3", "950")),
            (8193, ("a3", "950")),
        )
    ),
    *(
        row(
            f"row17-bs-{batch}",
            sized(replace(STRICT, global_bs=0 if batch else 4), batch),
            ("x", "expert_ids"),
            rf"\b{batch}\b",
            base="strict",
            on=products,
        )
        for batch, products in ((0, PRODUCTS), (257, ("a2",)), (513, ("a3", "950")))
    ),
    row(
        "row17-bs-257-in-fullmesh-v2",
        both(sized(STRICT, 257), put(comm_alg="fullmesh_v2")),
        "x",
        "257",
        ops=DISPATCH,
        base="strict",
        on=("a3",),
    ),
    row(
        "row17-bs-257-in-hierarchy",
        sized(HIERARCHY, 257),
        ("x", "expert_ids"),
        "257",
        base="strict hierarchy",
        on=("a3",),
    ),
    row(
        "row18-k-0",
        both(
            edit("expert_ids", lambda ids: ids[:, :0]),
            edit("expert_scales", lambda weights: weights[:, :0]),
        ),
        "expert_ids",
        r"\b0\b",
    ),
    row(
        "row18-k-above-e",
        sized(replace(PLAIN, top_k=7), 3),
        ("expert_ids", "moe_expert_num"),
        r"\b7\b",
    ),
    row(
        "row18-k-above-e-and-special",
        sized(replace(SPECIAL, top_k=9), 2),
        ("expert_ids", "moe_expert_num"),
        r"\b9\b",
        base="special",
    ),
    row(
        "row18-k-13-in-fullmesh-v2",
        sized(replace(PLAIN, num_experts=15, top_k=13), 3),
        ("expert_ids", "comm_alg"),
        r"\b13\b|fullmesh_v2",
        base="fullmesh_v2",
    ),
    row(
        "row18-k-17",
        sized(replace(STRICT, num_experts=18, top_k=17), 2),
        "expert_ids",
        r"\b17\b",
        base="strict",
        on=PRODUCTS,
    ),
    row("row19-g-below-bs-times-w", put(global_bs=6), "global_bs", r"\b6\b"),
    row("row19-g-not-a-multiple", put(global_bs=10), "global_bs", r"\b10\b"),
    row("row19-g-negative", put(global_bs=-9), "global_bs", "-9"),
]

MASKS = [
    *(
        row(
            f"row20-shape-{'x'.join(map(str, shape))}",
            put(x_active_mask=torch.ones(shape, dtype=torch.bool)),
            "x_active_mask",
            str(shape)[1:-1],
            base="mask",
        )
        for shape in ((4,), (3, 3), (2, 2), (1, 3, 2))
    ),
    row(
        "row20-no-prefix",
        put(x_active_mask=torch.tensor([True, False, True])),
        "x_active_mask",
        base="mask",
    ),
    *(
        row(
            f"row20-{len(shape)}d-with-unequal-bs",
            put(x_active_mask=torch.ones(shape, dtype=torch.bool)),
            ("x_active_mask", "global_bs"),
            base="unequal",
        )
        for shape in ((3,), (3, 2))
    ),
    row(
        "row20-in-hierarchy",
        put(x_active_mask=torch.ones(1, dtype=torch.bool)),
        "x_active_mask",
        base="strict hierarchy",
        on=("a2", "a3"),
    ),
]

OUTPUTS = [
    row("row21-expand-x", edit("expand_x", lambda x: x[:17]), "expand_x", "17", ops=COMBINE),
    row("row21-expand-x-with-g", put(global_bs=12), "expand_x", "18", ops=COMBINE),
    row(
        "row21-expand-x-with-t-2",
        edit("expand_x", lambda x: x[:11]),
        "expand_x",
        r"\b11\b",
        ops=COMBINE,
        base="pairs",
    ),
    *(
        row(
            f"row21-assist-of-{words}",
            edit(ASSIST, lambda words, size=words: words[:size]),
            ASSIST,
            rf"\b{words}\b",
            ops=COMBINE,
        )
        for words in (0, 3 * 18, 128 * 18 - 1)
    ),
    row(
        "row21-ep-send-counts-short",
        edit("ep_send_counts", lambda counts: counts[:5]),
        "ep_send_counts",
        r"\b5\b",
        ops=COMBINE,
    ),
    row(
        "row21-ep-send-counts-long",
        edit("ep_send_counts", lambda counts: torch.cat([counts, counts[:1]])),
        "ep_send_counts",
        r"\b7\b",
        ops=COMBINE,
    ),
    row(
        "row21-ep-send-counts-with-t-2",
        edit("ep_send_counts", lambda counts: counts[:3]),
        "ep_send_counts",
        r"\b3\b",
        ops=COMBINE,
        base="pairs",
    ),
    row(
        "row21-tp-send-counts-missing",
        put(tp_send_counts=None),
        "tp_send_counts",
        "None",
        ops=COMBINE,
        base="pairs",
    ),
    row(
        "row21-tp-send-counts-short",
        edit("tp_send_counts", lambda counts: counts[:1]),
        "tp_send_counts",
        r"\b1\b",
        ops=COMBINE,
        base="pairs",
    ),
    row(
        "row21-tp-send-counts-2d",
        edit("tp_send_counts", lambda counts: counts[None]),
        "tp_send_counts",
        "1, 2",
        ops=COMBINE,
        base="pairs",
    ),
    row(
        "row21-expand-scales-missing",
        put(expand_scales=None),
        "expand_scales",
        "None",
        ops=COMBINE,
        base="strict",
        on=("a2",),
    ),
    row(
        "row21-performance-info",
        put(performance_info=torch.zeros(2, dtype=torch.int64)),
        "performance_info",
        r"\b2\b",
    ),
]

ALGORITHMS = [
    row("row24-unknown", put(comm_alg="ring"), "comm_alg", "ring"),
    row("row24-other-case", put(comm_alg="FULLMESH"), "comm_alg", "FULLMESH"),
    *(
        row(
            f"row24-{algorithm}",
            put(comm_alg=algorithm),
            "comm_alg",
            algorithm,
            base="strict",
            on=(product,),
        )
        for product, algorithm in (("a2", "fullmesh_v1"), ("a3", "fullmesh"), ("950", "hierarchy"))
    ),
    row(
        "row24-fullmesh-v1",
        put(comm_alg="fullmesh_v1"),
        "comm_alg",
        "fullmesh_v1",
        ops=COMBINE,
        base="strict",
        on=("a3",),
    ),
    *(
        row(
            f"row24-fullmesh-v2-with-{base.replace(' ', '-')}",
            put(comm_alg="fullmesh_v2"),
            ("comm_alg", *arguments),
            base=base,
        )
        for base, arguments in (
            ("elastic", ("elastic_info",)),
            ("zero", ("zero_expert_num",)),
            ("copy", ("copy_expert_num",)),
            ("special", KINDS),
            ("mask", ("x_active_mask",)),
            ("mask by slot", ("x_active_mask",)),
            ("pairs", ("tp_world_size",)),
            ("unequal", ("global_bs",)),
        )
    ),
]

SPECIAL_EXPERTS = [
    *(
        row(f"row26-{kind}-negative", put(**{kind: -1}), kind, "-1", base="special")
        for kind in KINDS
    ),
    *(
        row(
            f"row26-{kind}-too-many",
            put(**dict.fromkeys(KINDS, 0) | {kind: 2**31 - 1 - SPECIAL.num_experts}),
            KINDS,
            base="special",
        )
        for kind in KINDS
    ),
    row("row26-copy-without-ori-x", put(ori_x=None), "ori_x", "None", ops=COMBINE, base="copy"),
    *(
        row(
            f"row26-const-without-{name}",
            put(**{name: None}),
            name,
            "None",
            ops=COMBINE,
            base="special",
        )
        for name in ("ori_x", *CONSTANTS)
    ),
    row(
        "row26-ori-x-shape",
        edit("ori_x", lambda x: x[:1]),
        "ori_x",
        "1, 4",
        ops=COMBINE,
        base="special",
    ),
    *(
        row(
            f"row26-{name}-of-{'x'.join(map(str, shape))}",
            put(**{name: torch.zeros(shape, dtype=torch.bfloat16)}),
            name,
            str(shape)[1:-1],
            ops=COMBINE,
            base="special",
        )
        for name in CONSTANTS
        for shape in ((3,), (2, 5), (1, 4))
    ),
    row(
        "row26-const",
        put(const_expert_num=1),
        "const_expert_num",
        r"\b1\b",
        base="strict",
        on=("a2",),
    ),
    row(
        "row26-zero-in-hierarchy",
        put(zero_expert_num=1),
        "zero_expert_num",
        r"\b1\b",
        base="strict hierarchy",
        on=("a2",),
    ),
]

# Of three ranks: flag, ranks, shared ranks and experts left, new rank of each, old rank of each.
ELASTIC = [
    *(
        row(
            f"row27-{size}-words",
            put(elastic_info=torch.zeros(size, dtype=torch.int32)),
            "elastic_info",
            rf"\b{size}\b",
        )
        for size in (0, 4, 9, 11)
    ),
    row(
        "row27-2d", edit("elastic_info", lambda words: words[None]), "elastic_info", base="elastic"
    ),
    row(
        "row27-with-t-2",
        tables(1, 2, 0, 2, 0, 1, 0, 1),
        ("elastic_info", "tp_world_size"),
        base="pairs",
    ),
    row("row27-no-rank-left", tables(1, 0, 0, 0, *[-1] * 6), "elastic_info"),
    row("row27-4-ranks-left", tables(1, 4, 0, 8, 0, 1, 2, 0, 1, 2), "elastic_info"),
    row("row27-only-shared-ranks", tables(1, 3, 3, 6, 0, 1, 2, 0, 1, 2), "elastic_info"),
    row("row27-shared-negative", tables(1, 3, -1, 8, 0, 1, 2, 0, 1, 2), "elastic_info"),
    row("row27-another-l", tables(1, 3, 0, 9, 0, 1, 2, 0, 1, 2), "elastic_info"),
    row("row27-tables-disagree", tables(1, 3, 0, 6, 1, 2, 0, 0, 1, 2), "elastic_info"),
    row("row27-one-rank-twice", tables(1, 3, 0, 6, 0, 1, 1, 0, 1, 1), "elastic_info"),
    row("row27-rank-outside", tables(1, 3, 0, 6, 0, 1, 3, 0, 1, 3), "elastic_info"),
    row("row27-without-me", without_me, "elastic_info"),
    row(
        "row27-given",
        tables(0, 0, 0, 0, 0, 0, 0, 0),
        "elastic_info",
        base="strict",
        on=("a2", "950"),
    ),
]

OTHERS = [
    *(
        row(
            f"row30-{'x'.join(map(str, shape))}",
            put(shared_expert_x=torch.zeros(shape, dtype=torch.bfloat16)),
            "shared_expert_x",
            str(shape)[1:-1],
            ops=COMBINE,
        )
        for shape in ((4, 4), (3, 8), (12,), (2, 2, 4), (4, 3), (1, 1, 3, 4))
    ),
    row(
        "row30-with-shared-ranks",
        put(shared_expert_x=torch.zeros(2, 1024, dtype=torch.bfloat16)),
        "shared_expert_x",
        ops=COMBINE,
        base="strict shared",
        on=("a3", "950"),
    ),
    *(
        row(
            f"row31-type-{number}",
            put(expert_token_nums_type=number),
            "expert_token_nums_type",
            str(number),
            ops=DISPATCH,
        )
        for number in (2, -1)
    ),
    # A sparse tensor stands for the fractal formats of an NPU: both are laid out in another way.
    row("row32-x-sparse", edit("x", torch.Tensor.to_sparse), "x", "sparse", ops=DISPATCH),
    row(
        "row32-expand-x-sparse",
        edit("expand_x", torch.Tensor.to_sparse),
        "expand_x",
        "sparse",
        ops=COMBINE,
    ),
    # Values, which only the CPU looks at.
    row("value-id-e", with_value("expert_ids", (1, 1), 6), "expert_ids", r"\b6\b"),
    row("value-id-negative", with_value("expert_ids", (2, 0), -1), "expert_ids", "-1"),
    row(
        "value-id-after-the-special",
        with_value("expert_ids", (1, 1), 8),
        "expert_ids",
        r"\b8\b",
        base="special",
    ),
    row(
        "value-id-twice",
        put(expert_ids=torch.tensor([[0, 1], [5, 5], [2, 3]], dtype=torch.int32)),
        "expert_ids",
        r"\b5\b",
    ),
    row(
        "value-id-twice-among-special",
        put(expert_ids=torch.tensor([[0, 4, 4], [3, 5, 3]], dtype=torch.int32)),
        "expert_ids",
        r"\b3\b",
        base="special",
    ),
]

PARTS = (
    REQUIRED,
    DTYPES,
    FORMATS,
    SHAPES,
    GROUPS,
    EXPERTS,
    QUANTISATION,
    SIZES,
    MASKS,
    OUTPUTS,
    ALGORITHMS,
    SPECIAL_EXPERTS,
    ELASTIC,
    OTHERS,
)
ROWS = {name: bad for part in PARTS for cases in part for name, bad in cases.items()}


def tokens_of(base: Base, rng: np.random.Generator) -> Tokens:
    """What one rank brings to a correct call."""
    group, batch = base.group, base.batch

    def floats(*shape: int) -> np.ndarray:
        return definition.encode(rng.normal(size=shape), group.dtype)

    special = group.zero_experts + group.copy_experts + group.const_experts
    mask = None
    if base.mask == 1:
        mask = np.arange(batch) < batch - 1
    elif base.mask == 2:
        mask = rng.random((batch, group.top_k)) < 0.5
    constants = group.const_experts
    return Tokens(
        x=floats(batch, group.hidden),
        ids=np.array(
            [rng.permutation(group.num_experts + special)[: group.top_k] for _ in range(batch)],
            np.int32,
        ),
        weights=rng.normal(size=(batch, group.top_k)).astype(np.float32),
        mask=mask,
        ori_x=floats(batch, group.hidden) if special else None,
        alpha_1=floats(constants) if constants else None,
        alpha_2=floats(constants) if constants else None,
        const_v=floats(constants, group.hidden) if constants else None,
    )


@functools.cache
def prepare(name: str) -> tuple[list[dict], list, list]:
    """The correct call of every rank, and what dispatch and combine must return."""
    base = BASES[name]
    group = base.group
    rng = np.random.default_rng(0)
    tokens = [tokens_of(base, rng) for _ in range(group.world_size * group.tp_world_size)]
    received = definition.dispatch(group, tokens)
    rows = [mine.expand_x for mine in received]
    combined = definition.combine(group, tokens, received, rows)
    calls = harness.make_calls(group, tokens, rows, version=2, comm_alg=base.comm_alg)
    return calls, received, combined


def check_round(group: Group, result: tuple, received: list, combined: list, rank: int) -> None:
    outputs, x = result
    check_dispatch(group, received[rank], outputs, rank=rank, version=2)
    definition.same_bits(x, combined[rank], f"rank {rank} x")


def in_a_world(world: str, name: str, fn: Callable[[Any], Any]) -> list:
    """``fn(ctx)`` on every rank of a world for the base ``name``."""
    group = BASES[name].group
    ranks = group.world_size * group.tp_world_size
    return run_world(world, ranks, fn, tp_world_size=group.tp_world_size, limit=LIMIT)


def check_ending(bad: Bad, refusal: dict, rank: int, culprit: int) -> None:
    """What ``rank`` says when it is the ``culprit``, or hears of one; world ranks."""
    if rank == culprit:
        check_refusal(bad, refusal)
    else:
        # In pairs a rank hears of it from one that shares its experts, or its plane.
        check_peer(bad, refusal, *divmod(culprit, BASES[bad.base].group.tp_world_size))


@pytest.fixture
def profile(request):
    moe_triton.set_profile(request.param)
    yield
    moe_triton.set_profile(None)


@pytest.mark.parametrize(
    "name, profile",
    [pytest.param(name, bad.profile, id=name) for name, bad in ROWS.items()],
    indirect=["profile"],
)
@pytest.mark.usefixtures("profile")
def test_refused(name):
    """By one rank, whose peers hear of it at once; and by all, each of which says the same."""
    bad = ROWS[name]
    calls, received, combined = prepare(bad.base)
    every_rank = range(len(calls))
    if bad.reaches_peers:
        wrong = [[list(ROWS).index(name) % len(calls)], every_rank]
    elif bad.base == "pairs":
        wrong = [[0, 1], every_rank]  # a pair, of which neither could tell the other
    else:
        wrong = [every_rank]

    def fn(ctx):
        results = []
        for culprits in wrong:
            change = bad.change if ctx.rank in culprits else put()
            refusal = bad_call(ctx, calls[ctx.rank], bad.op, change, version=2)
            results.append((refusal, harness.round_trip(ctx, calls, version=2)))
        return results

    for rank, results in enumerate(in_a_world("local", bad.base, fn)):
        for culprits, (refusal, result) in zip(wrong, results, strict=True):
            check_ending(bad, refusal, rank, rank if rank in culprits else culprits[0])
            base = BASES[bad.base]
            outputs, x = result
            if bad.profile == "a2":
                outputs = without_spare(base.group, outputs, base.batch)
            check_round(base.group, (outputs, x), received, combined, rank)


IN_PROCESSES = {
    "plain": [
        "null-x-dispatch",
        "dtype-assist-combine",
        "row09-ns-without-ranks-dispatch",
        "row19-g-below-bs-times-w-combine",
        "row21-assist-of-54-combine",
        "row24-unknown-dispatch",
        "row27-without-me-combine",
    ],
    "special": ["row26-const-without-ori_x-combine", "row26-zero_expert_num-negative-dispatch"],
    "pairs": ["row06-l-2-dispatch", "row21-tp-send-counts-missing-combine"],
}


@pytest.mark.parametrize("base", IN_PROCESSES)
@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_refused_on_one_process(world, base):
    names = IN_PROCESSES[base]
    calls, received, combined = prepare(base)

    def fn(ctx):
        results = []
        for i, name in enumerate(names):
            change = ROWS[name].change if ctx.rank == i % len(calls) else put()
            refusal = bad_call(ctx, calls[ctx.rank], ROWS[name].op, change, version=2)
            results.append((refusal, harness.round_trip(ctx, calls, version=2)))
        return results

    for rank, results in enumerate(in_a_world(world, base, fn)):
        for i, (name, (refusal, result)) in enumerate(zip(names, results, strict=True)):
            check_ending(ROWS[name], refusal, rank, i % len(calls))
            check_round(BASES[base].group, result, received, combined, rank)


def test_a_profile_in_processes():
    """The choice of one process concerns it alone: here rank 1 refuses what rank 0 would take."""
    calls, received, combined = prepare("plain")
    bad = ROWS["row16-h-1040-on-a2-dispatch"]

    def fn(ctx):
        if ctx.rank == 1:
            moe_triton.set_profile("a2")
        try:
            refusal = bad_call(ctx, calls[ctx.rank], "dispatch", put(), version=2)
        finally:
            moe_triton.set_profile(None)
        return refusal, harness.round_trip(ctx, calls, version=2)

    for rank, (refusal, result) in enumerate(in_a_world("symmetric", "plain", fn)):
        check_ending(replace(bad, got=r"\b4\b"), refusal, rank, 1)
        check_round(PLAIN, result, received, combined, rank)


def test_as_many_experts_as_there_may_be():
    """Row 26 at its edge: 2**31 - 2 experts of all kinds are accepted."""
    group = replace(SPECIAL, zero_experts=2**31 - 2 - 4, copy_experts=0, const_experts=0)
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
    combined = definition.combine(group, tokens, received, rows)
    calls = harness.make_calls(group, tokens, rows, version=2)
    results = run_world("local", 2, lambda ctx: harness.round_trip(ctx, calls, version=2))
    for rank, result in enumerate(results):
        check_round(group, result, received, combined, rank)


# W 2, L 2, BS 2, K 2, H 1024: 52 KB by the formula of A3 and 950, 4 MB and a little by A2's.
@pytest.mark.parametrize("profile, least", [("a2", 5), ("a3", 1), ("950", 1)], indirect=["profile"])
@pytest.mark.usefixtures("profile")
def test_row22_a_buffer_too_small(least, monkeypatch):
    """HCCL_BUFFSIZE is looked at where it is set; one that is large enough is accepted."""
    calls, received, combined = prepare("strict")
    bad = replace(ROWS["row16-h-1040-on-a2-dispatch"], argument="HCCL_BUFFSIZE")

    def dispatched(ctx):
        return harness.call_dispatch(ctx, calls[ctx.rank], version=2)

    outputs = in_a_world("local", "strict", dispatched)

    def both_ops(ctx):
        call = calls[ctx.rank]
        return {
            "dispatch": attempt(lambda: dispatched(ctx)),
            "combine": attempt(
                lambda: harness.call_combine(ctx, call, outputs[ctx.rank], version=2)
            ),
        }

    for found in (str(least - 1), "many"):
        monkeypatch.setenv("HCCL_BUFFSIZE", found)
        for refusals in in_a_world("local", "strict", both_ops):
            for op, refusal in refusals.items():
                check_refusal(replace(bad, op=op, got=re.escape(found)), refusal)
    monkeypatch.setenv("HCCL_BUFFSIZE", str(least))
    results = in_a_world("local", "strict", lambda ctx: harness.round_trip(ctx, calls, version=2))
    for rank, result in enumerate(results):
        check_round(STRICT, result, received, combined, rank)

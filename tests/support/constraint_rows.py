"""The table of invalid calls, row by row of the contract's table of constraints.

The name of a row starts with its number in that table; "null" and "dtype" are the lists before it,
"format" and "value" what follows from others. Every interface that has the argument runs the row.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle
import definition
import harness
import numpy as np
import torch
from definition import Group, Remaining, Tokens
from definition_checks import check_dispatch, without_spare
from invalid_calls import (
    ANYTHING,
    DOORS,
    LIMIT,
    MISSING,
    TYPE,
    VALUE,
    Change,
    InvalidCall,
    edit,
    put,
    with_value,
)
from random_cases import case_of, random_tokens

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Base:
    """A correct call.

    Attributes:
        group: the arguments that all ranks agree on.
        batch: BS.
        mask: number of dimensions of the mask, 0 for none.
        comm_alg: the algorithm.
        versions: of the functions that accept it.
        weighted: whether dispatch gets expert_scales.
    """

    group: Group
    batch: int = 3
    mask: int = 0
    comm_alg: str = ""
    versions: tuple[int, ...] = (1, 2)
    weighted: bool = True


PLAIN = Group(world_size=3, num_experts=6, top_k=2, hidden=4)
MIXED_EXPERTS = Group(2, 4, 3, 4, zero_experts=1, copy_experts=1, const_experts=2)
STRICT = Group(world_size=2, num_experts=4, top_k=2, hidden=1024)
HIERARCHY = Group(world_size=16, num_experts=16, top_k=1, hidden=1024)
V1, V2 = {"versions": (1,)}, {"versions": (2,)}
BASES = {
    "plain": Base(PLAIN),
    "hidden 8": Base(replace(PLAIN, hidden=8)),
    "unequal": Base(replace(PLAIN, global_bs=12)),
    "mask": Base(PLAIN, mask=1),
    "mask by slot": Base(PLAIN, mask=2),
    "shared": Base(Group(4, 4, 2, 4, shared_ranks=2)),
    "six": Base(Group(6, 6, 1, 4, shared_ranks=4, shared_experts=4), batch=1, **V2),
    "zero": Base(Group(2, 4, 3, 4, zero_experts=2), batch=2, **V2),
    "copy": Base(Group(2, 4, 3, 4, copy_experts=2), batch=2, **V2),
    "zero computation": Base(MIXED_EXPERTS, batch=2, **V2),
    "elastic": Base(replace(PLAIN, remaining=Remaining((0, 1, 2), 0, 6)), **V2),
    "pairs": Base(Group(2, 2, 1, 8, tp_world_size=2)),
    "fullmesh_v2": Base(PLAIN, comm_alg="fullmesh_v2", **V2),
    "strict": Base(STRICT, batch=2, **V2),
    "strict shared": Base(Group(4, 4, 2, 1024, shared_ranks=2), batch=2, **V2),
    "strict hierarchy": Base(HIERARCHY, batch=1, comm_alg="hierarchy", **V2),
    # Correct on one product, wrong on the others: W, H and expert_scales exclude each other.
    "v1 a2": Base(Group(16, 16, 1, 32), batch=1, **V1),
    "v1 a3": Base(Group(8, 8, 1, 7168), batch=1, weighted=False, **V1),
    "v1 950": Base(Group(4, 4, 1, 64), batch=1, weighted=False, **V1),
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
            return
        index = ASSIST if ASSIST in call else "expand_idx"
        words = 128 * capacity if index == ASSIST else batch * group.top_k
        call.update(
            {
                "expand_x": torch.zeros(capacity, group.hidden, dtype=torch.bfloat16),
                index: torch.zeros(words, dtype=torch.int32),
                "ep_send_counts": torch.zeros(
                    group.world_size * group.num_local(rank), dtype=torch.int32
                ),
                "expand_scales": torch.zeros(capacity),
            }
        )

    return Change(change)


def smooth(*shape: int, dtype: torch.dtype = torch.float32) -> Change:
    """Ask for int8 with smooth scales of this shape."""
    return put(quant_mode=2, scales=torch.ones(shape, dtype=dtype))


def bfloat16(*shape: int) -> torch.Tensor:
    """Zeros."""
    return torch.zeros(shape, dtype=torch.bfloat16)


def mask(*shape: int) -> torch.Tensor:
    """All active."""
    return torch.ones(shape, dtype=torch.bool)


def first(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first elements or rows of a tensor."""
    return lambda tensor: tensor[:size]


def column(tensor: torch.Tensor) -> torch.Tensor:
    """The first column, of one dimension."""
    return tensor[:, 0]


def nested(tensor: torch.Tensor) -> torch.Tensor:
    """One dimension more."""
    return tensor[None]


def no_columns(tensor: torch.Tensor) -> torch.Tensor:
    """No columns."""
    return tensor[:, :0]


def longer(tensor: torch.Tensor) -> torch.Tensor:
    """The first element or row again at the end."""
    return torch.cat([tensor, tensor[:1]])


NAMED_LIKE_EP = Change(lambda call: call.update(group_tp=call["group_ep"]))


def _without_me(call: dict) -> None:
    world, rank = call["ep_world_size"], call["ep_rank_id"]
    left = [old for old in range(world) if old != rank]
    to_new = [left.index(old) if old in left else -1 for old in range(world)]
    head = [1, len(left), 0, call["moe_expert_num"] // world * len(left)]
    call["elastic_info"] = torch.tensor([*head, *to_new, *left, -1], dtype=torch.int32)


def tables(*words: int) -> torch.Tensor:
    """elastic_info."""
    return torch.tensor(words, dtype=torch.int32)


PRODUCTS = ("a2", "a3", "950")
ASSIST = "assist_info_for_combine"
ZERO_COMPUTATION = ("zero_expert_num", "copy_expert_num", "const_expert_num")
CONSTANTS = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")


def row(
    name: str,
    argument: str,
    wrong: Any,
    got: str | None = None,
    *,
    code: int = VALUE,
    ops: Sequence[str] = ("dispatch", "combine"),
    on: Sequence[str] = ("portable",),
    base: str = "plain",
    blames: str | Sequence[str] = (),
    **options: Any,
) -> list[InvalidCall]:
    """The calls of one row, for each op and under each profile.

    Args:
        name: of the row.
        argument: the wrong argument.
        wrong: a value for it, a function of the correct one, or a ``Change`` of the whole call.
        got: pattern of the value in the message; of a number or None its own digits or letters.
        code: status code.
        ops: those that refuse it.
        on: profiles.
        base: the correct call; "{}" stands for the profile.
        blames: further arguments that the refusal may name.
        options: of ``InvalidCall``.
    """
    if not isinstance(wrong, Change):
        if got is None and (wrong is None or isinstance(wrong, int)):
            got = rf"(?<!\w){wrong}\b"
        elif got is None and isinstance(wrong, str):
            got = re.escape(wrong)
        wrong = edit(argument, wrong) if callable(wrong) else put(**{argument: wrong})
    arguments = (argument, *([blames] if isinstance(blames, str) else blames))
    return [
        InvalidCall(
            f"{name}{'' if profile == 'portable' else f'-on-{profile}'}-{op}",
            op,
            wrong,
            code,
            argument,
            arguments,
            got or ANYTHING,
            base=base.format(profile),
            profile=profile,
            **options,
        )
        for op in ops
        for profile in on
    ]


dispatch = functools.partial(row, ops=("dispatch",))
combine = functools.partial(row, ops=("combine",))
TYPED, SILENT = {"code": TYPE}, {"reaches_peers": False}
FLOAT8_X = edit("x", lambda x: x.to(torch.float8_e4m3fn))
PREQUANTIZED = FLOAT8_X | put(scales=torch.ones(3, 1))  # a scale for each of 3 tokens

REQUIRED = [
    dispatch("null-x", "x", None, code=MISSING),
    row("null-expert-ids", "expert_ids", None, code=MISSING),
    *(
        combine(f"null-{name}", name, None, code=MISSING)
        for name in ("expand_x", "expand_idx", ASSIST, "ep_send_counts", "expert_scales")
    ),
    row("null-group", "group_ep", None, code=MISSING, **SILENT),
    row("null-group-empty", "group_ep", "", code=MISSING, **SILENT),
    row("null-group-long", "group_ep", "g" * 128, "128", **TYPED, **SILENT),
    row("null-group-of-another-type", "group_ep", 5, r"\b5\b|int", **TYPED, **SILENT),
    # Without the name of the pair, a rank cannot abort the other one.
    row("null-group-tp-long", "group_tp", "g" * 128, "128", **TYPED, **SILENT, base="pairs"),
    # The lower code wins.
    dispatch(
        "null-before-dtype-and-value",
        "x",
        put(x=None, quant_mode=7) | edit("expert_ids", torch.Tensor.long),
        "None",
        code=MISSING,
    ),
    dispatch(
        "dtype-before-value",
        "expert_ids",
        put(quant_mode=7) | edit("expert_ids", torch.Tensor.long),
        "int64",
        **TYPED,
    ),
    combine(
        "dtype-before-value",
        ASSIST,
        put(comm_quant_mode=7, comm_alg="ring") | edit(ASSIST, torch.Tensor.long),
        "int64",
        **TYPED,
    ),
]

DTYPES = [
    *(
        dispatch(f"dtype-x-{kind}", "x", fn, kind, **TYPED)
        for kind, fn in (
            ("float32", torch.Tensor.float),
            ("int8", torch.Tensor.char),
            ("int32", torch.Tensor.int),
            ("list", torch.Tensor.tolist),
        )
    ),
    row("dtype-expert-ids", "expert_ids", torch.Tensor.long, "int64", **TYPED),
    *(
        dispatch(f"dtype-scales-{name}", "scales", smooth(6, 4, dtype=kind), name, **TYPED)
        for name, kind in (("float16", torch.float16), ("float64", torch.float64))
    ),
    row("dtype-expert-scales", "expert_scales", torch.Tensor.half, "float16", **TYPED),
    row("dtype-expert-scales-wide", "expert_scales", torch.Tensor.bfloat16, "bfloat16", **TYPED),
    row("dtype-mask", "x_active_mask", torch.Tensor.byte, "uint8", **TYPED, base="mask"),
    row("dtype-elastic", "elastic_info", torch.Tensor.long, "int64", **TYPED, base="elastic"),
    row("dtype-performance", "performance_info", tables(0, 0, 0), "int32", **TYPED),
    combine("dtype-expand-x-float32", "expand_x", torch.Tensor.float, "float32", **TYPED),
    combine("dtype-expand-x-int8", "expand_x", torch.Tensor.char, "int8", **TYPED),
    *(
        combine(f"dtype-{name}", name, torch.Tensor.long, "int64", **TYPED)
        for name in ("expand_idx", ASSIST, "ep_send_counts")
    ),
    combine(
        "dtype-tp-send-counts", "tp_send_counts", torch.Tensor.long, "int64", **TYPED, base="pairs"
    ),
    combine("dtype-expand-scales", "expand_scales", torch.Tensor.half, "float16", **TYPED),
    combine("dtype-shared-expert-x", "shared_expert_x", bfloat16(3, 4).half(), "float16", **TYPED),
    *(
        combine(
            f"dtype-{name}", name, torch.Tensor.half, "float16", **TYPED, base="zero computation"
        )
        for name in ("ori_x", *CONSTANTS)
    ),
]

# Formats that this library does not have, or not in the mode.
FORMATS = [
    dispatch("format-y-hifloat8", "y_dtype", put(quant_mode=2, y_dtype=290), "HiFloat8", **TYPED),
    dispatch("format-y-fp4", "y_dtype", put(quant_mode=4, y_dtype=296), "fp4", **TYPED),
    dispatch("format-y-unknown", "y_dtype", put(quant_mode=2, y_dtype=77), "77", **TYPED),
    dispatch("format-y-word", "y_dtype", put(quant_mode=2, y_dtype="int8"), "int8", **TYPED),
    dispatch("format-y-fp32", "y_dtype", put(y_dtype=torch.float32), "float32", **TYPED),
    dispatch("format-x-hifloat8", "x_dtype", 290, "HiFloat8", **TYPED),
    dispatch("format-x-fp4", "x_dtype", 297, "fp4", **TYPED),
    dispatch("format-x-other", "x_dtype", torch.float8_e5m2, "bfloat16", **TYPED, blames="x"),
    dispatch("format-x-int4", "x", torch.Tensor.int, "packed int4", **TYPED),
    dispatch("format-scales-fp4", "scales_dtype", 296, "fp4", **TYPED),
    *(
        dispatch(f"format-y-mode-{mode}", "y_dtype", put(quant_mode=mode, y_dtype=kind), **TYPED)
        for mode, kind in ((0, 24), (1, 23), (2, 15), (3, torch.int8), (4, 258))
    ),
    dispatch("format-x-quantised-twice", "x", PREQUANTIZED | put(quant_mode=2), "float8", **TYPED),
    dispatch("format-scales-of-bytes", "scales", torch.ones(6, 4).byte(), **TYPED),
    dispatch(
        "format-float8-on-a3",
        "x",
        FLOAT8_X | put(scales=torch.ones(2, 1)),
        **TYPED,
        base="strict",
        on=("a3",),
    ),
    dispatch(
        "format-y-float8-on-a3",
        "y_dtype",
        put(quant_mode=2, y_dtype=torch.float8_e4m3fn),
        **TYPED,
        base="strict",
        on=("a3",),
    ),
]

SHAPES = [
    dispatch("row01-x-1d", "x", column, r"\(3,\)"),
    dispatch("row01-x-3d", "x", nested, "1, 3, 4"),
    row("row01-expert-ids-1d", "expert_ids", column, r"\(3,\)"),
    row("row01-expert-scales-1d", "expert_scales", column, r"\(3,\)"),
    row("row01-expert-scales-3d", "expert_scales", nested, "1, 3, 2"),
    dispatch("row01-scales-1d", "scales", smooth(4), r"\(4,\)"),
    dispatch("row01-scales-3d", "scales", smooth(1, 6, 4), "1, 6, 4"),
    combine("row01-expand-x-1d", "expand_x", column, "18"),
    combine("row01-expand-x-3d", "expand_x", nested, "1, 18"),
    combine("row01-assist-2d", ASSIST, lambda words: words.view(-1, 128), "18, 128"),
    combine("row01-ep-send-counts-2d", "ep_send_counts", lambda n: n.view(2, 3), "2, 3"),
    dispatch("row02-more-rows-in-x", "x", longer, r"\b[34]\b", blames="expert_ids"),
    dispatch("row02-fewer-rows-in-x", "x", first(2), r"\b[32]\b", blames="expert_ids"),
    row("row02-expert-scales-rows", "expert_scales", first(2), "2, 2"),
    row("row02-expert-scales-fewer-columns", "expert_scales", lambda w: w[:, :1], "3, 1"),
    row("row02-expert-scales-more-columns", "expert_scales", lambda w: w.repeat(1, 2), "3, 4"),
    dispatch("row02-scales-columns", "scales", smooth(6, 5), "6, 5"),
]

GROUPS = [
    row("row03-w-0", "ep_world_size", 0),
    row("row03-w-negative", "ep_world_size", -1),
    row("row03-w-not-the-groups", "ep_world_size", 2),
    row(
        "row03-hierarchy-of-two",
        "ep_world_size",
        put(comm_alg="hierarchy"),
        r"\b2\b",
        base="strict",
        on=("a2", "a3"),
    ),
    row("row04-rank-negative", "ep_rank_id", -1),
    row("row04-rank-w", "ep_rank_id", 3),
    row("row05-t-3", "tp_world_size", 3),
    row("row05-t-negative", "tp_world_size", -1),
    row("row05-rank-without-tp", "tp_rank_id", 1),
    row("row05-rank-with-t-1", "tp_rank_id", put(tp_world_size=1, tp_rank_id=1), r"\b1\b"),
    row("row05-rank-negative", "tp_rank_id", -1),
    row("row05-rank-2-of-2", "tp_rank_id", 2, base="pairs"),
    row("row05-t-2-without-group", "group_tp", "", **SILENT, base="pairs", blames="tp_world_size"),
    row("row06-l-2", "moe_expert_num", 4, ANYTHING, base="pairs", blames="tp_world_size"),
    row(
        "row06-t-2-with-l-2",
        "tp_world_size",
        put(tp_world_size=2, group_tp="pair"),
        r"\b2\b|pair",
        blames=("moe_expert_num", "group_tp"),
    ),
    row("row07-shard-type", "expert_shard_type", 1),
    row("row29-one-name-for-both-with-t-2", "group_tp", NAMED_LIKE_EP, **SILENT, base="pairs"),
]

NS, S, E = "shared_expert_num", "shared_expert_rank_num", "moe_expert_num"
EXPERTS = [
    row("row08-w-not-a-multiple-of-s", S, 2, r"\b[23]\b", **V1, blames="ep_world_size"),
    row("row09-s-negative", S, -1),
    row("row09-s-w", S, 3),
    row("row09-ns-negative", NS, -1),
    row("row09-ns-negative-with-ranks", NS, -1, base="shared"),
    row("row09-ns-without-ranks", NS, 2),
    row("row09-ranks-without-ns", NS, 0, base="shared", blames=S),
    row("row09-s-1-without-ns", NS, put(**{S: 1, NS: 0}), r"\b0\b", blames=S),
    row("row09-s-not-a-multiple-of-ns", NS, put(**{S: 1, NS: 2}), r"\b[12]\b", blames=S),
    row("row09-s-3-with-ns-2", S, put(**{S: 3, NS: 2}), r"\b[23]\b", base="shared", blames=NS),
    row("row09-ns-above-s", NS, 4, r"\b[24]\b", base="shared", blames=S),
    row("row09-ns-5", NS, put(**{NS: 5, S: 5}), r"\b5\b", base="six"),
    row("row09-shared-ranks", S, 1, base="strict", on=("a2",)),
    row("row11-e-0", E, 0),
    row("row11-e-negative", E, -3),
    row("row11-e-not-a-multiple", E, 7),
    row("row11-e-9-with-s-1", E, put(**{E: 9, S: 1}), r"\b9\b"),
    row("row11-e-not-a-multiple-with-s", E, 5, base="shared"),
    row(
        "row11-e-1026",
        E,
        sized(replace(STRICT, num_experts=1026), 2),
        "1026",
        base="strict",
        on=PRODUCTS,
    ),
    row(
        "row11-e-528-in-hierarchy",
        E,
        sized(replace(HIERARCHY, num_experts=528), 1),
        "528",
        base="strict hierarchy",
        on=("a2", "a3"),
    ),
    row(
        "row11-l-times-w-4096",
        E,
        sized(Group(4, 1024, 2, 1024, shared_ranks=3, shared_experts=3), 2),
        "4096",
        base="strict shared",
        on=("a3", "950"),
    ),
]

QUANTISATION = [
    dispatch("row13-mode-7", "quant_mode", 7),
    dispatch("row13-mode-negative", "quant_mode", -1),
    *(
        dispatch(f"row13-mode-{mode}", "quant_mode", mode, base="strict", on=("a2", "a3"))
        for mode in (1, 3, 4)
    ),
    dispatch("row14-scales-without-quantisation", "scales", torch.ones(6, 4), "6, 4"),
    dispatch("row15-mode-4", "scales", put(quant_mode=4, scales=torch.ones(6, 4))),
    dispatch("row15-mode-1", "scales", put(quant_mode=1), "None"),
    dispatch("row15-mode-1-3", "scales", put(quant_mode=1, scales=torch.ones(3)), "3"),
    dispatch("row15-given", "scales", FLOAT8_X, "None"),
    dispatch("row15-given-2", "scales", PREQUANTIZED | put(scales=torch.ones(2)), "2"),
    dispatch("row15-given-5", "scales", PREQUANTIZED | put(scales=torch.ones(3, 5)), "5"),
    dispatch("row14-scales-of-7-experts", "scales", smooth(7, 4), "7, 4"),
    dispatch("row14-scales-without-ns", "scales", smooth(4, 4), "4, 4", base="shared"),
    dispatch("row14-scales-with-s", "scales", smooth(6, 4), "6, 4", base="shared"),
    dispatch("row14-scales-with-s-1", "scales", smooth(6, 4) | put(**{S: 1}), "6, 4"),
    dispatch(
        "row14-scales-in-hierarchy",
        "scales",
        smooth(16, 1024),
        base="strict hierarchy",
        on=("a2",),
    ),
    *(
        combine(f"row23-mode-{mode}", "comm_quant_mode", mode, base="hidden 8")
        for mode in (1, 5, -2)
    ),
    combine("row23-mode-2-with-t-2", "comm_quant_mode", 2, base="pairs", blames="tp_world_size"),
    combine("row23-mode-2-with-h-4", "comm_quant_mode", 2, r"\b[24]\b", blames="expand_x"),
    combine("row23-mode-2-in-fullmesh", "comm_quant_mode", 2, base="strict", on=("a2",)),
]

SIZES = [
    dispatch("row16-h-0", "x", no_columns, r"\b0\b"),
    combine("row16-h-0", "expand_x", no_columns, r"\b0\b"),
    *(
        row(
            f"row16-h-{hidden}",
            "expert_ids",
            sized(replace(STRICT, hidden=hidden), 2),
            str(hidden),
            base="strict",
            on=products,
            blames=("x", "expand_x"),
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
            "expert_ids",
            sized(replace(STRICT, global_bs=0 if batch else 4), batch),
            rf"\b{batch}\b",
            base="strict",
            on=products,
            blames="x",
        )
        for batch, products in ((0, PRODUCTS), (257, ("a2",)), (513, ("a3", "950")))
    ),
    dispatch(
        "row17-bs-257-in-fullmesh-v2",
        "x",
        sized(STRICT, 257) | put(comm_alg="fullmesh_v2"),
        "257",
        base="strict",
        on=("a3",),
    ),
    row(
        "row17-bs-257-in-hierarchy",
        "expert_ids",
        sized(HIERARCHY, 257),
        "257",
        base="strict hierarchy",
        on=("a3",),
        blames="x",
    ),
    row(
        "row18-k-0",
        "expert_ids",
        edit("expert_ids", no_columns) | edit("expert_scales", no_columns),
        r"\b0\b",
    ),
    row("row18-k-above-e", "expert_ids", sized(replace(PLAIN, top_k=7), 3), r"\b7\b", blames=E),
    row(
        "row18-k-above-e-without-tokens",
        "expert_ids",
        sized(replace(PLAIN, top_k=7, global_bs=9), 0),
        r"\b7\b",
        blames=E,
    ),
    row(
        "row18-k-above-all-experts",
        "expert_ids",
        sized(replace(MIXED_EXPERTS, top_k=9), 2),
        r"\b9\b",
        base="zero computation",
        blames=E,
    ),
    row(
        "row18-k-13-in-fullmesh-v2",
        "expert_ids",
        sized(replace(PLAIN, num_experts=15, top_k=13), 3),
        r"\b13\b|fullmesh_v2",
        base="fullmesh_v2",
        blames="comm_alg",
    ),
    row(
        "row18-k-17",
        "expert_ids",
        sized(replace(STRICT, num_experts=18, top_k=17), 2),
        r"\b17\b",
        base="strict",
        on=PRODUCTS,
    ),
    row("row19-g-below-bs-times-w", "global_bs", 6),
    row("row19-g-not-a-multiple", "global_bs", 10),
    row("row19-g-negative", "global_bs", -9),
]

MASKS = [
    *(
        row(
            f"row20-shape-{'x'.join(map(str, shape))}",
            "x_active_mask",
            mask(*shape),
            str(shape)[1:-1],
            base="mask",
        )
        for shape in ((4,), (3, 3), (2, 2), (1, 3, 2))
    ),
    row(
        "row20-no-prefix",
        "x_active_mask",
        torch.tensor([True, False, True]),
        base="mask",
        in_values=True,
    ),
    *(
        row(
            f"row20-{len(shape)}d-with-unequal-bs",
            "x_active_mask",
            mask(*shape),
            base="unequal",
            blames="global_bs",
        )
        for shape in ((3,), (3, 2))
    ),
    row("row20-in-hierarchy", "x_active_mask", mask(1), base="strict hierarchy", on=("a2", "a3")),
]

OUTPUTS = [
    combine("row21-expand-x", "expand_x", first(17), "17"),
    combine("row21-expand-x-with-g", "expand_x", put(global_bs=12), "18"),
    combine("row21-expand-x-with-t-2", "expand_x", first(11), r"\b11\b", base="pairs"),
    combine("row21-expand-idx-short", "expand_idx", first(5), r"\b5\b"),
    combine("row21-expand-idx-long", "expand_idx", longer, r"\b7\b"),
    *(
        combine(f"row21-assist-of-{words}", ASSIST, first(words), rf"\b{words}\b")
        for words in (0, 3 * 18, 128 * 18 - 1)
    ),
    combine("row21-ep-send-counts-short", "ep_send_counts", first(5), r"\b5\b"),
    combine("row21-ep-send-counts-long", "ep_send_counts", longer, r"\b7\b"),
    combine("row21-ep-send-counts-with-t-2", "ep_send_counts", first(3), r"\b3\b", base="pairs"),
    combine("row21-tp-send-counts-missing", "tp_send_counts", None, base="pairs"),
    combine("row21-tp-send-counts-short", "tp_send_counts", first(1), r"\b1\b", base="pairs"),
    combine("row21-tp-send-counts-2d", "tp_send_counts", nested, "1, 2", base="pairs"),
    combine("row21-expand-scales-missing", "expand_scales", None, base="strict", on=("a2",)),
    row("row21-performance-info", "performance_info", tables(0, 0).long(), r"\b2\b"),
]

ALGORITHMS = [
    row("row24-unknown", "comm_alg", "ring"),
    row("row24-other-case", "comm_alg", "FULLMESH"),
    *(
        row(f"row24-{algorithm}", "comm_alg", algorithm, base="strict", on=(product,))
        for product, algorithm in (("a2", "fullmesh_v1"), ("a3", "fullmesh"), ("950", "hierarchy"))
    ),
    combine("row24-fullmesh-v1", "comm_alg", "fullmesh_v1", base="strict", on=("a3",)),
    *(
        row(
            f"row24-fullmesh-v2-with-{base.replace(' ', '-')}",
            "comm_alg",
            "fullmesh_v2",
            ANYTHING,
            base=base,
            blames=arguments,
        )
        for base, arguments in (
            ("elastic", "elastic_info"),
            ("zero", "zero_expert_num"),
            ("copy", "copy_expert_num"),
            ("zero computation", ZERO_COMPUTATION),
            ("mask", "x_active_mask"),
            ("mask by slot", "x_active_mask"),
            ("pairs", "tp_world_size"),
            ("unequal", "global_bs"),
        )
    ),
]

TOO_MANY = 2**31 - 1 - MIXED_EXPERTS.num_experts
ZERO_COMPUTATION_EXPERTS = [
    *(
        row(f"row26-{kind}-negative", kind, -1, base="zero computation")
        for kind in ZERO_COMPUTATION
    ),
    *(
        row(
            f"row26-{kind}-too-many",
            kind,
            put(**dict.fromkeys(ZERO_COMPUTATION, 0) | {kind: TOO_MANY}),
            base="zero computation",
            blames=ZERO_COMPUTATION,
        )
        for kind in ZERO_COMPUTATION
    ),
    combine("row26-copy-without-ori-x", "ori_x", None, base="copy"),
    *(
        combine(f"row26-const-without-{name}", name, None, base="zero computation")
        for name in ("ori_x", *CONSTANTS)
    ),
    combine("row26-ori-x-shape", "ori_x", first(1), "1, 4", base="zero computation"),
    *(
        combine(
            f"row26-{name}-of-{'x'.join(map(str, shape))}",
            name,
            bfloat16(*shape),
            str(shape)[1:-1],
            base="zero computation",
        )
        for name in CONSTANTS
        for shape in ((3,), (2, 5), (1, 4))
    ),
    row("row26-const", "const_expert_num", 1, base="strict", on=("a2",)),
    row("row26-zero-in-hierarchy", "zero_expert_num", 1, base="strict hierarchy", on=("a2",)),
]

# Of three ranks: flag, ranks, shared ranks and experts left, new rank of each, old rank of each.
ELASTIC = [
    *(
        row(f"row27-{size}-words", "elastic_info", tables(*[0] * size), rf"\b{size}\b")
        for size in (0, 4, 9, 11)
    ),
    row("row27-2d", "elastic_info", nested, base="elastic"),
    row(
        "row27-with-t-2",
        "elastic_info",
        tables(1, 2, 0, 2, 0, 1, 0, 1),
        base="pairs",
        blames="tp_world_size",
    ),
    *(
        row(f"row27-{name}", "elastic_info", tables(*words))
        for name, words in (
            ("no-rank-left", (1, 0, 0, 0, *[-1] * 6)),
            ("4-ranks-left", (1, 4, 0, 8, 0, 1, 2, 0, 1, 2)),
            ("only-shared-ranks", (1, 3, 3, 6, 0, 1, 2, 0, 1, 2)),
            ("shared-negative", (1, 3, -1, 8, 0, 1, 2, 0, 1, 2)),
            ("another-l", (1, 3, 0, 9, 0, 1, 2, 0, 1, 2)),
            ("tables-disagree", (1, 3, 0, 6, 1, 2, 0, 0, 1, 2)),
            ("one-rank-twice", (1, 3, 0, 6, 0, 1, 1, 0, 1, 1)),
            ("rank-outside", (1, 3, 0, 6, 0, 1, 3, 0, 1, 3)),
        )
    ),
    row("row27-without-me", "elastic_info", Change(_without_me)),
    row("row27-given", "elastic_info", tables(*[0] * 8), base="strict", on=("a2", "950")),
]

OTHERS = [
    *(
        combine(
            f"row30-{'x'.join(map(str, shape))}",
            "shared_expert_x",
            bfloat16(*shape),
            str(shape)[1:-1],
        )
        for shape in ((4, 4), (3, 8), (12,), (2, 2, 4), (4, 3), (1, 1, 3, 4))
    ),
    combine(
        "row30-with-shared-ranks",
        "shared_expert_x",
        bfloat16(2, 1024),
        base="strict shared",
        on=("a3", "950"),
    ),
    dispatch("row31-type-2", "expert_token_nums_type", 2),
    dispatch("row31-type--1", "expert_token_nums_type", -1),
    # A sparse tensor stands for the fractal formats of an NPU: neither is strided.
    dispatch("row32-x-sparse", "x", torch.Tensor.to_sparse, "sparse"),
    combine("row32-expand-x-sparse", "expand_x", torch.Tensor.to_sparse, "sparse"),
    combine("reserved-out-dtype", "out_dtype", 1),
    combine("reserved-group-list-type", "group_list_type", 1),
    combine("reserved-activation-scale", "activation_scale", torch.ones(18)),
    combine("reserved-weight-scale", "weight_scale", torch.ones(2, 4)),
    combine("reserved-group-list", "group_list", torch.ones(2, dtype=torch.int64)),
]

# Values of tensors, which are checked on the CPU.
VALUES = [
    row(f"value-{name}", "expert_ids", wrong, got, base=base, in_values=True)
    for name, wrong, got, base in (
        ("id-e", with_value((1, 1), 6), r"\b6\b", "plain"),
        ("id-negative", with_value((2, 0), -1), "-1", "plain"),
        ("id-after-zero-computation", with_value((1, 1), 8), r"\b8\b", "zero computation"),
        ("id-twice", tables(0, 1, 5, 5, 2, 3).view(3, 2), r"\b5\b", "plain"),
        (
            "id-twice-in-zero-computation",
            tables(0, 4, 4, 3, 5, 3).view(2, 3),
            r"\b3\b",
            "zero computation",
        ),
    )
]

# Version 1, whose limits on the products are its own.
V1_ON_PRODUCTS = [
    make(name, argument, wrong, got, base="v1 {}", on=products)
    for name, make, argument, wrong, got, products in (
        ("row01-expand-idx-2d", combine, "expand_idx", nested, "2", ("a3", "950")),
        ("row08-s", dispatch, S, put(**{S: 4, E: 12}, expert_ids=tables(0)[None]), "4", ("a2",)),
        (
            "row08-ns-2",
            dispatch,
            NS,
            put(**{NS: 2, S: 2, E: 6}, expert_ids=tables(0)[None]),
            "2",
            ("a3",),
        ),
        ("row11-e-528", dispatch, E, 528, None, ("a3", "950")),
        ("row12-l-25", dispatch, E, 400, "25", ("a2",)),
        ("row13-mode-1", dispatch, "quant_mode", 1, None, ("a2", "a3")),
        ("row16-h", dispatch, "x", lambda x: x[:, :-1], r"\b(31|7167)\b", ("a2", "a3")),
        ("row20-mask", row, "x_active_mask", mask(1), None, PRODUCTS),
        ("row21-expert-scales", dispatch, "expert_scales", torch.ones(1, 1), None, ("a3", "950")),
        ("row21-no-expand-scales", combine, "expand_scales", None, None, ("a2",)),
        ("row23-mode-2", combine, "comm_quant_mode", 2, None, ("a2", "950")),
    )
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
    ZERO_COMPUTATION_EXPERTS,
    ELASTIC,
    OTHERS,
    VALUES,
    V1_ON_PRODUCTS,
)
_ALL = [call for part in PARTS for calls in part for call in calls]
# Two versions may have a row each under one name.
ROWS = {
    door_name: {
        call.name: call
        for call in _ALL
        if door.version in call.versions
        and door.version in BASES[call.base].versions
        and door.has(call.op, call.edited)
    }
    for door_name, door in DOORS.items()
}


def tokens_of(base: Base, rng: np.random.Generator) -> Tokens:
    """The tokens of one rank in a correct call."""
    tokens = random_tokens(rng, base.group, base.batch)
    if base.group.zero_experts:
        tokens.ori_x = tokens.x  # zero experts do not need it, and may have it
    if base.mask == 1:
        tokens.mask = np.arange(base.batch) < base.batch - 1
    elif base.mask == 2:
        tokens.mask = rng.random((base.batch, base.group.top_k)) < 0.5
    return tokens


@dataclass(frozen=True)
class Prepared:
    """A correct call of every rank, and the outputs it must have.

    Attributes:
        base: of the call.
        version: of the functions.
        calls: the arguments of every rank.
        received: outputs of dispatch.
        combined: the output of combine.
    """

    base: Base
    version: int
    calls: list[dict]
    received: list
    combined: list

    def check(self, rank: int, result: tuple, profile: str = "portable") -> None:
        """Assert that a round trip of ``rank`` returned the right bits."""
        group, (outputs, x) = self.base.group, result
        if profile == "a2":
            outputs = without_spare(group, outputs, self.base.batch)
        options = {"version": self.version, "weights_given": self.base.weighted}
        check_dispatch(group, self.received[rank], outputs, rank=rank, **options)
        definition.same_bits(x, self.combined[rank], f"rank {rank} x")

    def run(self, world: str, fn: Callable[[Any, dict], Any]) -> list:
        """``fn(ctx, call)`` on every rank of a world."""
        group, calls = self.base.group, self.calls
        ranks, pair = len(calls), group.tp_world_size
        return harness.run_world(
            world, ranks, lambda ctx: fn(ctx, calls[ctx.rank]), tp_world_size=pair, limit=LIMIT
        )


@functools.cache
def prepare(base: Base, version: int) -> Prepared:
    """The correct call of every rank."""
    group, rng = base.group, np.random.default_rng(0)
    tokens = [tokens_of(base, rng) for _ in range(group.world_size * group.tp_world_size)]
    options = {"weights_in_dispatch": base.weighted, "comm_alg": base.comm_alg}
    case = case_of(rng, group, tokens, version=version, **options)
    return Prepared(base, version, *case)

"""Decisions where the operators' documents are silent or contradict each other, by number.

A test is called after the number of its question, and its first line says question and answer.
Those in ELSEWHERE have their test beside others of the same op, where "13 #n" names them.
"""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path

import harness
import invalid_calls
import pytest
import torch
from invalid_calls import TYPE, VALUE
from worked_examples import BASIC, SHARED, TENSOR_PARALLEL, TWO_SHARED, example_calls

from moe_triton import set_profile
from moe_triton.compat import torch_npu

LAST = 44
ELSEWHERE = {
    "test_split_phase.py": (10, 29, 30, 31, 32),
    "test_quant_modes.py": (28,),
    "../local/test_update_expert.py": (33, 34, 35),
    "test_combine_add_rms_norm.py": (37,),
}
NOTHING_TO_TEST = {
    44: "one of the vendor's own tests of combine does not call the operator as it is documented",
}


def test_every_number_is_accounted_for():
    here = re.findall(r"^def test_(\d+)_", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)
    listed = [number for numbers in ELSEWHERE.values() for number in numbers]
    assert sorted([*map(int, here), *listed, *NOTHING_TO_TEST]) == list(range(1, LAST + 1))
    for name, numbers in ELSEWHERE.items():
        text = Path(__file__).parent.joinpath(name).read_text(encoding="utf-8")
        for number in numbers:
            assert re.search(rf"13 (#\d+, )*#{number}\b", text), f"{name} does not name #{number}"


def on_ranks(count, fn, tp_world_size=1):
    return harness.run_world("local", count, fn, tp_world_size=tp_world_size)


@contextlib.contextmanager
def product(name):
    set_profile(name)
    try:
        yield
    finally:
        set_profile(None)


def bf16(values):
    return torch.tensor(values, dtype=torch.bfloat16)


def ids(values):
    return torch.tensor(values, dtype=torch.int32)


def op(ctx, name, version):
    """An op with the arguments of this rank's group."""
    function = getattr(torch_npu, f"npu_moe_distribute_{name}" + ("_v2" if version == 2 else ""))
    agreed = {**harness.groups_of(ctx), "ep_world_size": ctx.ep_world_size}
    if ctx.tp_world_size > 1:
        agreed["tp_world_size"] = ctx.tp_world_size
    return lambda **given: function(**agreed | given)


def dispatch(ctx, x, expert_ids, num_experts, version=1, **given):
    call = op(ctx, "dispatch", version)
    return call(x=x, expert_ids=expert_ids, moe_expert_num=num_experts, **given)


def combine(ctx, rows, expert_ids, num_experts, outputs, weights, version=1, **given):
    index = "expand_idx" if version == 1 else "assist_info_for_combine"
    return op(ctx, "combine", version)(
        expand_x=rows,
        expert_ids=expert_ids,
        moe_expert_num=num_experts,
        expert_scales=weights,
        ep_send_counts=outputs[4],
        tp_send_counts=outputs[5],
        **{index: outputs[2]},
        **given,
    )


def refusal(call):
    """(status code, argument) of the error that a call raises, None if it raises none."""
    error = invalid_calls.attempt(call)["error"]
    return None if error is None else (error["code"], error["argument"])


def outputs_of(example):
    """Per rank the outputs of dispatch, and what combine makes of the example's rows."""
    calls = example_calls(example)
    group = example.group
    return on_ranks(
        group.world_size * group.tp_world_size,
        lambda ctx: harness.round_trip(ctx, calls),
        group.tp_world_size,
    )


def dispatched_alone(x, **given):
    """What one rank with one expert receives of its own tokens."""
    x = bf16(x)
    where = ids([[0]] * len(x))
    (outputs,) = on_ranks(1, lambda ctx: dispatch(ctx, x, where, 1, **given))
    return outputs


# Counts and indices.


def test_1_counts_are_prefix_sums():
    """ep_recv_counts: rows from each rank, or sums over (expert, rank) so far? Sums."""
    assert [out[4].tolist() for out, _ in outputs_of(BASIC)] == [[2, 5, 6, 7], [2, 3, 4, 5]]


def test_2_expand_idx_is_a_running_index():
    """expand_idx: how many tokens an expert got, or how many before this one? Before."""
    # Rank 0 chooses 0, 2, 2, 1, 0, 3.
    assert outputs_of(BASIC)[0][0][2].tolist() == [0, 0, 1, 0, 1, 0]


def test_9_shared_ranks_take_turns():
    """Which copy of a shared expert serves a rank: by stretches of tokens, or by the rank modulo
    the copies? Modulo."""
    counts = [out[4].tolist() for out, _ in outputs_of(SHARED)]
    assert counts[:2] == [[2, 2, 4, 4], [0, 2, 2, 4]]


def test_11_room_of_shared_ranks():
    """A of shared ranks: documents leave out W, code NS? Both count."""
    # BS 2, W 4, NS 2, S 2.
    assert [len(out[0]) for out, _ in outputs_of(TWO_SHARED)[:2]] == [8, 8]


@pytest.mark.parametrize("weights", [None, torch.tensor([[0.75], [0.25]])])
def test_22_weights_come_out_if_they_went_in(weights):
    """expand_scales on A3: none, undefined, or the weights? The weights; zeros if not given."""
    x, where = torch.ones(2, 1024).bfloat16(), ids([[1], [0]])
    with product("a3"):
        actual = on_ranks(2, lambda ctx: dispatch(ctx, x, where, 2, 2, expert_scales=weights)[6])
    if weights is None:
        assert [out.tolist() for out in actual] == [[0.0] * 4] * 2
    else:
        assert [out[:2].tolist() for out in actual] == [[0.25, 0.25], [0.75, 0.75]]


# Quantisation.


def test_3_scales_undo_the_quantisation():
    """dynamic_scales of mode 2: 127 / max, or the factor of the codes? The latter."""
    codes, scales, *_ = dispatched_alone([[1, -2, 0.5, 4]], quant_mode=2)
    assert codes.tolist() == [[32, -64, 16, 127]]
    assert scales.tolist() == [float.fromhex("0x1.020408p-5")]


def test_4_zeros_for_scales_without_quantisation():
    """dynamic_scales of mode 0: None, or a tensor of anything? torch_npu's tensor, of zeros."""
    assert dispatched_alone([[1, 2]])[1].tolist() == [0.0]


def test_5_a_row_of_zeros():
    """A row of zeros in mode 2: zeros with the scale 0.0, where the formula would give NaN."""
    codes, scales, *_ = dispatched_alone([[0, -0.0, 0]], quant_mode=2)
    assert codes.tolist() == [[0, 0, 0]]
    assert scales.tolist() == [0.0] and not scales.signbit().any()


def test_6_static_quantisation_is_for_950():
    """Mode 1: listed for all products, refused by A2 and A3. So here; 950 and portable have it."""
    x, factor = torch.ones(1, 7168).bfloat16(), torch.tensor([3.0])

    def fn(ctx):
        given = {"quant_mode": 1, "scales": factor}
        where = ids([[ctx.rank]])
        try:
            return dispatch(ctx, x, where, ctx.world_size, **given)[0][0, :2].tolist()
        except ValueError as error:
            return error.code, error.argument

    for name, ranks in (("portable", 1), ("950", 4)):
        with product(name):
            assert on_ranks(ranks, fn) == [[3, 3]] * ranks
    for name, ranks in (("a2", 16), ("a3", 8)):
        with product(name):
            assert on_ranks(ranks, fn) == [(VALUE, "quant_mode")] * ranks


@pytest.mark.parametrize("shared", [0, 1])
def test_7_rows_of_scales(shared):
    """scales: always NS + E rows, or E without shared ranks? E; only split-phase takes 1 + E."""
    x, experts = torch.ones(1, 4).bfloat16(), 2 - shared

    def fn(ctx):
        def call(rows):
            given = {"scales": torch.ones(rows, 4), "quant_mode": 2}
            given["shared_expert_rank_num"] = shared
            return dispatch(ctx, x, ids([[0]]), experts, **given)

        return [refusal(functools.partial(call, rows)) for rows in (2, 3 - 2 * shared)]

    assert on_ranks(2, fn) == [[None, (VALUE, "scales")]] * 2


def test_8_scales_of_any_strides():
    """scales that are not contiguous: allowed by one document, not by another. Allowed."""
    factors = torch.tensor([[2.0, 9, 0.5, 9, 1, 9, 4, 9]])
    codes, *_ = dispatched_alone([[1, -2, 0.5, 4]], quant_mode=2, scales=factors[:, ::2])
    assert codes.tolist() == [[16, -8, 4, 127]]


def test_27_mx_scales_come_in_pairs():
    """MX scales: ceil(H / 64) pairs, or ceil(H / 32) rounded up to even? The latter, as e8m0."""
    _, scales, *_ = dispatched_alone([[1.0] * 96], quant_mode=4)
    assert (scales.shape, scales.dtype) == ((1, 4), torch.float8_e8m0fnu)
    # 2**-8 for the elements, and a byte of 0 for the padding block.
    assert scales.view(torch.uint8).tolist() == [[119, 119, 119, 0]]


def test_40_blocks_of_eight_for_fp16_too():
    """comm_quant_mode 2 of float16: blocks of 16 on A2, of 8 elsewhere. Of 8 everywhere."""
    row = torch.tensor([[127.0] * 8 + [0.25] * 8]).half()

    def fn(ctx):
        where = ids([[1 - ctx.rank]])
        outputs = dispatch(ctx, row, where, 2)
        weights = torch.ones(1, 1)
        return combine(ctx, outputs[0], where, 2, outputs, weights, comm_quant_mode=2)

    for out in on_ranks(2, fn):
        # In a block with 127 it would have been 0.
        assert out[0, 8:].tolist() == pytest.approx([0.25] * 8, rel=2**-10)


def test_41_int8_rows_are_dequantised_before_combine():
    """Examples hand the int8 rows of dispatch on as bfloat16, without their scales: no model can.

    Combine refuses int8; times their scales the rows are the tokens again.
    """
    x, where = bf16([[1, -2, 0.5, 4]]), ids([[0]])

    def fn(ctx):
        outputs = dispatch(ctx, x, where, 1, quant_mode=2)
        weights = torch.ones(1, 1)
        wrong = refusal(lambda: combine(ctx, outputs[0], where, 1, outputs, weights))
        rows = (outputs[0].float() * outputs[1][:, None]).bfloat16()
        return wrong, combine(ctx, rows, where, 1, outputs, weights).tolist()

    wanted = [[1.0078125, -2.015625, 0.50390625, 4]]
    assert on_ranks(1, fn) == [((TYPE, "expand_x"), wanted)]


# Shared experts.


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("number", [0, 1])
def test_12_no_shared_ranks(number, version):
    """shared_expert_num without shared ranks: 0 or 1 by document. Either, without effect."""
    outputs = dispatched_alone([[1, 2], [3, 4]], version=version, shared_expert_num=number)
    assert outputs[0].tolist() == [[1, 2], [3, 4]]
    assert outputs[4].tolist() == [2]


@pytest.mark.parametrize("version", [1, 2])
def test_13_how_many_ranks_are_shared(version):
    """shared_expert_rank_num: below W, below W - 1, or up to W / 2? Below W; split-phase W / 2."""
    x = torch.ones(1, 2).bfloat16()

    def fn(ctx):
        def call(shared):
            given = {"shared_expert_rank_num": shared}
            return dispatch(ctx, x, ids([[0]]), 1, version, **given)

        return [refusal(functools.partial(call, shared)) for shared in (1, 2)]

    assert on_ranks(2, fn) == [[None, (VALUE, "shared_expert_rank_num")]] * 2


def test_14_shared_ranks_that_do_not_divide_the_group():
    """W a multiple of S: asked for in version 1 only."""
    x = torch.ones(1, 2).bfloat16()

    def fn(ctx):
        def call(version):
            return dispatch(ctx, x, ids([[0]]), 1, version, shared_expert_rank_num=2)

        return [refusal(functools.partial(call, version)) for version in (1, 2)]

    assert on_ranks(3, fn) == [[(VALUE, "shared_expert_rank_num"), None]] * 3


def test_15_nothing_is_divided_by_no_shared_experts():
    """S a multiple of NS, says a document that allows NS = 0: not asked for where both are 0."""
    x, where = bf16([[5, 6]]), ids([[0]])

    def fn(ctx):
        call = (ctx.ep_group, 1, 0, 1)
        none = {"shared_expert_num": 0, "shared_expert_rank_num": 0}
        y, _, info = torch_npu.npu_moe_distribute_dispatch_setup(x, where, *call, **none)
        back = torch_npu.npu_moe_distribute_dispatch_teardown
        return back(x, y, where, info, *call, **none)[0].tolist()

    assert on_ranks(1, fn) == [[[5, 6]]]


@pytest.mark.parametrize("name", ["portable", "a3"])
def test_16_an_addend_beside_shared_ranks(name):
    """shared_expert_x: only without shared ranks, or only with? Without; portable adds it."""
    x, where, addend = torch.ones(1, 1024).bfloat16(), ids([[0]]), torch.ones(1, 1024).bfloat16()

    def fn(ctx):
        shared = {"shared_expert_rank_num": 1}
        outputs = dispatch(ctx, x, where, 1, 2, **shared)
        given = shared | {"shared_expert_x": addend}
        rows, weights = outputs[0], torch.ones(1, 1)
        try:
            return combine(ctx, rows, where, 1, outputs, weights, 2, **given)[0, :2].tolist()
        except ValueError as error:
            return error.code, error.argument

    with product(name):
        actual = on_ranks(2, fn)
    # The routed row, the shared one and the addend, 1 each.
    assert actual == ([[3, 3]] * 2 if name == "portable" else [(VALUE, "shared_expert_x")] * 2)


def test_17_an_addend_has_weight_one():
    """shared_expert_x: times expert_scales, as the printed formula has it? It is added as it is."""
    x, where, addend = bf16([[2, 4]]), ids([[0]]), bf16([[8, 8]])

    def fn(ctx):
        outputs = dispatch(ctx, x, where, 1)
        weights = torch.tensor([[0.5]])
        return combine(ctx, outputs[0], where, 1, outputs, weights, shared_expert_x=addend)

    assert on_ranks(1, fn)[0].tolist() == [[9, 10]]


# Tensor parallelism.


def test_18_own_rows_come_first():
    """Rows of the pair in expand_x: in the order of the ranks, or own ones first? Own first."""
    actual = [out[0][:4].tolist() for out, _ in outputs_of(TENSOR_PARALLEL)[:2]]
    assert actual == [
        [[1, 1], [21, 1], [22, 2], [32, 2]],
        [[32, 2], [1, 1], [21, 1], [22, 2]],
    ]


def test_19_the_peers_counts_start_from_zero():
    """ep_recv_counts with T = 2: what its second half holds? The peer's sums, from 0 again."""
    actual = [out[4].tolist() for out, _ in outputs_of(TENSOR_PARALLEL)[:2]]
    assert actual == [[1, 3, 0, 1], [0, 1, 1, 3]]


def test_20_one_tp_count_a_rank():
    """tp_recv_counts: T numbers, or T times L, or others in examples? T."""
    assert [out[5].tolist() for out, _ in outputs_of(TENSOR_PARALLEL)] == [[3, 1]] * 2 + [
        [1, 3]
    ] * 2


@pytest.mark.parametrize("version", [1, 2])
def test_21_tensor_parallelism_stays(version):
    """Newer documents have no T = 2 any more: it is kept, for A3 and portable; 950 never had it."""
    x, where = torch.ones(1, 7168).bfloat16(), ids([[0]])
    wanted = {"a3": [[2]] * 16, "portable": [[2]] * 16, "950": [(VALUE, "tp_world_size")] * 16}

    def fn(ctx):
        mine = where + ctx.ep_rank
        try:
            return dispatch(ctx, x, mine, 8, version)[3].tolist()
        except ValueError as error:
            return error.code, error.argument

    for name, expected in wanted.items():
        with product(name):
            assert on_ranks(16, fn, tp_world_size=2) == expected


@pytest.mark.parametrize("version", [1, 2])
def test_38_sums_of_a_pair_round_to_even(version):
    """bfloat16 sums of a pair: halves away from zero in version 1, to even in 2. Always to even."""
    where = ids([[0]])

    def fn(ctx):
        outputs = dispatch(ctx, torch.ones(1, 2).bfloat16(), where, 1, version)
        # This rank's own row, and its part of the peer's: the sums are 257 and 259.
        rows = bf16([[256, 258], [1, 1]])
        return combine(ctx, rows, where, 1, outputs, torch.ones(1, 1), version).tolist()

    assert on_ranks(2, fn, tp_world_size=2) == [[[256, 260]]] * 2


# Ranges.


def test_23_how_many_experts_a_token_has():
    """K: 8 or 16 by document and version. The product's, and 16 without a product."""

    def fn(ctx, hidden, top_k, version):
        x, where = torch.ones(1, hidden).bfloat16(), torch.arange(top_k).int()[None]
        experts = ctx.world_size * 9
        return refusal(lambda: dispatch(ctx, x, where, experts, version))

    too_many = VALUE, "expert_ids"
    for name, ranks, hidden, top_k, version, expected in (
        ("a3", 8, 7168, 8, 1, None),
        ("a3", 8, 7168, 9, 1, too_many),
        ("a3", 2, 1024, 16, 2, None),
        ("a3", 2, 1024, 17, 2, too_many),
        ("a2", 16, 32, 16, 1, None),
        ("a2", 16, 32, 17, 1, too_many),
        ("portable", 2, 4, 16, 1, None),
        ("portable", 2, 4, 17, 1, too_many),
    ):
        with product(name):
            call = functools.partial(fn, hidden=hidden, top_k=top_k, version=version)
            actual = on_ranks(ranks, call)
        assert actual == [expected] * ranks, (name, top_k)


def test_24_hidden_size_of_version_1_on_a3():
    """H: 7168, or any? 7168 on A3, any in portable."""

    def fn(ctx, hidden):
        x, where = torch.ones(1, hidden).bfloat16(), ids([[ctx.rank]])
        return refusal(lambda: dispatch(ctx, x, where, 8))

    with product("a3"):
        assert on_ranks(8, lambda ctx: fn(ctx, 7136)) == [(VALUE, "x")] * 8
        assert on_ranks(8, lambda ctx: fn(ctx, 7168)) == [None] * 8
    assert on_ranks(8, lambda ctx: fn(ctx, 3)) == [None] * 8


def test_25_global_bs_of_unequal_ranks():
    """global_bs: 0, W times the largest BS, or W times 256? Any multiple of W from W * maxBS on."""

    def fn(ctx):
        tokens = 1 + ctx.rank
        x, where = torch.ones(tokens, 2).bfloat16(), ids([[0]] * tokens)
        codes = []
        for global_bs in (4, 6, 512):
            outputs = dispatch(ctx, x, where, 2, global_bs=global_bs)
            codes.append((len(outputs[0]), outputs[3].tolist()))
        codes.append(refusal(lambda: dispatch(ctx, x, where, 2, global_bs=5)))
        return codes

    wrong = VALUE, "global_bs"
    assert on_ranks(2, fn) == [
        [(4, [3]), (6, [3]), (512, [3]), wrong],
        [(4, [0]), (6, [0]), (512, [0]), wrong],
    ]


def test_26_global_bs_on_950():
    """global_bs on 950: only for equal BS by its document. Accepted for unequal ones too."""

    def fn(ctx):
        tokens = 1 + ctx.rank
        x, where = torch.ones(tokens, 64).bfloat16(), ids([[0]] * tokens)
        return dispatch(ctx, x, where, 4, global_bs=4 * 4)[3].tolist()

    with product("950"):
        assert on_ranks(4, fn) == [[10], [0], [0], [0]]


def test_39_a_group_name_that_is_too_long():
    """The code for a name of 128 characters: 161001 or 161002 by operator. 161002 in all."""
    x, where = torch.ones(1, 2).bfloat16(), ids([[0]])
    rows = (x, where, where[0], where[0], torch.ones(1, 1))
    call = ("g" * 128, 1, 0, 1)
    info = torch.zeros(32, dtype=torch.int32)
    for half, tensors in {
        "dispatch": (x, where),
        "dispatch_v2": (x, where),
        "combine": rows,
        "combine_v2": (x, where, torch.zeros(128).int(), where[0], torch.ones(1, 1)),
        "combine_add_rms_norm": (*rows, x[:, None], x[0]),
        "dispatch_setup": (x, where),
        "dispatch_teardown": (x, torch.zeros(1, 256).bfloat16(), where, info),
        "combine_setup": (x, where, torch.zeros(128).int()),
        "combine_teardown": (
            x,
            torch.zeros(1, 512).char(),
            where,
            where[0],
            torch.ones(1, 1),
            info,
        ),
    }.items():
        function = getattr(torch_npu, f"npu_moe_distribute_{half}")
        assert refusal(functools.partial(function, *tensors, *call)) == (TYPE, "group_ep"), half


# Masks and constant experts.


@pytest.mark.parametrize(
    "alphas, wanted",
    [
        pytest.param(([2], [3]), [34, 26], id="a number for each expert"),
        pytest.param(([[2, 1]], [[3, 0]]), [34, 16], id="a number for each column"),
    ],
)
def test_36_alphas_of_constant_experts(alphas, wanted):
    """Alphas: numbers, rows, or rows that make two numbers? As they come, element by element."""
    x, where = bf16([[7, 8]]), ids([[1]])
    first, second = map(bf16, alphas)

    def fn(ctx):
        const = {"const_expert_num": 1}
        outputs = dispatch(ctx, x, where, 1, 2, **const)
        const |= {"const_expert_alpha_1": first, "const_expert_alpha_2": second}
        const |= {"const_expert_v": bf16([[1, -1]]), "ori_x": x}
        return combine(ctx, outputs[0], where, 1, outputs, torch.tensor([[2.0]]), 2, **const)

    # 2 * (alpha_1 * [7, 8] + alpha_2 * [1, -1])
    assert on_ranks(1, fn)[0].tolist() == [wanted]


@pytest.mark.parametrize("mask", [[True, False], [[True, False], [False, False]]])
def test_42_a_mask_in_version_1(mask):
    """x_active_mask in version 1: reserved, or used? As in version 2; products refuse it."""
    mask = torch.tensor(mask)

    def fn(ctx, hidden):
        x = torch.ones(2, hidden).bfloat16()
        where = ids([[0, 1], [1, 0]])
        try:
            return dispatch(ctx, x, where, 8, x_active_mask=mask)[3].tolist()
        except ValueError as error:
            return error.code, error.argument

    second = 8 if mask.dim() == 1 else 0
    assert on_ranks(8, lambda ctx: fn(ctx, 2)) == [[8], [second]] + [[0]] * 6
    with product("a3"):
        assert on_ranks(8, lambda ctx: fn(ctx, 7168)) == [(VALUE, "x_active_mask")] * 8


def test_43_room_behind_the_counts_on_a2():
    """ep_recv_counts: 2 * G * K words more for each server of eight ranks, with that profile only.

    Only the hierarchical algorithm of A2 would write them, which is not here.
    """

    def fn(ctx):
        x, where = torch.ones(1, 32).bfloat16(), ids([[ctx.rank, 0]])
        where[0, 1] = (ctx.rank + 1) % 16
        return len(dispatch(ctx, x, where, 16)[4])

    with product("a2"):
        assert on_ranks(16, fn) == [16 + 2 * 16 * 2 * 2] * 16
    assert on_ranks(16, fn) == [16] * 16

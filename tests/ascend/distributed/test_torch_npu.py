"""The torch_npu names: signatures, worked examples, edges, and inputs that a call must not change.

Every worked example runs between threads, between processes over windows, and between processes
over collectives; all three must return the literal numbers bit for bit.
"""

from __future__ import annotations

from contextlib import contextmanager

import definition
import harness
import numpy as np
import pytest
import torch
from definition import Group
from definition_checks import check_dispatch
from harness import call_combine, call_dispatch, make_calls, round_trip, run_example, run_world
from invalid_calls import DOORS
from random_cases import case_of, check_round, random_tokens
from worked_examples import (
    BASIC,
    EXAMPLES,
    QUANTISED,
    SHARED,
    check_literal,
    example_calls,
    expert_bits,
)

from moe_triton.comm.message_exchange import MessageExchange
from moe_triton.compat import torch_npu

_GROUP = "group_ep ep_world_size ep_rank_id moe_expert_num *"
_PLACEMENT = (
    "group_tp='' tp_world_size=0 tp_rank_id=0 expert_shard_type=0 shared_expert_num=1 "
    "shared_expert_rank_num=0"
)
_ZERO_COMPUTATION = "zero_expert_num=0 copy_expert_num=0 const_expert_num=0"
SIGNATURES = {
    "dispatch": (
        f"x expert_ids {_GROUP} scales=None x_active_mask=None expert_scales=None {_PLACEMENT} "
        "quant_mode=0 global_bs=0 expert_token_nums_type=1"
    ),
    "combine": (
        f"expand_x expert_ids expand_idx ep_send_counts expert_scales {_GROUP} "
        "tp_send_counts=None x_active_mask=None activation_scale=None weight_scale=None "
        f"group_list=None expand_scales=None shared_expert_x=None {_PLACEMENT} global_bs=0 "
        "out_dtype=0 comm_quant_mode=0 group_list_type=0"
    ),
    "dispatch_v2": (
        f"x expert_ids {_GROUP} scales=None x_active_mask=None expert_scales=None "
        f"elastic_info=None performance_info=None {_PLACEMENT} quant_mode=0 global_bs=0 "
        f"expert_token_nums_type=1 comm_alg='' {_ZERO_COMPUTATION} y_dtype=None x_dtype=None "
        "scales_dtype=None"
    ),
    "combine_v2": (
        f"expand_x expert_ids assist_info_for_combine ep_send_counts expert_scales {_GROUP} "
        "tp_send_counts=None x_active_mask=None expand_scales=None shared_expert_x=None "
        "elastic_info=None ori_x=None const_expert_alpha_1=None const_expert_alpha_2=None "
        f"const_expert_v=None performance_info=None {_PLACEMENT} global_bs=0 comm_quant_mode=0 "
        f"comm_alg='' {_ZERO_COMPUTATION}"
    ),
}


@pytest.mark.parametrize("op", SIGNATURES)
def test_signature(op):
    function = getattr(torch_npu, f"npu_moe_distribute_{op}")
    assert harness.signature_of(function) == SIGNATURES[op]


@contextmanager
def poisoned_allocations():
    """Memory from torch.empty holds NaN or the largest integer, so that a gap shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Version 1 has no zero-computation experts.
VERSIONS = [
    (version, name)
    for version in (1, 2)
    for name in EXAMPLES
    if (version, name) != (1, "zero_computation")
]


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("version, name", VERSIONS)
def test_worked_example(version, name, world):
    example = EXAMPLES[name]
    calls = example_calls(example, version=version, strides="columns")

    def fn(ctx):
        with poisoned_allocations():
            return round_trip(ctx, calls, version=version)

    for rank, (outputs, combined) in enumerate(run_example(example, world, fn)):
        check_literal(example, rank, outputs, combined, version=version)


@pytest.mark.parametrize("strides", harness.STRIDES)
@pytest.mark.parametrize("version, name", VERSIONS)
def test_worked_example_in_any_layout(version, name, strides):
    example, options = EXAMPLES[name], {"version": version, "token_nums_type": 0}
    calls = example_calls(example, strides=strides, more_rows=len(strides), **options)
    results = run_example(example, "local", lambda ctx: round_trip(ctx, calls, version=version))
    for rank, (outputs, combined) in enumerate(results):
        check_literal(example, rank, outputs, combined, **options)


def counted(fn, seen):
    def wrapper(*args, **kwargs):
        seen.append(fn)
        return fn(*args, **kwargs)

    return wrapper


def test_the_transport_is_the_chosen_one():
    """Also on a pool of processes that has just used the other one."""
    calls = example_calls(BASIC)

    def fn(ctx):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            start = MessageExchange.start
            patch.setattr(MessageExchange, "start", counted(start, seen))
            return round_trip(ctx, calls)[1].tolist(), len(seen)

    for world in ("symmetric", "collective", "symmetric", "collective"):
        for rank, (combined, exchanges) in enumerate(run_world(world, 2, fn)):
            assert combined == BASIC.combined[rank]
            assert (exchanges > 0) == (world == "collective"), f"{exchanges} exchanges, {world}"


@pytest.mark.parametrize("world", harness.WORLDS)
def test_running_token_nums(world):
    calls = example_calls(SHARED, token_nums_type=0)
    results = run_world(world, 4, lambda ctx: call_dispatch(ctx, calls[ctx.ep_rank])[3].tolist())
    assert results == [[4], [4], [4, 8], [5, 8]]


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("tp_world_size", [0, 1])
@pytest.mark.parametrize("name", ["basic", "shared"])
@pytest.mark.parametrize("version", [1, 2])
def test_outputs_without_meaning_are_zeros(version, name, tp_world_size, world):
    """torch_npu allocates all seven in every call, and callers copy them to the host."""
    example = EXAMPLES[name]
    calls = example_calls(example, version=version, weights_in_dispatch=False)

    def fn(ctx):
        for args in calls[ctx.rank].values():
            args["tp_world_size"] = tp_world_size
        with poisoned_allocations():
            outputs, combined = round_trip(ctx, calls, version=version)
        return [outputs[position].cpu() for position in (1, 5, 6)], combined

    for rank, (actual, combined) in enumerate(run_world(world, example.group.world_size, fn)):
        assert [out.dtype for out in actual] == [torch.float32, torch.int32, torch.float32]
        capacity = example.capacity[rank]
        assert [out.tolist() for out in actual] == [
            [0.0] * capacity,
            [0] * tp_world_size,
            [0.0] * capacity,
        ]
        assert combined.tolist() == example.combined[rank]


def test_arguments_may_be_positional():
    calls = example_calls(BASIC)

    def fn(ctx):
        call = calls[ctx.rank]
        x, ids = call["dispatch"]["x"], call["dispatch"]["expert_ids"]
        group = (ctx.ep_group, 2, ctx.ep_rank, 4)
        outputs = torch_npu.npu_moe_distribute_dispatch(x, ids, *group)
        rows, weights = call["combine"]["expand_x"], call["combine"]["expert_scales"]
        combined = torch_npu.npu_moe_distribute_combine(
            rows, ids, outputs[2], outputs[4], weights, *group
        )
        return outputs, combined

    for rank, (outputs, combined) in enumerate(run_world("local", 2, fn)):
        assert not outputs[6].any()
        assert outputs[0][: len(BASIC.expand_x[rank])].tolist() == BASIC.expand_x[rank]
        assert combined.tolist() == BASIC.combined[rank]


@pytest.mark.parametrize("tp_world_size", [0, 1])
@pytest.mark.parametrize("shared_expert_num", [0, 1])
def test_sizes_without_effect(tp_world_size, shared_expert_num):
    """tp_world_size 0 and 1 mean no TP; without shared ranks shared_expert_num has no effect."""
    calls = example_calls(BASIC)
    for call in calls:
        for args in call.values():
            args.update(tp_world_size=tp_world_size, shared_expert_num=shared_expert_num)
    for rank, (outputs, combined) in enumerate(
        run_world("local", 2, lambda ctx: round_trip(ctx, calls))
    ):
        check_literal(BASIC, rank, outputs, combined)


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("shape", [(3, 2), (1, 6), (1, 3, 2)])
@pytest.mark.parametrize("door", [name for name in DOORS if DOORS[name].version == 1])
def test_expand_idx_may_have_any_shape(door, shape, world):
    calls = example_calls(BASIC)

    def fn(ctx):
        call = calls[ctx.rank]
        outputs, _ = DOORS[door].round_trip(ctx, call)
        call["combine"]["expand_idx"] = outputs[2].view(shape)
        return DOORS[door].round_trip(ctx, call)

    for rank, (outputs, combined) in enumerate(run_world(world, 2, fn)):
        check_literal(BASIC, rank, outputs, combined)


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("tp_world_size", [0, 1])
@pytest.mark.parametrize("door", DOORS)
def test_group_tp_may_be_group_ep_without_tp(door, tp_world_size, world):
    """CANN reads group_tp only if tp_world_size is 2; engines name the EP group there."""
    version = DOORS[door].version
    calls = example_calls(BASIC, version=version)

    def fn(ctx):
        call = calls[ctx.rank]
        for args in call.values():
            args |= {"group_tp": ctx.ep_group, "tp_world_size": tp_world_size, "tp_rank_id": 0}
        return DOORS[door].round_trip(ctx, call)

    for rank, (outputs, combined) in enumerate(run_world(world, 2, fn)):
        check_literal(BASIC, rank, outputs, combined, version=version)


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("global_bs", [0, 6, 8, 512])
def test_global_bs_sets_the_capacity_only(global_bs, world):
    example = BASIC
    group = Group(world_size=2, num_experts=4, top_k=2, hidden=2, global_bs=global_bs)
    rows = [expert_bits(example, rank) for rank in range(2)]
    calls = make_calls(group, example.tokens, rows)
    results = run_world(world, 2, lambda ctx: round_trip(ctx, calls))
    for rank, (outputs, combined) in enumerate(results):
        assert len(outputs[0]) == 2 * (global_bs or 6)
        assert outputs[4].tolist() == example.ep_recv_counts[rank]
        assert combined.tolist() == example.combined[rank]


def shared_x_case(example, *, three_dimensional):
    group = example.group
    shared = []
    for rank, mine in enumerate(example.tokens):
        values = np.arange(mine.batch * group.hidden, dtype=np.float32) * 3 + 0.125 * (rank + 1)
        shared.append(definition.encode(values, group.dtype).reshape(mine.batch, group.hidden))
    received = definition.dispatch(group, example.tokens)
    rows = [expert_bits(example, rank) for rank in range(group.world_size)]
    expected = definition.combine(group, example.tokens, received, rows, shared)
    shape = (1, example.tokens[0].batch, group.hidden) if three_dimensional else None
    calls = make_calls(
        group, example.tokens, rows, shared_x=shared, shared_x_shape=shape, strides="rows"
    )
    return calls, expected


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("three_dimensional", [False, True], ids=["2-D", "3-D"])
@pytest.mark.parametrize("name", ["basic", "shared"])
def test_shared_expert_x_is_added_with_weight_one(name, three_dimensional, world):
    """With shared ranks too: the portable profile adds both."""
    calls, expected = shared_x_case(EXAMPLES[name], three_dimensional=three_dimensional)
    results = run_world(world, len(calls), lambda ctx: round_trip(ctx, calls)[1])
    for rank, result in enumerate(results):
        definition.same_bits(result, expected[rank], f"rank {rank} x")


def test_shared_expert_x_by_hand():
    calls = example_calls(BASIC)
    calls[0]["combine"]["shared_expert_x"] = torch.tensor(
        [[-1, 100], [0.75, 0.5], [1, 2]], dtype=torch.bfloat16
    )
    results = run_world("local", 2, lambda ctx: round_trip(ctx, calls)[1])
    assert results[0].tolist() == [[1, 104], [9, 11.5], [16, 20]]
    assert results[1].tolist() == BASIC.combined[1]


def snapshot(call):
    return {
        name: None if value is None else value.clone()
        for args in call.values()
        for name, value in args.items()
        if value is None or isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("world", harness.WORLDS)
def test_inputs_stay_and_outputs_are_fresh(world):
    """No input is written, and no output changes or is shared with a later call."""
    first, second = example_calls(QUANTISED), example_calls(QUANTISED)
    for call in second:
        call["dispatch"]["x"] = call["dispatch"]["x"] * 2
        call["combine"]["expand_x"] = call["combine"]["expand_x"] * 2

    def fn(ctx):
        before = snapshot(first[ctx.ep_rank])
        outputs, combined = round_trip(ctx, first)
        for _ in range(4):
            round_trip(ctx, second)
        after = snapshot(first[ctx.ep_rank])
        unchanged = all(
            (value is None and after[name] is None)
            or torch.equal(value.nan_to_num(7.0), after[name].nan_to_num(7.0))
            for name, value in before.items()
        )
        return unchanged, outputs, combined

    for rank, (unchanged, outputs, combined) in enumerate(run_world(world, 2, fn)):
        assert unchanged
        check_literal(QUANTISED, rank, outputs, combined)


@pytest.mark.parametrize("world", harness.WORLDS)
def test_autograd_modes_may_change(world):
    """Buffers of one call serve the next, in or out of inference mode."""
    calls = example_calls(QUANTISED)
    modes = [torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode]

    def fn(ctx):
        results = []
        for mode in modes:
            with mode():
                results.append(round_trip(ctx, calls))
        return results

    for rank, results in enumerate(run_world(world, 2, fn)):
        for outputs, combined in results:
            check_literal(QUANTISED, rank, outputs, combined)


@pytest.mark.parametrize("world", harness.WORLDS)
def test_inputs_may_require_grad(world):
    """Inference only: the result is right and carries no gradient."""
    calls = example_calls(BASIC)

    def fn(ctx):
        call = {op: dict(args) for op, args in calls[ctx.ep_rank].items()}
        for args in call.values():
            for name, value in args.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    args[name] = value.clone().requires_grad_()
        outputs = call_dispatch(ctx, call)
        combined = call_combine(ctx, call, outputs)
        graphs = [out.requires_grad for out in (*outputs, combined)]
        return [out.detach() for out in outputs], combined.detach(), graphs

    for rank, (outputs, combined, graphs) in enumerate(run_world(world, 2, fn)):
        check_literal(BASIC, rank, outputs, combined)
        assert not any(graphs)


@pytest.mark.parametrize("world", harness.WORLDS)
def test_two_layers_in_either_order(world):
    """Two dispatches before their combines, in both orders: each combine finds its own rows."""
    a, b = example_calls(BASIC), example_calls(QUANTISED)

    def fn(ctx):
        rank = ctx.ep_rank
        results = []
        for order in ("ab", "ba"):
            outputs = {"a": call_dispatch(ctx, a[rank]), "b": call_dispatch(ctx, b[rank])}
            combined = {}
            for layer in order:
                call = {"a": a, "b": b}[layer][rank]
                combined[layer] = call_combine(ctx, call, outputs[layer])
            results.append((outputs, combined))
        return results

    for rank, results in enumerate(run_world(world, 2, fn)):
        for outputs, combined in results:
            check_literal(BASIC, rank, outputs["a"], combined["a"])
            check_literal(QUANTISED, rank, outputs["b"], combined["b"])


@pytest.mark.parametrize("world", harness.WORLDS)
def test_arguments_may_change_from_call_to_call(world):
    """One group, a new shape, dtype, expert number or quantisation in every call."""
    rng = np.random.default_rng(1)
    cases = []
    for hidden, num_experts, top_k, dtype, quant, shared in [
        (5, 2, 1, "bfloat16", 0, 0),
        (64, 8, 3, "float16", 2, 0),
        (1, 3, 2, "bfloat16", 2, 1),
        (5, 2, 2, "float16", 0, 0),
        (300, 8, 8, "bfloat16", 0, 1),
        (5, 2, 1, "bfloat16", 0, 0),
    ]:
        group = Group(2, num_experts, top_k, hidden, dtype, quant, shared, global_bs=12)
        cases.append((group, [random_tokens(rng, group, batch) for batch in (6, 2)]))
    expected = [case_of(rng, *case) for case in cases]

    def fn(ctx):
        return [round_trip(ctx, calls) for calls, *_ in expected]

    for rank, results in enumerate(run_world(world, 2, fn)):
        for (group, _), (_, *wanted), result in zip(cases, expected, results, strict=True):
            check_round(group, *wanted, rank, result)


EDGES = [
    pytest.param(Group(1, 1, 1, 1), [1], id="smallest"),
    pytest.param(Group(1, 5, 3, 7, quant_mode=2), [4], id="one rank"),
    pytest.param(Group(2, 4, 2, 3), [0, 0], id="no rank has tokens, global_bs 0"),
    pytest.param(Group(2, 4, 2, 3, global_bs=4), [0, 0], id="no rank has tokens"),
    pytest.param(Group(3, 3, 1, 8, global_bs=9), [0, 3, 0], id="one rank has tokens"),
    pytest.param(
        Group(3, 4, 2, 8, quant_mode=2, shared_ranks=1, global_bs=9), [0, 0, 3], id="shared idle"
    ),
    pytest.param(Group(2, 6, 6, 5), [2, 2], id="every expert"),
    pytest.param(Group(2, 1, 1, 5, shared_ranks=1), [2, 2], id="one MoE rank"),
    pytest.param(Group(6, 3, 1, 5, shared_ranks=3, shared_experts=3), [2] * 6, id="NS 3"),
    pytest.param(
        Group(6, 4, 2, 5, shared_ranks=2, global_bs=12), [2, 0, 1, 2, 2, 0], id="two copies, uneven"
    ),
    pytest.param(Group(2, 40, 16, 17, dtype="float16", quant_mode=2), [3, 3], id="K 16"),
    pytest.param(Group(2, 514, 2, 33), [5, 5], id="E above 512"),
    pytest.param(Group(2, 2, 1, 7168, quant_mode=2), [520, 520], id="BS above 512"),
]


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("group, batches", EDGES)
def test_edges(group, batches, world):
    rng = np.random.default_rng(2)
    tokens = [random_tokens(rng, group, batch) for batch in batches]
    calls, received, combined = case_of(rng, group, tokens)
    results = run_world(world, group.world_size, lambda ctx: round_trip(ctx, calls))
    for rank, result in enumerate(results):
        check_round(group, received, combined, rank, result)


@pytest.mark.parametrize("strides", harness.STRIDES)
@pytest.mark.parametrize("quant_mode", [0, 2])
@pytest.mark.parametrize("hidden", [1, 7, 8, 32])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_single_token_in_any_layout(world_size, hidden, quant_mode, strides):
    """torch calls one strided row contiguous, or keeps its stride when it reshapes."""
    rng = np.random.default_rng(7)
    group = Group(world_size, 2, 2, hidden, quant_mode=quant_mode)
    tokens = [random_tokens(rng, group, 1) for _ in range(world_size)]
    calls, received, combined = case_of(rng, group, tokens, strides=strides)
    results = run_world("local", world_size, lambda ctx: round_trip(ctx, calls))
    for rank, result in enumerate(results):
        check_round(group, received, combined, rank, result)


@pytest.mark.parametrize("world", harness.WORLDS)
def test_large_batch_with_everything(world):
    """Too many rows for one block, with smooth rows, a shared rank and shared_expert_x."""
    rng = np.random.default_rng(6)
    group = Group(2, 3, 2, 2048, quant_mode=2, shared_ranks=1, global_bs=400)
    tokens = [random_tokens(rng, group, batch) for batch in (200, 131)]
    shared_x = []
    for mine in tokens:
        mine.scales = rng.normal(size=(4, 2048)).astype(np.float32)
        shared_x.append(definition.encode(rng.normal(size=mine.x.shape), group.dtype))
    calls, received, combined = case_of(rng, group, tokens, shared_x=shared_x)
    results = run_world(world, 2, lambda ctx: round_trip(ctx, calls))
    for rank, result in enumerate(results):
        check_round(group, received, combined, rank, result)


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize("dtype", definition.TORCH_DTYPES)
def test_unquantised_rows_travel_as_bits(dtype, world):
    """NaN payloads, infinities, subnormals and negative zeros arrive as they left."""
    rng = np.random.default_rng(3)
    group = Group(2, 4, 2, 512, dtype=dtype)
    tokens = [random_tokens(rng, group, 64) for _ in range(2)]
    for mine in tokens:
        mine.x = rng.permutation(2**16).astype(np.uint16)[: 64 * 512].reshape(64, 512)
    received = definition.dispatch(group, tokens)
    empty = [np.zeros((0, 512), np.uint16)] * 2
    calls = make_calls(group, tokens, empty)
    results = run_world(world, 2, lambda ctx: call_dispatch(ctx, calls[ctx.ep_rank]))
    for rank, outputs in enumerate(results):
        check_dispatch(group, received[rank], outputs, rank=rank)


@pytest.mark.parametrize("world", harness.WORLDS)
def test_a_row_with_infinities_spoils_no_other(world):
    """Its own codes are undefined; all other rows are right."""
    rng = np.random.default_rng(4)
    group = Group(2, 4, 2, 16, quant_mode=2)
    tokens = [random_tokens(rng, group, 5) for _ in range(2)]
    bad = [definition.encode(np.array([np.inf] + [1] * 15), "bfloat16")]
    bad.append(definition.encode(np.array([1, np.nan] + [2] * 14), "bfloat16"))
    calls, received, _ = case_of(rng, group, tokens)
    for rank, call in enumerate(calls):
        call["dispatch"]["x"][2] = definition.to_tensor(bad[rank], "bfloat16")
    results = run_world(world, 2, lambda ctx: call_dispatch(ctx, calls[ctx.ep_rank]))
    for rank, outputs in enumerate(results):
        good = [i for i, row in enumerate(received[rank].rows) if row[2] != 2]
        definition.same_bits(outputs[0][good], received[rank].expand_x[good], "expand_x")
        definition.same_bits(outputs[1][good], received[rank].dynamic_scales[good], "scales")
        assert outputs[4].tolist() == received[rank].ep_recv_counts


@pytest.mark.parametrize("world", harness.WORLDS)
@pytest.mark.parametrize(
    "group",
    [
        pytest.param(Group(2, 4, 2, 9, quant_mode=2), id="S 0"),
        pytest.param(Group(2, 3, 2, 9, quant_mode=2, shared_ranks=1), id="S 1"),
        pytest.param(
            Group(4, 6, 2, 9, quant_mode=2, shared_ranks=2, shared_experts=2), id="S 2, NS 2"
        ),
    ],
)
def test_each_source_quantises_with_its_own_scales(group, world):
    rng = np.random.default_rng(5)
    tokens = [random_tokens(rng, group, 4) for _ in range(group.world_size)]
    for mine in tokens:
        shape = (group.num_shared + group.num_experts, 9)
        mine.scales = rng.normal(size=shape).astype(np.float32)
    received = definition.dispatch(group, tokens)
    empty = [np.zeros((0, 9), np.uint16)] * group.world_size
    calls = make_calls(group, tokens, empty, strides="transposed")
    results = run_world(world, group.world_size, lambda ctx: call_dispatch(ctx, calls[ctx.ep_rank]))
    for rank, outputs in enumerate(results):
        check_dispatch(group, received[rank], outputs, rank=rank)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("hidden", [1, 2, 16, 33])
def test_zero_rows_have_factor_zero(hidden, world_size):
    """0.0, not -0.0, whichever zeros the row and its smooth factors make."""
    rng = np.random.default_rng(8)
    group = Group(world_size, 2, 1, hidden, quant_mode=2)
    tokens = [random_tokens(rng, group, 4) for _ in range(world_size)]
    for mine in tokens:
        mine.x[:2] = 0
        mine.x[1:3, 0] = 0x8000
        mine.x[2, 1:] = 0x8000
        mine.scales = rng.normal(size=(2, hidden)).astype(np.float32)
        mine.scales[0] = -np.abs(mine.scales[0])
    calls = make_calls(group, tokens, [np.zeros((0, hidden), np.uint16)] * world_size)
    received = definition.dispatch(group, tokens)
    results = run_world("local", world_size, lambda ctx: call_dispatch(ctx, calls[ctx.ep_rank]))
    for rank, outputs in enumerate(results):
        check_dispatch(group, received[rank], outputs, rank=rank)

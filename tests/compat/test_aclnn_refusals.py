"""Calls that must be refused, through the aclnn interface: row by row of the contract's tables.

The rows are those that torch_npu's functions must refuse. What is an exception there is a status
here, of the first phase where no value in a tensor is to blame; the peers get one too, at once, and
after it the next correct call of the same group returns the right bits.
"""

from __future__ import annotations

import re

import aclnn_calls
import definition
import pytest
import torch
from aclnn_calls import keyword, parameters
from ascend.distributed import test_combine_add_rms_norm as norm
from ascend.distributed import test_torch_npu_errors as v1
from ascend.distributed import test_torch_npu_v2_errors as v2
from ascend.local import test_update_expert as replicas
from definition_checks import check_dispatch, without_spare
from harness import run_world
from invalid_calls import AT_ONCE, Bad, put
from worked_examples import BASIC, example_calls

import moe_triton
from moe_triton.compat import aclnn, torch_npu

DISPATCH, COMBINE = "aclnnMoeDistributeDispatch", "aclnnMoeDistributeCombine"
VALUES = ("value", "row20-no-prefix")  # rows in which a value of a tensor is wrong


def check_culprit(bad: Bad, name: str, function: str, ending: dict) -> None:
    """The rank that called wrongly has the status, and the sentence names its own parameter."""
    assert ending["status"] == bad.code, ending
    sentence = ending["sentence"]
    known = {keyword(function, parameter): parameter for parameter in parameters(function)}
    assert sentence.startswith(function), sentence
    assert any(
        re.search(rf": {known.get(argument, argument)}\b", sentence) for argument in bad.arguments
    ), sentence
    assert re.search(bad.got, sentence.rpartition(", got ")[2]), sentence
    assert ending["phase"] == (2 if name.startswith(VALUES) else 1), ending
    assert ending["seconds"] < AT_ONCE


def check_peer(bad: Bad, ending: dict) -> None:
    """A rank that called correctly hears of it in its second phase."""
    assert (ending["phase"], ending["status"]) == (2, aclnn.ACLNN_ERR_RUNTIME_ERROR), ending
    assert "rejected this call" in ending["sentence"], ending
    assert any(argument in ending["sentence"] for argument in bad.arguments), ending
    assert ending["seconds"] < AT_ONCE


ABSENT = ("shared_expert_x",)  # of version 1 in C
V1 = {
    name: bad
    for name, bad in v1.BAD.items()
    if not any(absent in bad.arguments for absent in ABSENT)
}


@pytest.fixture(scope="module")
def base():
    return v1.prepare(v1.BASE, [v1.BATCH] * v1.WORLD)


@pytest.mark.parametrize("name", V1)
def test_version_1(name, base):
    """By one rank, whose peers hear of it; then by all."""
    bad = V1[name]
    calls, received, combined = base
    function = DISPATCH if bad.op == "dispatch" else COMBINE
    every_rank = range(v1.WORLD)
    wrong = [[list(V1).index(name) % v1.WORLD], every_rank] if bad.reaches_peers else [every_rank]

    def fn(ctx):
        call, results = calls[ctx.rank], []
        for culprits in wrong:
            change = bad.change if ctx.rank in culprits else put()
            ending = aclnn_calls.bad_call(ctx, call, bad.op, change, DISPATCH, COMBINE)
            results.append((ending, aclnn_calls.round_trip(ctx, call, DISPATCH, COMBINE)))
        return results

    for rank, results in enumerate(run_world("local", v1.WORLD, fn, limit=v1.LIMIT)):
        for culprits, (ending, (outputs, x)) in zip(wrong, results, strict=True):
            if rank in culprits:
                check_culprit(bad, name, function, ending)
            else:
                check_peer(bad, ending)
            check_dispatch(v1.BASE, received[rank], outputs, rank=rank)
            definition.same_bits(x, combined[rank], f"rank {rank} x")


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_version_1_between_processes(world, base):
    """One row after the other, each by another rank."""
    calls, received, combined = base
    names = [name for name in v1.IN_PROCESSES if name in V1]

    def fn(ctx):
        call, results = calls[ctx.rank], []
        for i, name in enumerate(names):
            change = V1[name].change if ctx.rank == i % v1.WORLD else put()
            op = V1[name].op
            ending = aclnn_calls.bad_call(ctx, call, op, change, DISPATCH, COMBINE)
            results.append((ending, aclnn_calls.round_trip(ctx, call, DISPATCH, COMBINE)))
        return results

    for rank, results in enumerate(run_world(world, v1.WORLD, fn)):
        for i, (name, (ending, (outputs, x))) in enumerate(zip(names, results, strict=True)):
            if rank == i % v1.WORLD:
                function = DISPATCH if V1[name].op == "dispatch" else COMBINE
                check_culprit(V1[name], name, function, ending)
            else:
                check_peer(V1[name], ending)
            check_dispatch(v1.BASE, received[rank], outputs, rank=rank)
            definition.same_bits(x, combined[rank], f"rank {rank} x")


# In C there are no y_dtype, x_dtype and scales_dtype, which stands for the dtypes of the tensors.
V2 = {
    name: bad
    for name, bad in v2.ROWS.items()
    if name != "format-x-other-dispatch" and not any("_dtype" in one for one in bad.arguments)
}


@pytest.fixture
def profile(request):
    moe_triton.set_profile(request.param)
    yield request.param
    moe_triton.set_profile(None)


@pytest.mark.parametrize(
    "name, profile",
    [pytest.param(name, bad.profile, id=name) for name, bad in V2.items()],
    indirect=["profile"],
)
@pytest.mark.usefixtures("profile")
def test_later_versions(name):
    """By one rank, whose peers hear of it, under the profile of the row."""
    bad = V2[name]
    calls, received, combined = v2.prepare(bad.base)
    names = f"{DISPATCH}V4", f"{COMBINE}V4"
    function = names[bad.op == "combine"]
    culprit = list(V2).index(name) % len(calls)
    culprits = [culprit] if bad.reaches_peers else range(len(calls))

    def fn(ctx):
        change = bad.change if ctx.rank in culprits else put()
        ending = aclnn_calls.bad_call(ctx, calls[ctx.rank], bad.op, change, *names)
        return ending, aclnn_calls.round_trip(ctx, calls[ctx.rank], *names)

    for rank, (ending, result) in enumerate(v2.in_a_world("local", bad.base, fn)):
        if rank in culprits:
            check_culprit(bad, name, function, ending)
        else:
            check_peer(bad, ending)
        base, (outputs, x) = v2.BASES[bad.base], result
        found = outputs
        if bad.profile == "a2":
            found = without_spare(base.group, outputs, base.batch)
        v2.check_round(base.group, (found, x), received, combined, rank)


# W 2, L 2, BS 2, K 2, H 1024, as for torch_npu's functions.
@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("product, least", [("a2", 5), ("a3", 1), ("950", 1)])
def test_row_22(product, least, op):
    """One process has too small an HCCL_BUFFSIZE; its peer hears of it."""
    calls, received, combined = v2.prepare("strict")
    names = f"{DISPATCH}V4", f"{COMBINE}V4"

    def fn(ctx):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOE_TRITON_PROFILE", product)
            patch.setenv("HCCL_BUFFSIZE", str(least))
            call, small = calls[ctx.rank], str(least - 1)

            def change(*given):
                if ctx.rank == 1:
                    patch.setenv("HCCL_BUFFSIZE", small)

            ending = aclnn_calls.bad_call(ctx, call, op, change, *names)
            patch.setenv("HCCL_BUFFSIZE", str(least))
            return ending, aclnn_calls.round_trip(ctx, call, *names)

    function = names[op == "combine"]
    for rank, (ending, (outputs, x)) in enumerate(v2.in_a_world("symmetric", "strict", fn)):
        if rank == 1:
            assert ending["status"] == aclnn.ACLNN_ERR_INNER_TILING_ERROR, ending
            assert ending["sentence"].startswith(function), ending
            assert "HCCL_BUFFSIZE must be at least" in ending["sentence"], ending
            assert ending["phase"] == 1
        else:
            assert (ending["phase"], ending["status"]) == (2, aclnn.ACLNN_ERR_RUNTIME_ERROR), ending
            assert "HCCL_BUFFSIZE" in ending["sentence"], ending
        assert ending["seconds"] < AT_ONCE
        base, found = v2.BASES["strict"], outputs
        if product == "a2":
            found = without_spare(base.group, outputs, base.batch)
        v2.check_round(base.group, (found, x), received, combined, rank)


V1_PRODUCTS = [(product, name) for name, row in v1.BY_PRODUCT.items() for product in row[0]]


@pytest.mark.parametrize(
    "profile, name",
    [pytest.param(product, name, id=f"{name} on {product}") for product, name in V1_PRODUCTS],
    indirect=["profile"],
)
def test_version_1_on_a_product(profile, name):
    """The limits of one product, by one of all its ranks."""
    bad, group = v1.BY_PRODUCT[name][1], v1.ON_PRODUCTS[profile]
    calls, received, combined = v1.prepare(group, [1] * group.world_size)
    if profile != "a2":
        for call in calls:
            call["dispatch"]["expert_scales"] = None
    function = DISPATCH if bad.op == "dispatch" else COMBINE

    def fn(ctx):
        change = bad.change if ctx.rank == 1 else put()
        ending = aclnn_calls.bad_call(ctx, calls[ctx.rank], bad.op, change, DISPATCH, COMBINE)
        return ending, aclnn_calls.round_trip(ctx, calls[ctx.rank], DISPATCH, COMBINE)

    results = run_world("local", group.world_size, fn, limit=v1.LIMIT)
    for rank, (ending, (outputs, x)) in enumerate(results):
        if rank == 1:
            check_culprit(bad, name, function, ending)
            assert f"on {profile}" in ending["sentence"]
        else:
            check_peer(bad, ending)
        on_a2 = profile == "a2"
        found = without_spare(group, outputs, 1) if on_a2 else outputs
        check_dispatch(group, received[rank], found, rank=rank, weights_given=on_a2)
        definition.same_bits(x, combined[rank], f"rank {rank} x")


def update_expert(function: str, changes: dict) -> dict:
    """How the update of experts ends that ``changes`` have edited."""
    given = {"expert_ids": replicas.IDS, "eplb_table": replicas.TABLE}
    given |= {"local_rank_id": 3, "world_size": 8} | changes
    ids = changes.get("expert_ids", replicas.IDS)
    shape = (3, 2) if ids is None else tuple(ids.shape)
    outputs = [torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)]
    count = 1 if "EPLB" in function else 2
    return aclnn_calls.ending(function, given, outputs[:count])


OF_SUCCESSOR = ("expert_scales", "pruning_threshold", "active_mask")
REPLICAS = [
    (function, name)
    for name, (changes, *_) in replicas.BAD.items()
    for function in ("aclnnMoeEPLBUpdateExpert", "aclnnMoeUpdateExpert")
    if function == "aclnnMoeUpdateExpert" or not any(one in changes for one in OF_SUCCESSOR)
]
REPLICA_VALUES = ("id E", "id negative", "no replicas", "more than F")


@pytest.mark.parametrize("function, name", REPLICAS)
def test_row_28(function, name):
    changes, code, argument = replicas.BAD[name]
    ending = update_expert(function, changes)
    (parameter,) = (one for one in parameters(function) if keyword(function, one) == argument)
    assert ending["status"] == code, ending
    assert f": {parameter} must" in ending["sentence"], ending
    assert ending["phase"] == (2 if name in REPLICA_VALUES else 1), ending


NORM_VALUES = ("index of other ids",)


@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize("name", norm.BAD)
def test_combine_add_rms_norm(name, version):
    """By one rank; the other hears of it, and both go on."""
    changes, code, argument = norm.BAD[name]
    calls = example_calls(BASIC, version=2)
    function = f"{COMBINE}AddRmsNorm{version}"

    def fn(ctx):
        call = calls[ctx.rank]
        mine = aclnn_calls.dispatch_call(ctx, call)
        outputs = aclnn_calls.dispatch_outputs(mine)
        aclnn_calls.run(f"{DISPATCH}V2", mine, outputs)
        given = norm.arguments_after(ctx, call, outputs)
        outputs = aclnn_calls.norm_outputs(given)
        bad = given | (changes if ctx.rank == 1 else {})
        ending = aclnn_calls.ending(function, bad, outputs)
        expected = torch_npu.npu_moe_distribute_combine_add_rms_norm(**given)
        results = aclnn_calls.run(function, given, outputs)
        same = [torch.equal(one, other) for one, other in zip(results, expected, strict=True)]
        return ending, same

    (heard, same), (said, other) = run_world("local", 2, fn, limit=v1.LIMIT)
    assert same == other == [True] * 3
    (parameter,) = (one for one in parameters(function) if keyword(function, one) == argument)
    assert said["status"] == code, said
    assert f": {parameter} must" in said["sentence"], said
    assert said["phase"] == (2 if name in NORM_VALUES else 1), said
    assert (heard["phase"], heard["status"]) == (2, aclnn.ACLNN_ERR_RUNTIME_ERROR), heard
    assert argument in heard["sentence"]

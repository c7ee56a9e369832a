"""Combine with residual and RMSNorm: the worked example, its two kinds of index, and refusals.

Drawn configurations are compared with the definition in test_hypothesis_rms.
"""

from __future__ import annotations

import aclnn_calls
import harness
import invalid_calls
import pytest
import torch
from invalid_calls import MISSING, TYPE, VALUE
from worked_examples import BASIC, example_calls

from moe_triton import set_profile
from moe_triton.compat import aclnn, torch_npu


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("world", harness.WORLDS)
def test_worked_example(world, version):
    """One token, whose expert on the other rank changes nothing."""
    x = torch.tensor([[1, 2, 3, 4]]).bfloat16()

    def fn(ctx):
        ids = torch.tensor([[1 - ctx.rank]], dtype=torch.int32)
        weights, where = torch.ones(1, 1), (ctx.ep_group, 2, ctx.ep_rank, 2)
        suffix = "_v2" if version == 2 else ""
        dispatch = getattr(torch_npu, f"npu_moe_distribute_dispatch{suffix}")
        rows, _, index, _, counts, *_ = dispatch(x, ids, *where)
        residual = torch.tensor([[[1, 1, -1, 0]]]).bfloat16()
        gamma = torch.tensor([1, 0.5, 2, 1]).bfloat16()
        return torch_npu.npu_moe_distribute_combine_add_rms_norm(
            rows, ids, index, counts, weights, residual, gamma, *where
        )

    for y, rstd, total in harness.run_world(world, 2, fn):
        assert y.tolist() == [[[0.6953125, 0.5234375, 1.390625, 1.390625]]]
        assert rstd.tolist() == [[[pytest.approx(0.34815528988838196, rel=1e-6)]]]
        assert total.tolist() == [[[2, 3, 2, 4]]]
        assert (rstd.dtype, total.dtype) == (torch.float32, torch.bfloat16)


def test_inactive_tokens_are_zeros():
    """13 #37, for all three outputs."""
    calls = example_calls(BASIC, version=2)

    def fn(ctx):
        call = calls[ctx.rank]
        mask = torch.tensor([True, True, False])
        for args in call.values():
            args["x_active_mask"] = mask
        outputs = harness.call_dispatch(ctx, call, version=2)
        return torch_npu.npu_moe_distribute_combine_add_rms_norm(
            **arguments_after(ctx, call, outputs)
        )

    for outputs in harness.run_world("local", 2, fn):
        for out in outputs:
            assert out[:2].all()
            assert not out[2].any()


def arguments_after(ctx, call, outputs):
    arguments = harness.combine_arguments(ctx, call, outputs, version=2)
    arguments["expand_idx"] = arguments.pop("assist_info_for_combine")
    residual = {"residual_x": torch.ones(3, 1, 2).bfloat16(), "gamma": torch.ones(2).bfloat16()}
    return arguments | residual


def through(function, call):
    """The three outputs of torch_npu's function, or of both phases of a C function."""
    if function.startswith("npu"):
        return getattr(torch_npu, function)(**call)
    return aclnn_calls.run(function, call, aclnn_calls.norm_outputs(call))


FUNCTIONS = (
    "npu_moe_distribute_combine_add_rms_norm",
    "aclnnMoeDistributeCombineAddRmsNorm",
    "aclnnMoeDistributeCombineAddRmsNormV2",
)


@pytest.mark.parametrize("tp_world_size", [0, 1])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_group_tp_may_be_group_ep_without_tp(function, tp_world_size):
    calls = example_calls(BASIC, version=2)

    def fn(ctx):
        call = calls[ctx.rank]
        named = {"group_tp": ctx.ep_group, "tp_world_size": tp_world_size}
        given = arguments_after(ctx, call, harness.call_dispatch(ctx, call, version=2)) | named
        return through(function, given)[2]

    for rank, total in enumerate(harness.run_world("local", 2, fn)):
        assert (total[:, 0] - 1).tolist() == BASIC.combined[rank]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_expand_idx_may_have_any_shape(function):
    """That of version 1, as (BS, K)."""
    calls = example_calls(BASIC, version=2)
    first = example_calls(BASIC)

    def fn(ctx):
        outputs = harness.call_dispatch(ctx, first[ctx.rank])
        given = arguments_after(ctx, calls[ctx.rank], outputs)
        return through(function, given | {"expand_idx": outputs[2].view(3, 2)})[2]

    for rank, total in enumerate(harness.run_world("local", 2, fn)):
        assert (total[:, 0] - 1).tolist() == BASIC.combined[rank]


BAD = {
    "residual None": ({"residual_x": None}, MISSING, "residual_x"),
    "gamma None": ({"gamma": None}, MISSING, "gamma"),
    "residual float32": ({"residual_x": torch.ones(3, 1, 2)}, TYPE, "residual_x"),
    "gamma float16": ({"gamma": torch.ones(2).half()}, TYPE, "gamma"),
    "norm_eps text": ({"norm_eps": "small"}, TYPE, "norm_eps"),
    "norm_eps negative": ({"norm_eps": -1.0}, VALUE, "norm_eps"),
    "residual 2-D": ({"residual_x": torch.ones(3, 2).bfloat16()}, VALUE, "residual_x"),
    "residual rows": ({"residual_x": torch.ones(2, 1, 2).bfloat16()}, VALUE, "residual_x"),
    "gamma columns": ({"gamma": torch.ones(3).bfloat16()}, VALUE, "gamma"),
    "index of other ids": (
        {"expand_idx": torch.full((6,), 5, dtype=torch.int32)},
        VALUE,
        "expand_idx",
    ),
    "index of neither form": (
        {"expand_idx": torch.zeros(8, dtype=torch.int32)},
        VALUE,
        "expand_idx",
    ),
    "out_dtype": ({"out_dtype": 1}, VALUE, "out_dtype"),
    "comm_alg": ({"comm_alg": "ring"}, VALUE, "comm_alg"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    """By one rank; the other is aborted, and both go on."""
    changes, code, argument = BAD[name]
    calls = example_calls(BASIC, version=2)

    def fn(ctx):
        call = calls[ctx.rank]
        outputs = harness.call_dispatch(ctx, call, version=2)
        given = arguments_after(ctx, call, outputs)
        combine = torch_npu.npu_moe_distribute_combine_add_rms_norm
        changed = given | (changes if ctx.rank == 1 else {})
        return invalid_calls.attempt(lambda: combine(**changed))["error"], combine(**given)

    (peer, _), (culprit, _) = harness.run_world("local", 2, fn)
    assert (culprit["code"], culprit["argument"]) == (code, argument), culprit["traceback"]
    assert peer["types"][0] == "PeerAbortError"
    assert argument in peer["reason"]


@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize("name", BAD)
def test_refused_through_aclnn(name, version):
    """As by torch_npu's function; then both return the same bits."""
    changes, code, argument = BAD[name]
    calls = example_calls(BASIC, version=2)
    function = f"aclnnMoeDistributeCombineAddRmsNorm{version}"

    def fn(ctx):
        call = calls[ctx.rank]
        mine = aclnn_calls.dispatch_call(ctx, call)
        outputs = aclnn_calls.dispatch_outputs(mine)
        aclnn_calls.run("aclnnMoeDistributeDispatchV2", mine, outputs)
        given = arguments_after(ctx, call, outputs)
        outputs = aclnn_calls.norm_outputs(given)
        changed = given | (changes if ctx.rank == 1 else {})
        ending = aclnn_calls.ending(function, changed, outputs)
        expected = torch_npu.npu_moe_distribute_combine_add_rms_norm(**given)
        results = aclnn_calls.run(function, given, outputs)
        return ending, [torch.equal(*pair) for pair in zip(results, expected, strict=True)]

    (peer, same), (culprit, others) = harness.run_world("local", 2, fn, limit=invalid_calls.LIMIT)
    assert same == others == [True] * 3
    (parameter,) = (
        parameter
        for parameter in aclnn_calls.parameters(function)
        if aclnn_calls.keyword(function, parameter) == argument
    )
    assert culprit["status"] == code, culprit
    assert f": {parameter} must" in culprit["sentence"], culprit
    assert culprit["phase"] == (2 if name == "index of other ids" else 1), culprit
    assert (peer["phase"], peer["status"]) == (2, aclnn.ACLNN_ERR_RUNTIME_ERROR), peer
    assert argument in peer["sentence"]


@pytest.mark.parametrize(
    "profile, hidden, dtype, error, argument",
    [
        ("a2", 1024, torch.bfloat16, "UnavailableError", None),
        ("a3", 64, torch.bfloat16, "ArgumentValueError", "expand_x"),
        ("a3", 1024, torch.float16, "ArgumentTypeError", "expand_x"),
        ("950", 1024, torch.float16, "ArgumentTypeError", "expand_x"),
    ],
)
def test_refused_on_a_product(profile, hidden, dtype, error, argument):
    combine = torch_npu.npu_moe_distribute_combine_add_rms_norm
    rows, residual, gamma = (
        torch.ones(shape).to(dtype) for shape in ((2, hidden), (1, 1, hidden), (hidden,))
    )
    ids, counts = torch.zeros(1, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)

    def fn(ctx):
        given = (rows, ids, ids[0], counts, torch.ones(1, 1), residual, gamma)
        where = (ctx.ep_group, 2, ctx.ep_rank, 2)
        return invalid_calls.attempt(lambda: combine(*given, *where))["error"]

    set_profile(profile)
    try:
        actual = harness.run_world("local", 2, fn)
    finally:
        set_profile(None)
    culprits = [refusal for refusal in actual if refusal["types"][0] == error]
    assert culprits
    assert {refusal["argument"] for refusal in culprits} == {argument}

"""The aclnn interface: the documents' parameters, the worked examples, executors and outputs.

Invalid calls are in test_invalid_calls, and the split-phase ops in test_aclnn_split_phase.
"""

from __future__ import annotations

import inspect
import threading

import aclnn_calls
import definition
import harness
import numpy as np
import pytest
import torch
from aclnn_calls import POISON, combine_call, dispatch_call, launch, plan, poisoned
from definition import Group, Tokens
from definition_checks import check_dispatch, without_spare
from harness import run_world
from worked_examples import (
    BASIC,
    EXAMPLES,
    PLAIN,
    QUANTISED,
    TENSOR_PARALLEL,
    ZERO_COMPUTATION,
    check_literal,
    example_calls,
)

from moe_triton import set_profile
from moe_triton.compat import aclnn, torch_npu

GROUP = "groupEp epWorldSize epRankId moeExpertNum"
PLACEMENT = "expertShardType sharedExpertNum sharedExpertRankNum"
WITH_TP = f"{GROUP} groupTp tpWorldSize tpRankId {PLACEMENT}"
SENT = "x expertIds scalesOptional xActiveMaskOptional expertScalesOptional"
SENDING = f"{WITH_TP} quantMode globalBs expertTokenNumsType"
ARRIVED = (
    "expandXOut dynamicScalesOut assistInfoForCombineOut expertTokenNumsOut epRecvCountsOut "
    "tpRecvCountsOut expandScalesOut"
)
OPTIONAL = (
    "tpSendCountsOptional xActiveMaskOptional activationScaleOptional weightScaleOptional "
    "groupListOptional expandScalesOptional sharedExpertXOptional"
)
ROWS = f"expandX expertIds assistInfoForCombine epSendCounts expertScales {OPTIONAL}"
NORMED = (
    "expandX expertIds assistInfoForCombine epSendCounts expertScales residualX gamma " + OPTIONAL
)
EXTRA = (
    "elasticInfoOptional oriXOptional constExpertAlpha1Optional constExpertAlpha2Optional "
    "constExpertVOptional"
)
RETURNING = f"{WITH_TP} globalBS outDtype commQuantMode groupListType commAlg"
EXPERT_NUMS = "zeroExpertNum copyExpertNum constExpertNum"
HALF = f"{GROUP} {PLACEMENT}"
# The parameters in the order of the documents, without the two pointers at the end.
PARAMETERS = {
    "aclnnMoeDistributeDispatch": (
        f"x expertIds scales xActiveMask expertScales {SENDING} expandX dynamicScales expandIdx "
        "expertTokenNums epRecvCounts tpRecvCounts expandScales"
    ),
    "aclnnMoeDistributeDispatchV2": f"{SENT} {SENDING} commAlg {ARRIVED}",
    "aclnnMoeDistributeDispatchV3": (
        f"{SENT} elasticInfoOptional {SENDING} commAlg {EXPERT_NUMS} {ARRIVED}"
    ),
    "aclnnMoeDistributeDispatchV4": (
        f"{SENT} elasticInfoOptional performanceInfoOptional {SENDING} commAlg {EXPERT_NUMS} "
        f"{ARRIVED}"
    ),
    "aclnnMoeDistributeCombine": (
        "expandX expertIds expandIdx epSendCounts expertScales tpSendCounts xActiveMask "
        f"activationScale weightScale groupList expandScales {WITH_TP} globalBs outDtype "
        "commQuantMode groupListType x"
    ),
    "aclnnMoeDistributeCombineV2": f"{ROWS} {RETURNING} xOut",
    "aclnnMoeDistributeCombineV3": f"{ROWS} {EXTRA} {RETURNING} {EXPERT_NUMS} xOut",
    "aclnnMoeDistributeCombineV4": (
        f"{ROWS} {EXTRA} performanceInfoOptional {RETURNING} {EXPERT_NUMS} xOut"
    ),
    "aclnnMoeDistributeCombineAddRmsNorm": f"{NORMED} {RETURNING} normEps yOut rstdOut xOut",
    "aclnnMoeDistributeCombineAddRmsNormV2": (
        f"{NORMED} {EXTRA} {RETURNING} normEps {EXPERT_NUMS} yOut rstdOut xOut"
    ),
    "aclnnMoeEPLBUpdateExpert": (
        "expertIds eplbTable localRankId worldSize balanceMode balancedExpertIds"
    ),
    "aclnnMoeUpdateExpert": (
        "expertIds eplbTable expertScalesOptional pruningThresholdOptional activeMaskOptional "
        "localRankId worldSize balanceMode balancedExpertIds balancedActiveMask"
    ),
    "aclnnMoeDistributeDispatchSetup": (
        f"x expertIds scalesOptional xActiveMaskOptional {HALF} quantMode globalBs commType "
        "commAlg yOut expandIdxOut commCmdInfoOut"
    ),
    "aclnnMoeDistributeDispatchTeardown": (
        f"x y expertIds commCmdInfo {HALF} quantMode globalBs expertTokenNumsType commType "
        "commAlg expandXOut dynamicScalesOut assistInfoForCombineOut expertTokenNumsOut"
    ),
    "aclnnMoeDistributeCombineSetup": (
        f"expandX expertIds assistInfoForCombine {HALF} globalBs commQuantMode commType commAlg "
        "quantExpandXOut commCmdInfoOut"
    ),
    "aclnnMoeDistributeCombineTeardown": (
        "expandX quantExpandX expertIds expandIdx expertScales commCmdInfo xActiveMaskOptional "
        f"sharedExpertXOptional {HALF} globalBs commQuantMode commType commAlg xOut"
    ),
}
VERSIONS = ("", "V2", "V3", "V4")
RUNTIME = aclnn.ACLNN_ERR_RUNTIME_ERROR


def functions(version: str) -> tuple[str, str]:
    return f"aclnnMoeDistributeDispatch{version}", f"aclnnMoeDistributeCombine{version}"


@pytest.mark.parametrize("function", PARAMETERS)
def test_parameters_are_those_of_the_documents(function):
    assert list(aclnn_calls.parameters(function)) == PARAMETERS[function].split()
    second = inspect.signature(getattr(aclnn, function)).parameters
    assert list(second) == ["workspace", "workspaceSize", "executor", "stream"]


def test_there_are_no_others():
    named = {name for function in PARAMETERS for name in (function, f"{function}GetWorkspaceSize")}
    helpers = {name for name in aclnn.__all__ if name.endswith("CalcOutputSize")}
    assert len(helpers) == 2
    assert {name for name in aclnn.__all__ if name.startswith("aclnnMoe")} == named | helpers


def test_the_codes_of_the_documents():
    assert (aclnn.ACLNN_SUCCESS, aclnn.ACLNN_ERR_PARAM_NULLPTR) == (0, 161001)
    assert (aclnn.ACLNN_ERR_PARAM_INVALID, aclnn.ACLNN_ERR_INNER_TILING_ERROR) == (161002, 561002)
    assert (RUNTIME, aclnn.ACLNN_ERR_INNER) == (361001, 561000)


@pytest.mark.parametrize("name", [*PLAIN, "tensor_parallel", "comm_quantised_bf16"])
@pytest.mark.parametrize("version", VERSIONS)
def test_worked_examples(version, name):
    example = EXAMPLES[name]
    number = 1 if version == "" else 2
    calls = example_calls(example, version=number)
    group = example.group

    def fn(ctx):
        return aclnn_calls.round_trip(ctx, calls[ctx.rank], *functions(version))

    ranks = group.world_size * group.tp_world_size
    results = run_world("local", ranks, fn, tp_world_size=group.tp_world_size)
    for rank, (outputs, x) in enumerate(results):
        check_literal(example, rank, outputs, x, version=number)


@pytest.mark.parametrize("version", ["V3", "V4"])
def test_zero_computation_experts(version):
    calls = example_calls(ZERO_COMPUTATION, version=2)

    def fn(ctx):
        return aclnn_calls.round_trip(ctx, calls[ctx.rank], *functions(version))

    for rank, (outputs, x) in enumerate(run_world("local", ZERO_COMPUTATION.group.world_size, fn)):
        check_literal(ZERO_COMPUTATION, rank, outputs, x, version=2)


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_between_processes(world):
    calls = example_calls(BASIC)

    def fn(ctx):
        return aclnn_calls.round_trip(ctx, calls[ctx.rank], *functions(""))

    for rank, (outputs, x) in enumerate(run_world(world, 2, fn)):
        check_literal(BASIC, rank, outputs, x)


def test_performance_info_gains_the_waits():
    calls = example_calls(BASIC, version=2)
    dispatch, combine = functions("V4")

    def fn(ctx):
        call, waited = calls[ctx.rank], torch.zeros(2, dtype=torch.int64)
        counts = []
        mine = dispatch_call(ctx, call) | {"performance_info": waited}
        outputs = aclnn_calls.run(dispatch, mine, aclnn_calls.dispatch_outputs(mine))
        counts.append(waited.tolist())
        mine = combine_call(ctx, call, outputs) | {"performance_info": waited}
        aclnn_calls.run(combine, mine, aclnn_calls.combine_outputs(mine))
        return [*counts, waited.tolist()]

    for first, second in run_world("local", 2, fn):
        assert min(first) > 0
        assert all(later > earlier for earlier, later in zip(first, second, strict=True))


@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize("example", [QUANTISED, TENSOR_PARALLEL], ids=["int8", "pairs"])
def test_rows_beyond_those_needed_stay(example, version):
    """expandX, dynamicScales, expandScales and the triples may be larger, and strided."""
    number = 1 if version == "" else 2
    calls = example_calls(example, version=number)
    tp = example.group.tp_world_size
    dispatch, _ = functions(version)

    def fn(ctx):
        mine = dispatch_call(ctx, calls[ctx.rank])
        exact = aclnn_calls.run(dispatch, mine, aclnn_calls.dispatch_outputs(mine))
        larger = aclnn_calls.dispatch_outputs(mine, more=3)
        width = larger[0].shape[1]
        larger[0] = poisoned((len(larger[0]), 2 * width), larger[0].dtype)[:, ::2]
        return exact, aclnn_calls.run(dispatch, mine, larger)

    for exact, larger in run_world("local", example.group.world_size * tp, fn, tp_world_size=tp):
        n = int(exact[4][-1]) + (int(exact[4][len(exact[4]) // 2 - 1]) if tp == 2 else 0)
        for position, (small, large) in enumerate(zip(exact, larger, strict=True)):
            more = 3 if len(large) > len(small) else 0
            assert (more == 3) == (position in (0, 1, 6) or (position == 2 and number == 2))
            valid = n if position in (0, 1) else len(small)
            if position == 2 and number == 2:
                valid = 0  # words behind the triples have no meaning
            if position == 6:
                valid = 0
            assert torch.equal(large[:valid], small[:valid])
            beyond = large[len(small) :].contiguous().view(torch.uint8)
            assert beyond.numel() >= more and bool((beyond == POISON).all())


@pytest.mark.parametrize("size", [None, 5])
def test_a_tensor_for_no_output_stays(size):
    """As in the documents' example, which passes all seven; a null pointer is accepted, too."""
    calls = example_calls(BASIC, weights_in_dispatch=False)
    dispatch, _ = functions("")

    def fn(ctx):
        mine = dispatch_call(ctx, calls[ctx.rank])
        outputs = aclnn_calls.dispatch_outputs(mine)
        idle = {1: torch.float32, 5: torch.int32, 6: torch.float32}
        for position, dtype in idle.items():
            outputs[position] = None if size is None else poisoned((size,), dtype)
        aclnn_calls.run(dispatch, mine, outputs)
        given = [outputs[position] for position in idle if size is not None]
        return [tensor.view(torch.uint8).unique().tolist() for tensor in given]

    assert run_world("local", 2, fn) == [[[POISON]] * (3 if size else 0)] * 2


def test_planned_ahead_of_the_values():
    """Combine is planned, too, before dispatch runs; tensors are read when it is launched."""
    calls = example_calls(BASIC)
    dispatch, combine = functions("")

    def fn(ctx):
        call = calls[ctx.rank]
        sent = dispatch_call(ctx, call)
        ids, sent["expert_ids"] = sent["expert_ids"], torch.full((3, 2), -9, dtype=torch.int32)
        outputs = aclnn_calls.dispatch_outputs(sent)
        returned = combine_call(ctx, call, outputs)
        returned["expert_ids"] = sent["expert_ids"]
        (x,) = aclnn_calls.combine_outputs(returned)
        planned = plan(dispatch, sent, outputs), plan(combine, returned, [x])
        sent["expert_ids"].copy_(ids)
        statuses = [
            launch(name, one) for name, one in zip((dispatch, combine), planned, strict=True)
        ]
        return statuses, outputs, x

    for rank, (statuses, outputs, x) in enumerate(run_world("local", 2, fn)):
        assert statuses == [0, 0]
        check_literal(BASIC, rank, outputs, x)


def test_an_executor_is_for_one_launch():
    """The second is refused, and aborts a peer that has made one more call."""
    calls = example_calls(BASIC)
    dispatch, combine = functions("")

    def fn(ctx):
        mine = dispatch_call(ctx, calls[ctx.rank])
        outputs = aclnn_calls.dispatch_outputs(mine)
        planned = plan(dispatch, mine, outputs)
        first = launch(dispatch, planned)
        before = [None if one is None else one.clone() for one in outputs]
        if ctx.rank == 0:
            again = launch(dispatch, planned)
        else:
            again = aclnn_calls.ending(dispatch, mine, aclnn_calls.dispatch_outputs(mine))["status"]
        same = all(
            one is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            for one, other in zip(outputs, before, strict=True)
        )
        sentence = aclnn.aclnn_last_error()
        after = aclnn_calls.round_trip(ctx, calls[ctx.rank], dispatch, combine)
        return first, again, sentence, same, after

    results = run_world("local", 2, fn)
    for rank, (first, again, sentence, same, (outputs, x)) in enumerate(results):
        assert first == 0
        assert again == (aclnn.ACLNN_ERR_PARAM_INVALID, RUNTIME)[rank]
        assert "executor must be launched once" in sentence
        assert same
        check_literal(BASIC, rank, outputs, x)


def test_an_executor_is_for_its_function():
    given = [torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32)]
    out = [poisoned((1, 1), torch.int32)]
    status, size, executor = aclnn.aclnnMoeEPLBUpdateExpertGetWorkspaceSize(*given, 0, 2, 0, *out)
    assert (status, size) == (0, 0)
    assert aclnn.aclnnMoeUpdateExpert(None, 0, executor, None) == 161002
    assert "executor must be that of aclnnMoeUpdateExpertGetW" in aclnn.aclnn_last_error()
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, 0, None, None) == 161001
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, 0, 5, None) == 161002
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, 0, executor, 5) == 161002
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, None, executor, None) == 161002
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, -1, executor, None) == 561002
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, 0, executor, None) == 0
    assert out[0].tolist() == [[1]]


def test_the_stream_is_current_in_the_launch():
    entered = []

    class Stream:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    given = [torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32)]
    out = poisoned((1, 1), torch.int32)
    _, size, executor = aclnn.aclnnMoeEPLBUpdateExpertGetWorkspaceSize(*given, 0, 2, 0, out)
    assert entered == []
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, size, executor, Stream()) == 0
    assert entered == ["in", "out"]


# position of the output, the tensor for it, the status; as in rows 21, 9.2 and 9.3.
OUTPUTS = {
    "9.2 expandX": (0, lambda _: None, 161001),
    "9.2 dynamicScales": (1, lambda _: None, 161001),
    "9.2 expandIdx": (2, lambda _: None, 161001),
    "9.2 expertTokenNums": (3, lambda _: None, 161001),
    "9.2 epRecvCounts": (4, lambda _: None, 161001),
    "9.3 expandX": (0, torch.Tensor.float, 161002),
    "9.3 dynamicScales": (1, torch.Tensor.half, 161002),
    "9.3 expandIdx": (2, torch.Tensor.long, 161002),
    "9.3 expertTokenNums": (3, torch.Tensor.int, 161002),
    "9.3 epRecvCounts": (4, torch.Tensor.long, 161002),
    "9.3 expandScales": (6, torch.Tensor.half, 161002),
    "9.3 no tensor": (3, torch.Tensor.tolist, 161002),
    "21 expandX rows": (0, lambda out: out[1:], 561002),
    "21 expandX columns": (0, lambda out: out[:, 1:], 561002),
    "21 expandX 1-D": (0, lambda out: out.flatten(), 561002),
    "21 dynamicScales": (1, lambda out: out[1:], 561002),
    "21 expandIdx short": (2, lambda out: out[1:], 561002),
    "21 expandIdx long": (2, lambda out: out.repeat(2), 561002),
    "21 expertTokenNums long": (3, lambda out: out.repeat(2), 561002),
    "21 epRecvCounts short": (4, lambda out: out[1:], 561002),
    "21 epRecvCounts long": (4, lambda out: out.repeat(2), 561002),
    "21 expandScales": (6, lambda out: out[1:], 561002),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_refused(name):
    """By one rank, in its first phase; its peer has a status too."""
    position, change, status = OUTPUTS[name]
    calls = example_calls(QUANTISED)
    dispatch, combine = functions("")
    parameter = list(aclnn_calls.parameters(dispatch))[position - 7]

    def fn(ctx):
        call = calls[ctx.rank]
        mine = dispatch_call(ctx, call)
        outputs = aclnn_calls.dispatch_outputs(mine)
        if ctx.rank == 1:
            outputs[position] = change(outputs[position])
        ending = aclnn_calls.ending(dispatch, mine, outputs)
        return ending, aclnn_calls.round_trip(ctx, call, dispatch, combine)

    for rank, (ending, (outputs, x)) in enumerate(run_world("local", 2, fn, limit=20.0)):
        assert (ending["phase"], ending["status"]) == ((1, status) if rank else (2, RUNTIME))
        named = "y_dtype" if rank == 0 and name == "9.3 expandX" else parameter
        assert named in ending["sentence"]
        assert ending["sentence"].startswith("aclnnMoeDistributeDispatch")
        check_literal(QUANTISED, rank, outputs, x)


def test_tp_recv_counts_may_not_lack():
    calls = example_calls(TENSOR_PARALLEL)
    dispatch, combine = functions("")

    def fn(ctx):
        mine = dispatch_call(ctx, calls[ctx.rank])
        outputs = aclnn_calls.dispatch_outputs(mine)
        if ctx.rank == 3:
            outputs[5] = None
        ending = aclnn_calls.ending(dispatch, mine, outputs)
        return ending["status"], aclnn_calls.round_trip(ctx, calls[ctx.rank], dispatch, combine)

    results = run_world("local", 4, fn, tp_world_size=2, limit=20.0)
    # Rank 0 has no group in common with rank 3: a rank that has one aborts it.
    assert [status for status, _ in results] == [RUNTIME, RUNTIME, RUNTIME, 561002]
    for rank, (_, (outputs, x)) in enumerate(results):
        check_literal(TENSOR_PARALLEL, rank, outputs, x)


def test_of_two_faults_the_lower_code_wins():
    """Whether an input or an output has it."""
    calls = example_calls(BASIC)
    dispatch, _ = functions("")
    wrong_type = torch.zeros(3, 2, dtype=torch.int64)
    cases = [
        ({"x": None}, {3: lambda out: out.int()}, 161001),
        ({"expert_ids": wrong_type}, {2: lambda _: None}, 161001),
        ({"quant_mode": 7}, {3: lambda out: out.int()}, 161002),
        ({"expert_ids": wrong_type}, {0: lambda out: out[1:]}, 161002),
        ({"quant_mode": 7}, {0: lambda _: None}, 161001),
        # Without a tensor for dynamicScales, which rows that are quantised have.
        (
            {"quant_mode": 2, "global_bs": 5},
            {0: lambda out: out.to(torch.int8), 1: lambda _: None},
            161001,
        ),
        (
            {"quant_mode": 2},
            {0: lambda out: out.to(torch.int8), 1: lambda _: None, 3: lambda out: out.int()},
            161001,
        ),
    ]

    def fn(ctx):
        statuses = []
        for given, changes, _ in cases:
            mine = dispatch_call(ctx, calls[ctx.rank])
            outputs = aclnn_calls.dispatch_outputs(mine)
            for position, change in changes.items():
                outputs[position] = change(outputs[position])
            statuses.append(plan(dispatch, mine | given, outputs)[0])
        return statuses

    assert run_world("local", 2, fn) == [[status for *_, status in cases]] * 2


def test_the_last_error_is_of_the_thread():
    out = torch.zeros(1, 1, dtype=torch.int32)
    table = torch.ones(1, 2, dtype=torch.int32)
    call = aclnn.aclnnMoeEPLBUpdateExpertGetWorkspaceSize
    seen = []

    def other():
        seen.append(aclnn.aclnn_last_error())
        call(out, None, 0, 2, 0, out)
        seen.append(aclnn.aclnn_last_error())

    assert call(None, table, 0, 2, 0, out) == (161001, 0, None)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    mine = "aclnnMoeEPLBUpdateExpertGetWorkspaceSize: expertIds must be given, got None"
    assert seen == ["", mine.replace("expertIds", "eplbTable")]
    assert call(out, table, 0, 2, 0, out)[0] == 0
    assert aclnn.aclnn_last_error() == mine


def test_a_defect_is_a_status_with_its_traceback(monkeypatch):
    def broken(**_):
        raise RuntimeError("a defect")

    ids = torch.zeros(1, 1, dtype=torch.int32)
    table = torch.ones(1, 2, dtype=torch.int32)
    *_, executor = aclnn.aclnnMoeEPLBUpdateExpertGetWorkspaceSize(ids, table, 0, 2, 0, ids)
    monkeypatch.setattr(executor.interface.operator, "compute", broken)
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, 0, executor, None) == aclnn.ACLNN_ERR_INNER
    assert "a defect" in aclnn.aclnn_last_error()
    assert "Traceback" in aclnn.aclnn_last_error()


@pytest.mark.parametrize("version", ["", "V2"])
def test_combine_add_rms_norm(version):
    """The bits that torch_npu's function has."""
    calls = example_calls(BASIC, version=2)
    dispatch, _ = functions("V2")
    function = f"aclnnMoeDistributeCombineAddRmsNorm{version}"

    def fn(ctx):
        call = calls[ctx.rank]
        mine = dispatch_call(ctx, call)
        outputs = aclnn_calls.run(dispatch, mine, aclnn_calls.dispatch_outputs(mine))
        mine = combine_call(ctx, call, outputs)
        del mine["performance_info" if "performance_info" in mine else "comm_alg"]
        mine["expand_idx"] = mine.pop("assist_info_for_combine")
        tokens, hidden = len(mine["expert_ids"]), mine["expand_x"].shape[1]
        mine |= {
            "residual_x": torch.ones(tokens, 1, hidden).bfloat16(),
            "gamma": torch.full((hidden,), 0.5).bfloat16(),
            "norm_eps": 1e-5,
        }
        results = aclnn_calls.run(function, mine, aclnn_calls.norm_outputs(mine))
        return results, torch_npu.npu_moe_distribute_combine_add_rms_norm(**mine)

    for results, expected in run_world("local", 2, fn):
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)


EPLB_TABLE = [[1, 5, 0, 0], [2, 0, 4, 0], [3, 1, 3, 6], [2, 7, 2, 0]]
EPLB_IDS = [[0, 1], [2, 3], [1, 2]]


@pytest.mark.parametrize("rank, row", [(0, [3, 1, 7]), (3, [3, 3, 7])])
def test_update_expert(rank, row):
    """12.5; the successor has the mask as well."""
    ids = torch.tensor(EPLB_IDS, dtype=torch.int32)
    table = torch.tensor(EPLB_TABLE, dtype=torch.int32)
    expected = [[5, 0], row[1:], [0, row[1]]]
    out, mask = poisoned((3, 2), torch.int32), poisoned((3, 2), torch.bool)
    *_, executor = aclnn.aclnnMoeEPLBUpdateExpertGetWorkspaceSize(ids, table, rank, 8, 0, out)
    assert aclnn.aclnnMoeEPLBUpdateExpert(None, 0, executor, None) == 0
    assert out.tolist() == expected
    out = poisoned((3, 2), torch.int32)
    *_, executor = aclnn.aclnnMoeUpdateExpertGetWorkspaceSize(
        ids, table, None, None, None, rank, 8, 0, out, mask
    )
    assert aclnn.aclnnMoeUpdateExpert(None, 0, executor, None) == 0
    assert out.tolist() == expected and bool(mask.all())


def test_pruning():
    ids = torch.tensor(EPLB_IDS, dtype=torch.int64)
    table = torch.tensor(EPLB_TABLE, dtype=torch.int32)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])
    threshold, active = torch.tensor([0, 0.3]), torch.tensor([True, True, False])
    out, mask = poisoned((3, 2), torch.int64), poisoned((3, 2), torch.bool)
    *_, executor = aclnn.aclnnMoeUpdateExpertGetWorkspaceSize(
        ids, table, weights, threshold, active, -1, -1, 1, out, mask
    )
    assert aclnn.aclnnMoeUpdateExpert(None, 0, executor, None) == 0
    assert out.tolist() == [[5, 0], [3, 2], [0, 6]]
    assert mask.tolist() == [[True, False], [True, True], [False, False]]


def test_eplb_takes_balance_mode_0_and_int32_only():
    """Row 28; balance_mode 1 and int64 are the successor's, as are more ranks on A3."""
    ids = torch.tensor(EPLB_IDS, dtype=torch.int32)
    table = torch.tensor(EPLB_TABLE, dtype=torch.int32)
    call = aclnn.aclnnMoeEPLBUpdateExpertGetWorkspaceSize
    assert call(ids, table, 0, 8, 1, poisoned((3, 2), torch.int32))[0] == 561002
    assert "balanceMode" in aclnn.aclnn_last_error()
    assert call(ids.long(), table, 0, 8, 0, poisoned((3, 2), torch.int64))[0] == 161002
    assert call(ids.long(), table, 0, 8, 0, poisoned((3, 2), torch.int32))[0] == 161002

    many = torch.tensor([[1, 0]], dtype=torch.int32)
    out, mask = poisoned((1, 1), torch.int32), poisoned((1, 1), torch.bool)
    set_profile("a3")
    try:
        one = torch.zeros(1, 1, dtype=torch.int32)
        assert call(one, many, 0, 385, 0, out)[0] == 561002
        assert "worldSize" in aclnn.aclnn_last_error()
        successor = aclnn.aclnnMoeUpdateExpertGetWorkspaceSize
        assert successor(one, many, None, None, None, 0, 385, 0, out, mask)[0] == 0
    finally:
        set_profile(None)


@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize(
    "mode, kind",
    [
        (2, torch.int8),
        (2, torch.float8_e5m2),
        (3, torch.float8_e4m3fn),
        (3, torch.float8_e5m2),
        (4, torch.float8_e4m3fn),
        (4, torch.float8_e5m2),
    ],
)
def test_the_dtype_of_the_rows_is_that_of_their_tensor(mode, kind, version):
    """As y_dtype of torch_npu's function has it; without null pointers for the empty names."""
    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([[0, 1], [2, 3], [3, 0]], dtype=torch.int32)
    dispatch, _ = functions(version)

    def fn(ctx):
        mine = {"x": x, "expert_ids": ids, "group_ep": ctx.ep_group, "ep_world_size": 2}
        mine |= {"ep_rank_id": ctx.ep_rank, "moe_expert_num": 4, "quant_mode": mode}
        expected = torch_npu.npu_moe_distribute_dispatch_v2(**mine, y_dtype=kind)
        mine |= {"group_tp": None} | ({"comm_alg": None} if version else {})
        outputs = aclnn_calls.dispatch_outputs(mine | {"y_dtype": kind})
        aclnn_calls.run(dispatch, mine, outputs)
        n = int(expected[4][-1])
        return [
            torch.equal(one[:n].view(torch.uint8), other[:n].view(torch.uint8))
            for one, other in zip(expected[:2], outputs[:2], strict=True)
        ]

    assert run_world("local", 2, fn) == [[True, True]] * 2


@pytest.mark.parametrize("version", ["V2", "V3", "V4"])
@pytest.mark.parametrize(
    "name, value",
    [("activation_scale", torch.ones(1)), ("group_list", torch.ones(1)), ("out_dtype", 1)],
    ids=["activationScale", "groupList", "outDtype"],
)
def test_reserved_parameters_of_later_versions(name, value, version):
    """Which torch_npu's function does not have."""
    calls = example_calls(BASIC, version=2)
    dispatch, combine = functions(version)

    def fn(ctx):
        mine = dispatch_call(ctx, calls[ctx.rank])
        outputs = aclnn_calls.run(dispatch, mine, aclnn_calls.dispatch_outputs(mine))
        mine = combine_call(ctx, calls[ctx.rank], outputs) | {name: value}
        return aclnn_calls.ending(combine, mine, aclnn_calls.combine_outputs(mine))

    for ending in run_world("local", 2, fn):
        assert (ending["phase"], ending["status"]) == (1, 561002)
        assert "reserved" in ending["sentence"]


# The sizes of the documents' examples: EP 16 of A2, and EP 8 x TP 2 of A3.
OF_DOCUMENTS = {
    "a2": (Group(16, 16, 8, 7168, global_bs=8 * 16), ("",)),
    "a3": (Group(8, 8, 3, 7168, tp_world_size=2, global_bs=8 * 8), ("", "V2", "V4")),
    "a3 shared": (Group(8, 7, 3, 7168, tp_world_size=2, shared_ranks=1), ("", "V2")),
}


@pytest.mark.parametrize(
    "name, version", [(name, one) for name, (_, ones) in OF_DOCUMENTS.items() for one in ones]
)
def test_the_documents_sizes_under_their_profile(name, version):
    group, _ = OF_DOCUMENTS[name]
    rng, number = np.random.default_rng(0), 1 if version == "" else 2
    ranks = group.world_size * group.tp_world_size
    tokens = [
        Tokens(
            x=definition.encode(rng.integers(-4, 5, (8, group.hidden)), group.dtype),
            ids=np.array(
                [rng.permutation(group.num_experts)[: group.top_k] for _ in range(8)], np.int32
            ),
            weights=rng.normal(size=(8, group.top_k)).astype(np.float32),
        )
        for _ in range(ranks)
    ]
    received = definition.dispatch(group, tokens)
    rows = [mine.expand_x for mine in received]
    combined = definition.combine(group, tokens, received, rows)
    on_a2 = name == "a2"  # A3 takes no weights in dispatch of version 1
    weighted = {"weights_in_dispatch": on_a2}
    calls = harness.make_calls(group, tokens, rows, version=number, **weighted)

    def fn(ctx):
        return aclnn_calls.round_trip(ctx, calls[ctx.rank], *functions(version))

    set_profile(name.split()[0])
    try:
        results = run_world("local", ranks, fn, tp_world_size=group.tp_world_size)
        for rank, (outputs, x) in enumerate(results):
            mine = received[rank]
            options = {"version": number, "weights_given": on_a2}
            actual = without_spare(group, outputs, 8) if on_a2 else outputs
            check_dispatch(group, mine, actual, rank=rank, **options)
            definition.same_bits(x, combined[rank], f"rank {rank} x")
    finally:
        set_profile(None)


def test_a_peer_that_does_not_come_is_a_status(monkeypatch):
    """And so is the next call, as the group is broken."""
    monkeypatch.setattr("moe_triton.comm.registry.DEFAULT_TIMEOUT", 0.5)
    calls = example_calls(BASIC)
    dispatch, _ = functions("")

    def fn(ctx):
        endings = []
        for _ in range(2 if ctx.rank == 0 else 0):
            mine = dispatch_call(ctx, calls[ctx.rank])
            outputs = aclnn_calls.dispatch_outputs(mine)
            endings.append(aclnn_calls.ending(dispatch, mine, outputs))
        return endings

    endings, _ = run_world("local", 2, fn, limit=30.0)
    for ending in endings:
        assert (ending["phase"], ending["status"]) == (2, RUNTIME), ending
        assert ending["sentence"].startswith(f"{dispatch}: ")
    assert len({ending["sentence"] for ending in endings}) == 2

"""aclnnMoeDistributeDispatch, versions 1 to 4."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascend.distributed import schemas
from ...errors import ArgumentValueError
from .interface import FirstPhase, Interface, Output, first_phase, second_phase


def _outputs(suffix: str, third: Output) -> tuple[Output, ...]:
    int32 = torch.int32
    return (
        Output(f"expandX{suffix}", "(T * A, H)", larger=True),
        Output(f"dynamicScales{suffix}", "(T * A, ..)", larger=True, always=False, quantised=True),
        third,
        Output(f"expertTokenNums{suffix}", "(L,)", torch.int64),
        Output(f"epRecvCounts{suffix}", "(T * W * L,), and more on a2", int32),
        Output(f"tpRecvCounts{suffix}", "(T,)", int32, always=False, absent=ArgumentValueError),
        Output(
            f"expandScales{suffix}", "(A,)", torch.float32, larger=True, always=False, absent=None
        ),
    )


_V1 = Interface(
    "aclnnMoeDistributeDispatch",
    schemas.dispatch,
    _outputs("", Output("expandIdx", "(BS * K,)", torch.int32)),
    dtype_from="expandX",
)
_V2, _V3, _V4 = (
    Interface(
        f"aclnnMoeDistributeDispatchV{version}",
        schemas.dispatch_v2,
        _outputs("Out", Output("assistInfoForCombineOut", "(A * 128,)", torch.int32, larger=True)),
        dtype_from="expandXOut",
    )
    for version in (2, 3, 4)
)


def aclnnMoeDistributeDispatchGetWorkspaceSize(
    x: Tensor | None,
    expertIds: Tensor | None,
    scales: Tensor | None,
    xActiveMask: Tensor | None,
    expertScales: Tensor | None,
    groupEp: str | None,
    epWorldSize: int,
    epRankId: int,
    moeExpertNum: int,
    groupTp: str | None,
    tpWorldSize: int,
    tpRankId: int,
    expertShardType: int,
    sharedExpertNum: int,
    sharedExpertRankNum: int,
    quantMode: int,
    globalBs: int,
    expertTokenNumsType: int,
    expandX: Tensor | None,
    dynamicScales: Tensor | None,
    expandIdx: Tensor | None,
    expertTokenNums: Tensor | None,
    epRecvCounts: Tensor | None,
    tpRecvCounts: Tensor | None,
    expandScales: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_dispatch``, whose docstring describes the arguments.

    The dtype of expandX selects one of the dtypes of quantMode: int8 or a float8.

    Args:
        x: (BS, H).
        expertIds: (BS, K) int32.
        scales: float32, or None.
        xActiveMask: (BS,) or (BS, K) bool, or None.
        expertScales: (BS, K) float32, or None.
        groupEp: the group.
        epWorldSize: W.
        epRankId: this rank.
        moeExpertNum: E.
        groupTp: the group of the T ranks with the same experts; ignored without tensor parallelism.
        tpWorldSize: T.
        tpRankId: this rank in groupTp.
        expertShardType: 0.
        sharedExpertNum: NS.
        sharedExpertRankNum: S.
        quantMode: how rows are quantised.
        globalBs: W times the largest BS, or 0 if all are equal.
        expertTokenNumsType: 0 prefix sums, 1 counts.
        expandX: output, (T * A, H) or more rows.
        dynamicScales: output, (T * A, ..) or more rows; None if quantMode has no scales.
        expandIdx: output, (BS * K,) int32.
        expertTokenNums: output, (L,) int64.
        epRecvCounts: output, (T * W * L,) int32; (W * L + 2 * G * K * (W / 8),) under the profile
            a2, with G = W * maxBS.
        tpRecvCounts: output, (T,) int32; None without T = 2.
        expandScales: output, (A,) float32 or more; None if not wanted.

    Returns:
        A status, the bytes of workspace, and the executor, None after an error.
    """
    return first_phase(_V1, locals())


aclnnMoeDistributeDispatch = second_phase(_V1)


def aclnnMoeDistributeDispatchV2GetWorkspaceSize(
    x: Tensor | None,
    expertIds: Tensor | None,
    scalesOptional: Tensor | None,
    xActiveMaskOptional: Tensor | None,
    expertScalesOptional: Tensor | None,
    groupEp: str | None,
    epWorldSize: int,
    epRankId: int,
    moeExpertNum: int,
    groupTp: str | None,
    tpWorldSize: int,
    tpRankId: int,
    expertShardType: int,
    sharedExpertNum: int,
    sharedExpertRankNum: int,
    quantMode: int,
    globalBs: int,
    expertTokenNumsType: int,
    commAlg: str | None,
    expandXOut: Tensor | None,
    dynamicScalesOut: Tensor | None,
    assistInfoForCombineOut: Tensor | None,
    expertTokenNumsOut: Tensor | None,
    epRecvCountsOut: Tensor | None,
    tpRecvCountsOut: Tensor | None,
    expandScalesOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_dispatch_v2``, whose docstring describes the arguments.

    The parameters are those of version 1 and commAlg; the third output is
    assistInfoForCombineOut, (A * 128,) int32 or more.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V2, locals())


aclnnMoeDistributeDispatchV2 = second_phase(_V2)


def aclnnMoeDistributeDispatchV3GetWorkspaceSize(
    x: Tensor | None,
    expertIds: Tensor | None,
    scalesOptional: Tensor | None,
    xActiveMaskOptional: Tensor | None,
    expertScalesOptional: Tensor | None,
    elasticInfoOptional: Tensor | None,
    groupEp: str | None,
    epWorldSize: int,
    epRankId: int,
    moeExpertNum: int,
    groupTp: str | None,
    tpWorldSize: int,
    tpRankId: int,
    expertShardType: int,
    sharedExpertNum: int,
    sharedExpertRankNum: int,
    quantMode: int,
    globalBs: int,
    expertTokenNumsType: int,
    commAlg: str | None,
    zeroExpertNum: int,
    copyExpertNum: int,
    constExpertNum: int,
    expandXOut: Tensor | None,
    dynamicScalesOut: Tensor | None,
    assistInfoForCombineOut: Tensor | None,
    expertTokenNumsOut: Tensor | None,
    epRecvCountsOut: Tensor | None,
    tpRecvCountsOut: Tensor | None,
    expandScalesOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_dispatch_v2``, whose docstring describes the arguments.

    The parameters are those of version 2, elasticInfoOptional, whose values are read now, and the
    numbers of zero-computation experts.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V3, locals())


aclnnMoeDistributeDispatchV3 = second_phase(_V3)


def aclnnMoeDistributeDispatchV4GetWorkspaceSize(
    x: Tensor | None,
    expertIds: Tensor | None,
    scalesOptional: Tensor | None,
    xActiveMaskOptional: Tensor | None,
    expertScalesOptional: Tensor | None,
    elasticInfoOptional: Tensor | None,
    performanceInfoOptional: Tensor | None,
    groupEp: str | None,
    epWorldSize: int,
    epRankId: int,
    moeExpertNum: int,
    groupTp: str | None,
    tpWorldSize: int,
    tpRankId: int,
    expertShardType: int,
    sharedExpertNum: int,
    sharedExpertRankNum: int,
    quantMode: int,
    globalBs: int,
    expertTokenNumsType: int,
    commAlg: str | None,
    zeroExpertNum: int,
    copyExpertNum: int,
    constExpertNum: int,
    expandXOut: Tensor | None,
    dynamicScalesOut: Tensor | None,
    assistInfoForCombineOut: Tensor | None,
    expertTokenNumsOut: Tensor | None,
    epRecvCountsOut: Tensor | None,
    tpRecvCountsOut: Tensor | None,
    expandScalesOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_dispatch_v2``, whose docstring describes the arguments.

    The parameters are those of version 3, and performanceInfoOptional, to which the microseconds
    waited are added.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V4, locals())


aclnnMoeDistributeDispatchV4 = second_phase(_V4)

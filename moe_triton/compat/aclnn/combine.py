"""aclnnMoeDistributeCombine, versions 1 to 4."""

from __future__ import annotations

from torch import Tensor

from ...ascend.distributed import schemas
from .interface import FirstPhase, Interface, Output, first_phase, second_phase

_V1 = Interface(
    "aclnnMoeDistributeCombine",
    schemas.combine,
    (Output("x", "(BS, H)"),),
)
_V2, _V3, _V4 = (
    Interface(
        f"aclnnMoeDistributeCombineV{version}",
        schemas.combine_v2,
        (Output("xOut", "(BS, H)"),),
    )
    for version in (2, 3, 4)
)


def aclnnMoeDistributeCombineGetWorkspaceSize(
    expandX: Tensor | None,
    expertIds: Tensor | None,
    expandIdx: Tensor | None,
    epSendCounts: Tensor | None,
    expertScales: Tensor | None,
    tpSendCounts: Tensor | None,
    xActiveMask: Tensor | None,
    activationScale: Tensor | None,
    weightScale: Tensor | None,
    groupList: Tensor | None,
    expandScales: Tensor | None,
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
    globalBs: int,
    outDtype: int,
    commQuantMode: int,
    groupListType: int,
    x: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_combine``, whose docstring describes the arguments.

    Args:
        expandX: (T * A, H) the experts' rows.
        expertIds: (BS, K) int32, as in dispatch.
        expandIdx: (BS * K,) or another shape of as many elements, int32, from dispatch.
        epSendCounts: (T * W * L,) int32, dispatch's epRecvCounts.
        expertScales: (BS, K) float32.
        tpSendCounts: (T,) int32, dispatch's tpRecvCounts; ignored without T = 2.
        xActiveMask: as in dispatch.
        activationScale: reserved, None.
        weightScale: reserved, None.
        groupList: reserved, None.
        expandScales: (A,) float32 from dispatch, or None.
        groupEp: as in dispatch.
        epWorldSize: W.
        epRankId: this rank.
        moeExpertNum: E.
        groupTp: the group of the T ranks with the same experts; ignored without tensor parallelism.
        tpWorldSize: T.
        tpRankId: this rank in groupTp.
        expertShardType: 0.
        sharedExpertNum: NS.
        sharedExpertRankNum: S.
        globalBs: W times the largest BS, or 0 if all are equal.
        outDtype: reserved, 0.
        commQuantMode: 0, or 2 to send rows as int8.
        groupListType: reserved, 0.
        x: output, (BS, H) of the dtype of expandX.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V1, locals())


aclnnMoeDistributeCombine = second_phase(_V1)


def aclnnMoeDistributeCombineV2GetWorkspaceSize(
    expandX: Tensor | None,
    expertIds: Tensor | None,
    assistInfoForCombine: Tensor | None,
    epSendCounts: Tensor | None,
    expertScales: Tensor | None,
    tpSendCountsOptional: Tensor | None,
    xActiveMaskOptional: Tensor | None,
    activationScaleOptional: Tensor | None,
    weightScaleOptional: Tensor | None,
    groupListOptional: Tensor | None,
    expandScalesOptional: Tensor | None,
    sharedExpertXOptional: Tensor | None,
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
    globalBS: int,
    outDtype: int,
    commQuantMode: int,
    groupListType: int,
    commAlg: str | None,
    xOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_combine_v2``, whose docstring describes the arguments.

    The parameters are those of version 1, with assistInfoForCombine instead of expandIdx,
    sharedExpertXOptional and commAlg.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V2, locals())


aclnnMoeDistributeCombineV2 = second_phase(_V2)


def aclnnMoeDistributeCombineV3GetWorkspaceSize(
    expandX: Tensor | None,
    expertIds: Tensor | None,
    assistInfoForCombine: Tensor | None,
    epSendCounts: Tensor | None,
    expertScales: Tensor | None,
    tpSendCountsOptional: Tensor | None,
    xActiveMaskOptional: Tensor | None,
    activationScaleOptional: Tensor | None,
    weightScaleOptional: Tensor | None,
    groupListOptional: Tensor | None,
    expandScalesOptional: Tensor | None,
    sharedExpertXOptional: Tensor | None,
    elasticInfoOptional: Tensor | None,
    oriXOptional: Tensor | None,
    constExpertAlpha1Optional: Tensor | None,
    constExpertAlpha2Optional: Tensor | None,
    constExpertVOptional: Tensor | None,
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
    globalBS: int,
    outDtype: int,
    commQuantMode: int,
    groupListType: int,
    commAlg: str | None,
    zeroExpertNum: int,
    copyExpertNum: int,
    constExpertNum: int,
    xOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_combine_v2``, whose docstring describes the arguments.

    The parameters are those of version 2, elasticInfoOptional, whose values are read now, and those
    of zero-computation experts.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V3, locals())


aclnnMoeDistributeCombineV3 = second_phase(_V3)


def aclnnMoeDistributeCombineV4GetWorkspaceSize(
    expandX: Tensor | None,
    expertIds: Tensor | None,
    assistInfoForCombine: Tensor | None,
    epSendCounts: Tensor | None,
    expertScales: Tensor | None,
    tpSendCountsOptional: Tensor | None,
    xActiveMaskOptional: Tensor | None,
    activationScaleOptional: Tensor | None,
    weightScaleOptional: Tensor | None,
    groupListOptional: Tensor | None,
    expandScalesOptional: Tensor | None,
    sharedExpertXOptional: Tensor | None,
    elasticInfoOptional: Tensor | None,
    oriXOptional: Tensor | None,
    constExpertAlpha1Optional: Tensor | None,
    constExpertAlpha2Optional: Tensor | None,
    constExpertVOptional: Tensor | None,
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
    globalBS: int,
    outDtype: int,
    commQuantMode: int,
    groupListType: int,
    commAlg: str | None,
    zeroExpertNum: int,
    copyExpertNum: int,
    constExpertNum: int,
    xOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_combine_v2``, whose docstring describes the arguments.

    The parameters are those of version 3, and performanceInfoOptional, to which the microseconds
    waited are added.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V4, locals())


aclnnMoeDistributeCombineV4 = second_phase(_V4)

"""aclnnMoeDistributeCombineAddRmsNorm, versions 1 and 2."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascend.distributed import schemas
from .interface import FirstPhase, Interface, Output, first_phase, second_phase

_V1, _V2 = (
    Interface(
        f"aclnnMoeDistributeCombineAddRmsNorm{version}",
        schemas.combine_add_rms_norm,
        (
            Output("yOut", "(BS, 1, H)"),
            Output("rstdOut", "(BS, 1, 1)", torch.float32),
            Output("xOut", "(BS, 1, H)"),
        ),
        renamed={"assistInfoForCombine": "expand_idx"},
    )
    for version in ("", "V2")
)


def aclnnMoeDistributeCombineAddRmsNormGetWorkspaceSize(
    expandX: Tensor | None,
    expertIds: Tensor | None,
    assistInfoForCombine: Tensor | None,
    epSendCounts: Tensor | None,
    expertScales: Tensor | None,
    residualX: Tensor | None,
    gamma: Tensor | None,
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
    normEps: float,
    yOut: Tensor | None,
    rstdOut: Tensor | None,
    xOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_combine_add_rms_norm``; see there for the rest.

    The parameters are those of ``aclnnMoeDistributeCombineV2``, and residualX (BS, 1, H), gamma
    (H,) and normEps. Outputs are yOut (BS, 1, H), rstdOut (BS, 1, 1) float32 and xOut (BS, 1, H).

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V1, locals())


aclnnMoeDistributeCombineAddRmsNorm = second_phase(_V1)


def aclnnMoeDistributeCombineAddRmsNormV2GetWorkspaceSize(
    expandX: Tensor | None,
    expertIds: Tensor | None,
    assistInfoForCombine: Tensor | None,
    epSendCounts: Tensor | None,
    expertScales: Tensor | None,
    residualX: Tensor | None,
    gamma: Tensor | None,
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
    normEps: float,
    zeroExpertNum: int,
    copyExpertNum: int,
    constExpertNum: int,
    yOut: Tensor | None,
    rstdOut: Tensor | None,
    xOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_combine_add_rms_norm``; see there for the rest.

    The parameters are those of version 1, elasticInfoOptional, whose values are read now, and those
    of zero-computation experts.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_V2, locals())


aclnnMoeDistributeCombineAddRmsNormV2 = second_phase(_V2)

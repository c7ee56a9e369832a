"""The four split-phase interfaces."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascend.distributed import schemas
from .interface import FirstPhase, Interface, Output, first_phase, second_phase

_DISPATCH_SETUP = Interface(
    "aclnnMoeDistributeDispatchSetup",
    schemas.dispatch_setup,
    (
        Output("yOut", "(BS * (K + NS), tokenMsgSize)"),
        Output("expandIdxOut", "(BS * K,)", torch.int32),
        Output("commCmdInfoOut", "((BS * (K + NS) + W * L) * 16,)", torch.int32),
    ),
    dtype_from="yOut",
)
_DISPATCH_TEARDOWN = Interface(
    "aclnnMoeDistributeDispatchTeardown",
    schemas.dispatch_teardown,
    (
        Output("expandXOut", "(A, H)", larger=True),
        Output("dynamicScalesOut", "(A, ..)", larger=True),
        Output("assistInfoForCombineOut", "(A * 128,)", torch.int32, larger=True),
        Output("expertTokenNumsOut", "(L,)", torch.int64),
    ),
)
_COMBINE_SETUP = Interface(
    "aclnnMoeDistributeCombineSetup",
    schemas.combine_setup,
    (
        Output("quantExpandXOut", "(A, tokenMsgSize)", torch.int8),
        Output("commCmdInfoOut", "((A + W) * 16,)", torch.int32),
    ),
)
_COMBINE_TEARDOWN = Interface(
    "aclnnMoeDistributeCombineTeardown",
    schemas.combine_teardown,
    (Output("xOut", "(BS, H)"),),
)


def aclnnMoeDistributeDispatchSetupGetWorkspaceSize(
    x: Tensor | None,
    expertIds: Tensor | None,
    scalesOptional: Tensor | None,
    xActiveMaskOptional: Tensor | None,
    groupEp: str | None,
    epWorldSize: int,
    epRankId: int,
    moeExpertNum: int,
    expertShardType: int,
    sharedExpertNum: int,
    sharedExpertRankNum: int,
    quantMode: int,
    globalBs: int,
    commType: int,
    commAlg: str | None,
    yOut: Tensor | None,
    expandIdxOut: Tensor | None,
    commCmdInfoOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_dispatch_setup``; its docstring describes them.

    Outputs: yOut (BS * (K + NS), tokenMsgSize), expandIdxOut (BS * K,) and commCmdInfoOut,
    with the sizes of ``aclnnMoeDistributeDispatchSetupTeardownCalcOutputSize``.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_DISPATCH_SETUP, locals())


aclnnMoeDistributeDispatchSetup = second_phase(_DISPATCH_SETUP)


def aclnnMoeDistributeDispatchTeardownGetWorkspaceSize(
    x: Tensor | None,
    y: Tensor | None,
    expertIds: Tensor | None,
    commCmdInfo: Tensor | None,
    groupEp: str | None,
    epWorldSize: int,
    epRankId: int,
    moeExpertNum: int,
    expertShardType: int,
    sharedExpertNum: int,
    sharedExpertRankNum: int,
    quantMode: int,
    globalBs: int,
    expertTokenNumsType: int,
    commType: int,
    commAlg: str | None,
    expandXOut: Tensor | None,
    dynamicScalesOut: Tensor | None,
    assistInfoForCombineOut: Tensor | None,
    expertTokenNumsOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_dispatch_teardown``; its docstring describes them.

    Outputs: expandXOut (A, H), dynamicScalesOut, required in every call and not written if rows
    have no scales, assistInfoForCombineOut (A * 128,), each of these or more rows, and
    expertTokenNumsOut (L,). The second phase compares the arguments with those of the setup.
    An error does not abort the peers, as the teardown may be tried again.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_DISPATCH_TEARDOWN, locals())


aclnnMoeDistributeDispatchTeardown = second_phase(_DISPATCH_TEARDOWN)


def aclnnMoeDistributeCombineSetupGetWorkspaceSize(
    expandX: Tensor | None,
    expertIds: Tensor | None,
    assistInfoForCombine: Tensor | None,
    groupEp: str | None,
    epWorldSize: int,
    epRankId: int,
    moeExpertNum: int,
    expertShardType: int,
    sharedExpertNum: int,
    sharedExpertRankNum: int,
    globalBs: int,
    commQuantMode: int,
    commType: int,
    commAlg: str | None,
    quantExpandXOut: Tensor | None,
    commCmdInfoOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_combine_setup``; its docstring describes them.

    Outputs: quantExpandXOut (A, tokenMsgSize) and commCmdInfoOut, with the sizes of
    ``aclnnMoeDistributeCombineSetupTeardownCalcOutputSize``.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_COMBINE_SETUP, locals())


aclnnMoeDistributeCombineSetup = second_phase(_COMBINE_SETUP)


def aclnnMoeDistributeCombineTeardownGetWorkspaceSize(
    expandX: Tensor | None,
    quantExpandX: Tensor | None,
    expertIds: Tensor | None,
    expandIdx: Tensor | None,
    expertScales: Tensor | None,
    commCmdInfo: Tensor | None,
    xActiveMaskOptional: Tensor | None,
    sharedExpertXOptional: Tensor | None,
    groupEp: str | None,
    epWorldSize: int,
    epRankId: int,
    moeExpertNum: int,
    expertShardType: int,
    sharedExpertNum: int,
    sharedExpertRankNum: int,
    globalBs: int,
    commQuantMode: int,
    commType: int,
    commAlg: str | None,
    xOut: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_distribute_combine_teardown``; its docstring describes them.

    Outputs: xOut (BS, H). The second phase compares the arguments with those of the setup.
    An error does not abort the peers, as the teardown may be tried again.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_COMBINE_TEARDOWN, locals())


aclnnMoeDistributeCombineTeardown = second_phase(_COMBINE_TEARDOWN)

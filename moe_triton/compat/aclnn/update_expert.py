"""aclnnMoeEPLBUpdateExpert and its successor aclnnMoeUpdateExpert."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascend.distributed import schemas
from .interface import FirstPhase, Interface, Output, first_phase, second_phase

_EPLB = Interface(
    "aclnnMoeEPLBUpdateExpert",
    schemas.eplb_update_expert,
    (Output("balancedExpertIds", "(BS, K)", torch.int32),),
)
_SUCCESSOR = Interface(
    "aclnnMoeUpdateExpert",
    schemas.update_expert,
    (
        Output("balancedExpertIds", "(BS, K)"),
        Output("balancedActiveMask", "(BS, K)", torch.bool),
    ),
)


def aclnnMoeEPLBUpdateExpertGetWorkspaceSize(
    expertIds: Tensor | None,
    eplbTable: Tensor | None,
    localRankId: int,
    worldSize: int,
    balanceMode: int,
    balancedExpertIds: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_update_expert`` without pruning; see there.

    Args:
        expertIds: (BS, K) int32, ids of logical experts.
        eplbTable: (E, F) int32.
        localRankId: this rank.
        worldSize: number of ranks.
        balanceMode: 0, by rank.
        balancedExpertIds: output, (BS, K) int32.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_EPLB, locals())


aclnnMoeEPLBUpdateExpert = second_phase(_EPLB)


def aclnnMoeUpdateExpertGetWorkspaceSize(
    expertIds: Tensor | None,
    eplbTable: Tensor | None,
    expertScalesOptional: Tensor | None,
    pruningThresholdOptional: Tensor | None,
    activeMaskOptional: Tensor | None,
    localRankId: int,
    worldSize: int,
    balanceMode: int,
    balancedExpertIds: Tensor | None,
    balancedActiveMask: Tensor | None,
) -> FirstPhase:
    """Check a call of ``npu_moe_update_expert``; its docstring describes the rest.

    Args:
        expertIds: (BS, K) int32 or int64, ids of logical experts.
        eplbTable: (E, F) int32.
        expertScalesOptional: (BS, K) float32, or None.
        pruningThresholdOptional: (K,) or (1, K) float32, or None.
        activeMaskOptional: (BS,) bool, or None.
        localRankId: this rank.
        worldSize: number of ranks.
        balanceMode: 0 by rank, 1 by token.
        balancedExpertIds: output, (BS, K) of the dtype of expertIds.
        balancedActiveMask: output, (BS, K) bool.

    Returns:
        As in ``aclnnMoeDistributeDispatchGetWorkspaceSize``.
    """
    return first_phase(_SUCCESSOR, locals())


aclnnMoeUpdateExpert = second_phase(_SUCCESSOR)

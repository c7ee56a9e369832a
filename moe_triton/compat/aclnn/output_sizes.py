"""Sizes of the outputs of the split-phase interfaces."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ascend.distributed import fake_outputs, schemas
from .interface import described, translated
from .status import ACLNN_SUCCESS, failed


def aclnnMoeDistributeDispatchSetupTeardownCalcOutputSize(
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
    expertTokenNumsType: int,
    commType: int,
    commAlg: str | None,
) -> tuple[int, int, int, int, int]:
    """Sizes of outputs of a dispatch setup and teardown, whose parameters these are.

    Returns:
        A status; the second dimension of the setup's yOut; the sizes of its expandIdxOut, of the
        teardown's assistInfoForCombineOut, and of the setup's commCmdInfoOut.
    """
    call = locals()
    try:
        arguments = _checked(_DISPATCH, "x", call)
        y, expand_idx, info = schemas.dispatch_setup.outputs(**arguments, y_dtype=None)
        _, _, assist, _ = schemas.dispatch_teardown.outputs(**arguments, y=y)
    except Exception as error:  # noqa: BLE001 (the interface has statuses, no exceptions)
        return failed(_DISPATCH, error, translated(call)[1]), 0, 0, 0, 0
    return ACLNN_SUCCESS, y.shape[1], len(expand_idx), len(assist), len(info)


def aclnnMoeDistributeCombineSetupTeardownCalcOutputSize(
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
) -> tuple[int, int, int]:
    """Sizes of outputs of a combine setup, whose parameters these are.

    Returns:
        A status; the second dimension of quantExpandXOut; the size of commCmdInfoOut.
    """
    call = locals()
    try:
        arguments = _checked(_COMBINE, "expandX", call)
        sent, info = schemas.combine_setup.outputs(**arguments)
    except Exception as error:  # noqa: BLE001 (the interface has statuses, no exceptions)
        return failed(_COMBINE, error, translated(call)[1]), 0, 0
    return ACLNN_SUCCESS, sent.shape[1], len(info)


_DISPATCH = aclnnMoeDistributeDispatchSetupTeardownCalcOutputSize.__name__
_COMBINE = aclnnMoeDistributeCombineSetupTeardownCalcOutputSize.__name__


def _checked(function: str, tokens: str, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the op without values, after the checks of all that sizes depend on."""
    arguments, _ = translated(call)
    matrices = {tokens: call[tokens], "expertIds": call["expertIds"]}
    fake_outputs.check_sizes(function, matrices, arguments)
    return described(arguments)

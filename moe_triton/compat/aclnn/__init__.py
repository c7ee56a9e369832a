"""Ascend's C interface of the operators: two phases, each with a status.

    status, workspace_size, executor = aclnnXxxGetWorkspaceSize(inputs, attributes, outputs)
    status = aclnnXxx(workspace, workspace_size, executor, stream)

Parameters have the names and the order of the operator documents, without the two output pointers
at the end; a null pointer is None. Letters, dtypes and meanings are those of ``compat.torch_npu``:
the ops are the same, and their results are copied into the caller's tensors. Rows of a tensor
beyond those of its output are not written.

The first phase checks everything except the values in tensors. The second phase reads the values
and runs on the given stream, or else on the current one. An executor serves one launch; a second
launch is refused, also after a failed one. A rank whose call is refused, in either phase, aborts
its peers, whose calls end with a status too. The abort reaches the next call of the group on each
peer: a rank that has planned several calls ahead should not launch them after a refusal. An error
in groupEp itself cannot abort the peers, which wait until their time-out. A teardown does not abort
them, as it may be tried again.

No function raises. The statuses are

    0       ACLNN_SUCCESS
    161001  ACLNN_ERR_PARAM_NULLPTR       a required tensor or name is missing
    161002  ACLNN_ERR_PARAM_INVALID       a dtype, a name of a group, an executor
    561002  ACLNN_ERR_INNER_TILING_ERROR  a shape or a value, or ranks that do not agree
    361001  ACLNN_ERR_RUNTIME_ERROR       a peer refused its call or timed out, a teardown has no
                                          setup, no back end can run; the documents do not name
                                          these cases
    561000  ACLNN_ERR_INNER               a defect of this library

and ``aclnn_last_error()`` returns the message.
Source: the operator documents of aclnnMoeDistribute*, aclnnMoeEPLBUpdateExpert and
aclnnMoeUpdateExpert.
"""

from __future__ import annotations

from .combine import (
    aclnnMoeDistributeCombine,
    aclnnMoeDistributeCombineGetWorkspaceSize,
    aclnnMoeDistributeCombineV2,
    aclnnMoeDistributeCombineV2GetWorkspaceSize,
    aclnnMoeDistributeCombineV3,
    aclnnMoeDistributeCombineV3GetWorkspaceSize,
    aclnnMoeDistributeCombineV4,
    aclnnMoeDistributeCombineV4GetWorkspaceSize,
)
from .dispatch import (
    aclnnMoeDistributeDispatch,
    aclnnMoeDistributeDispatchGetWorkspaceSize,
    aclnnMoeDistributeDispatchV2,
    aclnnMoeDistributeDispatchV2GetWorkspaceSize,
    aclnnMoeDistributeDispatchV3,
    aclnnMoeDistributeDispatchV3GetWorkspaceSize,
    aclnnMoeDistributeDispatchV4,
    aclnnMoeDistributeDispatchV4GetWorkspaceSize,
)
from .interface import Executor
from .norm import (
    aclnnMoeDistributeCombineAddRmsNorm,
    aclnnMoeDistributeCombineAddRmsNormGetWorkspaceSize,
    aclnnMoeDistributeCombineAddRmsNormV2,
    aclnnMoeDistributeCombineAddRmsNormV2GetWorkspaceSize,
)
from .output_sizes import (
    aclnnMoeDistributeCombineSetupTeardownCalcOutputSize,
    aclnnMoeDistributeDispatchSetupTeardownCalcOutputSize,
)
from .split_phase import (
    aclnnMoeDistributeCombineSetup,
    aclnnMoeDistributeCombineSetupGetWorkspaceSize,
    aclnnMoeDistributeCombineTeardown,
    aclnnMoeDistributeCombineTeardownGetWorkspaceSize,
    aclnnMoeDistributeDispatchSetup,
    aclnnMoeDistributeDispatchSetupGetWorkspaceSize,
    aclnnMoeDistributeDispatchTeardown,
    aclnnMoeDistributeDispatchTeardownGetWorkspaceSize,
)
from .status import (
    ACLNN_ERR_INNER,
    ACLNN_ERR_INNER_TILING_ERROR,
    ACLNN_ERR_PARAM_INVALID,
    ACLNN_ERR_PARAM_NULLPTR,
    ACLNN_ERR_RUNTIME_ERROR,
    ACLNN_SUCCESS,
    aclnn_last_error,
)
from .update_expert import (
    aclnnMoeEPLBUpdateExpert,
    aclnnMoeEPLBUpdateExpertGetWorkspaceSize,
    aclnnMoeUpdateExpert,
    aclnnMoeUpdateExpertGetWorkspaceSize,
)

__all__ = [
    "ACLNN_ERR_INNER",
    "ACLNN_ERR_INNER_TILING_ERROR",
    "ACLNN_ERR_PARAM_INVALID",
    "ACLNN_ERR_PARAM_NULLPTR",
    "ACLNN_ERR_RUNTIME_ERROR",
    "ACLNN_SUCCESS",
    "Executor",
    "aclnnMoeDistributeCombine",
    "aclnnMoeDistributeCombineAddRmsNorm",
    "aclnnMoeDistributeCombineAddRmsNormGetWorkspaceSize",
    "aclnnMoeDistributeCombineAddRmsNormV2",
    "aclnnMoeDistributeCombineAddRmsNormV2GetWorkspaceSize",
    "aclnnMoeDistributeCombineGetWorkspaceSize",
    "aclnnMoeDistributeCombineSetup",
    "aclnnMoeDistributeCombineSetupGetWorkspaceSize",
    "aclnnMoeDistributeCombineSetupTeardownCalcOutputSize",
    "aclnnMoeDistributeCombineTeardown",
    "aclnnMoeDistributeCombineTeardownGetWorkspaceSize",
    "aclnnMoeDistributeCombineV2",
    "aclnnMoeDistributeCombineV2GetWorkspaceSize",
    "aclnnMoeDistributeCombineV3",
    "aclnnMoeDistributeCombineV3GetWorkspaceSize",
    "aclnnMoeDistributeCombineV4",
    "aclnnMoeDistributeCombineV4GetWorkspaceSize",
    "aclnnMoeDistributeDispatch",
    "aclnnMoeDistributeDispatchGetWorkspaceSize",
    "aclnnMoeDistributeDispatchSetup",
    "aclnnMoeDistributeDispatchSetupGetWorkspaceSize",
    "aclnnMoeDistributeDispatchSetupTeardownCalcOutputSize",
    "aclnnMoeDistributeDispatchTeardown",
    "aclnnMoeDistributeDispatchTeardownGetWorkspaceSize",
    "aclnnMoeDistributeDispatchV2",
    "aclnnMoeDistributeDispatchV2GetWorkspaceSize",
    "aclnnMoeDistributeDispatchV3",
    "aclnnMoeDistributeDispatchV3GetWorkspaceSize",
    "aclnnMoeDistributeDispatchV4",
    "aclnnMoeDistributeDispatchV4GetWorkspaceSize",
    "aclnnMoeEPLBUpdateExpert",
    "aclnnMoeEPLBUpdateExpertGetWorkspaceSize",
    "aclnnMoeUpdateExpert",
    "aclnnMoeUpdateExpertGetWorkspaceSize",
    "aclnn_last_error",
]

"""The operators as the C interface of Ascend has them: two phases, and a status for each.

    status, workspace_size, executor = aclnnXxxGetWorkspaceSize(inputs, attributes, outputs)
    status = aclnnXxx(workspace, workspace_size, executor, stream)

Parameters have the names and the order of the operator documents, without the two pointers at the
end; a null pointer is None. Letters, dtypes and meanings are those of ``compat.torch_npu``, whose
ops these are: the results are the same, and are copied into the caller's tensors. What lies behind
the rows that an output needs stays as it is.

The first phase checks all but the values in tensors, which the second phase reads when it runs, on
the current stream unless it is given one. An executor is for one launch; a second, also after one
that failed, is refused. A rank whose call is refused tells its peers in either phase, so that they
need not wait for it: their call ends with a status too. That status is for the next call of the
group that they come to; a rank that plans calls ahead of others still to be launched had better
not go on after a refusal. Where groupEp itself is wrong there is nobody to tell, and the peers
wait as for a rank that does not come; neither does a teardown tell, as it may be tried again.

Nothing is raised. The statuses are

    0       ACLNN_SUCCESS
    161001  ACLNN_ERR_PARAM_NULLPTR       a required tensor or name is missing
    161002  ACLNN_ERR_PARAM_INVALID       a dtype, a name of a group, an executor
    561002  ACLNN_ERR_INNER_TILING_ERROR  a shape or a value, or ranks that do not agree
    361001  ACLNN_ERR_RUNTIME_ERROR       a peer refused its call or did not come, a teardown has no
                                          setup, no back end can run; the documents are silent on
                                          these
    561000  ACLNN_ERR_INNER               a defect of this library

and ``aclnn_last_error()`` says more.
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

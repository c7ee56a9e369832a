"""The status codes of the aclnn interface, and the message of the last error."""

from __future__ import annotations

import threading
import traceback

from ...errors import INVALID_PARAM, NULL_POINTER, TILING_ERROR, MoeError

ACLNN_SUCCESS = 0
ACLNN_ERR_PARAM_NULLPTR = NULL_POINTER
ACLNN_ERR_PARAM_INVALID = INVALID_PARAM
ACLNN_ERR_INNER_TILING_ERROR = TILING_ERROR
ACLNN_ERR_RUNTIME_ERROR = 361001  # peers, the order of calls, a back end: not an argument
ACLNN_ERR_INNER = 561000  # a defect of this library

_last = threading.local()  # ranks may be threads


def aclnn_last_error() -> str:
    """The message of the last failed call of this thread; "" before the first.

    It begins with the name of the function. A successful call does not change it.
    """
    return getattr(_last, "message", "")


def failed(function: str, error: Exception, parameters: dict[str, str]) -> int:
    """Keep the message of an error; returns its status.

    Args:
        function: the called function.
        error: the exception.
        parameters: the function's parameter of each argument of the op.
    """
    if not isinstance(error, MoeError):
        _last.message = f"{function}: {''.join(traceback.format_exception(error))}"
        return ACLNN_ERR_INNER
    problem, argument = error.problem, error.argument
    if argument in parameters and problem.startswith(argument):
        problem = parameters[argument] + problem.removeprefix(argument)
    _last.message = f"{function}: {problem}"
    return ACLNN_ERR_RUNTIME_ERROR if error.code is None else error.code

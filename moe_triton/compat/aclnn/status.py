"""The status codes of the aclnn interface, and what went wrong last."""

from __future__ import annotations

import threading
import traceback

from ...errors import INVALID_PARAM, NULL_POINTER, TILING_ERROR, MoeError

ACLNN_SUCCESS = 0
ACLNN_ERR_PARAM_NULLPTR = NULL_POINTER
ACLNN_ERR_PARAM_INVALID = INVALID_PARAM
ACLNN_ERR_INNER_TILING_ERROR = TILING_ERROR
ACLNN_ERR_RUNTIME_ERROR = 361001  # peers, the order of calls, a back end: nothing that was passed
ACLNN_ERR_INNER = 561000  # a defect of this library

_last = threading.local()  # ranks may be threads


def aclnn_last_error() -> str:
    """Why the last call of this thread that failed did so; "" where none has.

    A sentence that begins with the function. A call that succeeds leaves it as it is.
    """
    return getattr(_last, "sentence", "")


def failed(function: str, error: Exception, parameters: dict[str, str]) -> int:
    """The status for an error, whose sentence is kept.

    Args:
        function: the one that was called.
        error: what it came to.
        parameters: the function's names for the arguments of the op that errors go by.
    """
    if not isinstance(error, MoeError):
        _last.sentence = f"{function}: {''.join(traceback.format_exception(error))}"
        return ACLNN_ERR_INNER
    problem, argument = error.problem, error.argument
    if argument in parameters and problem.startswith(argument):
        problem = parameters[argument] + problem.removeprefix(argument)
    _last.sentence = f"{function}: {problem}"
    return ACLNN_ERR_RUNTIME_ERROR if error.code is None else error.code

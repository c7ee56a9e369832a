"""What all two-phase interfaces share: a call is checked first, and made later.

The first phase checks descriptors: what tensors there are, their dtypes and shapes, the attributes,
and the tensors for the outputs. It reads no values, so that a call may be planned before its inputs
are computed; ``elasticInfo`` is the exception, as it says which ranks take part. The second phase
checks all of it again with the values, which it reads then, and runs the op.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ascend.distributed.schemas import CheckedOperator
from ...errors import (
    INVALID_PARAM,
    ArgumentError,
    ArgumentTypeError,
    ArgumentValueError,
    MissingArgumentError,
)
from ...ops import checks
from .status import ACLNN_SUCCESS, failed

_TEXTS = ("group_tp", "comm_alg")  # where C may give a null pointer for an empty one

_WITH_SCALES = (2, 3, 4)  # values of quant_mode, which have dynamic_scales

WORKSPACE_SIZE = 0  # bytes; the ops have memory of their own


Stream = contextlib.AbstractContextManager[Any] | None


class ExecutorError(ArgumentError, ValueError):
    """An executor that has been launched, or is another function's."""

    code = INVALID_PARAM


@dataclass(frozen=True)
class Output:
    """A tensor that the caller gives for an output.

    Attributes:
        name: of the parameter.
        shape: in words.
        dtype: where it is the same in all calls.
        larger: whether it may have more rows than that; these stay as they are.
        always: whether all calls have this output. Of what is given for one that a call has not,
            only the dtype is looked at, if that is always the same.
        quantised: whether calls with a quant_mode that makes scales have it; that is known first.
        absent: the error where there is no tensor for it; None where it may go without.
    """

    name: str
    shape: str
    dtype: torch.dtype | None = None
    larger: bool = False
    always: bool = True
    quantised: bool = False
    absent: type[ArgumentError] | None = MissingArgumentError

    def needed(self, given: dict[str, Any]) -> bool:
        """Whether a call has this output, as far as one argument says."""
        mode = given.get("quant_mode")
        return self.always or (self.quantised and isinstance(mode, int) and mode in _WITH_SCALES)


@dataclass(frozen=True)
class Interface:
    """One function in two phases.

    Attributes:
        name: of the second phase.
        operator: the op it stands for.
        outputs: in the order of the op's; further ones of the op are left out.
        dtype_from: the output whose dtype is the op's y_dtype, if one is.
        renamed: parameters whose name is not the op's, written its way.
    """

    name: str
    operator: CheckedOperator
    outputs: tuple[Output, ...]
    dtype_from: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)


def translated(
    call: dict[str, Any], renamed: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """A call by the names of the op's arguments, as ``ep_world_size`` is for ``epWorldSize``.

    Args:
        call: by the names of the parameters.
        renamed: those that the op calls otherwise.

    Returns:
        The arguments, and for the name of each that of its parameter.
    """
    parameters = {(renamed or {}).get(name) or _snake_case(name): name for name in call}
    given = {keyword: call[name] for keyword, name in parameters.items()}
    given |= {name: "" for name in _TEXTS if name in given and given[name] is None}
    return given, parameters


def _snake_case(parameter: str) -> str:
    words = parameter.removesuffix("Optional").replace("BS", "Bs")
    return re.sub(r"(?=[A-Z0-9])", "_", words).lower()


def described(given: dict[str, Any]) -> dict[str, Any]:
    """What is known of a call before its tensors have values; elastic_info is read all the same."""
    return {
        name: value.detach().to("meta")
        if isinstance(value, torch.Tensor) and name != "elastic_info"
        else value
        for name, value in given.items()
    }


class Executor:
    """One call that was checked, and can be launched once: what C calls an aclOpExecutor.

    Args:
        interface: the function.
        given: arguments of the op.
        targets: the tensors for its outputs.
        parameters: the function's names for the op's arguments.
    """

    def __init__(
        self,
        interface: Interface,
        given: dict[str, Any],
        targets: tuple[torch.Tensor | None, ...],
        parameters: dict[str, str],
    ) -> None:
        self.interface, self.given, self.targets = interface, given, targets
        self.parameters = parameters
        self._launched = False

    def launch(self, stream: Stream) -> None:
        """Run the op, and put its results where the caller wants them."""
        operator = self.interface.operator
        if self._launched:
            with operator.checking(**self.given):  # the peers come to one call more, too
                raise ExecutorError(
                    self.interface.name, "executor", "be launched once", "one that has been"
                )
        self._launched = True
        with torch.no_grad(), stream or contextlib.nullcontext():
            results = _as_tuple(operator.run(**self.given))
            for target, result in zip(self.targets, results, strict=False):
                if target is not None and result is not None:
                    target[: len(result)].copy_(result)


FirstPhase = tuple[int, int, Executor | None]


def first_phase(interface: Interface, call: dict[str, Any]) -> FirstPhase:
    """Check a call; a status, the bytes of workspace it needs, and what launches it.

    Args:
        interface: the function.
        call: its arguments by the names of its parameters.
    """
    targets = tuple(call[output.name] for output in interface.outputs)
    names = {output.name for output in interface.outputs}
    inputs = {name: value for name, value in call.items() if name not in names}
    given, parameters = translated(inputs, interface.renamed)
    if interface.dtype_from is not None:
        rows = call[interface.dtype_from]
        given["y_dtype"] = rows.dtype if isinstance(rows, torch.Tensor) else None
        parameters["y_dtype"] = interface.dtype_from
    try:
        _check(interface, given, targets)
    except Exception as error:  # noqa: BLE001 (the interface has statuses, no exceptions)
        return failed(f"{interface.name}GetWorkspaceSize", error, parameters), 0, None
    return ACLNN_SUCCESS, WORKSPACE_SIZE, Executor(interface, given, targets, parameters)


def second_phase(
    interface: Interface,
    workspace: object,  # noqa: ARG001 (none is used, whatever its size)
    workspace_size: int,
    executor: Executor | None,
    stream: Stream,
) -> int:
    """Launch what a first phase has checked; returns a status.

    Args:
        interface: the function.
        workspace: None will do.
        workspace_size: at least what the first phase said.
        executor: from the first phase.
        stream: where the op shall run, a ``torch.Stream``; None for the current one.
    """
    try:
        _launch(interface, workspace_size, executor, stream)
    except Exception as error:  # noqa: BLE001 (the interface has statuses, no exceptions)
        parameters = executor.parameters if isinstance(executor, Executor) else {}
        return failed(interface.name, error, parameters)
    return ACLNN_SUCCESS


def _launch(
    interface: Interface, workspace_size: int, executor: Executor | None, stream: Stream
) -> None:
    op = interface.name
    checks.required(op, executor=executor)
    if not isinstance(executor, Executor) or executor.interface is not interface:
        got = executor.interface.name if isinstance(executor, Executor) else repr(executor)
        raise ExecutorError(op, "executor", f"be that of {op}GetWorkspaceSize", f"that of {got}")
    if stream is not None and not isinstance(stream, contextlib.AbstractContextManager):
        raise ArgumentTypeError(op, "stream", "be a torch.Stream or None", repr(stream))
    checks.integers(op, workspaceSize=workspace_size)
    contract = f"be at least {WORKSPACE_SIZE}, as the first phase said"
    checks.value(op, "workspaceSize", workspace_size >= WORKSPACE_SIZE, contract, workspace_size)
    executor.launch(stream)


def _check(
    interface: Interface, given: dict[str, Any], targets: tuple[torch.Tensor | None, ...]
) -> None:
    """Check the inputs and the tensors for the outputs; of two faults the lower code wins."""
    op, outputs = interface.name, tuple(zip(interface.outputs, targets, strict=True))
    plan = described(given)
    with interface.operator.checking(**plan) as check:
        needed = {output.name: target for output, target in outputs if output.needed(given)}
        checks.required(op, **needed)
        try:
            check()
        except ArgumentValueError:
            _check_dtypes(op, outputs)
            raise
        _check_dtypes(op, outputs)
        results = _as_tuple(interface.operator.outputs(**plan))
        made = [
            (*output, result)
            for output, result in zip(outputs, results, strict=False)
            if result is not None
        ]
        for output, target, result in made:
            if target is None and output.absent is not None:
                raise output.absent(op, output.name, "be given, as there is such an output", None)
            checks.dtype(op, output.name, target, (result.dtype,))
        for output, target, result in made:
            if target is not None:
                _check_shape(op, output, target, result)


def _as_tuple(results: Any) -> tuple[torch.Tensor | None, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def _check_dtypes(op: str, outputs: tuple[tuple[Output, torch.Tensor | None], ...]) -> None:
    """Those that are the same in all calls."""
    for output, target in outputs:
        if output.dtype is not None:
            checks.dtype(op, output.name, target, (output.dtype,))


def _check_shape(op: str, output: Output, target: torch.Tensor, result: torch.Tensor) -> None:
    """The tensor for an output has room for the result."""
    sizes: tuple[int | None, ...] = tuple(result.shape)
    if output.larger and target.dim() and len(target) >= len(result):
        sizes = (None, *sizes[1:])
    checks.shape(op, output.name, target, sizes, output.shape, target.device)

"""The machinery of the two-phase interfaces: check a call first, launch it later.

The first phase checks descriptors: the dtypes and shapes of inputs and of the tensors for outputs,
and the attributes. It reads no values, so that a call may be planned before its inputs are
computed; ``elasticInfo`` is the exception, as it names the participating ranks. The second phase
reads the values, checks them with all the rest, and runs the op.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ascend import checks
from ...ascend.distributed.schemas import CheckedOperator
from ...errors import (
    INVALID_PARAM,
    ArgumentError,
    ArgumentTypeError,
    ArgumentValueError,
    MissingArgumentError,
)
from .status import ACLNN_SUCCESS, failed

_TEXTS = ("group_tp", "comm_alg")  # C may pass a null pointer for an empty string

_WITH_SCALES = (2, 3, 4)  # values of quant_mode with dynamic_scales

WORKSPACE_SIZE = 0  # bytes; the ops have memory of their own


Stream = contextlib.AbstractContextManager[Any] | None


class ExecutorError(ArgumentError, ValueError):
    """An executor that has been launched, or belongs to another function."""

    code = INVALID_PARAM


@dataclass(frozen=True)
class Output:
    """A parameter for an output, to which the caller passes a tensor.

    Attributes:
        name: of the parameter.
        shape: for error messages.
        dtype: if it is the same in all calls.
        larger: whether the tensor may have more rows; these are not written.
        always: whether all calls have this output. In a call without it only the dtype of the
            tensor is checked, if ``dtype`` fixes it.
        quantised: whether calls with a quant_mode that computes scales have it; checked first.
        absent: the error for a missing tensor; None if the output is optional.
    """

    name: str
    shape: str
    dtype: torch.dtype | None = None
    larger: bool = False
    always: bool = True
    quantised: bool = False
    absent: type[ArgumentError] | None = MissingArgumentError

    def needed(self, given: dict[str, Any]) -> bool:
        """Whether a call has this output, as far as quant_mode decides."""
        mode = given.get("quant_mode")
        return self.always or (self.quantised and isinstance(mode, int) and mode in _WITH_SCALES)


@dataclass(frozen=True)
class Interface:
    """A function in two phases.

    Attributes:
        name: of the second phase.
        operator: the op behind it.
        outputs: in the order of the op's; the op may have more.
        dtype_from: the output whose dtype is the op's y_dtype, or None.
        renamed: parameters under another name than the op's, with that name.
    """

    name: str
    operator: CheckedOperator
    outputs: tuple[Output, ...]
    dtype_from: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)


def translated(
    call: dict[str, Any], renamed: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Translate parameters into the op's arguments, as ``epWorldSize`` into ``ep_world_size``.

    Args:
        call: parameters by name.
        renamed: those under another name than the op's, with that name.

    Returns:
        The arguments by name, and the parameter of each by the argument's name.
    """
    parameters = {(renamed or {}).get(name) or _snake_case(name): name for name in call}
    arguments = {keyword: call[name] for keyword, name in parameters.items()}
    arguments |= {name: "" for name in _TEXTS if name in arguments and arguments[name] is None}
    return arguments, parameters


def _snake_case(parameter: str) -> str:
    words = parameter.removesuffix("Optional").replace("BS", "Bs")
    return re.sub(r"(?=[A-Z0-9])", "_", words).lower()


def described(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with tensors on the meta device, except elastic_info."""
    return {
        name: value.detach().to("meta")
        if isinstance(value, torch.Tensor) and name != "elastic_info"
        else value
        for name, value in arguments.items()
    }


class Executor:
    """A checked call that can be launched once: C's aclOpExecutor.

    Args:
        interface: the function.
        arguments: of the op.
        targets: the tensors for its outputs.
        parameters: the parameter of each argument.
    """

    def __init__(
        self,
        interface: Interface,
        arguments: dict[str, Any],
        targets: tuple[torch.Tensor | None, ...],
        parameters: dict[str, str],
    ) -> None:
        self.interface, self.arguments, self.targets = interface, arguments, targets
        self.parameters = parameters
        self._launched = False

    def launch(self, stream: Stream) -> None:
        """Run the op, and copy its results into the caller's tensors."""
        operator = self.interface.operator
        if self._launched:
            with operator.checking(**self.arguments):  # abort the peers of this extra call
                raise ExecutorError(
                    self.interface.name, "executor", "be launched once", "a launched one"
                )
        self._launched = True
        with torch.no_grad(), stream or contextlib.nullcontext():
            results = _as_tuple(operator.compute(**self.arguments))
            for target, result in zip(self.targets, results, strict=False):
                if target is not None and result is not None:
                    target[: len(result)].copy_(result)


FirstPhase = tuple[int, int, Executor | None]


def first_phase(interface: Interface, call: dict[str, Any]) -> FirstPhase:
    """Check a call; returns a status, the workspace bytes, and the executor.

    Args:
        interface: the function.
        call: its parameters by name.
    """
    targets = tuple(call[output.name] for output in interface.outputs)
    names = {output.name for output in interface.outputs}
    inputs = {name: value for name, value in call.items() if name not in names}
    arguments, parameters = translated(inputs, interface.renamed)
    if interface.dtype_from is not None:
        rows = call[interface.dtype_from]
        arguments["y_dtype"] = rows.dtype if isinstance(rows, torch.Tensor) else None
        parameters["y_dtype"] = interface.dtype_from
    try:
        _check(interface, arguments, targets)
    except Exception as error:  # noqa: BLE001 (the interface has statuses, no exceptions)
        return failed(f"{interface.name}GetWorkspaceSize", error, parameters), 0, None
    return ACLNN_SUCCESS, WORKSPACE_SIZE, Executor(interface, arguments, targets, parameters)


SecondPhase = Callable[[object, int, "Executor | None", Stream], int]


def second_phase(interface: Interface) -> SecondPhase:
    """The function that launches what ``first_phase(interface, ..)`` has checked."""

    def launch(
        workspace: object,  # noqa: ARG001 (the ops have memory of their own)
        workspaceSize: int,
        executor: Executor | None,
        stream: Stream,
    ) -> int:
        try:
            _launch(interface, workspaceSize, executor, stream)
        except Exception as error:  # noqa: BLE001 (the interface has statuses, no exceptions)
            parameters = executor.parameters if isinstance(executor, Executor) else {}
            return failed(interface.name, error, parameters)
        return ACLNN_SUCCESS

    launch.__name__ = launch.__qualname__ = interface.name
    launch.__module__ = __package__
    launch.__doc__ = f"""Launch a call that ``{interface.name}GetWorkspaceSize`` has checked.

    Args:
        workspace: None; its content is not used.
        workspaceSize: at least the size that the first phase returned.
        executor: from the first phase.
        stream: a ``torch.Stream`` to run on, None for the current one.

    Returns:
        A status.
    """
    return launch


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
    contract = f"be at least {WORKSPACE_SIZE}, the output of the first phase"
    checks.value(op, "workspaceSize", workspace_size >= WORKSPACE_SIZE, contract, workspace_size)
    executor.launch(stream)


def _check(
    interface: Interface, arguments: dict[str, Any], targets: tuple[torch.Tensor | None, ...]
) -> None:
    """Check inputs and the tensors for outputs; of two errors the lower code is reported."""
    op, outputs = interface.name, tuple(zip(interface.outputs, targets, strict=True))
    plan = described(arguments)
    with interface.operator.checking(**plan) as check:
        needed = {output.name: target for output, target in outputs if output.needed(arguments)}
        checks.required(op, **needed)
        try:
            check()
        except ArgumentValueError:
            _check_dtypes(op, outputs)
            raise
        _check_dtypes(op, outputs)
        results = _as_tuple(interface.operator.computed(**plan))
        produced = [
            (*output, result)
            for output, result in zip(outputs, results, strict=False)
            if result is not None
        ]
        for output, target, result in produced:
            if target is None and output.absent is not None:
                raise output.absent(op, output.name, "be given in a call with this output", None)
            checks.dtype(op, output.name, target, (result.dtype,))
        for output, target, result in produced:
            if target is not None:
                _check_shape(op, output, target, result)


def _as_tuple(results: Any) -> tuple[torch.Tensor | None, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def _check_dtypes(op: str, outputs: tuple[tuple[Output, torch.Tensor | None], ...]) -> None:
    """Check the dtypes that are the same in all calls."""
    for output, target in outputs:
        if output.dtype is not None:
            checks.dtype(op, output.name, target, (output.dtype,))


def _check_shape(op: str, output: Output, target: torch.Tensor, result: torch.Tensor) -> None:
    """Check that the tensor for an output has room for the result."""
    sizes: tuple[int | None, ...] = tuple(result.shape)
    if output.larger and target.dim() and len(target) >= len(result):
        sizes = (None, *sizes[1:])
    checks.shape(op, output.name, target, sizes, output.shape, target.device)

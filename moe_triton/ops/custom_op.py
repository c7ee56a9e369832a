"""Custom ops of ``torch.library`` in the namespace ``moe_triton``, for compilers and tracers.

An op that sends has an effect that its outputs do not show: a compiler must not drop it, merge it
with an equal one or reorder it, or the ranks would deadlock. So every ``Operator`` declares that it
writes to the same tensor, the token, which chains all of them in each graph, forward and backward.
(Registering an op as effectful takes one line, but inductor moves such ops, seen with torch 2.13.)
An op that runs on one device alone is a ``Function``.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

TOKEN = torch.zeros((), device="cpu")  # shared by all ops of this process; its value is unused

_KINDS: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "int": (int, torch.SymInt),
    "float": (float, int),
    "str": str,
}


def _is(value: object, kind: str) -> bool:
    """Whether a value has a schema's type; the dispatcher takes other types, and converts them."""
    if kind.startswith("List["):
        item = kind.removeprefix("List[").removesuffix("]")
        return isinstance(value, (list, tuple)) and all(_is(one, item) for one in value)
    if kind == "bool" or isinstance(value, bool):
        return isinstance(value, bool) and kind == "bool"
    return isinstance(value, _KINDS[kind])


class _Registered:
    """A custom op and the functions behind it, which take every argument by name.

    ``hidden`` are the leading arguments of the schema, which the functions do not take.
    """

    def __init__(
        self,
        name: str,
        hidden: Sequence[str],
        arguments: str,
        results: str,
        run: Callable[..., Any],
        outputs: Callable[..., Any],
    ) -> None:
        self.run, self.outputs = run, outputs
        self._hidden = len(hidden)
        self.name, self._name = name, f"moe_triton::{name}"
        # torch.library.custom_op would import the whole compiler in its first call.
        torch.library.define(self._name, f"({', '.join([*hidden, arguments])}) -> {results}")
        torch.library.impl(self._name, "CompositeExplicitAutograd")(self._named(run))
        torch.library.register_fake(self._name, self._named(outputs))
        self._overload = getattr(torch.ops.moe_triton, name).default
        self._arguments = self._overload._schema.arguments[self._hidden :]

    def _takes(self, arguments: dict[str, Any]) -> bool:
        """Whether all values are of the types in the schema."""
        for argument in self._arguments:
            value, kind = arguments[argument.name], argument.type
            if kind.kind() == "OptionalType":
                if value is None:
                    continue
                kind = kind.getElementType()
            if not _is(value, str(kind)):
                return False
        return True

    def _named(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Adapt ``function`` to the dispatcher, which calls by position and omits defaults."""

        def call(*args: Any, **kwargs: Any) -> Any:
            names = (argument.name for argument in self._arguments)
            values = dict(zip(names, args[self._hidden :], strict=False)) | kwargs
            return function(
                **{a.name: values.get(a.name, a.default_value) for a in self._arguments}
            )

        return call


class Operator(_Registered):
    """An op that sends, as a custom op without gradients.

    An op that does not send may be one too, so that compilers do not trace into it.

    Args:
        name: in the namespace ``moe_triton``.
        arguments: of the schema, after the token.
        results: of the schema.
        run: the op itself. Takes all arguments by name, without the token.
        outputs: fake outputs, of the shapes and dtypes of ``run`` for the same arguments. Must not
            raise, as a compiler would hide its error: ``run`` checks the arguments.

    Attributes:
        run: as given.
        outputs: as given.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        results: str,
        *,
        run: Callable[..., Any],
        outputs: Callable[..., Any],
    ) -> None:
        super().__init__(name, ["Tensor(a!) token"], arguments, results, run, outputs)

    def __call__(self, **arguments: Any) -> Any:
        """Call the op, with every argument by name.

        Values of types that the dispatcher would reject go straight to ``run``, which raises this
        library's error and aborts the peers.
        """
        if torch.compiler.is_compiling() or self._takes(arguments):
            with torch.no_grad():  # otherwise autograd would mark the outputs
                return self._overload(TOKEN, **arguments)
        return self.run(**arguments)


class Function(_Registered):
    """An op of one device that sends nothing, as a custom op that compilers may move or drop.

    Args:
        name: in the namespace ``moe_triton``.
        arguments: of the schema; with ``backward``, no tensor may be keyword-only.
        results: as in ``Operator``.
        run: the op itself. Takes all arguments by name.
        outputs: as in ``Operator``.
        backward: from the context and the gradients of all outputs to those of all arguments; None
            for an op without gradients.
        save: saves tensors of the arguments and outputs in the context, for ``backward``.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        results: str,
        *,
        run: Callable[..., Any],
        outputs: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        save: Callable[..., None] | None = None,
    ) -> None:
        super().__init__(name, [], arguments, results, run, outputs)
        self._has_gradients = backward is not None
        if backward is not None:
            torch.library.register_autograd(self._name, backward, setup_context=save)

    def __call__(self, **arguments: Any) -> Any:
        """Call the op, with every argument by name; wrong types as in ``Operator``."""
        if torch.compiler.is_compiling():
            return self._call(arguments)
        # Numpy's integers would send the call to ``run``, which has no gradients.
        arguments = {
            name: int(value)
            if isinstance(value, numbers.Integral) and not isinstance(value, bool)
            else value
            for name, value in arguments.items()
        }
        return self._call(arguments) if self._takes(arguments) else self.run(**arguments)

    def _call(self, arguments: dict[str, Any]) -> Any:
        if self._has_gradients:
            return self._overload(**arguments)
        with torch.no_grad():  # otherwise autograd would mark the outputs
            return self._overload(**arguments)

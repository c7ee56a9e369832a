"""Ops as custom ops of ``torch.library`` in the namespace ``moe_triton``.

This is how compilers and tracers see them. An op that sends has an effect that its outputs do not
show: a compiler must not drop it, merge it with an equal one, or change its place among the others,
or the ranks would wait for each other for ever. So every ``Operator`` claims to write to one and
the same tensor, the token, which makes one chain of them in each graph, forward and backward.
(Registering an op as effectful says the same in one line, but inductor moves such ops, seen with
torch 2.13.) What runs on one device alone is a ``Function``.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

TOKEN = torch.zeros((), device="cpu")  # of all ops of this process; its value means nothing

_KINDS: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "int": (int, torch.SymInt),
    "float": (float, int),
    "str": str,
}


def _is(value: object, kind: str) -> bool:
    """Whether a value is of a type of schemas; the dispatcher takes more, and converts it."""
    if kind == "List[int]":
        return isinstance(value, (list, tuple)) and all(_is(one, "int") for one in value)
    if kind == "bool" or isinstance(value, bool):
        return isinstance(value, bool) and kind == "bool"
    return isinstance(value, _KINDS[kind])


class _Registered:
    """A custom op and the functions behind it, which take every argument by name.

    ``hidden`` are arguments of the schema that the functions do not get, before all others.
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
        self._name = f"moe_triton::{name}"
        # Not torch.library.custom_op, whose first call imports the whole compiler.
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
        """``function`` for the dispatcher, which calls by position and leaves out defaults."""

        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[self._hidden :]
            values = dict(zip((a.name for a in self._arguments), given, strict=False)) | kwargs
            return function(
                **{a.name: values.get(a.name, a.default_value) for a in self._arguments}
            )

        return call


class Operator(_Registered):
    """An op that sends, as a custom op without gradients.

    What does not send may be one too, so that it is not taken apart by compilers.

    Args:
        name: in the namespace ``moe_triton``.
        arguments: of the schema, after the token.
        results: of the schema; a result may be None where ``outputs`` says so.
        run: the op itself. Takes all arguments by name, without the token.
        outputs: what ``run`` will return for the same arguments, with no values yet. Must not
            raise, as a compiler would hide its error: what is wrong is for ``run`` to say.

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

        Values of types that the dispatcher would refuse go straight to ``run``, which says what is
        wrong with them in the words of this library, and tells the peers.
        """
        if torch.compiler.is_compiling() or self._takes(arguments):
            with torch.no_grad():  # else the outputs would seem to have gradients
                return self._overload(TOKEN, **arguments)
        return self.run(**arguments)


class Function(_Registered):
    """An op of one device that sends nothing, as a custom op that compilers may move or drop.

    Args:
        name: in the namespace ``moe_triton``.
        arguments: of the schema; where there are gradients, without tensors by keyword only.
        results: as in ``Operator``.
        run: the op itself. Takes all arguments by name.
        outputs: as in ``Operator``.
        backward: with the context and the gradients of all outputs, the gradients of all arguments.
            None for an op without gradients.
        save: with the context, the arguments and the outputs, keeps what ``backward`` needs.
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
        # Other integers, such as those of numpy, must not lose the gradients.
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
        with torch.no_grad():  # else the outputs would seem to have gradients
            return self._overload(**arguments)

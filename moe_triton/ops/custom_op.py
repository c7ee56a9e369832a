"""Ops that send, as custom ops of ``torch.library`` in the namespace ``moe_triton``.

This is how compilers and tracers see them. An op that sends has an effect that its outputs do not
show: a compiler must not drop it, merge it with an equal one, or change its place among the others,
or the ranks would wait for each other for ever. So every op claims to write to one and the same
tensor, the token, which makes one chain of them in each graph, forward and backward. (Registering
an op as effectful says the same in one line, but inductor moves such ops, seen with torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOKEN = torch.zeros((), device="cpu")  # of all ops of this process; its value means nothing

_KINDS: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "int": (int, torch.SymInt),
    "float": (float, int),
    "str": str,
}


class Operator:
    """An op that sends, as a custom op without gradients.

    What does not send may be one too, so that it is not taken apart by compilers.

    Args:
        name: in the namespace ``moe_triton``.
        arguments: of the schema, after the token.
        results: of the schema; a result may be None where ``outputs`` says so.
        run: the op itself. Takes all arguments by name, without the token.
        outputs: what ``run`` will return for the same arguments, with no values yet. Must not
            raise, as a compiler would hide its error: what is wrong is for ``run`` to say.
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
        self._run = run
        qualified = f"moe_triton::{name}"
        # Not torch.library.custom_op, whose first call imports the whole compiler.
        torch.library.define(qualified, f"(Tensor(a!) token, {arguments}) -> {results}")
        torch.library.impl(qualified, "CompositeExplicitAutograd")(self._named(run))
        torch.library.register_fake(qualified, self._named(outputs))
        self._overload = getattr(torch.ops.moe_triton, name).default
        _, *self._arguments = self._overload._schema.arguments

    def __call__(self, **arguments: Any) -> Any:
        """Call the op, with every argument by name.

        Values of types that the dispatcher would refuse go straight to ``run``, which says what is
        wrong with them in the words of this library, and tells the peers.
        """
        if torch.compiler.is_compiling() or self._takes(arguments):
            with torch.no_grad():  # else the outputs would seem to have gradients
                return self._overload(TOKEN, **arguments)
        return self._run(**arguments)

    def _takes(self, arguments: dict[str, Any]) -> bool:
        """Whether all values are of the types in the schema."""
        for argument in self._arguments:
            value, kind = arguments[argument.name], argument.type
            if kind.kind() == "OptionalType":
                if value is None:
                    continue
                kind = kind.getElementType()
            if isinstance(value, bool) or not isinstance(value, _KINDS[str(kind)]):
                return False
        return True

    def _named(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` for the dispatcher, which calls by position and leaves out defaults."""

        def call(token: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
            values = dict(zip((a.name for a in self._arguments), args, strict=False)) | kwargs
            return function(
                **{a.name: values.get(a.name, a.default_value) for a in self._arguments}
            )

        return call

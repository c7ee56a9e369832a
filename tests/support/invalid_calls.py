"""Invalid calls: how to make them through each interface, and how each rank must end.

A refusal is one of the package's errors with the status code of the contract, and names the
argument and the value; in the aclnn interface it is a status and a sentence. The ranks that called
correctly end at once too, and name the culprit. The calls themselves are in ``constraint_rows``.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aclnn_calls
import cloudpickle
import harness
import torch
from harness import describe

from moe_triton.compat import aclnn, torch_npu

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MISSING, TYPE, VALUE = 161001, 161002, 561002
KINDS = {
    MISSING: ("MissingArgumentError", "TypeError"),
    TYPE: ("MoeError",),
    VALUE: ("ArgumentValueError", "ValueError"),
}
# An abort message, not a time-out: far below the 30 s that a silent peer is waited for.
AT_ONCE = 5.0
ANYTHING = r""
LIMIT = 20.0


class Change:
    """An edit of a call's keyword arguments; ``|`` makes two edits one after the other."""

    def __init__(self, fn: Callable[[dict], Any]) -> None:
        self.fn = fn

    def __call__(self, call: dict) -> None:
        self.fn(call)

    def __or__(self, other: Change) -> Change:
        return Change(lambda call: (self(call), other(call)))


def put(**values: Any) -> Change:
    """Replace arguments."""
    return Change(lambda call: call.update(values))


def edit(name: str, fn: Callable[[Any], Any]) -> Change:
    """Replace an argument by a function of itself."""
    return Change(lambda call: call.update({name: fn(call[name])}))


def with_value(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A copy of a tensor with one element replaced."""

    def fn(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return fn


@dataclass(frozen=True)
class InvalidCall:
    """One way to call wrongly.

    Attributes:
        name: begins with the row of the contract's table of constraints.
        op: "dispatch" or "combine".
        change: edits the keyword arguments of a correct call.
        code: status code of the refusal.
        edited: the argument that the interface must have.
        arguments: the refusal names one of these.
        got: pattern of the offending value in the message.
        reaches_peers: False when the call does not say which group it belongs to.
        base: name of the correct call.
        profile: the product profile under which the call is wrong.
        versions: of the functions.
        in_values: whether only values of a tensor are wrong.
    """

    name: str
    op: str
    change: Change
    code: int
    edited: str
    arguments: tuple[str, ...]
    got: str
    reaches_peers: bool = True
    base: str = "plain"
    profile: str = "portable"
    versions: tuple[int, ...] = (1, 2)
    in_values: bool = False


def attempt(fn: Callable[[], object]) -> dict:
    """How a call that should be refused ended, and after how long."""
    start = time.monotonic()
    try:
        fn()
    except Exception as error:
        refusal = describe(error)
    else:
        refusal = None
    return {"error": refusal, "seconds": time.monotonic() - start}


class TorchNpu:
    """The functions of torch_npu."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.suffix = "" if version == 1 else "_v2"

    def function(self, op: str) -> Callable[..., Any]:
        """The dispatch or the combine."""
        return getattr(torch_npu, f"npu_moe_distribute_{op}{self.suffix}")

    def has(self, op: str, argument: str) -> bool:
        """Whether the function takes an argument."""
        return argument in inspect.signature(self.function(op)).parameters

    def round_trip(self, ctx: Any, call: dict) -> tuple:
        """The seven outputs of dispatch and the output of combine on this rank."""
        outputs = harness.call_dispatch(ctx, call, version=self.version)
        return outputs, harness.call_combine(ctx, call, outputs, version=self.version)

    def bad_call(self, ctx: Any, call: dict, op: str, change: Change) -> dict:
        """How an edited call of ``op`` ends; a dispatch before a combine is correct."""
        if op == "dispatch":
            args = harness.groups_of(ctx) | call["dispatch"]
        else:
            outputs = harness.call_dispatch(ctx, call, version=self.version)
            args = harness.combine_arguments(ctx, call, outputs, version=self.version)
        change(args)
        return attempt(lambda: self.function(op)(**args))

    def check_refusal(self, bad: InvalidCall, refusal: dict) -> None:
        """The culprit raises an error in three parts."""
        error = refusal["error"]
        assert error is not None, "the call was accepted"
        assert "MoeError" in error["types"], error["traceback"]
        assert error["code"] == bad.code, error["traceback"]
        for kind in KINDS[bad.code]:
            assert kind in error["types"], error["traceback"]
        assert error["argument"] in bad.arguments, error["traceback"]
        assert bad.op in error["op"], error["traceback"]
        text = error["text"]
        assert text.startswith(f"{error['op']}: "), text
        contract, _, got = text.rpartition(", got ")
        assert re.search(rf"\b{error['argument']}\b.* must \S+", contract), text
        assert re.search(bad.got, got), text
        assert bad.profile == "portable" or f"on {bad.profile}" in contract, text
        assert refusal["seconds"] < AT_ONCE

    def check_peer(self, bad: InvalidCall, refusal: dict, *culprits: int) -> None:
        """A rank that called correctly is aborted by one of ``culprits``."""
        error = refusal["error"]
        assert error is not None, "the call of a peer returned although a rank refused"
        assert "PeerAbortError" in error["types"], error["traceback"]
        assert error["rank"] in culprits, error["traceback"]
        assert any(argument in error["reason"] for argument in bad.arguments), error["traceback"]
        assert re.search(bad.got, error["reason"]), error["traceback"]
        assert f"rank {error['rank']}" in error["text"], error["traceback"]
        assert refusal["seconds"] < AT_ONCE


class Aclnn:
    """The functions of the aclnn interface, of one version."""

    def __init__(self, suffix: str) -> None:
        self.version = 2 if suffix else 1
        self.names = {
            op: f"aclnnMoeDistribute{op.title()}{suffix}" for op in ("dispatch", "combine")
        }

    def has(self, op: str, argument: str) -> bool:
        """Whether the first phase has a parameter for an argument of torch_npu."""
        function = self.names[op]
        return any(
            aclnn_calls.keyword(function, parameter) == argument
            for parameter in aclnn_calls.parameters(function)
        )

    def round_trip(self, ctx: Any, call: dict) -> tuple:
        """The seven outputs of dispatch and the output of combine on this rank."""
        return aclnn_calls.round_trip(ctx, call, *self.names.values())

    def bad_call(self, ctx: Any, call: dict, op: str, change: Change) -> dict:
        """How an edited call of ``op`` ends; a dispatch before a combine is correct."""
        return aclnn_calls.bad_call(ctx, call, op, change, *self.names.values())

    def check_refusal(self, bad: InvalidCall, ending: dict) -> None:
        """The culprit gets a status, of the first phase unless a value is wrong, and a sentence."""
        assert ending["status"] == bad.code, ending
        function, sentence = self.names[bad.op], ending["sentence"]
        parameters = aclnn_calls.parameters(function)
        known = {aclnn_calls.keyword(function, name): name for name in parameters}
        assert sentence.startswith(function), sentence
        named = [rf": {known.get(argument, argument)}\b" for argument in bad.arguments]
        assert any(re.search(pattern, sentence) for pattern in named), sentence
        assert re.search(bad.got, sentence.rpartition(", got ")[2]), sentence
        assert bad.profile == "portable" or f"on {bad.profile}" in sentence, sentence
        assert ending["phase"] == (2 if bad.in_values else 1), ending
        assert ending["seconds"] < AT_ONCE

    def check_peer(self, bad: InvalidCall, ending: dict, *_: int) -> None:
        """A rank that called correctly gets a status from its second phase."""
        assert (ending["phase"], ending["status"]) == (2, aclnn.ACLNN_ERR_RUNTIME_ERROR), ending
        assert "rejected this call" in ending["sentence"], ending
        assert any(argument in ending["sentence"] for argument in bad.arguments), ending
        assert ending["seconds"] < AT_ONCE


DOORS: dict[str, TorchNpu | Aclnn] = {
    "torch_npu v1": TorchNpu(1),
    "torch_npu v2": TorchNpu(2),
    "aclnn": Aclnn(""),
    "aclnn V4": Aclnn("V4"),
}

"""Calls that must be refused: how to make them, and what each rank must then say.

A refusal is one of the package's errors with the status code of the contract, that names the
argument and the value. The ranks that called correctly raise too, at once, and name the culprit.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from harness import call_dispatch, describe, groups_of

from moe_triton.compat import torch_npu

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MISSING, TYPE, VALUE = 161001, 161002, 561002
KINDS = {
    MISSING: ("MissingArgumentError", "TypeError"),
    TYPE: ("MoeError",),
    VALUE: ("ArgumentValueError", "ValueError"),
}
# Refusals are told, not timed out: far below the 30 s a silent peer is waited for.
AT_ONCE = 5.0
ANYTHING = r""

Change = Callable[[dict], None]


@dataclass(frozen=True)
class Bad:
    """One way to call wrongly.

    Attributes:
        op: "dispatch" or "combine".
        change: edits the keyword arguments of a correct call.
        code: status code of the refusal.
        argument: the argument it names, or several that would do.
        got: pattern of the offending value in the message.
        reaches_peers: False when the call does not say which group it belongs to.
        base: name of the correct call.
        profile: the product profile under which the call is wrong.
    """

    op: str
    change: Change
    code: int
    argument: str | tuple[str, ...]
    got: str
    reaches_peers: bool = True
    base: str = "plain"
    profile: str = "portable"

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments that the refusal may name."""
        return (self.argument,) if isinstance(self.argument, str) else self.argument


def put(**values: Any) -> Change:
    """Replace arguments."""
    return lambda call: call.update(values)


def edit(name: str, fn: Callable[[Any], Any]) -> Change:
    """Replace an argument by a function of itself."""

    def change(call: dict) -> None:
        call[name] = fn(call[name])

    return change


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(call: dict) -> None:
        for one in changes:
            one(call)

    return change


def with_value(name: str, place: tuple[int, ...], value: float) -> Change:
    """A copy of a tensor argument with one element replaced."""

    def fn(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return edit(name, fn)


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


def bad_call(ctx: Any, call: dict, op: str, change: Change, *, version: int = 1) -> dict:
    """One call of ``op``, edited by ``change``; a dispatch before a combine is left correct."""
    names = groups_of(ctx)
    suffix = "" if version == 1 else "_v2"
    fn = getattr(torch_npu, f"npu_moe_distribute_{op}{suffix}")
    if op == "dispatch":
        args = names | call["dispatch"]
    else:
        outputs = call_dispatch(ctx, call, version=version)
        args = {
            **names,
            "expand_idx" if version == 1 else "assist_info_for_combine": outputs[2],
            "ep_send_counts": outputs[4],
            "tp_send_counts": outputs[5],
            "expand_scales": outputs[6],
            **call["combine"],
        }
    change(args)
    return attempt(lambda: fn(**args))


def check_refusal(bad: Bad, refusal: dict) -> None:
    """The rank that called wrongly says so, in three parts."""
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
    assert refusal["seconds"] < AT_ONCE


def check_peer(bad: Bad, refusal: dict, *culprits: int) -> None:
    """A rank that called correctly hears of it from one of ``culprits``."""
    error = refusal["error"]
    assert error is not None, "the call of a peer returned although a rank refused"
    assert "PeerAbortError" in error["types"], error["traceback"]
    assert error["rank"] in culprits, error["traceback"]
    assert any(argument in error["reason"] for argument in bad.arguments), error["traceback"]
    assert re.search(bad.got, error["reason"]), error["traceback"]
    assert f"rank {error['rank']}" in error["text"], error["traceback"]
    assert refusal["seconds"] < AT_ONCE

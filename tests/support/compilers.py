"""The compilers of the tests of torch.compile, and helpers that these tests share."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

needed = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needed)]

MARKS = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Raised within inductor.
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
]


class Recorded(TorchDispatchMode):
    """Remembers the ops of this library that are called, and their arguments without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = args, kwargs or {}
        if func.namespace == "moe_triton":
            self.calls.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, given)))
        return func(*given[0], **given[1])


def usual(function):
    """A test of compiled calls, with all marks of these tests."""
    for mark in MARKS:
        function = mark(function)
    return function


def check(call, *inputs: torch.Tensor) -> None:
    """A function of one device gives the same outputs and gradients compiled, and passes opcheck.

    The gradients are those of the sum of all floating-point outputs.
    """

    def run(function):
        leaves = [one.detach().clone().requires_grad_(one.requires_grad) for one in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(one.float().sum() for one in outputs if one is not None and one.requires_grad)
        if torch.is_tensor(total):
            total.backward()
        return [*outputs, *(leaf.grad for leaf in leaves)]

    expected = run(call)
    actual = run(torch.compile(call, backend="aot_eager", fullgraph=True))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    with Recorded() as recorded:
        call(*inputs)
    assert recorded.calls
    for op, args, kwargs in recorded.calls:
        torch.library.opcheck(op, args, kwargs)

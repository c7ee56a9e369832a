"""Which compilers tests of torch.compile run with, and what such tests have in common."""

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

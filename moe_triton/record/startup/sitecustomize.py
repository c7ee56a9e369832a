"""Runs when Python starts in a script under ``moe-triton record``; imports nothing heavy itself."""  # noqa: INP001 - a folder for PYTHONPATH, no package

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# Of moe_triton.record.hooks, which imports torch.
MODULES = ("torch_npu", "moe_triton.compat.torch_npu")


def _run_hidden() -> None:
    """Run the sitecustomize that this one hides, if there is one."""
    here = Path(__file__).resolve().parent
    path = [folder for folder in sys.path if Path(folder).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


class _AfterImport:
    """Finder that wraps the operators of a module once it is imported."""

    def __init__(self) -> None:
        self._waiting = set(MODULES)

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name not in self._waiting:
            return None
        self._waiting.discard(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            self._waiting.add(name)
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            from moe_triton.record import hooks

            hooks.record_imported(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_run_hidden()
if os.environ.get("MOE_TRITON_RECORD"):
    sys.meta_path.insert(0, _AfterImport())

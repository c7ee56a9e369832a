"""Stands for SGLang's kernels, of which there is no build for CPUs on the index.

Without AMX, SGLang's layers fall back to PyTorch and call none of them; a call raises.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

__version__ = "0.4.10"
__path__ = ()  # a package, for imports of its modules


class _Missing:
    """Imported and never called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{self.name} is a stand-in of the tests")


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every submodule."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name)


sys.meta_path.append(_Finder())

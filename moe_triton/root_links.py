"""Stands aside for the distributions that share a name with the links in the root of a checkout.

With the root of the repository on ``sys.path``, ``import kernels`` reaches ``moe_triton/kernels``
through a link that is for readers. Engines and Jupyter mean other distributions by ``kernels`` and
``comm``. Loaded by path, as importing ``moe_triton`` would import torch.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


def load_other(name: str) -> None:
    """Replace module ``name``, which is being imported, by the distribution of that name.

    Without one, ``importlib.import_module`` gets an empty module of version 0, without a file:
    transformers calls it, uncaught, for the version of what ``find_spec`` has found.

    Raises:
        ModuleNotFoundError: an import statement, and no such distribution further along the path.
    """
    path = [entry for entry in sys.path if not _is_ours(Path(entry, name))]
    spec = _find(name, path)
    if spec is None and not _imported_by_a_function():
        raise ModuleNotFoundError(
            f"No module named {name!r}; the link in the root of the repository is for reading: "
            f"import moe_triton.{name}",
            name=name,
        )
    if spec is None:
        sys.modules[name] = module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__["__version__"] = "0"
        return
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(module)


def _is_ours(package: Path) -> bool:
    return package.resolve().parent.name == "moe_triton"


def _find(name: str, path: list[str]) -> ModuleSpec | None:
    """The first module of that name that any finder has, on ``path`` or elsewhere."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path if finder is PathFinder else None)
        if spec is not None and not (spec.origin and _is_ours(Path(spec.origin).parent)):
            return spec
    return None


def _imported_by_a_function() -> bool:
    """Whether ``importlib.import_module`` imports the link, and no import statement."""
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe()))
    files = (frame.f_code.co_filename for frame in frames)
    for file in files:
        if file.endswith("__init__.py") and _is_ours(Path(file).parent):
            break
    caller = next((file for file in files if not file.startswith("<frozen importlib")), "")
    return caller == importlib.__file__

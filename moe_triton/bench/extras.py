"""Optional packages, and the message that names the extra which brings them."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackageError(Exception):
    """A package that an option needs is not installed."""


def require(module: str, what: str, extra: str = "bench") -> ModuleType:
    """Import ``module``, which ``what`` needs.

    Raises:
        MissingPackageError: it is not installed; the text names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{what} needs {package}, which is not installed: pip install 'moe_triton[{extra}]'"
        ) from error

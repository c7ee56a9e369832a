"""Make ``import deep_ep`` find this interface."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Mapping
from importlib.machinery import ModuleSpec

from ...errors import UnavailableError
from .buffer import Buffer
from .config import Config, topk_idx_t
from .elastic import ElasticBuffer
from .ep_buffer import EPBuffer
from .handle import EPHandle
from .utils import EventHandle, EventOverlap, get_logical_domain_size, get_physical_domain_size

NAME = "deep_ep"
__version__ = "2.1.0"  # of the original whose interface this is

_CLASSES = (Buffer, Config, EPBuffer, EPHandle, ElasticBuffer)
_EVENTS = (EventHandle, EventOverlap)
_SIZES = (get_logical_domain_size, get_physical_domain_size)


def install(*, replace: bool = False) -> types.ModuleType:
    """Put this interface into ``sys.modules`` as ``deep_ep``, ``deep_ep.utils`` and its parts.

    The same call again changes nothing. Modules that have imported another ``deep_ep`` keep it.

    Args:
        replace: also where another ``deep_ep`` is installed or imported, which otherwise is an
            error.

    Returns:
        The module ``deep_ep``.

    Raises:
        UnavailableError: there is another ``deep_ep``.
    """
    present = sys.modules.get(NAME)
    if present is not None and getattr(present, "is_moe_triton", False):
        return present
    origin = _another()
    if origin is not None and not replace:
        raise UnavailableError(
            "deep_ep.install",
            f"another deep_ep is installed ({origin}); uninstall it, or pass replace=True",
        )
    module = _module(NAME, {item.__name__: item for item in _CLASSES})
    module.__path__ = []  # a package: its parts are below
    vars(module).update(is_moe_triton=True, __version__=__version__, topk_idx_t=topk_idx_t)
    vars(module).update({item.__name__: item for item in (*_EVENTS, *_SIZES)})
    parts = {"utils": (*_EVENTS, *_SIZES), "utils.event": _EVENTS, "utils.envs": _SIZES}
    for stale in [name for name in sys.modules if name.startswith(f"{NAME}.")]:
        del sys.modules[stale]
    sys.modules[NAME] = module
    for name, items in parts.items():
        values = {item.__name__: item for item in items}
        part = sys.modules[f"{NAME}.{name}"] = _module(f"{NAME}.{name}", values)
        part.__path__ = []
        parent, _, last = f"{NAME}.{name}".rpartition(".")
        setattr(sys.modules[parent], last, part)
    return module


def _another() -> str | None:
    """Where another ``deep_ep`` is; None if there is none."""
    if NAME in sys.modules:
        return str(getattr(sys.modules[NAME], "__file__", "imported"))
    spec = importlib.util.find_spec(NAME)
    return None if spec is None else str(spec.origin)


def _module(name: str, values: Mapping[str, object]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin=__name__, is_package=True)
    vars(module).update(values)
    return module

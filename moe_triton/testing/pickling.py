"""Functions, results and exceptions on their way between processes.

With cloudpickle anything goes that a test writes: lambdas, closures, functions of ``__main__`` and
of modules that a worker could not import, such as the test modules of pytest's importlib mode.
Without it, functions have to be importable by name.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

try:
    import cloudpickle
except ImportError:
    cloudpickle = None

# Modules below these are importable in every process of this interpreter.
_INSTALLED = tuple(
    str(path) + os.sep
    for path in {
        *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
    }
)


def dump_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickle a call for a worker.

    Raises:
        TypeError: if the function, or something it refers to, cannot travel.
    """
    if cloudpickle is None:
        module = sys.modules.get(getattr(fn, "__module__", None) or "")
        if module is None or module.__name__ == "__main__" or module in _unimportable_modules():
            raise TypeError(
                "fn must be a function of a module that can be imported by name as long as "
                f"cloudpickle is not installed, got {fn!r}"
            )
        return _explain(pickle.dumps, (fn, args))
    with _by_value(_unimportable_modules()):
        return _explain(cloudpickle.dumps, (fn, args))


def dump_result(value: Any) -> bytes:
    """Pickle what a function returned.

    Raises:
        TypeError: if it cannot travel.
    """
    return _explain(pickle.dumps if cloudpickle is None else cloudpickle.dumps, value)


def load(data: bytes) -> Any:
    """Undo ``dump_call`` and ``dump_result``."""
    return pickle.loads(data)  # noqa: S301 (from our own workers, over a private pipe)


def dump_error(error: BaseException) -> bytes:
    """Pickle an exception so that ``load_error`` gives one of the same class and message.

    The usual way calls the class with ``args`` again, which fails, or gives another message, where
    ``__init__`` takes something else than it hands on. Then the exception travels without its
    ``__init__``. One that cannot travel at all becomes a ``RuntimeError`` with its name and text.
    """
    without_init = (type(error), error.args, dict(vars(error)))
    for candidate in (error, without_init, (type(error), (str(error),), {})):
        with contextlib.suppress(Exception):
            data = dump_result(candidate)
            if str(load_error(data)) == str(error):
                return data
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def load_error(data: bytes) -> BaseException:
    """Undo ``dump_error``."""
    found = load(data)
    if isinstance(found, BaseException):
        return found
    kind, args, state = found
    error: BaseException = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


def _explain(dumps: Callable[[Any], bytes], value: Any) -> bytes:
    # What a pickler raises depends on the object: TypeError, PicklingError, AttributeError, ...
    try:
        return dumps(value)
    except Exception as error:
        what = value[0] if isinstance(value, tuple) and value and callable(value[0]) else value
        raise TypeError(
            f"{type(what).__name__} {getattr(what, '__qualname__', '')} and what it refers to must "
            f"be picklable: {error}"
        ) from error


@contextlib.contextmanager
def _by_value(modules: list[ModuleType]) -> Iterator[None]:
    known = cloudpickle.list_registry_pickle_by_value()
    added = [module for module in modules if module.__name__ not in known]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


def _unimportable_modules() -> list[ModuleType]:
    """Loaded modules that ``import`` would not find again in a fresh process."""
    own = __name__.partition(".")[0]
    found = []
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        if (
            isinstance(origin, str)
            and name not in ("__main__", own)
            and module.__name__ == name
            and not name.startswith(own + ".")
            and not origin.startswith(_INSTALLED)
            and not _importable(name, origin)
        ):
            found.append(module)
    return found


def _importable(name: str, origin: str) -> bool:
    """Whether the import system finds this very file under this name."""
    parts = name.split(".")
    path: Any = None
    spec: ModuleSpec | None = None
    for count in range(1, len(parts) + 1):
        spec = _find_spec(".".join(parts[:count]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
        if path is None and count < len(parts):
            return False
    return spec is not None and os.path.realpath(spec.origin or "") == os.path.realpath(origin)


def _find_spec(name: str, path: Any) -> ModuleSpec | None:
    # importlib.util.find_spec would answer from sys.modules, which a fresh process does not have.
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None

"""Functions, results and exceptions on their way between processes.

With cloudpickle, lambdas, closures and functions of ``__main__`` travel, and functions of a module
that a worker cannot import, such as the test modules of pytest's importlib mode. Without it,
functions have to be importable by name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

try:
    import cloudpickle
except ImportError:
    cloudpickle = None


def dump_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickle a call for a worker.

    Raises:
        TypeError: the function, or something it refers to, cannot be pickled.
    """
    target = fn
    while isinstance(target, functools.partial):
        target = target.func
    module = sys.modules.get(getattr(target, "__module__", None) or "__main__")
    by_name = module is not None and _importable(module)
    if cloudpickle is None:
        if not by_name:
            raise TypeError(
                "fn must be a function of a module that can be imported by name as long as "
                f"cloudpickle is not installed, got {fn!r}"
            )
        return _explain(pickle.dumps, (fn, args))
    with contextlib.ExitStack() as stack:
        known = cloudpickle.list_registry_pickle_by_value()
        if module is not None and not by_name and module.__name__ not in {"__main__", *known}:
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        return _explain(cloudpickle.dumps, (fn, args))


def dump_result(value: Any) -> bytes:
    """Pickle what a function returned.

    Raises:
        TypeError: it cannot be pickled.
    """
    return _explain(pickle.dumps if cloudpickle is None else cloudpickle.dumps, value)


def load(data: bytes) -> Any:
    """Undo ``dump_call`` and ``dump_result``."""
    return pickle.loads(data)  # noqa: S301 (from our own workers, over a private pipe)


def dump_error(error: BaseException) -> bytes:
    """Pickle an exception so that ``load_error`` gives one of the same class and message.

    Unpickling calls the class with ``args`` again, which fails, or gives another message, where
    ``__init__`` takes other arguments than it passes on. Then the exception travels without its
    ``__init__``. One that cannot be pickled becomes a ``RuntimeError`` with its name and text.
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
    loaded = load(data)
    if isinstance(loaded, BaseException):
        return loaded
    cls, args, state = loaded
    error: BaseException = cls.__new__(cls, *args)
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


def _importable(module: ModuleType) -> bool:
    """Whether the import system of a fresh process finds this very file under this name."""
    spec, path = None, None
    for name in itertools.accumulate(module.__name__.split("."), "{}.{}".format):
        # importlib.util.find_spec would answer from sys.modules, which a fresh process lacks.
        specs = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next(filter(None, specs), None)
        if spec is None:
            return False
        path = spec.submodule_search_locations or ()
    origin = getattr(module, "__file__", None)
    if spec is None or origin is None or spec.origin is None:
        return False
    return os.path.realpath(spec.origin) == os.path.realpath(origin)

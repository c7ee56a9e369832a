"""Names of torch_npu that are not emulated: refused, or recorded by ``npu-run --list-missing``.

Without the option, asking for such a name raises. With it, a name that the program needs is a
``Placeholder``, whose calls return placeholders, so that the program runs on and asks for more.
"""

from __future__ import annotations

import dis
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from ..errors import UnavailableError
from . import settings

# The instructions of `module.name` and of imports. hasattr and getattr are calls, and a program
# that uses them has an answer to a name that is not there.
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM")
_PACKAGES = ("torch_npu.", "torch.npu.", "torchair.")


class NotEmulatedError(UnavailableError, AttributeError):
    """A name of torch_npu or torchair that has no stand-in.

    Also an ``AttributeError``, so that ``hasattr`` is False.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, "is not emulated by moe-triton npu-run")


def not_emulated(module: str, name: str) -> Any:
    """Refuse a name that a stand-in module lacks.

    Returns:
        With ``--list-missing`` a placeholder, if the program needs the name.

    Raises:
        NotEmulatedError: with the full name.
        AttributeError: for dunder names, which Python itself looks up.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    full_name = f"{module}.{name}"
    if settings.MISSING in os.environ:
        frame = _calling_frame()
        operation = _instruction(frame).opname
        # `from package import name` asks for the name before it imports a module of that name.
        if operation == "IMPORT_NAME" and importlib.util.find_spec(full_name) is not None:
            raise NotEmulatedError(full_name)
        _record(full_name, frame)
        if operation in _ATTRIBUTE:
            return Placeholder(full_name)
    raise NotEmulatedError(full_name)


def module_getattr(module: str) -> Callable[[str], Any]:
    """``__getattr__`` of a stand-in module, by its name in programs: refuse all other names."""
    return functools.partial(not_emulated, module)


def refuse_call(name: str) -> Any:
    """Refuse a call of a function that has a name here and cannot be imitated.

    Args:
        name: the full name.

    Returns:
        With ``--list-missing`` a placeholder.

    Raises:
        NotEmulatedError: with the full name.
    """
    if settings.MISSING not in os.environ:
        raise NotEmulatedError(name)
    _record(name, _calling_frame())
    return Placeholder(name)


class Placeholder:
    """The unknown value of a missing name, and of all that is computed from it.

    Where its value is needed, as by ``if`` or ``float``, it raises ``NotEmulatedError``.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}, which is not emulated>"

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Placeholder]:
        """As many as are unpacked, as in ``y, scale = torch_npu.npu_function(x)``."""
        instruction = _instruction(_calling_frame())
        if instruction.opname != "UNPACK_SEQUENCE":
            raise NotEmulatedError(self._name)
        return iter([self] * int(instruction.arg or 0))

    def __bool__(self) -> bool:
        raise NotEmulatedError(self._name)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Placeholder:
        """The result of a function of torch with a placeholder among its arguments."""
        del func, types
        arguments = [*args, *(kwargs or {}).values()]
        # Functions such as torch.cat take lists.
        flat = [x for a in arguments for x in (a if isinstance(a, list | tuple) else [a])]
        return next(x for x in flat if isinstance(x, Placeholder))


def _same(self: Placeholder, *_: object, **__: object) -> Placeholder:
    return self


def _unknown(self: Placeholder) -> Any:
    raise NotEmulatedError(self._name)


_BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_OTHERS = (
    *("call", "enter", "getitem", "setitem", "neg", "invert", "abs"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
)
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS):
    setattr(Placeholder, f"__{_name}__", _same)
for _name in ("float", "int", "index", "len"):
    setattr(Placeholder, f"__{_name}__", _unknown)
Placeholder.__hash__ = object.__hash__  # type: ignore[method-assign]


def _calling_frame() -> FrameType:
    """The innermost frame outside of the stand-ins and of Python's import system."""
    inside = (str(Path(__file__).parent), "<frozen importlib")
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(inside) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _instruction(frame: FrameType) -> dis.Instruction:
    """What the frame executes now."""
    return next(i for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti)


def _record(name: str, frame: FrameType) -> None:
    # One write in append mode: processes share the file.
    with Path(os.environ[settings.MISSING]).open("a", encoding="utf-8") as file:
        file.write(f"{name}\t{frame.f_code.co_filename}\t{frame.f_lineno}\n")


class _MissingModules(MetaPathFinder, Loader):
    """Records modules that the stand-in packages lack, and imports empty ones in their place."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """A module that an import statement names."""
        del path, target
        if not f"{fullname}.".startswith(_PACKAGES):
            return None
        frame = _calling_frame()
        instruction = _instruction(frame)
        # Not where `from torch_npu import name` tries whether the name is a module.
        if instruction.opname != "IMPORT_NAME" or not f"{instruction.argval}.".startswith(
            f"{fullname}."
        ):
            return None
        _record(fullname, frame)
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own."""

    def exec_module(self, module: ModuleType) -> None:
        """Let the module refuse all names."""
        module.__getattr__ = module_getattr(module.__name__)  # type: ignore[method-assign]


def install() -> None:
    """Record missing modules, for the rest of this process, if ``--list-missing`` asks for it."""
    if settings.MISSING in os.environ:
        sys.meta_path.append(_MissingModules())


def report(records: str) -> list[str]:
    """Lines for the user: each missing name, and all places that asked for it.

    Args:
        records: the text that processes have written.
    """
    places: dict[str, dict[str, None]] = {}
    for line in records.splitlines():
        name, file, number = line.split("\t")
        places.setdefault(name, {})[f"{file}:{number}"] = None
    return [f"{name}: {', '.join(where)}" for name, where in sorted(places.items())]

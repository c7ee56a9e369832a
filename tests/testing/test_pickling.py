"""Pickling of calls, results and exceptions, and the errors for what cannot be pickled."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import threading

import cloudpickle
import pytest

import moe_triton
from moe_triton import errors
from moe_triton.testing import pickling

LIMIT = 7


def module_level(number):
    return number + LIMIT


def in_fresh_process(data):
    """Unpickle a call in a process that cannot import this file, and return its result."""
    code = (
        "import sys; from moe_triton.testing import pickling\n"
        "fn, args = pickling.load(sys.stdin.buffer.read())\n"
        "sys.stdout.buffer.write(pickling.dump_result(fn(*args)))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    return pickling.load(done.stdout)


def test_functions_of_this_module_travel_by_value():
    offset, registered = 30, cloudpickle.list_registry_pickle_by_value()

    def closure(number):
        return module_level(number) + offset

    assert in_fresh_process(pickling.dump_call(closure, (5,))) == 42
    assert cloudpickle.list_registry_pickle_by_value() == registered


def load_module(path, name, monkeypatch):
    """Import a file the way pytest's importlib mode does: without a place on sys.path."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_only_what_cannot_be_imported_travels_by_value(tmp_path, monkeypatch):
    package = tmp_path / "a_package"
    package.mkdir()
    for name in ("__init__.py", "inner.py"):
        (package / name).write_text("def f():\n    return 1\n")
    module = load_module(package / "inner.py", "a_package.inner", monkeypatch)
    assert not pickling._importable(module)
    monkeypatch.syspath_prepend(tmp_path)
    assert pickling._importable(module)
    # The same name finds another file.
    other = tmp_path / "other.py"
    other.write_text("")
    assert not pickling._importable(load_module(other, "a_package.inner", monkeypatch))
    # A module is no package.
    assert not pickling._importable(load_module(other, "other.inner", monkeypatch))
    assert pickling._importable(pytest)
    assert pickling._importable(threading)


def test_a_lambda_needs_cloudpickle(tmp_path, monkeypatch):
    path = tmp_path / "unknown.py"
    path.write_text("def named():\n    return 1\n\nunnamed = lambda: 1\n")
    module = load_module(path, "unknown", monkeypatch)
    monkeypatch.setattr(pickling, "cloudpickle", None)
    fn, args = pickling.load(pickling.dump_call(moe_triton.testing.weights, (2, 2)))
    assert fn is moe_triton.testing.weights
    assert args == (2, 2)
    for local in (module.unnamed, module.named):
        with pytest.raises(TypeError, match="imported by name as long as cloudpickle is not"):
            pickling.dump_call(local, ())


def test_what_cannot_travel_is_named():
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"function .*<lambda> and what it refers to .* pickle"):
        pickling.dump_call(lambda: lock, ())
    with pytest.raises(TypeError, match=r"list .* must be picklable"):
        pickling.dump_result([lock])


class RenamedError(ValueError):
    """Its arguments are not those of ``__init__``, so that the usual way gives another message."""

    def __init__(self, name):
        super().__init__(f"no {name}")
        self.name = name


class KeywordError(ValueError):
    """The usual way cannot make this one at all."""

    def __init__(self, *, name):
        super().__init__(f"no {name}")
        self.name = name


class HeavyError(ValueError):
    """Holds what cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        OSError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        SystemExit(3),
        RenamedError("name"),
        KeywordError(name="name"),
        errors.PeerAbortError("dispatch", 3, "bad ids"),
        errors.PeerTimeoutError("dispatch", (1, 2), "ranks 1, 2 did not come"),
        errors.ArgumentMismatchError("dispatch", "hidden", 64, 128, rank=2),
        errors.ArgumentValueError("dispatch", "topk_ids", "be in [0, 8)", 9),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_keep_class_message_and_attributes(error):
    copy = pickling.load_error(pickling.dump_error(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.args == error.args


def test_an_exception_that_holds_too_much_keeps_class_and_message():
    copy = pickling.load_error(pickling.dump_error(HeavyError("full")))
    assert type(copy) is HeavyError
    assert str(copy) == "full"


def test_an_exception_that_cannot_travel_becomes_a_runtime_error(monkeypatch):
    monkeypatch.setattr(pickling, "cloudpickle", None)

    class LocalError(Exception):
        pass

    data = pickling.dump_error(LocalError("gone"))
    assert type(pickle.loads(data)) is RuntimeError
    assert str(pickling.load_error(data)) == "LocalError: gone"

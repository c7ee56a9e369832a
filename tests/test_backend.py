"""The choice of the back end: by device, by name, and the cause when it cannot run."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moe_triton import backend
from moe_triton.errors import UnavailableError
from moe_triton.ops import device_steps


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    yield
    backend.set_backend(None)


def test_choice_by_device():
    assert backend.get_backend() == "cpu"
    assert backend.get_backend(torch.device("cpu")) == "cpu"


def test_choice_by_environment_and_by_call(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "cuda")
    with pytest.raises(UnavailableError, match="'cuda' needs tensors on its device"):
        backend.get_backend("cpu")
    backend.set_backend("cpu")
    assert backend.get_backend("cpu") == "cpu"


def test_each_choice_is_logged_once_with_its_reason(monkeypatch, caplog):
    backend._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "moe_triton"):
        for _ in range(3):
            backend.get_backend("cpu")
        monkeypatch.setenv(backend.ENVIRONMENT, "cpu")
        backend.get_backend("cpu")
        backend.set_backend("cpu")
        backend.get_backend("cpu")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "back end cpu for tensors of cpu, because of their device"),
        ("INFO", "back end cpu for tensors of cpu, because MOE_TRITON_BACKEND is set"),
        ("INFO", "back end cpu for tensors of cpu, because set_backend() chose it"),
    ]


@pytest.mark.parametrize(
    "name", [name for name in backend.BACKENDS if name not in ("cpu", "interpret")]
)
def test_a_back_end_that_cannot_run_gives_the_cause(name):
    cause = backend.unavailable_because(name)
    assert cause
    with pytest.raises(UnavailableError) as caught:
        backend.set_backend(name)
    assert cause in str(caught.value)


@pytest.mark.parametrize("name", ["", "CPU", "tpu"])
def test_unknown_names(name):
    with pytest.raises(UnavailableError, match="backend must be one of"):
        backend.set_backend(name)


def test_an_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "tpu")
    with pytest.raises(UnavailableError, match="got 'tpu'"):
        backend.get_backend()


def test_a_device_without_a_back_end():
    with pytest.raises(UnavailableError):
        backend.get_backend("meta")


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton takes the current device; making it current costs nothing where it is already."""
    current = []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    module = SimpleNamespace(device=device, current_device=lambda: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    for index in range(2):
        here = torch.device("cuda", index)
        step = device_steps._launched(here, lambda *_: [*current])
        assert step() == ([here] if index else [])


def run(code: str, **environment) -> str:
    """The output of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in os.environ.items() if name != backend.INTERPRETER}
        | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


CHOOSE = """
import sys
{before}
from moe_triton import MoeError, get_backend, set_backend
try:
    {choose}
    print(get_backend(), "triton" in sys.modules)
    import triton.language as tl
    print(type(tl.cdiv).__name__)
except MoeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "choose, environment",
    [
        ('set_backend("interpret")', {}),
        ("pass", {backend.ENVIRONMENT: "interpret"}),
        ('set_backend("interpret")', {backend.INTERPRETER: "1"}),
    ],
)
def test_the_interpreter_is_on_when_triton_comes_later(choose, environment):
    printed = run(CHOOSE.format(before="", choose=choose), **environment)
    assert printed.split() == ["interpret", "False", "InterpretedFunction"]


def test_the_interpreter_cannot_be_switched_on_afterwards():
    code = CHOOSE.format(before="import triton", choose='set_backend("interpret")')
    assert "Triton was imported before TRITON_INTERPRET=1 was set" in run(code)
    assert run(code, **{backend.INTERPRETER: "1"}).split()[0] == "interpret"


def test_the_interpreter_needs_triton(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="Triton is not installed"):
        backend.set_backend("interpret")

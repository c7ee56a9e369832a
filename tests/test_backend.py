"""The choice of the back end: by device, by name, and the reason when it cannot be."""

from __future__ import annotations

import pytest
import torch

from moe_triton import backend
from moe_triton.errors import UnavailableError


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    yield
    backend.set_backend(None)


def test_the_device_decides():
    assert backend.get_backend() == "cpu"
    assert backend.get_backend(torch.device("cpu")) == "cpu"


def test_a_choice_by_environment_and_by_call(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "cuda")
    with pytest.raises(UnavailableError, match="'cuda' needs tensors on its device"):
        backend.get_backend("cpu")
    backend.set_backend("cpu")
    assert backend.get_backend("cpu") == "cpu"


@pytest.mark.parametrize("name", [name for name in backend.BACKENDS if name != "cpu"])
def test_what_cannot_run_says_why(name):
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

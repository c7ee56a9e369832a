"""Kernels run on the GPU where there is one, and otherwise in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined: before this, nothing may import one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device():
    """Where the kernels under test run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cpu" if interpreted else "cuda", None if interpreted else 0)


@pytest.fixture
def asserting(monkeypatch, device):
    """Device assertions fail, as they do on a GPU when debugging."""
    if device.type != "cpu":
        pytest.skip("a failed assertion ends the process that uses the device")
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)

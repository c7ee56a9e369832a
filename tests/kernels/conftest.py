"""Kernels run on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, so set it before the first import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device():
    """Where the kernels under test run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cpu" if interpreted else "cuda", None if interpreted else 0)


@pytest.fixture(params=["kernels", "ref"])
def steps(request):
    """The launchers, then their definitions: both must give numbers worked out by hand."""
    return importlib.import_module(f"moe_triton.{request.param}")


@pytest.fixture
def asserting(monkeypatch, device):
    """Enable device assertions, as on a GPU in debug mode."""
    if device.type != "cpu":
        pytest.skip("a failed assertion ends the process that uses the device")
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def reserve(device):
    """``reserve(num_bytes)`` skips the test if a GPU has less free memory.

    A CPU only reserves untouched memory; a GPU must have it.
    """

    def check(num_bytes: int) -> None:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if free < num_bytes:
                pytest.skip(f"{num_bytes} bytes of device memory are needed, {free} are free")

    return check


@pytest.fixture
def captured(device):
    """``captured(call)`` returns a function that replays the launches of ``call``.

    On a GPU it replays a graph. The interpreter has no graphs: it repeats the call.
    """

    def capture(call):
        if device.type == "cpu":
            return call
        torch.cuda.synchronize()  # copies of inputs on another stream may be in flight
        with torch.cuda.stream(torch.cuda.Stream()):
            call()  # compiles, and copies to the device what is copied once
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    return capture

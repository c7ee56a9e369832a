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


@pytest.fixture
def reserve(device):
    """``reserve(size)`` skips the test where so many bytes cannot be had.

    A CPU only reserves what nobody touches; a GPU has it or not.
    """

    def check(num_bytes: int) -> None:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if free < num_bytes:
                pytest.skip(f"{num_bytes} bytes of device memory are needed, {free} are free")

    return check


@pytest.fixture
def captured(device):
    """``captured(call)`` repeats the launches of ``call``, in the memory that they had.

    On a GPU it replays a graph. The interpreter has no graphs: there the call itself is made again.
    """

    def capture(call):
        if device.type == "cpu":
            return call
        torch.cuda.synchronize()  # inputs may still be on their way, on another stream
        with torch.cuda.stream(torch.cuda.Stream()):
            call()  # what is compiled and copied to the device once comes before the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    return capture

"""Both tables of device steps have the signatures of the Protocol, and launches their guards."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_triton import backend, kernels, ref
from moe_triton.comm import DeviceSteps
from moe_triton.comm.transport import WindowSteps
from moe_triton.ops import device_steps, steps_on

NAMES = [
    name
    for protocol in (WindowSteps, DeviceSteps, device_steps.Steps)
    for name in vars(protocol)
    if not name.startswith("_")
]


def parameters(step) -> list[tuple]:
    """Name, default and annotation of each parameter but self; positional-only ones unnamed."""
    return [
        (
            None if parameter.kind is parameter.POSITIONAL_ONLY else name,
            parameter.default,
            parameter.annotation.replace("torch.Tensor", "Tensor"),
        )
        for name, parameter in inspect.signature(step).parameters.items()
        if name != "self"
    ]


def returned(step) -> str:
    return inspect.signature(step).return_annotation.replace("torch.Tensor", "Tensor")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", [ref, kernels], ids=["ref", "kernels"])
def test_a_step_has_the_signature_of_the_protocol(table, name):
    promised, step = getattr(device_steps.Steps, name), getattr(table, name)
    for wanted, got in zip(parameters(promised), parameters(step), strict=True):
        assert wanted[0] in (None, got[0])
        assert wanted[1:] == got[1:]
    assert returned(promised) == returned(step)


def test_ref_is_the_table_of_the_cpu(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT, "cpu")
    assert steps_on(torch.device("cpu")) is ref


def test_the_interpreter_runs_one_program_at_a_time():
    """Numpy, which it computes with, does not warn of intended zeros and NaNs."""
    running, most = [], []

    def step(number):
        running.append(number)
        most.append(len(running))
        np.zeros(1) / np.zeros(1)
        running.remove(number)

    guarded = device_steps._interpreted(step)
    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_launch_takes_a_lock_only_where_triton_compiles_in_an_unknown_way(monkeypatch):
    current = []
    module = SimpleNamespace(current_device=lambda: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)

    def step():
        current.append(device_steps._launch.locked())

    fake = SimpleNamespace(**dict.fromkeys(NAMES, step))
    monkeypatch.setattr(device_steps, "_kernels", lambda: fake)
    for known in (True, False):
        monkeypatch.setattr(device_steps, "compile_once", lambda _, known=known: known)
        steps = device_steps._launched_steps.__wrapped__(torch.device("cuda", 0))
        for name in NAMES:
            getattr(steps, name)()
        assert current == [not known] * len(NAMES)
        current.clear()


# Triton with a driver that only writes down what would be launched.
LAUNCH = """
import json, sys, threading, time
from types import SimpleNamespace
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from moe_triton.ops import compile_once

@triton.jit
def _copy_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + SIZE, tl.load(x_ptr))

loads, launches = [], []

def load_binary(name, kernel, shared, device):
    loads.append(name)
    time.sleep(0.1)
    return object(), len(loads), 0, 0, 1024

def launcher(source, metadata):
    return lambda x, y, z, stream, function, *rest: launches.append(function)

properties = {"max_shared_mem": 2**20}
utils = SimpleNamespace(load_binary=load_binary, get_device_properties=lambda _: properties)
driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda _: 0, utils=utils,
    get_current_target=lambda: GPUTarget("cuda", 90, 32), launcher_cls=launcher,
))
if not compile_once.compile_once("moe_triton.kernels"):
    print("null")
    sys.exit()
compile_once.guard(_copy_kernel)
x = torch.zeros(64)

def run():
    for size in (16, 32):
        _copy_kernel[(1,)](x, size)

threads = [threading.Thread(target=run) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps([len(loads), launches]))
"""


def test_threads_load_a_kernel_once_and_launch_no_null_function(tmp_path):
    """Without the guard they load about 11 binaries for these two kernels."""
    script = tmp_path / "launch.py"
    script.write_text(LAUNCH, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != backend.INTERPRETER}
    done = subprocess.run(
        [sys.executable, script],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    counted = json.loads(done.stdout)
    if counted is None:
        pytest.skip("this Triton compiles in another way, and each launch takes a lock")
    loads, functions = counted
    assert loads == 2
    assert len(functions) == 12
    assert set(functions) == {1, 2}

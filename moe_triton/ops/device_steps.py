"""The table of device steps of each back end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import ref
from ..backend import get_backend
from ..comm import DeviceSteps

# Ranks may be threads. Triton's interpreter keeps the program that it is in at one place for all of
# them, and its compiler does not expect two that ask for the same kernel.
_triton = threading.Lock()


def steps_on(device: torch.device) -> DeviceSteps:
    """The steps for tensors on ``device``; ``UnavailableError`` when its back end cannot run."""
    return _table(get_backend(device))


def local_step(name: str, device: torch.device) -> Callable[..., Any]:
    """A step that no transport needs, by its name in ``ref``; errors as above."""
    return _step(get_backend(device), name)


@functools.cache
def _table(backend: str) -> DeviceSteps:
    names = {field.name for field in dataclasses.fields(DeviceSteps)} - {"fixed_shapes"}
    # On the CPU a value is as near as a shape, so that memory need not be set aside for the worst.
    fixed_shapes = backend not in ("cpu", "interpret")
    return DeviceSteps(fixed_shapes, **{name: _step(backend, name) for name in names})


@functools.cache
def _step(backend: str, name: str) -> Callable[..., Any]:
    if backend == "cpu":
        return getattr(ref, name)
    # Only here: importing the kernels imports Triton, as an interpreter or not.
    step = getattr(importlib.import_module("moe_triton.kernels"), name)
    return _one_at_a_time(step)


def _one_at_a_time(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The interpreter computes with numpy, which warns of zeros and NaNs that are meant.
        with _triton, np.errstate(all="ignore"), _current(_device_of(args)):
            return step(*args, **kwargs)

    return call


def _device_of(args: tuple[Any, ...]) -> torch.device:
    """That of the first tensor, which may be that of a plan."""
    first = args[0]
    while isinstance(first, tuple):
        first = first[0]
    device: torch.device = first.device
    return device


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its stream, wherever the tensors are."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    current: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return current

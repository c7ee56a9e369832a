"""The device steps of each back end, as one typed table.

``moe_triton.ref`` is the table of the CPU. The kernels' launchers need a guard around each call:
Triton launches on the current device, and neither its interpreter nor its compiler expects threads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import ref
from ..backend import get_backend
from ..comm import DeviceSteps
from ..comm.all_to_all import use_steps
from .compile_once import compile_once

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Steps(DeviceSteps, Protocol):
    """The steps of transports, and those that only operators of one device call."""

    def top_k_gating(
        self,
        logits: Tensor,
        top_k: int,
        /,
        *,
        bias: Tensor | None = None,
        chosen_ids: Tensor | None = None,
        groups: int = 1,
        top_groups: int = 1,
        group_by_two: bool = False,
        scoring: str = "softmax",
        scaling: float = 1.0,
        epsilon: float = 1e-20,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose each token's experts: weights, ids and scores."""

    def eplb_map(
        self, expert_ids: Tensor, table: Tensor, /, *, rank: int | None, world_size: int
    ) -> Tensor:
        """Choose the replica of each expert."""

    def keep_experts(self, weights: Tensor, threshold: Tensor, active: Tensor | None, /) -> Tensor:
        """Mark the slots whose weight reaches the threshold."""

    def finalize_routing(
        self,
        rows: Tensor,
        index: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
        expert_ids: Tensor | None,
        skips: tuple[Tensor | None, Tensor | None],
        out: Tensor,
        /,
    ) -> None:
        """Sum the rows of each token with weights, biases and skip connections."""

    def quantize_affine(self, x: Tensor, scale: Tensor, offset: Tensor, /) -> Tensor:
        """Quantise rows to int8 with a scale and an offset."""


def steps_on(device: torch.device) -> Steps:
    """The steps for tensors on ``device``; ``UnavailableError`` when its back end cannot run."""
    backend = get_backend(device)
    if backend == "cpu":
        return ref
    return _interpreted_steps() if backend == "interpret" else _launched_steps(device)


use_steps(steps_on)


class _Guard(Protocol):
    def __call__(self, step: Callable[_P, _T], /) -> Callable[_P, _T]: ...


class _Guarded:
    """``steps``, each behind a guard."""

    def __init__(self, guard: _Guard, steps: Steps) -> None:
        self.dispatch_send = guard(steps.dispatch_send)
        self.dispatch_totals = guard(steps.dispatch_totals)
        self.dispatch_recv = guard(steps.dispatch_recv)
        self.combine_send = guard(steps.combine_send)
        self.combine_recv = guard(steps.combine_recv)
        self.send_record = guard(steps.send_record)
        self.recv_records = guard(steps.recv_records)
        self.routing_plan = guard(steps.routing_plan)
        self.recv_permutation = guard(steps.recv_permutation)
        self.recv_row_index = guard(steps.recv_row_index)
        self.local_permutation = guard(steps.local_permutation)
        self.combine_row_index = guard(steps.combine_row_index)
        self.gather_quant = guard(steps.gather_quant)
        self.zero_padding = guard(steps.zero_padding)
        self.gather_rows = guard(steps.gather_rows)
        self.encode = guard(steps.encode)
        self.add_rows = guard(steps.add_rows)
        self.weighted_sum = guard(steps.weighted_sum)
        self.top_k_gating = guard(steps.top_k_gating)
        self.eplb_map = guard(steps.eplb_map)
        self.keep_experts = guard(steps.keep_experts)
        self.finalize_routing = guard(steps.finalize_routing)
        self.quantize_affine = guard(steps.quantize_affine)


def _kernels() -> Steps:
    # Imports Triton, as an interpreter or not.
    from .. import kernels

    return kernels


@functools.cache
def _interpreted_steps() -> Steps:
    return _Guarded(_interpreted, _kernels())


# The interpreter keeps the running program in one place for all threads, and ranks may be threads.
_interpreter = threading.Lock()


def _interpreted(step: Callable[_P, _T]) -> Callable[_P, _T]:
    @functools.wraps(step)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        # The interpreter computes with numpy, which warns of intended zeros and NaNs.
        with _interpreter, np.errstate(all="ignore"):
            return step(*args, **kwargs)

    return call


@functools.cache
def _launched_steps(device: torch.device) -> Steps:
    steps = _Guarded(functools.partial(_launched, device), _kernels())
    return steps if compile_once("moe_triton.kernels") else _Guarded(_locked, steps)


def _launched(device: torch.device, step: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make ``device`` the current one, on which Triton launches."""
    module = torch.get_device_module(device)

    @functools.wraps(step)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if module.current_device() == device.index:
            return step(*args, **kwargs)
        with module.device(device):
            return step(*args, **kwargs)

    return call


_launch = threading.Lock()


def _locked(step: Callable[_P, _T]) -> Callable[_P, _T]:
    """Serialise the launches of all threads."""

    @functools.wraps(step)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _launch:
            return step(*args, **kwargs)

    return call

"""The public all-to-all-v, over windows or torch.distributed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist

from ..errors import ArgumentTypeError, ArgumentValueError, MoeError
from ..topology import Topology
from .groups import resolve
from .registry import default_communicator
from .transport import Call, DeviceSteps
from .window import MoeConfig

_OP = "all_to_all_v"

_FindSteps: TypeAlias = "Callable[[torch.device], DeviceSteps]"
_find_steps: _FindSteps | None = None


def use_steps(find: _FindSteps) -> None:
    """Set who knows the steps on a device: this package does not know the back ends."""
    global _find_steps
    _find_steps = find


def all_to_all_v(
    x: torch.Tensor,
    send_counts: Sequence[int] | torch.Tensor,
    *,
    group: dist.ProcessGroup | str | None = None,
    rank: int | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """All-to-all-v: send consecutive rows of ``x`` to each rank of a group.

    Args:
        x: [N, ...] of any dtype, on the CPU; trailing shape and dtype equal on all ranks.
        send_counts: [W] rows for each rank, in the order of ``x``; they add up to N.
        group: a process group, a group's name, or None for the default process group.
        rank: this rank, for an in-process group whose thread is not bound.

    Returns:
        The received rows, ordered by source rank, and their number from each rank.

    Raises:
        ArgumentTypeError, ArgumentValueError: ``x`` or the counts break their contract.
        ArgumentMismatchError: the ranks' rows differ in size.
        PeerAbortError, PeerTimeoutError, BrokenGroupError: a peer failed.
    """
    own = resolve(_OP, group, rank)
    communicator = default_communicator(own)
    try:
        counts = _check(x, send_counts, own.size)
    except MoeError as error:
        communicator.abort_peers("exchange", _OP, error)
        raise
    row_bytes = math.prod(x.shape[1:]) * x.itemsize
    raw = x.contiguous().reshape(-1).view(torch.uint8).view(len(x), row_bytes)
    assert _find_steps is not None
    call = exchange_call(_OP, own.size, _find_steps(x.device), x.device)
    received = communicator.transport(_OP, call, "exchange").all_to_all_v(call, raw, counts)
    rows = torch.cat(received).view(x.dtype).reshape(-1, *x.shape[1:])
    return rows, [part.numel() // row_bytes for part in received]


def exchange_call(op: str, world_size: int, steps: DeviceSteps, device: torch.device) -> Call:
    """The call of an all-to-all-v; sizes and formats of rows come with ``x``."""
    config = MoeConfig(Topology(world_size, world_size), 1, 1, 1)
    return Call(op, config, {}, steps, device)


def _check(x: torch.Tensor, send_counts: Sequence[int] | torch.Tensor, world: int) -> list[int]:
    if not isinstance(x, torch.Tensor):
        raise ArgumentTypeError(_OP, "x", "be a tensor", type(x))
    if x.dim() == 0 or x.device.type != "cpu" or math.prod(x.shape[1:]) == 0:
        got = f"shape {tuple(x.shape)} on {x.device}"
        raise ArgumentValueError(_OP, "x", "have rows of at least one element, on the CPU", got)
    if isinstance(send_counts, torch.Tensor):
        integers = send_counts.dim() == 1 and not send_counts.is_floating_point()
        counts = send_counts.tolist() if integers else None
    else:
        integers = isinstance(send_counts, Sequence)
        integers = integers and all(isinstance(c, numbers.Integral) for c in send_counts)
        counts = [int(count) for count in send_counts] if integers else None
    if counts is None:
        contract = "be a sequence or 1-d tensor of integers"
        raise ArgumentTypeError(_OP, "send_counts", contract, repr(send_counts))
    if len(counts) != world or min(counts) < 0 or sum(counts) != len(x):
        raise ArgumentValueError(
            _OP, "send_counts", f"be {world} counts that add up to {len(x)}", counts
        )
    return counts

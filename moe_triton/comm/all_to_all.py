"""The public all-to-all-v, over windows or torch.distributed."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TypeAlias, overload

import torch
import torch.distributed as dist

from ..errors import ArgumentTypeError, ArgumentValueError, MoeError
from ..topology import Topology
from .communicator import Communicator
from .groups import resolve
from .registry import default_communicator
from .transport import Call, DeviceSteps, DispatchInput
from .window import MoeConfig

_OP = "all_to_all_v"
# Numbers that the steps move as they are, by their bytes.
_WORDS = {1: None, 2: torch.float16, 4: torch.float32, 8: torch.float64}

_FindSteps: TypeAlias = "Callable[[torch.device], DeviceSteps]"
_find_steps: _FindSteps | None = None


def use_steps(find: _FindSteps) -> None:
    """Set who knows the steps on a device: this package does not know the back ends."""
    global _find_steps
    _find_steps = find


@overload
def all_to_all_v(
    x: torch.Tensor,
    send_counts: Sequence[int] | torch.Tensor,
    *,
    capacity: None = None,
    group: dist.ProcessGroup | str | None = None,
    rank: int | None = None,
) -> tuple[torch.Tensor, list[int]]: ...


@overload
def all_to_all_v(
    x: torch.Tensor,
    send_counts: Sequence[int] | torch.Tensor,
    *,
    capacity: int,
    group: dist.ProcessGroup | str | None = None,
    rank: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def all_to_all_v(
    x: torch.Tensor,
    send_counts: Sequence[int] | torch.Tensor,
    *,
    capacity: int | None = None,
    group: dist.ProcessGroup | str | None = None,
    rank: int | None = None,
) -> tuple[torch.Tensor, list[int] | torch.Tensor]:
    """All-to-all-v: send consecutive rows of ``x`` to each rank of a group.

    Without a capacity the host reads how many rows come, and waits for a device. With one, no host
    waits for a device where the ranks have windows, and a graph can hold the call; its first call
    with new sizes must come before the capture.

    Args:
        x: [N, ...] of any dtype, on the CPU or a device; trailing shape and dtype equal on all
            ranks.
        send_counts: [W] rows for each rank, in the order of ``x``, as integers or a tensor. They
            add up to N; with a capacity to at most N, and the last rows stay here.
        capacity: the most rows that any rank sends or receives, equal on all ranks, or None.
        group: a process group, a group's name, or None for the default process group.
        rank: this rank, for an in-process group whose thread is not bound.

    Returns:
        rows: [R, ...] the received rows, ordered by source rank. With a capacity R is the capacity,
            and rows after the last one hold garbage.
        counts: [W] their number from each rank: a list, or with a capacity an int64 tensor on the
            device of ``x``.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks its contract. On a device the
            values of ``send_counts`` are not read.
        ArgumentMismatchError: the ranks' rows differ in size, or their capacities.
        ReceiveOverflowError: on the CPU and over collectives, a rank receives more rows than the
            capacity. On a device with windows such rows are left out, and the counts show it.
        PeerAbortError, PeerTimeoutError, BrokenGroupError: a peer failed.
        UnavailableError: the device cannot be used.
    """
    own = resolve(_OP, group, rank)
    communicator = default_communicator(own)
    assert _find_steps is not None
    try:
        _check_rows(x, capacity)
        counts = _check_counts(x, send_counts, own.size, exactly=capacity is None)
        steps = _find_steps(x.device)
    except MoeError as error:
        communicator.abort_peers("exchange" if capacity is None else "dispatch", _OP, error)
        raise
    row_bytes = math.prod(x.shape[1:]) * x.itemsize
    raw = x.detach().contiguous().reshape(-1).view(torch.uint8).view(len(x), row_bytes)
    if capacity is not None:
        return _within(capacity, communicator, steps, x, raw, counts)
    call = exchange_call(_OP, own.size, steps, x.device)
    transport = communicator.transport(_OP, call, "exchange")
    received = transport.all_to_all_v(call, raw, _listed(counts))
    rows = torch.cat(received).view(x.dtype).reshape(-1, *x.shape[1:])
    return rows, [part.numel() // row_bytes for part in received]


def _within(
    capacity: int,
    communicator: Communicator,
    steps: DeviceSteps,
    x: torch.Tensor,
    raw: torch.Tensor,
    counts: list[int] | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exchange as a dispatch of rows to ranks, each of which is one expert."""
    world, row_bytes, device = communicator.group.size, raw.shape[1], x.device
    dtype = _WORDS[math.gcd(row_bytes, 8)]
    if dtype is None:
        raw, dtype = torch.nn.functional.pad(raw, (0, 1)), torch.float16
    words, call = raw.view(dtype), exchange_call(_OP, world, steps, device)
    config = MoeConfig(
        Topology(world, world),
        1,
        words.shape[1],
        capacity,
        dtype,
        # A limit is compared with the counts of all ranks by the host.
        max_rows=None if call.fixed_shapes else capacity,
    )
    arguments = {"op": _OP, "row_bytes": row_bytes, "capacity": capacity}
    call = dataclasses.replace(call, config=config, arguments=arguments)
    ends = torch.as_tensor(counts, device=device).cumsum(0)
    # Rows after the last count get the number W, and are not sent.
    ranks = torch.bucketize(torch.arange(len(x), device=device), ends, out_int32=True, right=True)
    transport = communicator.transport(_OP, call)
    sent = DispatchInput(words, ranks[:, None], num_rows=capacity)
    received = transport.dispatch_recv(transport.dispatch_send(call, sent))
    rows = received.x.view(torch.uint8)[:, :row_bytes].contiguous().view(x.dtype)
    return rows.view(capacity, *x.shape[1:]), received.counts[0].long()


def exchange_call(op: str, world_size: int, steps: DeviceSteps, device: torch.device) -> Call:
    """The call of an all-to-all-v; sizes and formats of rows come with ``x``."""
    config = MoeConfig(Topology(world_size, world_size), 1, 1, 1)
    return Call(op, config, {}, steps, device)


def _check_rows(x: torch.Tensor, capacity: int | None) -> None:
    if not isinstance(x, torch.Tensor):
        raise ArgumentTypeError(_OP, "x", "be a tensor", type(x))
    if x.dim() == 0 or x.is_meta or math.prod(x.shape[1:]) == 0:
        got = f"shape {tuple(x.shape)} on {x.device}"
        raise ArgumentValueError(_OP, "x", "have rows of at least one element, in memory", got)
    if capacity is None:
        return
    if not isinstance(capacity, numbers.Integral) or isinstance(capacity, bool):
        raise ArgumentTypeError(_OP, "capacity", "be an integer or None", repr(capacity))
    if capacity < max(len(x), 1):
        contract = f"be at least 1 and the {len(x)} rows of x"
        raise ArgumentValueError(_OP, "capacity", contract, capacity)


def _check_counts(
    x: torch.Tensor, send_counts: Sequence[int] | torch.Tensor, world: int, *, exactly: bool
) -> list[int] | torch.Tensor:
    """The counts; a tensor on a device, whose values only its owner knows, as it is."""
    if isinstance(send_counts, torch.Tensor):
        integers = send_counts.dim() == 1 and not send_counts.is_floating_point()
        if integers and not exactly and send_counts.device.type != "cpu":
            if len(send_counts) != world or send_counts.device != x.device:
                got = f"{len(send_counts)} on {send_counts.device}"
                contract = f"be {world} counts on the device of x"
                raise ArgumentValueError(_OP, "send_counts", contract, got)
            return send_counts
        counts = send_counts.tolist() if integers else None
    else:
        integers = isinstance(send_counts, Sequence)
        integers = integers and all(isinstance(c, numbers.Integral) for c in send_counts)
        counts = [int(count) for count in send_counts] if integers else None
    if counts is None:
        contract = "be a sequence or 1-d tensor of integers"
        raise ArgumentTypeError(_OP, "send_counts", contract, repr(send_counts))
    total = sum(counts)
    fits = total == len(x) if exactly else total <= len(x)
    if len(counts) != world or min(counts) < 0 or not fits:
        sums = f"{world} counts that add up to {'' if exactly else 'at most '}{len(x)}"
        raise ArgumentValueError(_OP, "send_counts", f"be {sums}", counts)
    return counts


def _listed(counts: list[int] | torch.Tensor) -> list[int]:
    return counts.tolist() if isinstance(counts, torch.Tensor) else counts

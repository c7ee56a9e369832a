"""What a group has under way between setups and teardowns of the split-phase ops.

A teardown takes the oldest setup of its kind. The first word of comm_cmd_info is the number of the
setup, by which a teardown with what another setup returned is told.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...comm import Communicator, Pending, Transport
from ...errors import PeerTimeoutError, SequenceError
from ...ops import checks
from .dispatch import Dispatch

_numbers = itertools.count(1)
_lock = threading.Lock()  # ranks may be threads


@dataclasses.dataclass
class PendingOp:
    """An operation between setup and teardown.

    Attributes:
        pending: the transport's part.
        arguments: what the teardown must repeat, by name.
        dispatch: of a dispatch.
        number: of the setup, as comm_cmd_info says.
    """

    pending: Pending[Any]
    arguments: dict[str, Any]
    dispatch: Dispatch | None = None
    number: int = dataclasses.field(default_factory=lambda: next(_numbers) % 2**31)


_under_way: weakref.WeakKeyDictionary[Communicator, dict[str, list[PendingOp]]] = (
    weakref.WeakKeyDictionary()
)


def _queue(communicator: Communicator, kind: str) -> list[PendingOp]:
    with _lock:
        return _under_way.setdefault(communicator, {}).setdefault(kind, [])


def start(communicator: Communicator, kind: str, op: str, started: PendingOp) -> torch.Tensor:
    """Keep an operation; returns the first word of its comm_cmd_info."""
    queue, transport = _queue(communicator, kind), communicator.transport(op)
    # What recover() has given up is nobody's any more.
    queue[:] = [one for one in queue if one.pending.owner is transport]
    queue.append(started)
    return torch.tensor([started.number], dtype=torch.int32)


def find(
    op: str, communicator: Communicator, kind: str, info: torch.Tensor, arguments: dict[str, Any]
) -> PendingOp:
    """The oldest operation under way, if it is the one that the arguments of a teardown mean.

    Raises:
        SequenceError: none is under way.
        ArgumentValueError: the arguments are not those of its setup.
    """
    queue = _queue(communicator, kind)
    if queue:  # else there may be nobody to meet
        transport = communicator.transport(op)
        queue = [one for one in queue if one.pending.owner is transport]
    if not queue:
        raise SequenceError(
            op, f"a {kind} setup must come before its teardown, got none in flight for this group"
        )
    started = queue[0]
    for name, expected in started.arguments.items():
        got = arguments[name]
        checks.value(op, name, got == expected, f"be {expected}, as in the setup", got)
    checks.shape(op, "comm_cmd_info", info, (None,), "(words,)", info.device)
    number = int(info[0]) if len(info) else 0
    contract = f"be what setup number {started.number}, the oldest in flight, returned"
    held = number == started.number
    checks.value(op, "comm_cmd_info", held, contract, f"that of number {number}")
    return started


def _forget(communicator: Communicator, kind: str, started: PendingOp) -> None:
    queue = _queue(communicator, kind)
    queue[:] = [one for one in queue if one is not started]


@contextmanager
def torn_down(
    op: str, communicator: Communicator, kind: str, started: PendingOp
) -> Iterator[Transport]:
    """Within it the operation is torn down; it stays under way if that can be tried again."""
    try:
        yield communicator.transport(op)
    except (PeerTimeoutError, SequenceError):
        raise
    except BaseException:
        _forget(communicator, kind, started)
        raise
    _forget(communicator, kind, started)

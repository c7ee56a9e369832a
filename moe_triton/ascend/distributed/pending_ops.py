"""Operations between setup and teardown of the split-phase ops, in order for each group.

A teardown takes the oldest setup of its kind. The first word of comm_cmd_info is the number of the
setup, so that a teardown with another setup's outputs is refused.
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
from .dispatch import CheckedDispatch

_numbers = itertools.count(1)
_lock = threading.Lock()  # ranks may be threads


@dataclasses.dataclass
class PendingOp:
    """An operation between setup and teardown.

    Attributes:
        pending: the transport's part.
        arguments: those that the teardown must repeat, by name.
        dispatch: of a dispatch.
        number: of the setup, in comm_cmd_info.
    """

    pending: Pending[Any]
    arguments: dict[str, Any]
    dispatch: CheckedDispatch | None = None
    number: int = dataclasses.field(default_factory=lambda: next(_numbers) % 2**31)


_queues: weakref.WeakKeyDictionary[Communicator, dict[str, list[PendingOp]]] = (
    weakref.WeakKeyDictionary()
)


def _queue(communicator: Communicator, kind: str) -> list[PendingOp]:
    with _lock:
        return _queues.setdefault(communicator, {}).setdefault(kind, [])


def start(communicator: Communicator, kind: str, op: str, pending_op: PendingOp) -> torch.Tensor:
    """Queue an operation; returns the first word of its comm_cmd_info."""
    queue, transport = _queue(communicator, kind), communicator.transport(op)
    # recover() replaces the transport, and drops the operations of the old one.
    queue[:] = [queued for queued in queue if queued.pending.owner is transport]
    queue.append(pending_op)
    return torch.tensor([pending_op.number], dtype=torch.int32)


def find(
    op: str, communicator: Communicator, kind: str, info: torch.Tensor, arguments: dict[str, Any]
) -> PendingOp:
    """The oldest operation in flight, after a check that the teardown's arguments are of its setup.

    Raises:
        SequenceError: no operation is in flight.
        ArgumentValueError: the arguments differ from those of the setup.
    """
    queue = _queue(communicator, kind)
    if queue:  # else keep from a rendezvous that peers may never join
        transport = communicator.transport(op)
        queue = [queued for queued in queue if queued.pending.owner is transport]
    if not queue:
        raise SequenceError(
            op, f"a {kind} setup must come before its teardown, got none in flight for this group"
        )
    oldest = queue[0]
    for name, expected in oldest.arguments.items():
        got = arguments[name]
        checks.value(op, name, got == expected, f"be {expected}, as in the setup", got)
    checks.shape(op, "comm_cmd_info", info, (None,), "(words,)", info.device)
    number = int(info[0]) if len(info) else 0
    contract = f"be the output of setup number {oldest.number}, the oldest in flight"
    same = number == oldest.number
    checks.value(op, "comm_cmd_info", same, contract, f"that of number {number}")
    return oldest


def _forget(communicator: Communicator, kind: str, pending_op: PendingOp) -> None:
    queue = _queue(communicator, kind)
    queue[:] = [queued for queued in queue if queued is not pending_op]


@contextmanager
def torn_down(
    op: str, communicator: Communicator, kind: str, pending_op: PendingOp
) -> Iterator[Transport]:
    """Tear an operation down in the body; it stays in flight after an error that allows a retry."""
    try:
        yield communicator.transport(op)
    except (PeerTimeoutError, SequenceError):
        raise
    except BaseException:
        _forget(communicator, kind, pending_op)
        raise
    _forget(communicator, kind, pending_op)

"""Open communicators of this process: one per group for the functional ops, and others."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict

import torch.distributed as dist

from ..errors import MoeError
from . import groups
from .communicator import Communicator
from .groups import Group

DEFAULT_TIMEOUT = 30.0  # seconds

_lock = threading.Lock()  # ranks may be threads
_defaults: dict[tuple[str, int, tuple[int, ...] | None], Communicator] = {}
_others: weakref.WeakSet[Communicator] = weakref.WeakSet()  # dropping one closes it
_opened: dict[tuple[str, int], int] = defaultdict(int)  # number of others so far, by group and rank


def default_communicator(group: Group) -> Communicator:
    """The communicator of this rank's functional ops."""
    key = (group.name, group.rank, group.members)
    with _lock:
        known = _defaults.get(key)
        # A process group that was destroyed and created again may have the old name.
        if (
            known is not None
            and known.group.process_group is group.process_group
            and known.choice == group.transport
        ):
            return known
        if known is not None:
            known.close()
        _defaults[key] = Communicator(
            group, "default", transport="auto", in_flight=1, timeout=DEFAULT_TIMEOUT
        )
        return _defaults[key]


def open_communicator(
    group: Group, *, transport: str, in_flight: int, timeout: float
) -> Communicator:
    """A new communicator; all ranks must open theirs in the same order."""
    with _lock:
        number = _opened[group.name, group.rank]
        _opened[group.name, group.rank] += 1
        communicator = Communicator(
            group,
            f"communicator{number}",
            transport=transport,
            in_flight=in_flight,
            timeout=timeout,
        )
        _others.add(communicator)
        return communicator


def abort_communicator(group: Group, op: str, error: MoeError) -> None:
    """Abort the opening of a communicator because this rank rejects its arguments."""
    communicator = open_communicator(group, transport="auto", in_flight=1, timeout=DEFAULT_TIMEOUT)
    communicator.abort_peers("dispatch", op, error)
    close_communicator(communicator)


def abandon_communicator(communicator: Communicator) -> None:
    """Close the communicator opened last after a time-out, and let the next one reuse its number.

    Late or restarted peers then still find this rank when it tries again. A failure common to all
    ranks keeps its number: otherwise a rank that goes on to the next communicator would look
    restarted to peers that still handle the failure.
    """
    close_communicator(communicator)
    with _lock:
        _opened[communicator.group.name, communicator.group.rank] -= 1


def close_communicator(communicator: Communicator) -> None:
    """Close one communicator and forget it."""
    with _lock:
        _others.discard(communicator)
    communicator.close()


def recover(group: dist.ProcessGroup | str, rank: int | None = None) -> None:
    """Repair a group for the functional ops after a time-out; collective.

    Args:
        group: a process group or a group's name.
        rank: this rank, for an in-process group whose thread is not bound.

    Raises:
        ArgumentNameError, ArgumentTypeError, ArgumentValueError: the group or the rank is invalid.
        PeerTimeoutError: ranks did not come; all ranks must call it again.
        PeerAbortError, ArgumentMismatchError, UnavailableError: as for the first call on a group.
    """
    default_communicator(groups.resolve("recover", group, rank)).recover("recover")


def unregister_group(name: str) -> None:
    """Close this process's communicators of a registered group and forget the group."""
    _close(name)
    groups.unregister(name)


def close_all() -> None:
    """Close every communicator of this process, before its process groups are destroyed."""
    _close(None)


def _close(name: str | None) -> None:
    with _lock:
        keys = [key for key in _defaults if name in (None, key[0])]
        communicators = [_defaults.pop(key) for key in keys]
        communicators += [other for other in _others if name in (None, other.group.name)]
        _others.difference_update(communicators)
        for key in [key for key in _opened if name in (None, key[0])]:
            del _opened[key]
    for communicator in communicators:
        communicator.close()

"""The communicators this process has open: one per group for the functional ops, and others."""

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
_others: weakref.WeakSet[Communicator] = weakref.WeakSet()  # who drops one need not close it
_opened: dict[tuple[str, int], int] = defaultdict(int)  # others so far, by group and rank


def default_communicator(group: Group) -> Communicator:
    """The communicator that all functional ops of this rank share."""
    key = (group.name, group.rank, group.members)
    with _lock:
        found = _defaults.get(key)
        # A process group that was destroyed and made again may have the old name.
        if (
            found is not None
            and found.group.process_group is group.process_group
            and found.choice == group.transport
        ):
            return found
        if found is not None:
            found.close()
        _defaults[key] = Communicator(
            group, "default", transport="auto", in_flight=1, timeout=DEFAULT_TIMEOUT
        )
        return _defaults[key]


def open_communicator(
    group: Group, *, transport: str, in_flight: int, timeout: float
) -> Communicator:
    """A communicator of its own; all ranks must open theirs in the same order."""
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
    """Take part in the opening of a communicator only to tell the peers why this rank cannot."""
    communicator = open_communicator(group, transport="auto", in_flight=1, timeout=DEFAULT_TIMEOUT)
    communicator.abort_peers("dispatch", op, error)
    close_communicator(communicator)


def abandon_communicator(communicator: Communicator) -> None:
    """Close the communicator opened last, to which peers did not come, and give back its place.

    Peers that come later or are restarted still find this rank there when it tries again. Only for
    them: what fails on all ranks alike uses up its place, else a rank that goes on to the next
    communicator would look like one that was restarted to those still busy with the failure.
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
    """Let the functional ops work again on a group that a timeout broke; collective.

    Args:
        group: a process group or a group's name.
        rank: this rank, for an in-process group whose thread is not bound.

    Raises:
        ArgumentNameError, ArgumentTypeError, ArgumentValueError: no such group, or no such rank.
        PeerTimeoutError: ranks did not come; when it fails, all ranks must call it again.
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
        doomed = [key for key in _defaults if name in (None, key[0])]
        communicators = [_defaults.pop(key) for key in doomed]
        communicators += [found for found in _others if name in (None, found.group.name)]
        _others.difference_update(communicators)
        for key in [key for key in _opened if name in (None, key[0])]:
            del _opened[key]
    for communicator in communicators:
        communicator.close()

"""The endpoints this process has open: one per group for the functional ops, and others."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict

import torch.distributed as dist

from ..errors import MoeError
from . import groups
from .communicator import Endpoint
from .groups import Group

DEFAULT_TIMEOUT = 30.0  # seconds

_lock = threading.Lock()  # ranks may be threads
_defaults: dict[tuple[str, int, tuple[int, ...] | None], Endpoint] = {}
_others: weakref.WeakSet[Endpoint] = weakref.WeakSet()  # who drops one need not close it
_opened: dict[tuple[str, int], int] = defaultdict(int)  # others so far, by group and rank


def default_endpoint(group: Group) -> Endpoint:
    """The endpoint that all functional ops of this rank share."""
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
        _defaults[key] = Endpoint(
            group, "default", transport="auto", in_flight=1, timeout=DEFAULT_TIMEOUT
        )
        return _defaults[key]


def open_endpoint(group: Group, *, transport: str, in_flight: int, timeout: float) -> Endpoint:
    """An endpoint of its own; all ranks must open theirs in the same order."""
    with _lock:
        number = _opened[group.name, group.rank]
        _opened[group.name, group.rank] += 1
        endpoint = Endpoint(
            group, f"endpoint{number}", transport=transport, in_flight=in_flight, timeout=timeout
        )
        _others.add(endpoint)
        return endpoint


def refuse_endpoint(group: Group, op: str, error: MoeError) -> None:
    """Take part in the opening of an endpoint only to tell the peers why this rank cannot."""
    endpoint = open_endpoint(group, transport="auto", in_flight=1, timeout=DEFAULT_TIMEOUT)
    endpoint.reject("dispatch", op, error)
    close_endpoint(endpoint)


def abandon_endpoint(endpoint: Endpoint) -> None:
    """Close the endpoint opened last, to which peers did not come, and give back its place.

    Peers that come later or are restarted still find this rank there when it tries again. Only for
    them: what fails on all ranks alike uses up its place, else a rank that goes on to the next
    endpoint would look like one that was restarted to those still busy with the failure.
    """
    close_endpoint(endpoint)
    with _lock:
        _opened[endpoint.group.name, endpoint.group.rank] -= 1


def close_endpoint(endpoint: Endpoint) -> None:
    """Close one endpoint and forget it."""
    with _lock:
        _others.discard(endpoint)
    endpoint.close()


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
    default_endpoint(groups.resolve("recover", group, rank)).recover("recover")


def unregister_group(name: str) -> None:
    """Close this process's endpoints of a registered group and forget the group."""
    _close(name)
    groups.unregister(name)


def close_all() -> None:
    """Close every endpoint of this process, before its process groups are destroyed."""
    _close(None)


def _close(name: str | None) -> None:
    with _lock:
        doomed = [key for key in _defaults if name in (None, key[0])]
        endpoints = [_defaults.pop(key) for key in doomed]
        endpoints += [found for found in _others if name in (None, found.group.name)]
        _others.difference_update(endpoints)
        for key in [key for key in _opened if name in (None, key[0])]:
            del _opened[key]
    for endpoint in endpoints:
        endpoint.close()

"""Groups by name: torch's process groups, in-process worlds, and groups over a bare store.

Ops take a group as a ``ProcessGroup``, as the name under which torch knows one, or as a name
registered here. A registered group needs only a ``torch.distributed.Store`` in which its ranks find
each other.
"""

from __future__ import annotations

import dataclasses
import numbers
import threading
from typing import Any, Literal, cast, get_args

import torch.distributed as dist

from ..errors import ArgumentNameError, ArgumentTypeError, ArgumentValueError

TransportName = Literal["auto", "single", "symmetric", "local", "shm", "collective"]
#: What ``transport=`` accepts: "single" (one rank alone), "local" (windows between threads of one
#: process), "shm" (windows between processes of one host), "symmetric" (windows in whichever memory
#: fits the group and the device), "collective" (torch.distributed), or "auto" for the first of
#: these that works. A group of one rank takes "single" whatever the name.
TRANSPORTS: tuple[TransportName, ...] = get_args(TransportName)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One rank's membership in a group.

    Attributes:
        name: unique in this process.
        rank: this rank, 0 <= rank < size.
        size: number of ranks.
        store: for the rendezvous, its keys private to the group; None for a group of one.
        in_process: all ranks are threads of this process.
        process_group: torch's group, or None.
        transport: replaces "auto" on this group.
        members: ranks of the named group that form this subgroup, in the order of their ranks
            here; None for all.
    """

    name: str
    rank: int
    size: int
    store: dist.Store | None
    in_process: bool = False
    process_group: dist.ProcessGroup | None = None
    transport: str = "auto"
    members: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Registration:
    store: dist.Store
    size: int
    in_process: bool
    rank: int | None
    transport: str


_registered: dict[str, _Registration] = {}
_transports: dict[str, str] = {}  # of torch process groups, by name
_bound = threading.local()


def check_transport(op: str, transport: str) -> str:
    """``transport`` itself, if it is one of the names."""
    if transport not in TRANSPORTS:
        raise ArgumentValueError(op, "transport", f"be one of {[*TRANSPORTS]}", repr(transport))
    return transport


def register(
    name: str,
    store: dist.Store,
    size: int,
    *,
    in_process: bool = False,
    rank: int | None = None,
    transport: str = "auto",
) -> None:
    """Register ``name`` as a group of ``size`` ranks with a rendezvous in ``store``.

    Args:
        name: must not be registered already.
        store: shared by the ranks; a ``HashStore`` for threads, a file or TCP store for processes.
        size: number of ranks.
        in_process: the ranks are threads of this process; each call names its rank, or
            ``bind_rank`` has bound its thread.
        rank: of this process; required unless ``in_process``.
        transport: a name of ``TRANSPORTS``.

    Raises:
        ArgumentNameError: the name is taken.
        ArgumentTypeError: the rank is not an integer.
        ArgumentValueError: the rank is missing or out of range, or the transport is unknown.
    """
    op = "register_group"
    if name in _registered:
        raise ArgumentNameError(op, "name", "not be registered already", repr(name))
    if not in_process and rank is None:
        raise ArgumentValueError(op, "rank", "be given between processes", None)
    own = None if rank is None else _check_rank(op, "rank", rank, size, name)
    check_transport(op, transport)
    prefixed = dist.PrefixStore(f"moe_triton/{name}", store)
    _registered[name] = _Registration(prefixed, size, in_process, own, transport)


def unregister(name: str) -> None:
    """Forget a registered group."""
    _registered.pop(name, None)


def bind_rank(name: str, rank: int) -> None:
    """Bind the calling thread to ``rank`` of the in-process group ``name``."""
    if not hasattr(_bound, "ranks"):
        _bound.ranks = {}
    _bound.ranks[name] = rank


def set_transport(group: dist.ProcessGroup | str, transport: str) -> None:
    """Set the transport that "auto" stands for on one of torch's process groups.

    Args:
        group: a process group, or torch's name for it.
        transport: a name of ``TRANSPORTS``.

    Raises:
        ArgumentTypeError: the group is neither a process group nor a name.
        ArgumentValueError: the transport is unknown, or this rank is not in the group.
    """
    op = "set_transport"
    name = group if isinstance(group, str) else _check_group(op, "group", group).group_name
    _transports[name] = check_transport(op, transport)


def _check_group(op: str, argument: str, group: object) -> dist.ProcessGroup:
    """``group`` itself, if it is a process group of this rank."""
    if isinstance(group, dist.ProcessGroup):
        return group
    # dist.new_group() returns this number to the ranks that are not in the new group.
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if type(group) is type(outside) and group == outside:
        raise ArgumentValueError(
            op,
            argument,
            "be a group of this rank",
            f"GroupMember.NON_GROUP_MEMBER ({outside}), which torch.distributed.new_group() "
            "returns to ranks outside the new group; only its members may call",
        )
    contract = "be a group's name or a process group"
    raise ArgumentTypeError(op, argument, contract, type(group).__name__)


def _check_rank(op: str, argument: str, rank: object, size: int, name: str) -> int:
    """``rank`` as an int, checked to be in [0, size)."""
    contract = f"be in [0, {size}) for {name!r}"
    if rank is None:
        raise ArgumentValueError(op, argument, contract, None)
    if not isinstance(rank, numbers.Integral) or isinstance(rank, bool):
        raise ArgumentTypeError(op, argument, "be an integer", repr(rank))
    if not 0 <= int(rank) < size:
        raise ArgumentValueError(op, argument, contract, rank)
    return int(rank)


def _from_process_group(group: dist.ProcessGroup) -> Group:
    name = group.group_name
    store = dist.distributed_c10d._get_process_group_store(group)
    return Group(
        name,
        group.rank(),
        group.size(),
        dist.PrefixStore("moe_triton", store),
        process_group=group,
        transport=_transports.get(name, "auto"),
    )


def subgroup(group: Group, members: tuple[int, ...]) -> Group:
    """Some ranks of a group, this one among them, as a group of their own.

    It shares the group's store, so the rank that serves the store must keep running.
    """
    if members == tuple(range(group.size)):
        return group
    store = group.store
    if store is not None:
        store = dist.PrefixStore("members " + " ".join(map(str, members)), store)
    return dataclasses.replace(
        group, rank=members.index(group.rank), size=len(members), store=store, members=members
    )


def resolve(
    op: str,
    group: dist.ProcessGroup | str | None,
    rank: int | None = None,
    *,
    argument: str = "group",
    rank_argument: str = "rank",
) -> Group:
    """Find a group and this rank's number in it.

    Args:
        op: for error messages.
        group: a process group, a name, or None: the default process group, or a group of one rank
            where torch.distributed is not initialised.
        rank: this rank, needed for an in-process group whose thread is not bound.
        argument: the caller's name of ``group``, for error messages.
        rank_argument: the caller's name of ``rank``.

    Raises:
        ArgumentNameError: the name is not registered.
        ArgumentTypeError: the group is neither a process group nor a name, or the rank is not an
            integer.
        ArgumentValueError: the rank is missing or out of range, or is not in the group.
    """
    if group is None:
        if not dist.is_initialized():
            return Group("alone", 0, 1, None)
        return _from_process_group(dist.distributed_c10d._get_default_group())
    if not isinstance(group, str):
        return _from_process_group(_check_group(op, argument, group))
    if group in _registered:
        entry = _registered[group]
        own = entry.rank
        if own is None:
            bound = getattr(_bound, "ranks", {}).get(group, rank)
            own = _check_rank(op, rank_argument, bound, entry.size, group)
        return Group(group, own, entry.size, entry.store, entry.in_process, None, entry.transport)
    try:
        process_group = dist.distributed_c10d._resolve_process_group(cast("Any", group))
    except (RuntimeError, LookupError, ValueError):
        process_group = None
    if process_group is None:
        raise ArgumentNameError(
            op, argument, "name a registered or torch process group", repr(group)
        )
    return _from_process_group(process_group)

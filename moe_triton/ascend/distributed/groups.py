"""Process groups of an op, and abort propagation to peers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from ... import comm
from ...errors import MoeError
from ..group_arguments import GroupArguments

_TP = "gather"  # the operation of a TP pair, in dispatch and in combine


@dataclasses.dataclass
class OpGroups:
    """The groups in which an op communicates.

    Attributes:
        group: the whole expert-parallel group.
        ep: the communicator of its ranks, or of the remaining ones with ``elastic_info``.
        tp: the communicator of the two ranks that share experts, or None.
    """

    group: comm.Group
    ep: comm.Communicator
    tp: comm.Communicator | None = None

    @classmethod
    def resolve(cls, op: str, arguments: GroupArguments) -> OpGroups:
        """Find the groups; first in every op, since an earlier error could not abort the peers.

        An unknown TP group is left to the checks.
        """
        tp = None
        if arguments.has_tp:
            with contextlib.suppress(MoeError):
                tp = comm.default_communicator(arguments.resolve_tp(op))
        try:
            group = arguments.resolve_ep(op)
        except MoeError as error:
            if tp is not None:
                tp.abort_peers(_TP, op, error)
            raise
        ep = comm.default_communicator(group)
        # One group may be named as both: abort its peers once.
        return cls(group, ep, None if tp is ep else tp)

    @contextlib.contextmanager
    def abort_peers_on_error(
        self, op: str, ep_kind: str | None, *, tp: bool = False
    ) -> Iterator[None]:
        """Abort the peers that wait for this rank when the body raises.

        Args:
            op: for error messages.
            ep_kind: the operation in which peers of the expert-parallel group wait, or None.
            tp: whether the other rank of the pair waits.
        """
        try:
            yield
        except BaseException as error:
            # An error that came from one group means nothing in the other: pass on its text.
            reason = MoeError(op, error.problem if isinstance(error, MoeError) else repr(error))
            if ep_kind is not None:
                self.ep.abort_peers(ep_kind, op, reason)
            if tp and self.tp is not None:
                self.tp.abort_peers(_TP, op, reason)
            raise


@contextlib.contextmanager
def checked_ahead(
    op: str,
    check: Callable[..., object],
    kind: str | None,
    tp: bool,
    arguments: GroupArguments,
    **others: Any,
) -> Iterator[Callable[[], object]]:
    """Check a call before it is made; an error in the body aborts the peers.

    Args:
        op: for error messages.
        check: the op's own, called as ``check(op, groups, arguments=arguments, **others)``.
        kind: ``ep_kind`` of ``abort_peers_on_error``.
        tp: likewise.
        arguments: of the group.
        others: all other arguments of the call.

    Yields:
        The check, to be called after all checks that come before it.
    """
    groups = OpGroups.resolve(op, arguments)
    with groups.abort_peers_on_error(op, kind, tp=tp):
        yield functools.partial(check, op, groups, arguments=arguments, **others)

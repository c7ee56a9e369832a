"""Whom an op talks to, and who has to hear of it when it cannot go on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from ... import comm
from ...errors import MoeError
from ..group_arguments import GroupArguments


@dataclasses.dataclass
class Ranks:
    """Whom an op talks to.

    Attributes:
        group: the whole expert-parallel group.
        ep: the communicator of its ranks, of those that are left where it is scaled down.
        tp: the communicator of the pair that shares experts, or None.
    """

    group: comm.Group
    ep: comm.Communicator
    tp: comm.Communicator | None = None

    @classmethod
    def of(cls, op: str, arguments: GroupArguments, tp_kind: str) -> Ranks:
        """Find the groups; the first thing an op does, as it can tell nobody what fails before.

        Args:
            op: for error messages.
            arguments: where a pair cannot be found, that is for the checks to say.
            tp_kind: as in ``abort_peers_on_error``.
        """
        tp = None
        if arguments.has_tp:
            with contextlib.suppress(MoeError):
                tp = comm.default_communicator(arguments.resolve_tp(op))
        try:
            group = arguments.resolve_ep(op)
        except MoeError as error:
            if tp is not None:
                tp.abort_peers(tp_kind, op, error)
            raise
        ep = comm.default_communicator(group)
        # A group that is named as the pair as well must not be told twice.
        return cls(group, ep, None if tp is ep else tp)

    @contextlib.contextmanager
    def abort_peers_on_error(
        self, op: str, ep_kind: str | None, tp_kind: str | None
    ) -> Iterator[None]:
        """Tell the peers who wait for this rank when it cannot go on.

        Args:
            op: for error messages.
            ep_kind: the operation that those of the expert-parallel group are coming to.
            tp_kind: the operation that the other rank of the pair is coming to.
        """
        try:
            yield
        except BaseException as error:
            # Where it came from the ranks of one group, those of the other do not know it.
            reason = MoeError(op, error.problem if isinstance(error, MoeError) else repr(error))
            if ep_kind is not None:
                self.ep.abort_peers(ep_kind, op, reason)
            if tp_kind is not None and self.tp is not None:
                self.tp.abort_peers(tp_kind, op, reason)
            raise


@contextlib.contextmanager
def checking(
    op: str,
    check: Callable[..., object],
    kinds: tuple[str | None, str | None],
    arguments: GroupArguments,
    **given: Any,
) -> Iterator[Callable[[], object]]:
    """What is found wrong with a call before it is made; within it, the peers are told.

    Args:
        op: for error messages.
        check: one of the ops' own, called as ``check(op, ranks, arguments=arguments, **given)``.
        kinds: of ``abort_peers_on_error``.
        arguments: of the call.
        given: of the call, the others.

    Yields:
        The check, to be called once what goes before it is right.
    """
    ranks = Ranks.of(op, arguments, "gather")
    with ranks.abort_peers_on_error(op, *kinds):
        yield functools.partial(check, op, ranks, arguments=arguments, **given)

"""The library's exceptions, with the status codes of the aclnn interface.

A message has three parts: the op and the argument, the contract, and the value that came:

    npu_moe_distribute_dispatch: expert_ids must be int32 of shape (BS, K), got torch.int64

Every class is a ``MoeError`` and also the built-in exception that a caller would expect, so that
``except ValueError`` works. ``code`` is None where the aclnn interface has no status.
"""

from __future__ import annotations

from typing import Any

NULL_POINTER = 161001  # ACLNN_ERR_PARAM_NULLPTR: a required tensor is missing
INVALID_PARAM = 161002  # ACLNN_ERR_PARAM_INVALID: a dtype or name that is not supported
TILING_ERROR = 561002  # ACLNN_ERR_INNER_TILING_ERROR: a shape or value out of range


class MoeError(Exception):
    """Base of all errors of this library.

    Attributes:
        op: the op that was called.
        argument: the argument at fault, or None.
        code: the aclnn status code, or None.
    """

    code: int | None = None

    def __init__(self, op: str, problem: str, *, argument: str | None = None) -> None:
        super().__init__(f"{op}: {problem}")
        self.op = op
        self.argument = argument
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries; the default would call __init__ with the message alone.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[MoeError], args: tuple[Any, ...], state: dict[str, Any]) -> MoeError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ArgumentError(MoeError):
    """An argument breaks its contract; nothing has been sent."""

    def __init__(self, op: str, argument: str, contract: str, got: object) -> None:
        super().__init__(op, f"{argument} must {contract}, got {got}", argument=argument)


class MissingArgumentError(ArgumentError, TypeError):
    """A required argument is None or empty."""

    code = NULL_POINTER


class ArgumentTypeError(ArgumentError, TypeError):
    """A dtype that is not supported."""

    code = INVALID_PARAM


class ArgumentValueError(ArgumentError, ValueError):
    """A shape, stride, device or value out of range."""

    code = TILING_ERROR


class ArgumentNameError(ArgumentError, ValueError):
    """A group name of the wrong form, or one that is not registered."""

    code = INVALID_PARAM


class ArgumentMismatchError(MoeError, ValueError):
    """The ranks of a group called with different arguments; raised on every rank.

    Attributes:
        rank: the peer that differs.
    """

    code = TILING_ERROR

    def __init__(self, op: str, argument: str, mine: object, theirs: object, *, rank: int) -> None:
        super().__init__(
            op,
            f"{argument} must be equal on all ranks of the group, got {mine} on this rank and "
            f"{theirs} on rank {rank}",
            argument=argument,
        )
        self.rank = rank


class PeerAbortError(MoeError, RuntimeError):
    """A peer's call failed its checks, which aborts this rank's. The group stays usable.

    Attributes:
        rank: the peer.
        reason: its error text.
    """

    def __init__(self, op: str, rank: int, reason: str) -> None:
        super().__init__(op, f"rank {rank} rejected this call: {reason}")
        self.rank = rank
        self.reason = reason


class PeerTimeoutError(MoeError, RuntimeError):
    """Peers did not take part in time, or exited. The group is broken until ``recover()``.

    Attributes:
        ranks: the peers that are missing.
    """

    def __init__(self, op: str, ranks: tuple[int, ...], problem: str) -> None:
        super().__init__(op, problem)
        self.ranks = ranks


class BrokenGroupError(MoeError, RuntimeError):
    """An earlier time-out broke the group, and ``recover()`` has not been called since."""


class SequenceError(MoeError, RuntimeError):
    """A setup or teardown came out of order; it had no effect."""

    @classmethod
    def too_many(cls, op: str, kind: str, limit: int) -> SequenceError:
        """A setup beyond the limit of operations in flight."""
        return cls(
            op,
            f"at most {limit} {kind} operations may be in flight, got one more; tear one down "
            "first, or ask for more with in_flight",
        )

    @classmethod
    def out_of_order(cls, op: str, kind: str, got: int, oldest: int | None) -> SequenceError:
        """A teardown of an operation that is not the oldest, or a second one of the same."""
        in_flight = "none is" if oldest is None else f"number {oldest} is the oldest"
        return cls(
            op,
            f"{kind} operations must be torn down in the order of their setup, and once, got "
            f"number {got} while {in_flight} in flight",
        )


class RoutingMismatchError(MoeError, ValueError):
    """The ranks combine rows of different dispatches; raised where the counts disagree.

    Attributes:
        rank: the peer that returned too many or too few rows.
    """

    code = TILING_ERROR

    def __init__(self, op: str, rank: int, target: str, sent: int, returned: int) -> None:
        super().__init__(
            op,
            "expert_ids and the counts of received rows must come from the same dispatch on all "
            f"ranks, got {sent} rows sent to {target} and {returned} returned by rank {rank}",
            argument="expert_ids",
        )
        self.rank = rank


class ReceiveOverflowError(MoeError, RuntimeError):
    """A rank would receive more rows than ``max_recv_tokens``; raised on every rank.

    Attributes:
        rank: the first rank that overflows.
    """

    def __init__(self, op: str, rank: int, rows: int, limit: int) -> None:
        super().__init__(
            op,
            f"max_recv_tokens must hold the rows of every rank, got {limit} with {rows} rows for "
            f"rank {rank}",
            argument="max_recv_tokens",
        )
        self.rank = rank


class UnavailableError(MoeError, RuntimeError):
    """A back end, transport, format or operation that is not available here, with the cause."""

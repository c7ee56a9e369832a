"""Common parts of the launchers: layout of the ranks, rank contexts, and choice of the failure."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ..comm import TRANSPORTS
from ..errors import BrokenGroupError, PeerAbortError, PeerTimeoutError

# Errors that a rank raises because of a peer. They are reported where no other error explains them.
_CONSEQUENCES = (PeerAbortError, PeerTimeoutError, BrokenGroupError)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the ranks of a world form groups: ``rank = ep_rank * tp_world_size + tp_rank``.

    Attributes:
        world_size: ranks in all.
        tp_world_size: ranks of a tensor-parallel group; 0 and 1 both mean none.

    Raises:
        ValueError: the world is empty or not a multiple of the tensor-parallel size.
    """

    world_size: int
    tp_world_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "tp_world_size", max(self.tp_world_size, 1))
        if self.world_size < 1 or self.world_size % self.tp_world_size:
            raise ValueError(
                f"world_size must be a positive multiple of tp_world_size {self.tp_world_size}, "
                f"got {self.world_size}"
            )

    @property
    def ep_world_size(self) -> int:
        """Ranks of an expert-parallel group."""
        return self.world_size // self.tp_world_size

    def ep_rank(self, rank: int) -> int:
        """Position of a world rank in its expert-parallel group."""
        return rank // self.tp_world_size

    def tp_rank(self, rank: int) -> int:
        """Position of a world rank in its tensor-parallel group."""
        return rank % self.tp_world_size

    def ep_ranks(self, rank: int) -> list[int]:
        """World ranks of the expert-parallel group that ``rank`` belongs to."""
        return list(range(self.tp_rank(rank), self.world_size, self.tp_world_size))

    def tp_ranks(self, rank: int) -> list[int]:
        """World ranks of the tensor-parallel group that ``rank`` belongs to."""
        first = self.ep_rank(rank) * self.tp_world_size
        return list(range(first, first + self.tp_world_size))


@dataclasses.dataclass(frozen=True)
class RankContext:
    """A rank's numbers and groups, the argument of the function that a launcher runs.

    Attributes:
        rank: world rank.
        ep_rank: rank in the expert-parallel group.
        tp_rank: rank in the tensor-parallel group.
        world_size: ranks in all, EP x TP.
        ep_world_size: ranks of the expert-parallel group.
        tp_world_size: ranks of the tensor-parallel group; 1 means none.
        ep_group: name that the ops accept as ``group_ep``.
        tp_group: name that the ops accept as ``group_tp``; empty without tensor parallelism.
        device: of this rank.
        store: key-value store of this world, for the function's own use.
    """

    rank: int
    ep_rank: int
    tp_rank: int
    world_size: int
    ep_world_size: int
    tp_world_size: int
    ep_group: str
    tp_group: str
    device: torch.device
    store: dist.Store

    @classmethod
    def of(
        cls, layout: Layout, rank: int, *, ep_group: str, tp_group: str, **fields: Any
    ) -> RankContext:
        """A context whose numbers follow from the layout."""
        return cls(
            rank=rank,
            ep_rank=layout.ep_rank(rank),
            tp_rank=layout.tp_rank(rank),
            world_size=layout.world_size,
            ep_world_size=layout.ep_world_size,
            tp_world_size=layout.tp_world_size,
            ep_group=ep_group,
            tp_group=tp_group,
            **fields,
        )


def check_transport(transport: str) -> None:
    """Raise ValueError unless ``transport`` is a name of ``comm.TRANSPORTS``."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {list(TRANSPORTS)}, got {transport!r}")


class WorkerDiedError(RuntimeError):
    """The process of a rank ended before it answered.

    Attributes:
        rank: its world rank.
        pid: its process id.
        exitcode: its exit code; the negative signal number if a signal ended it.
    """

    def __init__(self, rank: int, pid: int, exitcode: int | None) -> None:
        how = f"exit code {exitcode}"
        if exitcode is not None and exitcode < 0:
            with contextlib.suppress(ValueError):
                how += f" ({signal.Signals(-exitcode).name})"
        super().__init__(f"the process of rank {rank} (pid {pid}) died with {how}")
        self.rank = rank
        self.pid = pid
        self.exitcode = exitcode


class RemoteTraceback(Exception):
    """The traceback of an exception of another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """One rank's exception.

    Attributes:
        rank: world rank.
        when: time of the exception in seconds of the monotonic clock, common to all processes.
        error: the exception.
        details: the traceback on that rank, where ``error`` has none.
    """

    rank: int
    when: float
    error: BaseException
    details: str = ""

    def is_consequence(self) -> bool:
        """Whether the error reports the failure of another rank."""
        return isinstance(self.error, _CONSEQUENCES)


def raise_first(failures: Sequence[Failure], unfinished: Sequence[int] = ()) -> NoReturn:
    """Raise the exception that explains the others.

    A dead process comes first, because its peers notice closed connections before the launcher
    notices its end; then the earliest error that is no consequence; then the earliest of all. The
    exception gets the attribute ``failed_rank``, its text the rank, or a note where the text has
    another form than the one argument of the exception; from Python 3.11 on a note names the other
    ranks; the traceback of another process becomes its cause.

    Args:
        failures: at least one.
        unfinished: ranks that had not answered when the launcher stopped waiting.
    """
    first = min(failures, key=_order)
    error = first.error
    notes = [] if _name_rank(error, first.rank) else [f"on rank {first.rank}"]
    others = [f"rank {f.rank}: {type(f.error).__name__}" for f in failures if f is not first]
    others += [f"rank {rank}: no answer" for rank in unfinished]
    if others:
        notes.append("other ranks: " + ", ".join(others))
    with contextlib.suppress(AttributeError):  # no notes before Python 3.11, or a class without
        error.failed_rank = first.rank  # type: ignore[attr-defined]
        known = getattr(error, "__notes__", ())  # results may be asked for twice
        for note in (note for note in notes if note not in known):
            error.add_note(note)  # type: ignore[attr-defined,unused-ignore]
    if first.details:
        # Not a note: pytest.raises(match=...) would search the source lines in it.
        raise error from RemoteTraceback(first.details)
    raise error


def _name_rank(error: BaseException, rank: int) -> bool:
    """Make the text of ``error`` name ``rank``; whether it does."""
    if isinstance(error, WorkerDiedError):
        return True
    text, suffix = str(error), f"(on rank {rank})"
    if text.endswith(suffix):  # raised before: results may be asked for twice
        return True
    if text == "" and not error.args:
        named = suffix
    elif error.args == (text,):
        named = f"{text} {suffix}"
    else:
        return False
    with contextlib.suppress(AttributeError):
        error.args = (named,)
    return str(error) == named


def _order(failure: Failure) -> tuple[int, float]:
    if isinstance(failure.error, WorkerDiedError):
        return 0, failure.when
    return (2 if failure.is_consequence() else 1), failure.when

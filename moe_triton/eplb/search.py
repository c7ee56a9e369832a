"""Local search: relieve the heaviest rank that a move can relieve, until no move helps.

The load of an expert is a number of equal quanta: the rows that one rank sends, or those of one
column of the table. A state has the quanta of each expert that each rank serves, and the experts
that each rank holds. A move takes quanta from one rank and leaves every rank it touches below that
rank's former load. So the loads in descending order fall with every move: the search ends, and is
never worse than its start. Relieving lighter ranks makes room for moves of the heaviest.

Letters: E experts, R ranks, s slots on each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .greedy import Floats, Ints

_MOVES_PER_SLOT = 16  # a safety bound; searches take far fewer
_GOAL = 1.001  # of the mean; loads of successive batches differ by more
_MARGIN = 1e-12  # of the heaviest load, so that rounding does not count as progress


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """The quanta that each rank serves, and the experts that it holds.

    Attributes:
        quantum: [E], the load of one quantum of each expert.
        parts: [E, R], the quanta that each rank serves; 0 where ``held`` is False.
        held: [E, R], whether an expert is on a rank; s experts on each rank.
    """

    quantum: Floats
    parts: Ints
    held: NDArray[np.bool_]

    def load(self) -> Floats:
        """[R], the load of each rank."""
        return self.quantum @ self.parts


class _Move(NamedTuple):
    """The highest load left on the ranks it touches, and edits (expert, rank, quanta, held)."""

    peak: float
    edits: tuple[tuple[int, int, int, bool], ...]


def refine(state: State) -> None:
    """Relieve ranks in place until all are within ``_GOAL`` or no move helps one above the mean."""
    for _ in range(_MOVES_PER_SLOT * int(state.held.sum())):
        load = state.load()
        mean = load.mean()
        if load.max() <= mean * _GOAL:
            break
        heavy = (rank for rank in np.argsort(-load, kind="stable") if load[rank] > mean)
        relief = (_relief(state, load, int(rank)) for rank in heavy)
        move = next((move for move in relief if move is not None), None)
        if move is None:
            break
        _apply(state, move)
    for expert, rank in np.argwhere(state.held & (state.parts == 0)):
        _use_idle(state, int(expert), int(rank))


def _relief(state: State, load: Floats, rank: int) -> _Move | None:
    """The move with the lowest peak, if that is below the load of ``rank``."""
    moves = [move for find in (_shift, _swap, _replicate) for move in find(state, load, rank)]
    best = min(moves, key=lambda move: move.peak, default=None)
    return best if best is not None and best.peak < load[rank] * (1 - _MARGIN) else None


def _apply(state: State, move: _Move) -> None:
    for expert, rank, quanta, held in move.edits:
        state.parts[expert, rank], state.held[expert, rank] = quanta, held


def _halfway(excess: Floats, quantum: Floats, most: Ints) -> Ints:
    """The quanta in [0, most] closest to half of the excess."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wanted = np.nan_to_num(np.floor(excess / 2 / quantum + 0.5), posinf=0, neginf=0)
    return np.clip(wanted, 0, most).astype(np.int64)


def _shift(state: State, load: Floats, rank: int) -> Iterator[_Move]:
    """Move quanta of an expert from ``rank`` to another rank that holds it."""
    experts = np.flatnonzero(state.held[:, rank])
    have = state.parts[experts, rank, None]
    quantum = state.quantum[experts, None]
    quanta = _halfway(load[rank] - load, quantum, have)
    peak = np.maximum(load[rank] - quanta * quantum, load + quanta * quantum)
    peak = np.where(state.held[experts] & (quanta > 0), peak, np.inf)
    at, other = np.unravel_index(peak.argmin(), peak.shape)
    if np.isfinite(peak[at, other]):
        expert, moved = int(experts[at]), int(quanta[at, other])
        yield _Move(
            float(peak[at, other]),
            (
                (expert, rank, int(have[at, 0]) - moved, True),
                (expert, int(other), int(state.parts[expert, other]) + moved, True),
            ),
        )


def _swap(state: State, load: Floats, rank: int) -> Iterator[_Move]:
    """Swap an expert of ``rank`` with one of another rank, with their quanta."""
    experts = np.flatnonzero(state.held[:, rank])
    others, homes = _elsewhere(state, rank)
    if not len(others):
        return
    give = state.parts[experts, rank] * state.quantum[experts]
    take = state.parts[others, homes] * state.quantum[others]
    less = give[:, None] - take
    peak = np.maximum(load[rank] - less, load[homes] + less)
    allowed = ~state.held[experts[:, None], homes] & ~state.held[others, rank]
    peak = np.where(allowed, peak, np.inf)
    at, slot = np.unravel_index(peak.argmin(), peak.shape)
    if np.isfinite(peak[at, slot]):
        expert, other, home = int(experts[at]), int(others[slot]), int(homes[slot])
        yield _Move(
            float(peak[at, slot]),
            (
                (expert, home, int(state.parts[expert, rank]), True),
                (expert, rank, 0, False),
                (other, rank, int(state.parts[other, home]), True),
                (other, home, 0, False),
            ),
        )


def _replicate(state: State, load: Floats, rank: int) -> Iterator[_Move]:
    """Give an expert of ``rank`` a replica in a slot whose expert has another replica.

    The quanta of the replaced replica go to the lightest other rank that holds its expert. If that
    is ``rank``, the move does not relieve it and is rejected.
    """
    experts = np.flatnonzero(state.held[:, rank])
    others, homes = _elsewhere(state, rank)
    slots = np.arange(len(others))
    heirs_load = np.where(state.held[others], load, np.inf)
    heirs_load[slots, homes] = np.inf
    if not np.isfinite(heirs_load).any():
        return
    heirs = heirs_load.argmin(axis=1)
    freed = state.parts[others, homes] * state.quantum[others]
    rest = load[homes] - freed
    have = state.parts[experts, rank, None]
    quantum = state.quantum[experts, None]
    quanta = _halfway(load[rank] - rest, quantum, have)
    peak = np.maximum(load[rank] - quanta * quantum, rest + quanta * quantum)
    peak = np.maximum(peak, heirs_load[slots, heirs] + freed)
    peak = np.where(~state.held[experts[:, None], homes] & (quanta > 0), peak, np.inf)
    at, slot = np.unravel_index(peak.argmin(), peak.shape)
    if np.isfinite(peak[at, slot]):
        expert, moved = int(experts[at]), int(quanta[at, slot])
        other, home, heir = int(others[slot]), int(homes[slot]), int(heirs[slot])
        inherited = int(state.parts[other, heir] + state.parts[other, home])
        yield _Move(
            float(peak[at, slot]),
            (
                (expert, rank, int(have[at, 0]) - moved, True),
                (expert, home, moved, True),
                (other, home, 0, False),
                (other, heir, inherited, True),
            ),
        )


def _elsewhere(state: State, rank: int) -> tuple[Ints, Ints]:
    """The expert and the rank of every slot that is not on ``rank``."""
    experts, ranks = np.nonzero(state.held)
    return experts[ranks != rank], ranks[ranks != rank]


def _use_idle(state: State, idle: int, rank: int) -> None:
    """Use a replica that serves no rows, for its own expert or another, if that helps."""
    load = state.load()
    quantum = state.quantum[:, None]
    quanta = _halfway(load - load[rank], quantum, np.maximum(state.parts - 1, 0))
    gain = quanta * quantum * (load - load[rank] - quanta * quantum)
    usable = ~state.held[:, rank]
    usable[idle] = True
    gain = np.where(usable[:, None], gain, 0)
    expert, donor = np.unravel_index(gain.argmax(), gain.shape)
    if gain[expert, donor] > _MARGIN * load[donor] ** 2:
        moved = int(quanta[expert, donor])
        left = int(state.parts[expert, donor]) - moved
        edits = ((idle, rank, 0, False), (int(expert), rank, moved, True))
        _apply(state, _Move(0.0, (*edits, (int(expert), int(donor), left, True))))

"""Local search: relieve the heaviest rank that can be, one move after the other, until none can.

The load of an expert comes in equal quanta: the rows that one rank sends, or those of one column of
the table. A state says how many quanta of each expert each rank serves, and which experts it holds.
Every move takes quanta from one rank and leaves each rank that it touches below what that one had.
So the loads in descending order fall from move to move, and the search ends; it is never worse than
where it began. Relieving others than the heaviest makes room for what the heaviest cannot yet move.

Letters: E experts, R ranks, s slots on each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .greedy import Floats, Ints

_MOVES_PER_SLOT = 16  # a search takes few; the bound is for loads that nobody has thought of
_GOAL = 1.001  # of the mean: from one batch to the next, loads differ by more
_MARGIN = 1e-12  # of the heaviest load, so that rounding is no progress


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Who serves what.

    Attributes:
        quantum: [E], the load of one quantum of each expert.
        parts: [E, R], the quanta that each rank serves; 0 where ``held`` is False.
        held: [E, R], whether an expert is on a rank; s on each, every expert somewhere.
    """

    quantum: Floats
    parts: Ints
    held: NDArray[np.bool_]

    def load(self) -> Floats:
        """[R], of each rank."""
        return self.quantum @ self.parts


class _Move(NamedTuple):
    """The highest load it leaves on the ranks it touches, and (expert, rank, quanta, held)."""

    peak: float
    edits: tuple[tuple[int, int, int, bool], ...]


def refine(state: State) -> None:
    """Relieve ranks until none has more than ``_GOAL``, or none above the mean can be; in place."""
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
        _employ(state, int(expert), int(rank))


def _relief(state: State, load: Floats, rank: int) -> _Move | None:
    """The move that leaves the lowest peak, if that is below what ``rank`` has."""
    moves = [move for make in (_shift, _swap, _replicate) for move in make(state, load, rank)]
    best = min(moves, key=lambda move: move.peak, default=None)
    return best if best is not None and best.peak < load[rank] * (1 - _MARGIN) else None


def _apply(state: State, move: _Move) -> None:
    for expert, rank, quanta, held in move.edits:
        state.parts[expert, rank], state.held[expert, rank] = quanta, held


def _halfway(excess: Floats, quantum: Floats, most: Ints) -> Ints:
    """The quanta in [0, most] that come closest to half of the excess."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wanted = np.nan_to_num(np.floor(excess / 2 / quantum + 0.5), posinf=0, neginf=0)
    return np.clip(wanted, 0, most).astype(np.int64)


def _shift(state: State, load: Floats, rank: int) -> Iterator[_Move]:
    """Some quanta of an expert go from ``rank`` to another rank that holds it."""
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
    """An expert of ``rank`` changes places with one of another rank, quanta and all."""
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
    """An expert of ``rank`` gets a replica in a slot whose own expert has another replica.

    The quanta of the replica that gives way go to the lightest other rank that holds its expert. If
    that is ``rank``, the move does not relieve it and is not taken.
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


def _employ(state: State, idle: int, rank: int) -> None:
    """Put a replica that serves nobody to use, for its own expert or another, if any gains."""
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

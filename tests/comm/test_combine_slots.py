"""Which data slot a combine uses, in every interleaving of the ranks: kept rules and broken ones.

All ranks issue the same halves in the same order, as a program or as a graph that is replayed, so
the rule of ``RingProtocol.combine_slot_free`` gives the same slots on every rank. The model takes
these slots and lets the ranks run: a rank writes its rows, in place ahead of the setup where they
are lent; it issues the setup; in the teardown it waits until all peers have issued theirs, and then
reads the rows of one peer after the other. Rows of another combine are a violation. That records
and the rows of dispatch are never overwritten too early is proved in ``test_window_protocol.py``.

Halves: ``Ds`` and ``Dr`` set a dispatch up and tear it down, ``Cs`` and ``Cr`` a combine; ``L``
writes the rows of the next combine in place.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from moe_triton.comm.window import combine_slots

Place = tuple[int, int]  # the block, which grows once, and the slot in it


@dataclasses.dataclass(frozen=True)
class Rules:
    """How slots are chosen; the defaults are the protocol.

    Attributes:
        grows: a combine without a free slot gets a block of more slots.
        rotates: a copy goes to the slot after the last one, wherever that was; else to that of its
            number.
        whole: a dispatch frees the slot if it was set up after the last teardown of a combine.
        lends_freely: rows are lent without a free slot.
        slots: of the larger block; None is 2f.
    """

    grows: bool = True
    rotates: bool = True
    whole: bool = True
    lends_freely: bool = False
    slots: int | None = None


class Half(NamedTuple):
    """One half of an operation; ``send`` is the index of its setup, ``place`` that of its rows."""

    what: str
    number: int
    send: int
    place: Place | None


def plan(program: list[str], rules: Rules, in_flight: int = 1) -> list[Half]:
    """The halves of a program, with the slots that every rank chooses."""
    more = rules.slots or combine_slots(in_flight, in_a_row=True)
    block, slots = 0, combine_slots(in_flight)
    free, last, lent = True, 0, False
    sends: dict[str, list[int]] = {"D": [], "C": []}
    ended = {"D": 0, "C": 0}
    after: list[int | None] = []  # of each dispatch: the combines that were over when it began
    places: list[Place] = []
    halves = []
    for index, what in enumerate(program):
        kind = what[0]
        if what == "L":
            lent = (free and len(places) == ended["C"]) or rules.lends_freely
            place = (block, 0) if lent else None
            halves.append(Half(what, len(places), index, place))
        elif what == "Cs":
            if not free and slots < more and rules.grows and not lent:
                block, slots, last = block + 1, more, 0
            last = (last + 1 if rules.rotates else len(places)) % slots
            if lent:
                last = 0
            free, lent = False, False
            places.append((block, last))
            sends["C"].append(index)
            halves.append(Half(what, len(places) - 1, index, places[-1]))
        elif what == "Ds":
            after.append(ended["C"] if ended["C"] == len(places) else None)
            sends["D"].append(index)
            halves.append(Half(what, len(after) - 1, index, None))
        else:
            number = ended[kind]
            ended[kind] += 1
            place = places[number] if kind == "C" else None
            halves.append(Half(what, number, sends[kind][number], place))
            if kind == "D" and (after[number] == len(places) or not rules.whole):
                free = True
    return halves


class Rank(NamedTuple):
    """Progress: the half, whether its rows are written, and the peers whose rows are read."""

    at: int = 0
    wrote: bool = False
    read: int = 0


State = tuple[tuple[Rank, ...], tuple[tuple[tuple[Place, int], ...], ...]]


def moves(state: State, r: int, halves: list[Half]) -> Iterator[State | str]:
    """The next states of a rank, or a violation."""
    ranks, rows = state
    me = ranks[r]
    if me.at == len(halves):
        return
    half, done = halves[me.at], me._replace(at=me.at + 1, wrote=False, read=0)

    def become(rank: Rank, mine: dict[Place, int] | None = None) -> State:
        written = rows if mine is None else (*rows[:r], tuple(sorted(mine.items())), *rows[r + 1 :])
        return (*ranks[:r], rank, *ranks[r + 1 :]), written

    if half.what == "L" and half.place is not None:
        yield become(done, {**dict(rows[r]), half.place: half.number})
    elif half.what == "Cs" and not me.wrote:
        yield become(me._replace(wrote=True), {**dict(rows[r]), half.place: half.number})
    elif half.what in ("Ds", "Cs", "L"):
        yield become(done)
    elif all(rank.at > half.send for rank in ranks):
        if half.what == "Dr":
            yield become(done)
            return
        for peer in range(len(ranks)):
            if me.read >> peer & 1:
                continue
            found = dict(rows[peer]).get(half.place)
            if found != half.number:
                yield f"rank {r} reads combine {found} of rank {peer} for {half.number}"
                return
            read = me.read | 1 << peer
            everything = read == (1 << len(ranks)) - 1
            yield become(done if everything else me._replace(read=read))
            return  # reads change nothing: their order does not matter


def explore(world: int, halves: list[Half], most: int = 400_000) -> str | None:
    """A violation in some interleaving, or None."""
    start: State = ((Rank(),) * world, ((),) * world)
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        reached = [move for r in range(world) for move in moves(state, r, halves)]
        if not reached and any(rank.at < len(halves) for rank in state[0]):
            return "deadlock"
        for move in reached:
            if isinstance(move, str):
                return move
            if move not in seen:
                seen.add(move)
                queue.append(move)
        assert len(seen) <= most, "too many states"
    return None


def replayed(words: str, times: int) -> list[str]:
    return words.split() * times


IN_TURN = "Ds Dr Cs Cr"
PROGRAMS = {
    "in turn": (IN_TURN, 1),
    "in place": ("Ds Dr L Cs Cr", 1),
    "two combines": ("Ds Dr Cs Cr Cs Cr", 1),
    "three combines": ("Ds Dr Cs Cr Cs Cr Cs Cr", 1),
    "in place, then two copies": ("Ds Dr L Cs Cr Cs Cr Cs Cr", 1),
    "copies and places in turn": ("Ds Dr L Cs Cr Cs Cr Ds Dr L Cs Cr", 1),
    "dispatch set up between the halves": ("Ds Dr Cs Ds Cr Dr Cs Cr", 1),
    "dispatch within a combine": ("Ds Dr Cs Ds Dr Cr", 1),
    "two layers": (f"{IN_TURN} {IN_TURN}", 1),
    "two micro-batches": ("Ds Ds Dr Dr Cs Cs Cr Cr", 2),
    "two micro-batches in a pipeline": ("Ds Dr Ds Cs Dr Cs Cr Cr", 2),
}


@pytest.mark.parametrize("world, times", [(2, 3), (3, 2)])
@pytest.mark.parametrize("words, in_flight", PROGRAMS.values(), ids=PROGRAMS)
def test_holds(words, in_flight, world, times):
    """Also where a graph of these halves is replayed."""
    if world == 3 and in_flight == 2:
        times = 1
    halves = plan(replayed(words, times), Rules(), in_flight)
    assert explore(world, halves) is None


def test_holds_for_every_short_program():
    """Any order of four dispatches and combines, with rows in place wherever they are lent."""
    for kinds in itertools.product("DC", repeat=4):
        words = " ".join("Ds Dr" if kind == "D" else "L Cs Cr" for kind in kinds)
        assert explore(2, plan(replayed(words, 1), Rules())) is None, words


def test_one_slot_is_enough_where_dispatches_lie_between():
    halves = plan(replayed(IN_TURN, 3), Rules())
    assert {half.place for half in halves if half.what[0] == "C"} == {(0, 0)}
    halves = plan(replayed("Ds Dr Cs Cr Cs Cr", 2), Rules())
    assert {half.place[0] for half in halves if half.what[0] == "C"} == {0, 1}


BUGS = {
    "one slot for two combines": ("Ds Dr Cs Cr Cs Cr", Rules(grows=False)),
    "a dispatch that began before the combine ended": (
        "Ds Dr Cs Ds Cr Dr Cs Cr",
        Rules(whole=False),
    ),
    "a copy to the slot of its number": ("Ds Dr Cs Cr Ds Dr L Cs Cr Cs Cr", Rules(rotates=False)),
    "lent without a dispatch": ("Ds Dr Cs Cr Cs Cr L Cs Cr", Rules(lends_freely=True)),
    "a ring of one slot": ("Ds Dr Cs Cr Cs Cr", Rules(slots=1)),
}


@pytest.mark.parametrize("words, rules", BUGS.values(), ids=BUGS)
def test_planted_bug_is_found(words, rules):
    assert explore(2, plan(replayed(words, 3), rules)) is not None
    assert explore(2, plan(replayed(words, 3), Rules())) is None


def test_slots_that_a_graph_froze():
    """A host that chose slots at the capture would replay the same ones."""
    words, combines = "Cs Cr Cs Cr Cs Cr", 3  # an odd number, without a dispatch
    warm = plan(replayed(words, 2), Rules())
    period = len(warm) // 2
    frozen = warm
    for replay in (1, 2):
        for half in warm[period:]:
            number, send = half.number + combines * replay, half.send + period * replay
            frozen = [*frozen, half._replace(number=number, send=send)]
    assert explore(2, frozen) is not None
    assert explore(2, plan(replayed(words, 4), Rules())) is None

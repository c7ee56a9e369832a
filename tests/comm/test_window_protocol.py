"""Every interleaving of the window protocol, kept and broken: an explicit-state model checker.

The model
---------
Rank r issues operations 0, 1, 2, ...; operation i is ``setup(i)``, later ``teardown(i)``.

* ``setup(i)`` writes the data of operation i (here a tag, the number i) and to every peer the flag
  record (epoch, data). The data go one of two ways:

  * *push*: to every peer's window. Peers come in any order; only the two writes to one peer are
    ordered (release / acquire).
  * *gather*: once, to the rank's own window, before any flag; the peers read them there. Flags go
    to the peers' windows, in any order. Headers, which also do, are left out: they are data pushed.
* ``teardown(i)`` polls the flags, in any order, until all carry its epoch. By signed int32
  difference 0 is arrived, negative is not yet, positive is an overrun. Then it reads source by
  source, where the data are, while others go on writing.
* There are n = 2f slots for the data and the flags of each source. The slot comes from the epoch,
  the epoch from two counters, one that setups advance and one that teardowns advance.
* ``setup(i)`` follows ``teardown(i - f)`` of its own rank; teardowns are first-in-first-out. Every
  local order these rules allow is explored, on each rank its own. With ``streams=1`` a
  rank commits itself to its next half before it can run, so a waiting teardown holds up the setups
  behind it (deadlocks show here); with ``streams=2`` its setups and teardowns run side by side
  (contains every local order: overwrites show here).
* *Abort*: a setup may write the record (epoch, abort) instead of data and flag; the operation is
  then over for this rank. A peer whose ``teardown(i)`` finds an abort raises at once, also when
  other flags are still missing, or later, when they are there.
* *Abandon*: a rank may drop its oldest pending operation without a teardown.
* *Drain*: an operation that ended in one of these ways stays undrained. ``setup(i + f)``, also an
  aborting one, first waits until the flags of i from all peers have been seen, which a complete
  ``teardown(i)`` proves by itself.

What a rank writes for itself is left out: one rank writes and reads it, in the local order.

Why it is enough
----------------
``rounds=None`` lets the ranks go on for ever. No rule depends on the absolute number of an
operation there, so the state space is finite once states are compared up to a shift
(`_canonical`): the answer covers any number of trips round the ring. Cases with ``rounds`` stop
after so many operations; they are for what does depend on the number (wrap-around, a skipped
operation, a captured slot) and, with ``reduced=False``, for checking the reductions against an
exploration without any.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import pytest

INT32_MAX = 2**31 - 1
VIOLATIONS = ("wrong data", "overrun", "bad slot", "deadlock")

# How an operation can end. With a drain after "read" too, setup(i) always looks at the flags of
# i - f: the same rule without bookkeeping, as after a complete teardown they are sure to be there.
EARLY_ENDS = frozenset({"aborted", "raised", "abandoned"})
EVERY_END = EARLY_ENDS | {"read"}

# How far a setup or a teardown has come with one rank.
NOTHING, HALF, DONE = 0, 1, 2


@dataclass(frozen=True)
class Protocol:
    """A world and its rules. The second group is for sabotage; its defaults are the protocol.

    Attributes:
        world: number of ranks, W.
        in_flight: f, how far setups may be ahead of teardowns.
        streams: 1 or 2, the streams a rank spreads its halves over.
        rounds: operations each rank issues; None is no end.
        start: epoch of operation 0, an int32; 0 where ``rounds`` is None.
        may_abort: any rank may abort any operation.
        may_abandon: any rank may drop its oldest pending operation at any time.
        gather: data are written once and read where they are; False is push.

        ring: slots for each source; None is 2f.
        flag_first: the flag goes out before the data.
        shared_counter: None, or who advances the only epoch counter: "setup" or "teardown".
        frozen_slot: a captured graph replays the slot of the capture.
        unordered: no event orders setup(i) after teardown(i - f).
        uncounted_aborts: an operation aborted behind a pending one does not count against f.
        skipped: rank 0 leaves this operation out.
        undrained: how an operation has to end to stay undrained; see `EVERY_END`.
        drain_delay: operations are drained this many setups late.
        drain_forgiven: number of peers a drain does not wait for.
        counts_unfinished: the teardown counter also steps over what ended without a teardown.
        plain_difference: epochs are subtracted without wrapping.
        c_remainder: the slot is the remainder of C and of Triton, with the sign of the epoch.
    """

    world: int
    in_flight: int
    streams: int = 2
    rounds: int | None = None
    start: int = 0
    may_abort: bool = False
    may_abandon: bool = False
    gather: bool = False

    ring: int | None = None
    flag_first: bool = False
    shared_counter: str | None = None
    frozen_slot: bool = False
    unordered: bool = False
    uncounted_aborts: bool = False
    skipped: int | None = None
    undrained: frozenset[str] = EARLY_ENDS
    drain_delay: int = 0
    drain_forgiven: int = 0
    counts_unfinished: bool = True
    plain_difference: bool = False
    c_remainder: bool = False

    @property
    def slots(self) -> int:
        """Slots of the ring, n."""
        return 2 * self.in_flight if self.ring is None else self.ring

    def epoch(self, count: int) -> int:
        """Epoch, int32, that a counter shows after ``count`` steps."""
        return _int32(self.start + count)

    def slot(self, epoch: int) -> int:
        """Slot of an epoch; outside the ring where the rule is wrong."""
        if self.frozen_slot:
            return 0
        if self.c_remainder and epoch < 0:
            return -(-epoch % self.slots)
        return epoch % self.slots

    def ahead(self, seen: int, wanted: int) -> int:
        """How far a flag is ahead of the wanted epoch."""
        return seen - wanted if self.plain_difference else _int32(seen - wanted)

    def has_room(self, rank: Rank) -> bool:
        """Whether setup(i - f) was torn down, or is over, where setup(i) is the rank's next."""
        ahead = rank.pending.count(False) if self.uncounted_aborts else len(rank.pending)
        return ahead < self.in_flight

    def operation(self, r: int, count: int) -> int:
        """Number of the operation that rank r issues after ``count`` others."""
        return count + (r == 0 and self.skipped is not None and count >= self.skipped)

    def issued(self, r: int) -> int | None:
        """How many operations rank r issues in all; None is no end."""
        if self.rounds is None:
            return None
        return self.rounds - (r == 0 and self.skipped is not None)


class Rank(NamedTuple):
    """What a rank holds besides its window. Its device counters are ``sent`` and ``over - lag``."""

    sent: int  # setups that ended
    over: int  # operations that ended, in whatever way
    lag: int  # of these, how many the teardown counter missed
    pending: tuple[bool, ...]  # operations over .. sent - 1: aborted?
    undrained: tuple[int, ...]  # operations whose flags must still be asked for
    turn: str  # half that may run: "setup", "teardown", "both", "none"
    aborting: bool  # the running setup writes aborts
    push: tuple[int, ...] = ()  # progress of the running setup with each rank, () between setups
    take: tuple[int, ...] = ()  # progress of the running teardown, () before its first step


class Cell(NamedTuple):
    """One slot of one source, as a reader sees it.

    Gathered data have one place, which all readers see: a write changes the tag for all of them.
    """

    tag: int  # operation whose data this is
    epoch: int  # flag record, first half
    abort: bool  # flag record, second half: written and read in one piece with the first


Window = tuple[tuple[Cell, ...], ...]  # [source][slot]


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    windows: tuple[Window, ...]  # [reader][source][slot]


class Move(NamedTuple):
    """A step of one rank: what it becomes and what it writes, or the violation it runs into."""

    label: str
    rank: Rank | None
    violation: str | None = None
    peers: tuple[int, ...] = ()  # who sees the write
    slot: int = -1
    tag: int | None = None  # data written
    record: tuple[int, bool] | None = None  # flag record written
    forced: bool = False


class Step(NamedTuple):
    label: str
    state: State | None
    violation: str | None


class Result(NamedTuple):
    """Outcome of an exploration; ``trace`` is one line for each step up to the violation."""

    states: int
    violation: str | None
    trace: tuple[str, ...]


def _int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _put(items: tuple, index: int, value: object) -> tuple:
    return (*items[:index], value, *items[index + 1 :])


def _others(protocol: Protocol, r: int) -> tuple[int, ...]:
    return tuple(p for p in range(protocol.world) if p != r)


def _end(protocol: Protocol, rank: Rank, how: str) -> Rank:
    """End the oldest pending operation: "read", "aborted", "raised" or "abandoned"."""
    owes = how != "aborted" and how in protocol.undrained  # an abort owed from the start
    return rank._replace(
        over=rank.over + 1,
        lag=rank.lag + (how != "read" and not protocol.counts_unfinished),
        pending=rank.pending[1:],
        undrained=tuple(sorted((*rank.undrained, rank.over))) if owes else rank.undrained,
        take=(),
    )


def _next(protocol: Protocol, r: int, rank: Rank) -> Iterator[Rank]:
    """After a half has ended: the rank, once for each half it may commit itself to."""
    while rank.pending and rank.pending[0]:
        rank = _end(protocol, rank, "aborted")
    if protocol.streams == 2:
        yield rank._replace(turn="both")
        return
    may_setup = rank.sent != protocol.issued(r) and protocol.has_room(rank)
    if may_setup:
        yield rank._replace(turn="setup")
    if rank.pending:
        yield rank._replace(turn="teardown")
    if not may_setup and not rank.pending:
        yield rank._replace(turn="none")


def _start_moves(protocol: Protocol, r: int, me: Rank, window: Window) -> Iterator[Move]:
    """Begin the next setup, once the local order and the drains allow it."""
    if me.sent == protocol.issued(r):
        return
    if not protocol.has_room(me) and not protocol.unordered:
        return
    due = [d for d in me.undrained if d + protocol.in_flight + protocol.drain_delay <= me.sent]
    peers = _others(protocol, r)[protocol.drain_forgiven :]
    paid = True
    for undrained_epoch, p in itertools.product(due, peers):
        epoch = protocol.epoch(undrained_epoch)
        seen = window[p][protocol.slot(epoch)].epoch
        if protocol.ahead(seen, epoch) > 0:
            label = f"rank {r} still owes a look at epoch {epoch} and finds {seen} of rank {p}"
            yield Move(label, None, "overrun")
        paid = paid and seen == epoch
    if not paid:
        return
    for aborting in (False, True) if protocol.may_abort else (False,):
        begun = me._replace(
            undrained=tuple(d for d in me.undrained if d not in due),
            aborting=aborting,
            push=tuple(DONE if p == r else NOTHING for p in range(protocol.world)),
        )
        verb = "aborts operation" if aborting else "begins setup of operation"
        label = f"rank {r} {verb} {protocol.operation(r, me.sent)}"
        yield Move(label, begun, forced=not due)


def _push_moves(protocol: Protocol, r: int, me: Rank) -> Iterator[Move]:
    """Write the next thing to any peer the running setup is not done with."""
    epoch = protocol.epoch(me.over if protocol.shared_counter == "teardown" else me.sent)
    slot = protocol.slot(epoch)
    if not 0 <= slot < protocol.slots:
        yield Move(f"rank {r} writes to slot {slot} for epoch {epoch}", None, "bad slot")
        return
    operation = protocol.operation(r, me.sent)
    others = _others(protocol, r)
    # What a peer's progress is when data come next. Gathered data go out once for all peers.
    data = HALF if protocol.flag_first else NOTHING
    once = protocol.gather and not me.aborting
    writes = [(p,) for p in others if me.push[p] != DONE and not (once and me.push[p] == data)]
    if once and all(me.push[p] == data for p in others):
        writes.append(others)
    for peers in writes:
        where = f"to rank {peers[0]}, slot {slot}"
        progress = me.push[peers[0]]
        if not me.aborting and progress == data:
            where = f"to its slot {slot}" if once else where
            label = f"rank {r} writes data of operation {operation} {where}"
            write = {"tag": operation, "forced": not protocol.flag_first}
        else:
            what = "abort" if me.aborting else "flag"
            label = f"rank {r} writes {what} of epoch {epoch} {where}"
            write = {"record": (epoch, me.aborting)}
        push = me.push
        for p in peers:
            push = _put(push, p, DONE if me.aborting else progress + 1)
        now = me._replace(push=push)
        choices = [now]
        if all(progress == DONE for progress in push):
            owes = me.aborting and "aborted" in protocol.undrained
            ended = now._replace(
                sent=me.sent + 1,
                pending=(*me.pending, me.aborting),
                undrained=(*me.undrained, me.sent) if owes else me.undrained,
                aborting=False,
                push=(),
            )
            choices = list(_next(protocol, r, ended))
        for choice in choices:
            yield Move(label, choice, peers=peers, slot=slot, **write)


def _teardown_moves(
    protocol: Protocol, reduced: bool, r: int, me: Rank, window: Window
) -> Iterator[Move]:
    """Poll a flag, raise, read a source, or drop the oldest pending operation."""
    operation = protocol.operation(r, me.over)
    count = {None: me.over - me.lag, "setup": me.sent - 1, "teardown": me.over}
    epoch = protocol.epoch(count[protocol.shared_counter])
    slot = protocol.slot(epoch)
    who = f"rank {r} in teardown of operation {operation}"

    def ended(label: str, how: str, forced: bool = False) -> Iterator[Move]:
        for choice in _next(protocol, r, _end(protocol, me, how)):
            yield Move(label, choice, forced=forced)

    if protocol.may_abandon and not me.take:
        yield from ended(f"rank {r} abandons operation {operation}", "abandoned")
    if not 0 <= slot < protocol.slots:
        yield Move(f"{who} looks at slot {slot} for epoch {epoch}", None, "bad slot")
        return

    take = me.take or tuple(DONE if s == r else NOTHING for s in range(protocol.world))
    cells = {s: window[s][slot] for s in range(protocol.world)}
    unseen = [s for s in cells if take[s] == NOTHING]
    late = [s for s in unseen if protocol.ahead(cells[s].epoch, epoch) > 0]
    for s in late:
        label = f"{who} wants epoch {epoch} and finds {cells[s].epoch} of rank {s}"
        yield Move(label, None, "overrun")
    arrived = [s for s in unseen if cells[s].epoch == epoch]
    aborts = [s for s in arrived if cells[s].abort]
    pays = "raised" in protocol.undrained and not (protocol.drain_delay or protocol.drain_forgiven)
    for s in aborts:
        forced = pays and not protocol.may_abandon and not late
        yield from ended(f"{who} raises at the abort of rank {s}", "raised", forced)

    if not reduced:
        for s in arrived:
            if not cells[s].abort:
                seen = me._replace(take=_put(take, s, HALF))
                yield Move(f"{who} sees the flag of rank {s}", seen)
        if unseen:
            return
    elif aborts or len(arrived) < len(unseen):
        return

    unread = [s for s in cells if take[s] != DONE]
    wrong = [s for s in unread if cells[s].tag != operation]
    for s in wrong:
        what = f"data of operation {cells[s].tag}" if cells[s].tag >= 0 else "old data"
        label = f"{who} reads {what} of rank {s}, slot {slot}"
        yield Move(label, None, "wrong data")
    if reduced:
        if not wrong:
            yield from ended(f"{who} sees all flags and reads slot {slot}", "read")
        return
    for s in unread:
        if s in wrong:
            continue
        label = f"{who} reads data of rank {s}, slot {slot}"
        if len(unread) == 1:
            yield from ended(label, "read")
        else:
            yield Move(label, me._replace(take=_put(take, s, DONE)))


def _moves(protocol: Protocol, reduced: bool, r: int, me: Rank, window: Window) -> list[Move]:
    """All moves of one rank: they depend on the rank and on its own window only."""
    moves: list[Move] = []
    if me.turn in ("setup", "both"):
        if me.push:
            moves += _push_moves(protocol, r, me)
        else:
            moves += _start_moves(protocol, r, me, window)
    if me.turn in ("teardown", "both") and me.pending:
        moves += _teardown_moves(protocol, reduced, r, me, window)
    return moves


def _apply(state: State, r: int, move: Move) -> Step:
    if move.rank is None:
        return Step(move.label, None, move.violation)
    ranks = _put(state.ranks, r, move.rank)
    windows = state.windows
    for peer in move.peers:
        window = windows[peer]
        cell = window[r][move.slot]
        tag = cell.tag if move.tag is None else move.tag
        cell = Cell(tag, *(move.record or (cell.epoch, cell.abort)))
        window = _put(window, r, _put(window[r], move.slot, cell))
        windows = _put(windows, peer, window)
    return Step(move.label, State(ranks, windows), None)


def _is_spent(protocol: Protocol, state: State, r: int, slot: int, readers: Iterable[int]) -> bool:
    """Whether no reader can read what lies in a slot of rank r.

    It is past that operation, or an abort that it has not looked at yet stops it there.
    """
    for p in readers:
        reader, window = state.ranks[p], state.windows[p]
        tag = window[r][slot].tag
        stop = (protocol.epoch(tag), True)
        if tag >= reader.over - reader.lag and stop not in [cells[slot][1:] for cells in window]:
            return False
    return True


def _is_forced(protocol: Protocol, state: State, r: int, move: Move) -> bool:
    """Whether nothing is lost if this move is taken before all others.

    Forced moves commute with every move of the other ranks, and none of those can disable them:

    * the start of a setup that drains nothing: it looks only at what its own rank did;
    * data written by a setup where no reader can read what lay there: they can read the slot again
      only after the flags that follow this write;
    * a raise that leaves an undrained operation: only a later record in the same slot could come
    before it, an
      overrun, and draining finds that overrun as the teardown would have.

    A flag or a read is never put off for ever, as finitely many forced moves lie before it.
    """
    return move.forced and (
        move.tag is None or _is_spent(protocol, state, r, move.slot, move.peers)
    )


def _steps(
    protocol: Protocol, state: State, moves: Callable[..., list[Move]], reduced: bool
) -> list[Step]:
    """Steps out of a state.

    Two reductions besides `_canonical`, both only if ``reduced``:

    * A teardown polls and reads all sources in one step, taken whenever it is possible. Polling and
      reading change nothing that others see, so the polls and reads of a run can all move down to
      the last of them: what was overwritten in between is an overrun there, and a wrong tag is as
      wrong.
    * If a rank has forced moves (`_is_forced`), only these are followed.
    """
    actual = []
    for r, (rank, window) in enumerate(zip(*state, strict=True)):
        mine = moves(r, rank, window)
        if reduced:
            forced = [move for move in mine if _is_forced(protocol, state, r, move)]
            if forced:
                # One write is enough, as writes to different peers commute; the others are
                # alternatives (data or abort, what comes next) and all of them are followed.
                kept = [move for move in forced if move.peers == forced[0].peers]
                return [_apply(state, r, move) for move in kept]
        actual += [(r, move) for move in mine]
    return [_apply(state, r, move) for r, move in actual]


@cache
def _forget(
    slots: tuple[Cell, ...], oldest: int, undrained: tuple[int, ...], base: int
) -> tuple[Cell, ...]:
    """Shift the slots of one source, and make equal what the reader never looks at again."""
    cells = []
    for tag, epoch, abort in slots:
        old = epoch < oldest and epoch not in undrained
        cells.append(
            Cell(
                -1 if tag < oldest else tag - base,
                -1 if old else epoch - base,
                abort and not old,
            )
        )
    turn = base % len(slots)
    return (*cells[turn:], *cells[:turn])


def _canonical(protocol: Protocol, state: State, order: Sequence[int] | None = None) -> State:
    """One state for all that go on alike, where there is no last operation.

    Equal are states that differ by a shift of all operations (slots rotate along), by the names of
    ranks (all may do the same), or by data and flags that no later teardown or drain looks at.
    Ranks are sorted without regard to ties, which costs states, not truth; or put in ``order``.
    """
    if protocol.rounds is not None:
        return state
    if order is None:
        ranks = state.ranks
        order = sorted(range(len(ranks)), key=lambda r: (ranks[r][:7], sum(ranks[r].push)))
    base = min(min((rank.over - rank.lag, *rank.undrained)) for rank in state.ranks)
    ranks = []
    windows = []
    for r in order:
        rank, window = state.ranks[r], state.windows[r]
        oldest = rank.over - rank.lag
        windows.append(tuple([_forget(window[s], oldest, rank.undrained, base) for s in order]))
        ranks.append(
            rank._replace(
                sent=rank.sent - base,
                over=rank.over - base,
                undrained=rank.undrained
                and tuple([undrained_epoch - base for undrained_epoch in rank.undrained]),
                push=rank.push and tuple([rank.push[p] for p in order]),
                take=rank.take and tuple([rank.take[s] for s in order]),
            )
        )
    return State(tuple(ranks), tuple(windows))


def _initial(protocol: Protocol) -> State:
    """Nothing issued, and flags of the epoch before the first."""
    rank = Rank(0, 0, 0, (), (), "setup" if protocol.streams == 1 else "both", False)
    cell = Cell(-1, protocol.epoch(-1), False)
    window = ((cell,) * protocol.slots,) * protocol.world
    return State((rank,) * protocol.world, (window,) * protocol.world)


def _finished(protocol: Protocol, state: State) -> bool:
    return all(rank.sent == rank.over == protocol.issued(r) for r, rank in enumerate(state.ranks))


def explore(
    protocol: Protocol,
    *,
    reduced: bool = True,
    seek: str | None = None,
    max_states: int = 300_000,
) -> Result:
    """Breadth-first search of all interleavings for a violation.

    Violations are "wrong data" (a teardown reads what is not its operation's), "overrun" (a flag is
    ahead of the wanted epoch), "bad slot" (outside the ring) and "deadlock" (no rank can move and
    one has operations left).

    Args:
        protocol: the rules.
        reduced: False explores every poll and read on its own, with no reduction but, where
            ``rounds`` is None, `_canonical`.
        seek: stop only at this kind of violation; others end their branch. None stops at any.
        max_states: guard against a model that grows without end.

    Returns:
        Number of states met, the violation or None, and a trace to it: a shortest one where no
        reduction applies, a short one else.

    Raises:
        RuntimeError: more than ``max_states`` states.
    """
    numbered = protocol.start or protocol.frozen_slot or protocol.skipped is not None
    if protocol.rounds is None and (numbered or protocol.drain_forgiven):
        raise ValueError(f"explore: {protocol} tells operations or ranks apart, it needs rounds")
    moves = cache(partial(_moves, protocol, reduced))
    initial = _initial(protocol)
    parents: dict[State, State | None] = {initial: None}
    queue = deque([initial])
    while queue:
        state = queue.popleft()
        steps = _steps(protocol, state, moves, reduced)
        if not steps and not _finished(protocol, state):
            steps = [Step("no rank can move", None, "deadlock")]
        for step in steps:
            if step.state is None:
                if seek in (None, step.violation):
                    trace = _trace(protocol, moves, parents, state, step.violation)
                    return Result(len(parents), step.violation, trace)
                continue
            reached = _canonical(protocol, step.state)
            if reached not in parents:
                parents[reached] = state
                queue.append(reached)
        if len(parents) > max_states:
            raise RuntimeError(f"explore: more than {max_states} states for {protocol}")
    return Result(len(parents), None, ())


def _trace(
    protocol: Protocol,
    moves: Callable[..., list[Move]],
    parents: dict[State, State | None],
    last: State,
    violation: str,
) -> tuple[str, ...]:
    """Replay the way to ``last`` with the true names and numbers, which `_canonical` took away."""
    way = []
    target: State | None = last
    while target is not None:
        way.append(target)
        target = parents[target]
    orders = list(itertools.permutations(range(protocol.world)))
    state = _initial(protocol)
    labels = []
    for target in reversed(way[:-1]):
        for label, reached, _ in _steps(protocol, state, moves, False):
            if reached and any(_canonical(protocol, reached, o) == target for o in orders):
                labels.append(label)
                state = reached
                break
        else:
            raise AssertionError("the states on the way are not a run of the model")
    ends = [
        step.label for step in _steps(protocol, state, moves, False) if step.violation == violation
    ]
    return (*labels, ends[0] if ends else "no rank can move")


def _case(name: str, *args: object, **rules: object) -> object:
    return pytest.param(Protocol(**rules), *args, id=name)


def _report(result: Result) -> str:
    return "\n".join((f"{result.violation} after {result.states} states:", *result.trace))


# With f = 1 nothing of a rank can run side by side, so a second stream changes nothing.
SIZES = [(2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 3, 1), (2, 3, 2), (3, 1, 1), (3, 2, 1), (3, 2, 2)]
SIZES += [(4, 1, 1)]


@pytest.mark.parametrize("world, in_flight, streams", SIZES)
def test_holds_for_any_number_of_operations(world, in_flight, streams):
    result = explore(Protocol(world, in_flight, streams))
    assert result.violation is None, _report(result)


@pytest.mark.parametrize(
    "world, in_flight, streams",
    [pytest.param(*size, marks=pytest.mark.full) if size == (3, 2, 1) else size for size in SIZES],
)
def test_holds_when_any_rank_rejects_anything(world, in_flight, streams):
    result = explore(Protocol(world, in_flight, streams, may_abort=True))
    assert result.violation is None, _report(result)


@pytest.mark.parametrize("world, in_flight, streams", [(2, 1, 1), (2, 2, 1), (2, 2, 2), (3, 1, 1)])
def test_holds_when_operations_are_also_abandoned(world, in_flight, streams):
    result = explore(Protocol(world, in_flight, streams, may_abort=True, may_abandon=True))
    assert result.violation is None, _report(result)


@pytest.mark.parametrize("world, in_flight, streams", SIZES)
def test_holds_when_data_are_gathered(world, in_flight, streams):
    result = explore(Protocol(world, in_flight, streams, gather=True))
    assert result.violation is None, _report(result)


@pytest.mark.parametrize("world, in_flight, streams", [(2, 1, 1), (2, 2, 1), (2, 2, 2), (3, 1, 1)])
def test_holds_when_data_are_gathered_and_operations_abandoned(world, in_flight, streams):
    protocol = Protocol(world, in_flight, streams, may_abort=True, may_abandon=True, gather=True)
    result = explore(protocol)
    assert result.violation is None, _report(result)


def test_holds_when_three_ranks_with_two_in_flight_abandon_anything():
    result = explore(Protocol(3, 2, may_abandon=True))
    assert result.violation is None, _report(result)


@pytest.mark.parametrize(
    "protocol",
    [
        _case("2-ranks-f1", world=2, in_flight=1, may_abort=True, may_abandon=True),
        _case("2-ranks-f2", world=2, in_flight=2, may_abort=True, may_abandon=True),
        _case("3-ranks-f1", world=3, in_flight=1, may_abort=True, may_abandon=True),
        _case("3-ranks-f2", world=3, in_flight=2, may_abort=True),
    ],
)
def test_holds_when_every_setup_asks(protocol):
    result = explore(replace(protocol, undrained=EVERY_END))
    assert result.violation is None, _report(result)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(
    "protocol",
    [
        _case("2-ranks-f1", world=2, in_flight=1, rounds=4, may_abort=True, may_abandon=True),
        _case("2-ranks-f2", world=2, in_flight=2, rounds=6),
        _case("2-ranks-f2-abort", world=2, in_flight=2, rounds=5, may_abort=True),
        _case("3-ranks-f1", world=3, in_flight=1, rounds=3),
        _case("3-ranks-f1-abort-for-ever", world=3, in_flight=1, may_abort=True),
    ],
)
def test_holds_without_reductions(protocol, streams):
    result = explore(replace(protocol, streams=streams), reduced=False)
    assert result.violation is None, _report(result)


@pytest.mark.parametrize("middle", [INT32_MAX, -1], ids=["past-int32-max", "past-zero"])
@pytest.mark.parametrize(
    "protocol",
    [
        _case("2-ranks-f1", world=2, in_flight=1, rounds=5, may_abort=True),
        _case("2-ranks-f2", world=2, in_flight=2, rounds=7),
        _case("2-ranks-f3-ring-of-8", world=2, in_flight=3, rounds=10, ring=8),
        _case("3-ranks-f1", world=3, in_flight=1, rounds=5),
    ],
)
def test_holds_wherever_the_epochs_wrap(protocol, middle):
    for before in range(protocol.rounds + 1):
        result = explore(replace(protocol, start=_int32(middle - before + 1)))
        assert result.violation is None, _report(result)


@pytest.mark.parametrize(
    "protocol",
    [
        _case("one-counter-is-enough-at-f1", world=2, in_flight=1, shared_counter="setup"),
        _case(
            "two-ranks-need-no-drain-after-a-raise",
            world=2,
            in_flight=2,
            may_abort=True,
            undrained=frozenset({"aborted"}),
        ),
    ],
)
def test_where_a_rule_is_not_needed(protocol):
    assert explore(protocol).violation is None


TORN = {"wrong data", "overrun"}

# Each with every kind of violation it can lead to within its rounds.
BUGS = [
    _case("ring-of-2f-1-at-f1", TORN, world=2, in_flight=1, rounds=3, ring=1),
    _case("ring-of-2f-1-at-f2", TORN, world=2, in_flight=2, rounds=5, ring=3),
    _case("one-setup-past-f", TORN, world=2, in_flight=2, rounds=4, ring=2),
    _case("flag-before-data", {"wrong data"}, world=2, in_flight=1, rounds=3, flag_first=True),
    _case(
        "one-counter-advanced-by-setups",
        {"wrong data"},
        world=2,
        in_flight=2,
        streams=1,
        rounds=4,
        shared_counter="setup",
    ),
    _case(
        "one-counter-advanced-by-teardowns",
        {"wrong data", "deadlock"},
        world=2,
        in_flight=2,
        streams=1,
        rounds=4,
        shared_counter="teardown",
    ),
    _case("slot-frozen-in-a-graph", TORN, world=2, in_flight=1, rounds=3, frozen_slot=True),
    _case(
        "abandoned-teardown",
        TORN,
        world=2,
        in_flight=1,
        rounds=4,
        may_abandon=True,
        undrained=frozenset(),
    ),
    _case("setup-on-another-stream-f1", TORN, world=2, in_flight=1, rounds=3, unordered=True),
    _case("setup-on-another-stream-f2", TORN, world=2, in_flight=2, rounds=5, unordered=True),
    _case(
        "setup-on-another-stream-that-asks",
        TORN,
        world=2,
        in_flight=1,
        rounds=4,
        unordered=True,
        undrained=EVERY_END,
    ),
    _case("skipped-operation", {"wrong data"}, world=2, in_flight=1, rounds=4, skipped=1),
    _case("skipped-last-operation", {"deadlock"}, world=2, in_flight=1, rounds=2, skipped=1),
    _case(
        "abort-without-drain",
        TORN,
        world=2,
        in_flight=1,
        rounds=4,
        may_abort=True,
        undrained=frozenset(),
    ),
    _case(
        "abort-with-a-drain-of-the-peers-only",
        TORN,
        world=2,
        in_flight=1,
        rounds=4,
        may_abort=True,
        undrained=frozenset({"raised"}),
    ),
    _case(
        "drained-one-setup-late",
        TORN,
        world=2,
        in_flight=1,
        rounds=4,
        may_abort=True,
        drain_delay=1,
    ),
    _case(
        "abort-not-counted-by-the-teardown-counter",
        TORN,
        world=2,
        in_flight=1,
        rounds=4,
        may_abort=True,
        counts_unfinished=False,
    ),
    _case(
        "abort-not-counted-against-f",
        TORN,
        world=2,
        in_flight=2,
        streams=1,
        rounds=5,
        may_abort=True,
        uncounted_aborts=True,
    ),
    _case(
        "epochs-compared-without-wrapping",
        {"overrun"},
        world=2,
        in_flight=1,
        rounds=4,
        start=INT32_MAX - 1,
        plain_difference=True,
    ),
    _case(
        "slot-with-the-sign-of-the-epoch",
        {"bad slot"},
        world=2,
        in_flight=1,
        rounds=4,
        start=INT32_MAX - 1,
        c_remainder=True,
    ),
    # The slot jumps where 2**32 is no multiple of the ring, so 2f must be a power of two.
    _case("ring-of-6-wraps", TORN, world=2, in_flight=3, rounds=8, start=INT32_MAX - 2),
    # The same where data are gathered.
    _case("gather-ring-of-2f-1-at-f1", TORN, world=2, in_flight=1, rounds=3, ring=1, gather=True),
    _case("gather-ring-of-2f-1-at-f2", TORN, world=2, in_flight=2, rounds=5, ring=3, gather=True),
    _case(
        "gather-flag-before-data",
        {"wrong data"},
        world=2,
        in_flight=1,
        rounds=3,
        flag_first=True,
        gather=True,
    ),
    _case(
        "gather-setup-on-another-stream-f1",
        TORN,
        world=2,
        in_flight=1,
        rounds=3,
        unordered=True,
        gather=True,
    ),
    _case(
        "gather-setup-on-another-stream-f2",
        TORN,
        world=2,
        in_flight=2,
        rounds=5,
        unordered=True,
        gather=True,
    ),
    _case(
        "gather-abort-without-drain",
        TORN,
        world=2,
        in_flight=1,
        rounds=4,
        may_abort=True,
        undrained=frozenset(),
        gather=True,
    ),
]


@pytest.mark.parametrize("reduced", [True, False], ids=["reduced", "full"])
@pytest.mark.parametrize("protocol, kinds", BUGS)
def test_planted_bug_is_found(protocol, kinds, reduced):
    results = {kind: explore(protocol, reduced=reduced, seek=kind) for kind in VIOLATIONS}
    assert {kind for kind in results if results[kind].violation} == kinds
    first = explore(protocol, reduced=reduced)
    assert first.violation in kinds
    assert len(first.trace) <= 30, _report(first)


@pytest.mark.parametrize(
    "protocol, kind",
    [
        _case("ring-of-2f-1", "wrong data", world=3, in_flight=2, ring=3),
        _case("flag-before-data", "wrong data", world=3, in_flight=2, flag_first=True),
        _case("setup-on-another-stream", "wrong data", world=3, in_flight=1, unordered=True),
        _case(
            "abandoned-teardown",
            "wrong data",
            world=3,
            in_flight=1,
            may_abandon=True,
            undrained=frozenset(),
        ),
        _case(
            "abort-without-drain",
            "wrong data",
            world=3,
            in_flight=1,
            may_abort=True,
            undrained=frozenset(),
        ),
        # Needs a third rank: with two, an abort in sight is every flag in sight.
        _case(
            "abort-with-a-drain-of-the-aborting-rank-only",
            "wrong data",
            world=3,
            in_flight=1,
            may_abort=True,
            undrained=frozenset({"aborted"}),
        ),
        _case(
            "drain-that-forgives-one-peer",
            "wrong data",
            world=3,
            in_flight=1,
            rounds=4,
            may_abort=True,
            drain_forgiven=1,
        ),
        _case("gather-ring-of-2f-1", "wrong data", world=3, in_flight=2, ring=3, gather=True),
        _case(
            "gather-flag-before-data",
            "wrong data",
            world=3,
            in_flight=2,
            flag_first=True,
            gather=True,
        ),
        _case(
            "gather-setup-on-another-stream",
            "wrong data",
            world=3,
            in_flight=1,
            unordered=True,
            gather=True,
        ),
    ],
)
def test_planted_bug_is_found_with_three_ranks(protocol, kind):
    result = explore(protocol, seek=kind)
    assert result.violation == kind
    assert len(result.trace) <= 40, _report(result)


def test_trace_tells_the_story():
    protocol = Protocol(world=2, in_flight=1, rounds=3, may_abort=True, undrained=frozenset())
    assert explore(protocol, seek="wrong data").trace == (
        "rank 0 begins setup of operation 0",
        "rank 0 writes data of operation 0 to rank 1, slot 0",
        "rank 1 begins setup of operation 0",
        "rank 1 writes data of operation 0 to rank 0, slot 0",
        "rank 0 writes flag of epoch 0 to rank 1, slot 0",
        "rank 1 writes flag of epoch 0 to rank 0, slot 0",
        "rank 0 in teardown of operation 0 sees all flags and reads slot 0",
        "rank 0 aborts operation 1",
        "rank 0 writes abort of epoch 1 to rank 1, slot 1",
        "rank 0 begins setup of operation 2",
        "rank 0 writes data of operation 2 to rank 1, slot 0",
        "rank 1 in teardown of operation 0 reads data of operation 2 of rank 0, slot 0",
    )

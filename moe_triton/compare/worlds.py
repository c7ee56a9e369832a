"""Which calls of which ranks belong together: dispatch and combine are collective."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from ..ascend import op_names
from ..record.calls import RankCall
from ..record.operators import is_collective

# A teardown works on what its setup sent: the two are run together.
_SETUPS = {
    op_names.DISPATCH_TEARDOWN: op_names.DISPATCH_SETUP,
    op_names.COMBINE_TEARDOWN: op_names.COMBINE_SETUP,
}


@dataclasses.dataclass(frozen=True)
class WorldCall:
    """One call of all ranks of a world; of an operator on one device, that of all ranks apart.

    Attributes:
        op: the operator.
        name: of the call in the dump, without the rank.
        step: folder of the step, "" without one.
        calls: in the order of the world ranks, ``ep_rank * T + tp_rank``.
        ep_world: W.
        tp_world: T, 1 without tensor parallelism.
        setups: the calls that a teardown completes, in the same order; else empty.
    """

    op: str
    name: str
    step: str
    calls: tuple[RankCall, ...]
    ep_world: int
    tp_world: int
    setups: tuple[RankCall, ...] = ()

    @property
    def place(self) -> str:
        """Step and name, for messages."""
        return f"{self.step}/{self.name}".lstrip("/")


Report = Callable[[str, str], None]


def group_calls(calls: Sequence[RankCall], report: Report) -> list[WorldCall]:
    """The calls of each world, in the order of the first rank's dump.

    Args:
        calls: of all ranks.
        report: called with a place and a problem where a world is incomplete or inconsistent.
    """
    by_number: dict[tuple[str, str, int], list[RankCall]] = defaultdict(list)
    for call, number in _numbered(calls):
        by_number[call.step, call.op, number].append(call)
    worlds: list[WorldCall] = []
    for (step, op, _), members in by_number.items():
        if not is_collective(op):
            worlds.append(WorldCall(op, members[0].name, step, tuple(members), 1, 1))
            continue
        for part in _components(members):
            world = _world(op, step, part, report)
            if world is not None:
                worlds.append(world)
    return _with_setups(worlds, report)


def _numbered(calls: Sequence[RankCall]) -> Iterator[tuple[RankCall, int]]:
    """Each call and its number, by which ranks are matched.

    Dumps count the calls of all groups together, and ranks of two groups may interleave them
    differently: then the calls of each group are counted. With one group the dump's own count
    holds, which survives a call that is missing.
    """
    groups: dict[tuple[str, str, str], set[str | None]] = defaultdict(set)
    for call in calls:
        if call.group is not None:
            groups[call.step, call.rank, call.op].add(call.group)
    seen: dict[tuple[object, ...], int] = defaultdict(int)
    for call in calls:
        mine = groups[call.step, call.rank, call.op]
        if len(mine) <= 1 and call.index is not None:
            yield call, call.index
            continue
        # A broken call may not say its group.
        key = (call.step, call.rank, call.op, call.group)
        yield call, seen[key]
        seen[key] += 1


def _components(members: list[RankCall]) -> list[list[RankCall]]:
    """Ranks connected by the names of their groups; all, if only all of them are a world."""
    parts: list[tuple[set[object], list[RankCall]]] = []
    known = {call.group for call in members} - {None}
    for call in members:
        # A broken call may not say its group: it belongs to the only one, if there is one.
        group = next(iter(known)) if call.group is None and len(known) == 1 else call.group
        names: set[object] = {("ep", group)}
        if call.tp_world == 2:
            names.add(("tp", str(call.arguments.get("group_tp"))))
        joined = [call]
        for part in [part for part in parts if part[0] & names]:
            names |= part[0]
            joined = part[1] + joined
            parts.remove(part)
        parts.append((names, joined))
    components = [part[1] for part in parts]
    if len(components) > 1 and not any(map(_complete, components)) and _complete(members):
        return [members]  # each rank has its own name of the group
    return components


def _size(calls: Sequence[RankCall]) -> tuple[int, int]:
    return calls[0].number("ep_world_size"), calls[0].tp_world


def _complete(calls: Sequence[RankCall]) -> bool:
    ep, tp = _size(calls)
    ids = sorted((call.ep_rank, call.tp_rank) for call in calls)
    return len(calls) <= ep * tp and ids == [(e, t) for e in range(ep) for t in range(tp)]


def _world(op: str, step: str, calls: list[RankCall], report: Report) -> WorldCall | None:
    place = f"{step}/{calls[0].name}".lstrip("/")
    broken = [call for call in calls if call.problem]
    for call in broken:
        report(f"{step}/{call.rank}/{call.name}".lstrip("/"), call.problem)
    sizes = {_size([call]) for call in calls if not call.problem}
    if not sizes:
        return None
    if len(sizes) > 1:
        got = ", ".join(f"{ep} x {tp}" for ep, tp in sorted(sizes))
        report(place, f"ep_world_size x tp_world_size must be equal on all ranks, got {got}")
        return None
    ((ep, tp),) = sizes
    if not 1 <= ep <= 4096 or tp not in (1, 2):
        report(
            place, f"ep_world_size must be 1 to 4096 and tp_world_size at most 2, got {ep}, {tp}"
        )
        return None
    by_rank: dict[int, RankCall] = {}
    for call in calls:
        if call.problem:
            continue
        rank = call.ep_rank * tp + call.tp_rank
        if not 0 <= rank < ep * tp:
            report(place, f"ep_rank_id must be below {ep}, got {call.ep_rank} in {call.rank}")
            return None
        if rank in by_rank:
            report(
                place,
                f"ep_rank_id must be another on each rank, got {call.ep_rank} in both "
                f"{by_rank[rank].rank} and {call.rank}",
            )
            return None
        by_rank[rank] = call
    absent = [rank for rank in range(ep * tp) if rank not in by_rank]
    if absent:
        few = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        report(
            place,
            f"{op} is collective: the calls of all {ep * tp} ranks are needed, and those of "
            f"rank {few} are missing (there are {', '.join(c.rank for c in by_rank.values())})",
        )
        return None
    ordered = tuple(by_rank[rank] for rank in range(ep * tp))
    return WorldCall(op, ordered[0].name, step, ordered, ep, tp)


def _with_setups(worlds: list[WorldCall], report: Report) -> list[WorldCall]:
    """Give each teardown its setup: setups are torn down in the order in which they began."""
    pending: dict[tuple[object, ...], list[WorldCall]] = defaultdict(list)
    for world in worlds:
        if world.op in _SETUPS.values():
            pending[_group_key(world, world.op)].append(world)
    result = []
    for world in worlds:
        if world.op in _SETUPS:
            setups = pending[_group_key(world, _SETUPS[world.op])]
            if not setups:
                report(world.place, f"its {_SETUPS[world.op]} is missing")
                continue
            result.append(dataclasses.replace(world, setups=setups.pop(0).calls))
        else:
            result.append(world)
    return result


def _group_key(world: WorldCall, op: str) -> tuple[object, ...]:
    return world.step, op, world.calls[0].group, world.ep_world

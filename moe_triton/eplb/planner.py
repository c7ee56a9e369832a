"""From the load of experts to a plan: the greedy scheme by itself, or as the start of a search.

Letters: E logical experts, S physical slots, W ranks, N nodes, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from . import greedy, search, table
from .greedy import Floats, Ints
from .plan_sizes import PlanSizes, check_load
from .replica_plan import Plan


def plan(
    load: torch.Tensor,
    *,
    num_ranks: int,
    num_slots: int,
    num_nodes: int = 1,
    num_groups: int | None = None,
    balance_mode: int = table.BY_RANK,
) -> Plan:
    """Choose the replicas of hot experts, their ranks, and which rank or token uses which.

    It begins with what ``plan_greedy`` plans and moves experts, replicas and parts of their load
    away from the heaviest rank as long as that helps, so it is never worse than it. The parts are
    those that the table can express: by rank, all copies that a rank sends to one expert go to one
    replica, W-ths of its load; by token, they are fractions whose denominator is at most W.
    No rank holds two replicas of one expert. The same arguments give the same plan.

    Args:
        load: (E,) or (layers, E), any real dtype and device: rows for each logical expert over
            some time, of all ranks together.
        num_ranks: W, those that hold routed experts; all of them send, equally much.
        num_slots: S, the physical experts: a multiple of W, at least E and at most one of each
            expert for each rank that may hold it. dispatch calls it the number of experts.
        num_nodes: N, a divisor of W; ranks of a node are consecutive. By rank, a rank uses its own
            replica or one of its node where the balance allows.
        num_groups: G, a multiple of N and a divisor of E: the experts come in G groups of
            consecutive ids, and all replicas of a group stay on one node, as group-limited routing
            likes it. Each node gets G / N of them. None for experts that may go anywhere.
        balance_mode: how ``npu_moe_update_expert`` will choose: 0 by rank, 1 by token.

    Returns:
        The plan; its tensors begin with a dimension for layers if ``load`` does.

    Raises:
        ArgumentTypeError: a load that is no tensor of real numbers, a size that is no integer.
        ArgumentValueError: a shape, a size that does not divide, a negative or infinite load.
    """
    sizes = num_ranks, num_slots, num_nodes, num_groups, balance_mode
    return _plan_layers("eplb.plan", load, *sizes, _searched)


def plan_greedy(
    load: torch.Tensor,
    *,
    num_ranks: int,
    num_slots: int,
    num_nodes: int = 1,
    num_groups: int | None = None,
    balance_mode: int = table.BY_RANK,
) -> Plan:
    """Plan by DeepSeek's published scheme (module ``greedy``), to compare with.

    It knows neither balance mode: every replica stands in the table once, in order of their ids.
    ``load_after`` is what the mode makes of that, and with mode 1 what the scheme itself expects.

    Args:
        load: as in ``plan``.
        num_ranks: as in ``plan``.
        num_slots: as in ``plan``.
        num_nodes: as in ``plan``; without groups it changes nothing.
        num_groups: as in ``plan``.
        balance_mode: as in ``plan``.

    Returns:
        As ``plan``; a rank may hold two replicas of one expert.

    Raises:
        The errors of ``plan``.
    """
    sizes = num_ranks, num_slots, num_nodes, num_groups, balance_mode
    return _plan_layers("eplb.plan_greedy", load, *sizes, _greedy)


def _plan_layers(
    op: str,
    load: torch.Tensor,
    num_ranks: int,
    num_slots: int,
    num_nodes: int,
    num_groups: int | None,
    balance_mode: int,
    make: Callable[[Floats, PlanSizes], tuple[Ints, NDArray[np.int32]]],
) -> Plan:
    check_load(op, load)
    sizes = PlanSizes(load.shape[-1], num_ranks, num_slots, num_nodes, num_groups, balance_mode)
    sizes.check(op)
    layers = load.detach().cpu().double()
    if load.dim() == 1:
        layers = layers[None]
    made = [make(layer.numpy(), sizes) for layer in layers]
    eplb_table = torch.from_numpy(table.stack([rows for _, rows in made]))
    placement = torch.from_numpy(np.stack([slots for slots, _ in made]))
    home = torch.arange(sizes.num_experts) * num_ranks // sizes.num_experts
    before = layers.new_zeros(len(layers), num_ranks).index_add_(1, home, layers)
    given = {"num_ranks": num_ranks, "num_slots": num_slots, "balance_mode": balance_mode}
    after = torch.stack(
        [table.rank_load(one, rows, **given) for one, rows in zip(layers, eplb_table, strict=True)]
    )
    if load.dim() == 1:
        eplb_table, placement, before, after = eplb_table[0], placement[0], before[0], after[0]
    return Plan(eplb_table, placement, num_ranks, balance_mode, before, after)


def _greedy(load: Floats, sizes: PlanSizes) -> tuple[Ints, NDArray[np.int32]]:
    """The placement and the table of the greedy scheme."""
    placement = greedy.place(load, _nodes(load, sizes), sizes.num_ranks, sizes.num_slots)
    return placement, table.of_replicas(placement, sizes.num_experts)


def _searched(load: Floats, sizes: PlanSizes) -> tuple[Ints, NDArray[np.int32]]:
    """The placement and the table of the best that the searches find."""
    packed = _nodes(load, sizes)
    exchanged = _exchanged(load, packed, sizes)
    nodes = [packed] if np.array_equal(packed, exchanged) else [packed, exchanged]
    # A table of W-ths serves by token as well as by rank, and may balance better than one that
    # begins with equal parts.
    modes = dict.fromkeys((sizes.balance_mode, table.BY_RANK))
    found = [_search(load, one, sizes, mode) for one in nodes for mode in modes]
    state = min(found, key=lambda state: state.load().max())
    placement = np.nonzero(state.held.T)[1]
    return placement, table.of_parts(state.parts, placement, sizes.balance_mode, sizes.num_nodes)


def _search(load: Floats, nodes: Ints, sizes: PlanSizes, balance_mode: int) -> search.State:
    """What the search reaches, node by node, from the greedy placement as a mode uses it."""
    placement = greedy.place(load, nodes, sizes.num_ranks, sizes.num_slots)
    state = _start(load, placement, sizes.num_ranks, balance_mode)
    num_nodes = int(nodes.max()) + 1
    for node, ranks in enumerate(np.split(np.arange(sizes.num_ranks), num_nodes)):
        experts = np.flatnonzero(nodes == node)
        inside = np.ix_(experts, ranks)
        part = search.State(state.quantum[experts], state.parts[inside], state.held[inside])
        _fill(part, sizes.num_slots // sizes.num_ranks)
        search.refine(part)
        state.parts[inside], state.held[inside] = part.parts, part.held
    return state


def _start(load: Floats, placement: Ints, num_ranks: int, balance_mode: int) -> search.State:
    """The load as a balance mode spreads it over the replicas of a placement."""
    replicas = np.bincount(placement, minlength=len(load))
    # By token, as many quanta as fit into a row of the table and divide into equal parts.
    total = np.full(len(load), num_ranks)
    if balance_mode == table.BY_TOKEN:
        total = total // replicas * replicas
    shares = table.column_shares(replicas, replicas.max(), num_ranks, balance_mode)
    quanta = np.rint(shares * total[:, None]).astype(np.int64)
    parts = np.zeros((len(load), num_ranks), np.int64)
    numbers = np.zeros(len(load), np.int64)
    slots_per_rank = len(placement) // num_ranks
    for slot, expert in enumerate(placement):
        parts[expert, slot // slots_per_rank] += quanta[expert, numbers[expert]]
        numbers[expert] += 1
    held = np.zeros(parts.shape, np.bool_)
    held[placement, np.arange(len(placement)) // slots_per_rank] = True
    return search.State(load / total, parts, held)


def _fill(state: search.State, slots: int) -> None:
    """Give the slot of a second replica on one rank to the expert whose replicas carry the most."""
    total = state.quantum * state.parts.sum(1)
    for rank in range(state.held.shape[1]):
        while state.held[:, rank].sum() < slots:
            each = total / state.held.sum(1)
            state.held[np.where(state.held[:, rank], -1.0, each).argmax(), rank] = True


def _nodes(load: Floats, sizes: PlanSizes) -> Ints:
    """(E,) the node on which each expert has to stay, as the greedy scheme packs the groups."""
    if sizes.num_groups is None:
        return np.zeros(len(load), np.int64)
    groups = load.reshape(sizes.num_groups, -1).sum(1)
    return np.repeat(greedy.pack(groups, sizes.num_nodes), len(load) // sizes.num_groups)


def _exchanged(load: Floats, nodes: Ints, sizes: PlanSizes) -> Ints:
    """The same after exchanges of two groups between the heaviest node and another."""
    if sizes.num_groups is None:
        return nodes
    size = len(load) // sizes.num_groups
    at = np.eye(sizes.num_nodes, dtype=np.int64)[nodes[::size]]
    state = search.State(load.reshape(-1, size).sum(1), at, at.astype(np.bool_))
    search.refine(state)
    return np.repeat(state.parts.argmax(1), size)

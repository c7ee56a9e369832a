"""Plan replicas from the load of experts: by the greedy scheme, or by a search from its result.

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
    """Choose replicas of hot experts, their ranks, and the replica that each rank or token uses.

    Starts from ``plan_greedy`` and moves experts, replicas and parts of their load away from the
    heaviest rank while that helps, so the plan is never worse. Parts are those that the table can
    express: by rank, all rows that a rank sends to one expert go to one replica, W-ths of its load;
    by token, fractions with a denominator of at most W. No rank holds two replicas of one expert.
    The same arguments give the same plan.

    Args:
        load: (E,) or (layers, E), any real dtype and device: rows for each logical expert over
            some time, of all ranks together.
        num_ranks: W, the ranks with routed experts; all send equally many rows.
        num_slots: S, the physical experts, dispatch's number of experts: a multiple of W, at least
            E, and at most one of each expert on each rank that may hold it.
        num_nodes: N, a divisor of W; ranks of a node are consecutive. By rank, a rank uses its own
            replica or one of its node where the balance allows.
        num_groups: G, a multiple of N and a divisor of E: experts form G groups of consecutive ids,
            and all replicas of a group stay on one node, which suits group-limited routing. Each
            node gets G / N groups. None: experts may go anywhere.
        balance_mode: how ``npu_moe_update_expert`` will choose: 0 by rank, 1 by token.

    Returns:
        The plan; its tensors have a leading dimension for layers if ``load`` has.

    Raises:
        ArgumentTypeError: a load that is not a real tensor, a size that is not an integer.
        ArgumentValueError: a shape, a size that does not divide, a negative or infinite load.
    """
    sizes = num_ranks, num_slots, num_nodes, num_groups, balance_mode
    return _plan_layers("eplb.plan", load, sizes, _search)


def plan_greedy(
    load: torch.Tensor,
    *,
    num_ranks: int,
    num_slots: int,
    num_nodes: int = 1,
    num_groups: int | None = None,
    balance_mode: int = table.BY_RANK,
) -> Plan:
    """Plan by DeepSeek's published scheme (module ``greedy``), as a baseline.

    The scheme ignores the balance mode: every replica is in the table once, in order of their ids.
    ``load_after`` is the load in that mode; in mode 1 it is what the scheme itself assumes.

    Args:
        load: this and the others as in ``plan``.
        num_ranks: W.
        num_slots: S.
        num_nodes: N; ignored without groups.
        num_groups: G.
        balance_mode: 0 by rank, 1 by token.

    Returns:
        As ``plan``; a rank may hold two replicas of one expert.

    Raises:
        The errors of ``plan``.
    """
    sizes = num_ranks, num_slots, num_nodes, num_groups, balance_mode
    return _plan_layers("eplb.plan_greedy", load, sizes, _greedy)


def _plan_layers(
    op: str,
    load: torch.Tensor,
    arguments: tuple[int, int, int, int | None, int],
    plan_layer: Callable[[Floats, PlanSizes], tuple[Ints, NDArray[np.int32]]],
) -> Plan:
    """Check the arguments and plan each layer by ``plan_layer``, which returns (slots, rows)."""
    check_load(op, load)
    sizes = PlanSizes(load.shape[-1], *arguments)
    sizes.check(op)
    num_ranks, mode = sizes.num_ranks, sizes.balance_mode
    layers = torch.atleast_2d(load.detach().cpu().double())
    placements, tables = zip(*(plan_layer(layer.numpy(), sizes) for layer in layers), strict=True)
    placement = torch.from_numpy(np.stack(placements))
    eplb_table = torch.from_numpy(table.stack(tables))
    home = torch.arange(sizes.num_experts) * num_ranks // sizes.num_experts
    before = layers.new_zeros(len(layers), num_ranks).index_add_(1, home, layers)
    after = torch.stack(
        [
            table.rank_load(
                layer, rows, num_ranks=num_ranks, num_slots=sizes.num_slots, balance_mode=mode
            )
            for layer, rows in zip(layers, eplb_table, strict=True)
        ]
    )
    if load.dim() == 1:
        eplb_table, placement, before, after = eplb_table[0], placement[0], before[0], after[0]
    return Plan(eplb_table, placement, num_ranks, mode, before, after)


def _greedy(load: Floats, sizes: PlanSizes) -> tuple[Ints, NDArray[np.int32]]:
    """The placement and the table of the greedy scheme."""
    placement = greedy.place(load, _nodes(load, sizes), sizes.num_ranks, sizes.num_slots)
    return placement, table.of_replicas(placement, sizes.num_experts)


def _search(load: Floats, sizes: PlanSizes) -> tuple[Ints, NDArray[np.int32]]:
    """The placement and the table of the best search result."""
    packed = _nodes(load, sizes)
    exchanged = _exchange_groups(load, packed, sizes)
    starts = [packed] if np.array_equal(packed, exchanged) else [packed, exchanged]
    # A table of W-ths also serves by token, and may balance better than a start from equal parts.
    modes = dict.fromkeys((sizes.balance_mode, table.BY_RANK))
    states = [_search_from(load, nodes, sizes, mode) for nodes in starts for mode in modes]
    state = min(states, key=lambda state: state.load().max())
    placement = np.nonzero(state.held.T)[1]
    return placement, table.of_parts(state.parts, placement, sizes.balance_mode, sizes.num_nodes)


def _search_from(load: Floats, nodes: Ints, sizes: PlanSizes, balance_mode: int) -> search.State:
    """Search node by node, from the greedy placement in a balance mode."""
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
    """The state of a placement whose table a balance mode reads."""
    replicas = np.bincount(placement, minlength=len(load))
    # By token, the most quanta that fit into a row of the table and divide equally.
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
    """Replace second replicas on a rank by the expert with the highest load per replica."""
    total = state.quantum * state.parts.sum(1)
    for rank in range(state.held.shape[1]):
        while state.held[:, rank].sum() < slots:
            each = total / state.held.sum(1)
            state.held[np.where(state.held[:, rank], -1.0, each).argmax(), rank] = True


def _nodes(load: Floats, sizes: PlanSizes) -> Ints:
    """(E,) the node of each expert, as the greedy scheme packs the groups."""
    if sizes.num_groups is None:
        return np.zeros(len(load), np.int64)
    groups = load.reshape(sizes.num_groups, -1).sum(1)
    return np.repeat(greedy.pack(groups, sizes.num_nodes), len(load) // sizes.num_groups)


def _exchange_groups(load: Floats, nodes: Ints, sizes: PlanSizes) -> Ints:
    """(E,) the node of each expert after a search that exchanges groups between nodes."""
    if sizes.num_groups is None:
        return nodes
    size = len(load) // sizes.num_groups
    at = np.eye(sizes.num_nodes, dtype=np.int64)[nodes[::size]]
    state = search.State(load.reshape(-1, size).sum(1), at, at.astype(np.bool_))
    search.refine(state)
    return np.repeat(state.parts.argmax(1), size)

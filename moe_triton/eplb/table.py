"""Rows of ``eplb_table``: who uses which replica, read from a table and written into one.

A row is a number n and n physical experts. Of these, ``npu_moe_update_expert`` takes number
``rank // ceil(W / n)`` with balance mode 0 and, for token i, number ``i % n`` with mode 1. So a
replica's part of the load follows from where it stands in the row, and an id may stand there more
than once: that is how replicas get unequal parts.

Letters: E logical experts, F columns of the table, S physical slots, W ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from .greedy import Floats, Ints
from .plan_sizes import check_table

BY_RANK, BY_TOKEN = 0, 1  # balance modes
_UNUSED = -1


def column_shares(count: Ints, columns: int, num_ranks: int, balance_mode: int) -> Floats:
    """The part of an expert's rows that each column of its row of the table gets.

    By rank, every rank is taken to send equally many rows, and by token, the tokens of an expert
    are taken to be spread evenly over the remainders of their indices.

    Args:
        count: (E,), column 0.
        columns: F - 1, the others.
        num_ranks: W.
        balance_mode: 0 by rank, 1 by token.

    Returns:
        (E, F - 1), each row with sum 1.
    """
    column, count = np.arange(columns)[None], count[:, None]
    if balance_mode == BY_TOKEN:
        return (column < count) / count
    each = -(-num_ranks // count)
    return np.clip(num_ranks - column * each, 0, each) / num_ranks


def rank_load(
    load: torch.Tensor,
    eplb_table: torch.Tensor,
    *,
    num_ranks: int,
    num_slots: int,
    balance_mode: int = BY_RANK,
) -> torch.Tensor:
    """The rows that each rank receives when ``npu_moe_update_expert`` applies a table.

    Exact with balance mode 0 if all ranks send an expert equally many rows, and with mode 1 if the
    tokens of each expert are spread evenly over the remainders of their indices.

    Args:
        load: (E,), rows for each logical expert.
        eplb_table: (E, F) int32, as ``npu_moe_update_expert`` takes it.
        num_ranks: W.
        num_slots: S, the physical experts, S / W of them on each rank.
        balance_mode: 0 by rank, 1 by token.

    Returns:
        (W,) float64.

    Raises:
        ArgumentTypeError: a load that is no tensor of real numbers, a table that is not int32, a
            size that is no integer.
        ArgumentValueError: a shape, a size that does not divide, a negative or infinite load, a
            count or a slot in the table that cannot be.
    """
    check_table("eplb.rank_load", load, eplb_table, num_ranks, num_slots, balance_mode)
    rows = eplb_table.cpu().numpy()
    shares = column_shares(rows[:, 0], rows.shape[1] - 1, num_ranks, balance_mode)
    weights = load.cpu().double().numpy()[:, None] * shares
    used = shares > 0
    ranks = rows[:, 1:][used] // (num_slots // num_ranks)
    return torch.from_numpy(np.bincount(ranks, weights[used], minlength=num_ranks))


def of_replicas(placement: Ints, num_experts: int) -> NDArray[np.int32]:
    """The table in which each replica of an expert stands once, in order of their ids.

    Args:
        placement: (S,), the logical expert in each slot.
        num_experts: E.

    Returns:
        (E, F), F as small as it can be but at least 2.
    """
    return _fill([np.flatnonzero(placement == expert) for expert in range(num_experts)])


def of_parts(parts: Ints, placement: Ints, balance_mode: int, num_nodes: int) -> NDArray[np.int32]:
    """The table in which the replicas of an expert stand in proportion to their parts.

    By rank, column 1 + r is what rank r uses, if there is more than one replica in use: its own
    where it has one, or else one of its node, as far as the parts allow. By token, the columns of
    a replica are spread over the row, so that few tokens are spread over the replicas too.

    Args:
        parts: (E, W), the parts of an expert's rows that each rank gets; with balance mode 0, of W.
        placement: (S,), the logical expert in each slot; at most one on a rank.
        balance_mode: 0 by rank, 1 by token.
        num_nodes: nodes, with equally many consecutive ranks.

    Returns:
        (E, F), F as small as it can be but at least 2.
    """
    num_ranks = parts.shape[1]
    slots = np.empty(parts.shape, np.int64)
    ranks = np.arange(len(placement)) // (len(placement) // num_ranks)
    slots[placement, ranks] = np.arange(len(placement))
    rows = []
    for expert, mine in enumerate(parts):
        if np.count_nonzero(mine) == 1:
            users = np.flatnonzero(mine)
        elif balance_mode == BY_RANK:
            users = _nearest(mine, num_nodes)
        else:
            users = _spread(mine // np.gcd.reduce(mine))
        rows.append(slots[expert, users])
    return _fill(rows)


def stack(tables: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Tables of several layers as one array, with as many columns as the widest has."""
    columns = max(one.shape[1] for one in tables)
    stacked = np.full((len(tables), len(tables[0]), columns), _UNUSED, np.int32)
    for layer, one in zip(stacked, tables, strict=True):
        layer[:, : one.shape[1]] = one
    return stacked


def _fill(rows: list[Ints]) -> NDArray[np.int32]:
    table = np.full((len(rows), 1 + max(map(len, rows))), _UNUSED, np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[0], row[1 : 1 + len(ids)] = len(ids), ids
    return table


def _nearest(parts: Ints, num_nodes: int) -> Ints:
    """For each of W ranks the rank that serves it, when rank r serves ``parts[r]`` of them."""
    num_ranks = len(parts)
    chosen = np.where(parts > 0, np.arange(num_ranks), -1)
    left = parts - (parts > 0)
    by_node = np.arange(num_ranks).reshape(num_nodes, -1)
    for group in (*by_node, by_node.ravel()):
        waiting = group[chosen[group] < 0]
        serving = np.repeat(group, left[group])[: len(waiting)]
        chosen[waiting[: len(serving)]] = serving
        left -= np.bincount(serving, minlength=num_ranks)
    return chosen


def _spread(parts: Ints) -> Ints:
    """Each rank ``parts[r]`` times, the one that is furthest behind its part next."""
    total = int(parts.sum())
    given = np.zeros(len(parts), np.int64)
    chosen = np.empty(total, np.int64)
    for column in range(total):
        behind = np.where(given < parts, (column + 1) * parts - total * given, -total * total)
        chosen[column] = behind.argmax()
        given[chosen[column]] += 1
    return chosen

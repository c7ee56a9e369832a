"""Read and write rows of ``eplb_table``, which assign replicas to ranks or tokens.

A row is a number n and n physical experts. ``npu_moe_update_expert`` takes number
``rank // ceil(W / n)`` of these with balance mode 0 and, for token i, number ``i % n`` with mode 1.
So a replica's part of the load follows from its columns; an id in several columns gets a larger
part.

Letters: E logical experts, F columns of the table, S physical slots, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .greedy import Floats, Ints
from .plan_sizes import check_table

BY_RANK, BY_TOKEN = 0, 1  # balance modes
_UNUSED = -1


def column_shares(count: Ints, columns: int, num_ranks: int, balance_mode: int) -> Floats:
    """The part of an expert's rows for each column of its row of the table.

    By rank, assumes that every rank sends equally many rows; by token, that the tokens of an expert
    are spread evenly over the remainders of their indices.

    Args:
        count: (E,), column 0.
        columns: F - 1, the number of the others.
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
    """The rows that each rank receives if ``npu_moe_update_expert`` applies a table.

    Exact with balance mode 0 if all ranks send an expert equally many rows, and with mode 1 if the
    tokens of each expert are spread evenly over the remainders of their indices.

    Args:
        load: (E,), rows for each logical expert.
        eplb_table: (E, F) int32, as for ``npu_moe_update_expert``.
        num_ranks: W.
        num_slots: S, the physical experts, S / W of them on each rank.
        balance_mode: 0 by rank, 1 by token.

    Returns:
        (W,) float64.

    Raises:
        ArgumentTypeError: a load that is not a real tensor, a table that is not int32, a size that
            is not an integer.
        ArgumentValueError: a shape, a size that does not divide, a negative or infinite load, a
            count or slot of the table out of range.
    """
    check_table("eplb.rank_load", load, eplb_table, num_ranks, num_slots, balance_mode)
    rows = eplb_table.cpu().numpy()
    shares = column_shares(rows[:, 0], rows.shape[1] - 1, num_ranks, balance_mode)
    weights = load.cpu().double().numpy()[:, None] * shares
    used = shares > 0
    ranks = rows[:, 1:][used] // (num_slots // num_ranks)
    return torch.from_numpy(np.bincount(ranks, weights[used], minlength=num_ranks))


def of_replicas(placement: Ints, num_experts: int) -> NDArray[np.int32]:
    """The table with each replica of an expert once, in order of their ids.

    Args:
        placement: (S,), the logical expert in each slot.
        num_experts: E.

    Returns:
        (E, F) with the smallest F, at least 2.
    """
    return _fill([np.flatnonzero(placement == expert) for expert in range(num_experts)])


def of_parts(parts: Ints, placement: Ints, balance_mode: int, num_nodes: int) -> NDArray[np.int32]:
    """The table with the replicas of an expert in proportion to their parts.

    By rank, column 1 + r is for rank r if several replicas are in use: its own replica, or else one
    of its node, as far as the parts allow. By token, the columns of a replica are spread over the
    row, so that few tokens are spread over the replicas too.

    Args:
        parts: (E, W), the parts of an expert's rows for each rank; W in all with balance mode 0.
        placement: (S,), the logical expert in each slot; at most one on a rank.
        balance_mode: 0 by rank, 1 by token.
        num_nodes: nodes, with equally many consecutive ranks.

    Returns:
        (E, F) with the smallest F, at least 2.
    """
    num_ranks = parts.shape[1]
    slots = np.empty(parts.shape, np.int64)
    ranks = np.arange(len(placement)) // (len(placement) // num_ranks)
    slots[placement, ranks] = np.arange(len(placement))
    rows = []
    for expert, shares in enumerate(parts):
        if np.count_nonzero(shares) == 1:
            users = np.flatnonzero(shares)
        elif balance_mode == BY_RANK:
            users = _nearest(shares, num_nodes)
        else:
            users = _spread(shares // np.gcd.reduce(shares))
        rows.append(slots[expert, users])
    return _fill(rows)


def stack(tables: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Stack the tables of several layers, padded to the widest."""
    columns = max(table.shape[1] for table in tables)
    stacked = np.full((len(tables), len(tables[0]), columns), _UNUSED, np.int32)
    for layer, table in zip(stacked, tables, strict=True):
        layer[:, : table.shape[1]] = table
    return stacked


def _fill(rows: list[Ints]) -> NDArray[np.int32]:
    table = np.full((len(rows), 1 + max(map(len, rows))), _UNUSED, np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[0], row[1 : 1 + len(ids)] = len(ids), ids
    return table


def _nearest(parts: Ints, num_nodes: int) -> Ints:
    """(W,) the rank that serves each rank, if rank r serves ``parts[r]`` ranks."""
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
    """Rank r ``parts[r]`` times; next is always the rank furthest behind its part."""
    total = int(parts.sum())
    count = np.zeros(len(parts), np.int64)
    chosen = np.empty(total, np.int64)
    for column in range(total):
        behind = np.where(count < parts, (column + 1) * parts - total * count, -total * total)
        chosen[column] = behind.argmax()
        count[chosen[column]] += 1
    return chosen

"""The greedy scheme that DeepSeek published as EPLB: replicate the heaviest, pack heaviest first.

Each extra replica goes to the expert with the highest load per replica. Replicas are then placed,
heaviest first, on the least loaded rank with a free slot. The hierarchical form first packs groups
of experts onto nodes in the same way, and then does both steps inside each node. It assumes that
all replicas of an expert get equal parts of its tokens.

Letters: E logical experts, S physical slots, W ranks, N nodes.
Source: the description of github.com/deepseek-ai/EPLB. Two replicas of an expert may share a rank,
as there. An expert gets at most W replicas, the limit of ``npu_moe_update_expert``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def pack(weights: Floats, bins: int) -> Ints:
    """Put equally many items into each bin, heaviest first into the lightest bin.

    Args:
        weights: (n,), n a multiple of ``bins``.
        bins: number of bins.

    Returns:
        (n,) the bin of each item.
    """
    free = np.full(bins, len(weights) // bins)
    load = np.zeros(bins)
    bin_of = np.empty(len(weights), np.int64)
    for item in np.argsort(-weights, kind="stable"):
        bin_of[item] = lightest = np.where(free > 0, load, np.inf).argmin()
        load[lightest] += weights[item]
        free[lightest] -= 1
    return bin_of


def replicate(load: Floats, num_slots: int, most: int) -> Ints:
    """Add replicas one at a time where the load per replica is highest.

    Args:
        load: (E,).
        num_slots: S, in [E, E * most].
        most: replicas that an expert may have.

    Returns:
        (E,) the number of replicas of each expert, with sum S.
    """
    replicas = np.ones(len(load), np.int64)
    for _ in range(num_slots - len(load)):
        replicas[np.where(replicas < most, load / replicas, -1.0).argmax()] += 1
    return replicas


def place(load: Floats, nodes: Ints, num_ranks: int, num_slots: int) -> Ints:
    """Place replicas: the logical expert in each physical slot.

    Args:
        load: (E,).
        nodes: (E,), the node of each expert's replicas; equally many experts on each.
        num_ranks: W, a multiple of N.
        num_slots: S, a multiple of W.

    Returns:
        (S,), slot s on rank s // (S / W); ascending on each rank.
    """
    num_nodes = int(nodes.max()) + 1
    ranks = num_ranks // num_nodes
    placed = []
    for node in range(num_nodes):
        experts = np.flatnonzero(nodes == node)
        replicas = replicate(load[experts], num_slots // num_nodes, ranks)
        slots = np.repeat(experts, replicas)
        rank = pack(np.repeat(load[experts] / replicas, replicas), ranks)
        # A stable sort by rank keeps the experts ascending.
        placed.append(slots[np.argsort(rank, kind="stable")])
    return np.concatenate(placed)

"""The greedy scheme that DeepSeek published as EPLB: replicate the heaviest, pack heaviest first.

Each further replica goes to the expert whose replicas carry the most, and the replicas go, heaviest
first, to the rank with the least load that has a slot left. The hierarchical form first packs
groups of experts onto nodes in the same way, and then does both steps inside each node. It takes
every replica of an expert to get an equal part of its tokens.

Letters: E logical experts, S physical slots, W ranks, N nodes.
Source: the description of github.com/deepseek-ai/EPLB. Two replicas of an expert may share a rank,
as there; an expert never gets more replicas than there are ranks, which is all that
``npu_moe_update_expert`` takes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def pack(weights: Floats, bins: int) -> Ints:
    """The bin of each item: equally many in each, the heaviest first into the lightest.

    Args:
        weights: (n,), n a multiple of ``bins``.
        bins: how many.

    Returns:
        (n,) in [0, bins).
    """
    room = np.full(bins, len(weights) // bins)
    filled = np.zeros(bins)
    chosen = np.empty(len(weights), np.int64)
    for item in np.argsort(-weights, kind="stable"):
        chosen[item] = lightest = np.where(room > 0, filled, np.inf).argmin()
        filled[lightest] += weights[item]
        room[lightest] -= 1
    return chosen


def replicate(load: Floats, num_slots: int, most: int) -> Ints:
    """How many replicas each expert gets: one more, again and again, where each carries the most.

    Args:
        load: (E,).
        num_slots: S, in [E, E * most].
        most: replicas that an expert can have.

    Returns:
        (E,), with sum S.
    """
    replicas = np.ones(len(load), np.int64)
    for _ in range(num_slots - len(load)):
        replicas[np.where(replicas < most, load / replicas, -1.0).argmax()] += 1
    return replicas


def place(load: Floats, nodes: Ints, num_ranks: int, num_slots: int) -> Ints:
    """The logical expert in each physical slot.

    Args:
        load: (E,).
        nodes: (E,), the node that each expert has to stay on; equally many on each.
        num_ranks: W, a multiple of the nodes.
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
        # By rank, then by expert: the slots are in order of the experts already.
        placed.append(slots[np.argsort(rank, kind="stable")])
    return np.concatenate(placed)

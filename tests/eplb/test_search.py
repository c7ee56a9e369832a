"""Each move of the search where only that move helps, and moves it must not make."""

from __future__ import annotations

import numpy as np

from moe_triton.eplb import search


def refined(quantum, parts, held=None):
    parts = np.array(parts)
    held = parts > 0 if held is None else np.array(held, bool)
    state = search.State(np.array(quantum, float), parts, held)
    search.refine(state)
    return state


def test_quanta_go_to_another_replica():
    # Both ranks hold both experts, so only quanta can move. 10 : 4 becomes 7 : 7.
    state = refined([1, 2], [[8, 2], [1, 1]])
    assert state.parts.tolist() == [[5, 5], [1, 1]]


def test_a_replica_without_rows_gets_some():
    state = refined([1, 2], [[10, 0], [1, 1]], np.ones((2, 2)))
    assert state.parts.tolist() == [[5, 5], [1, 1]]


def test_experts_are_swapped():
    # 5 + 4 against 3 + 2; 5 + 2 against 3 + 4.
    state = refined([5, 4, 3, 2], [[1, 0], [1, 0], [0, 1], [0, 1]])
    assert sorted(state.load()) == [7, 7]
    assert (state.held.sum(0) == 2).all()
    assert np.array_equal(state.held, state.parts > 0)


def test_a_replica_makes_room_for_one_of_another_expert():
    # Expert 1 has replicas on ranks 1 and 2; expert 0, too heavy for rank 0, has none.
    state = refined([1, 1], [[6, 0, 0], [0, 1, 1]])
    assert sorted(state.load()) == [2, 3, 3]
    assert state.parts[0].tolist() in ([3, 3, 0], [3, 0, 3])
    assert (state.held.sum(0) == 1).all()


def test_an_idle_replica_serves_where_that_is_lighter():
    """The heaviest rank cannot be relieved, but the second can."""
    # Rank 0: expert 0 alone, which cannot be divided. Expert 1 is held by ranks 1 and 2.
    state = refined([9, 1], [[1, 0, 0], [0, 6, 0]], [[1, 0, 0], [0, 1, 1]])
    assert state.load().tolist() == [9, 3, 3]


def test_a_replica_that_cannot_help_stays_idle():
    state = refined([4, 4], [[1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 1]])
    assert state.load().max() == 4
    assert (state.held.sum(0) == 1).all()


def test_an_idle_slot_takes_no_second_replica():
    """Rank 2 holds expert 1 already, so its idle slot must not take expert 1 from rank 1."""
    quantum = [9, 1, 1, 0]
    parts = [[1, 0, 0], [0, 6, 1], [0, 1, 0], [1, 0, 0]]
    held = [[1, 0, 0], [0, 1, 1], [0, 1, 1], [1, 0, 0]]
    state = refined(quantum, parts, held)
    assert state.parts.sum(1).tolist() == [1, 7, 1, 1]
    assert (state.held.sum(0) == 2).all()


def test_nothing_to_do():
    state = refined([0, 0], [[1, 0], [0, 1]])
    assert state.parts.tolist() == [[1, 0], [0, 1]]
    assert refined([3], [[2]]).parts.tolist() == [[2]]

"""The placement of experts, against one written out expert by expert."""

from __future__ import annotations

import pytest

from moe_triton.topology import Topology

SHAPES = [
    pytest.param(Topology(1, 3), id="one rank"),
    pytest.param(Topology(4, 8), id="no shared ranks"),
    pytest.param(Topology(4, 4, 1, 2), id="one shared expert twice"),
    pytest.param(Topology(8, 6, 2, 2), id="two shared experts once"),
    pytest.param(Topology(9, 10, 2, 4), id="replicas do not divide the world"),
]


@pytest.mark.parametrize("topology", SHAPES)
def test_every_expert_has_one_rank(topology):
    owners = [e for rank in range(topology.world_size) for e in topology.local_experts(rank)]
    assert owners == list(range(topology.num_experts))
    for rank in range(topology.world_size):
        expected = len(topology.local_experts(rank)) or 1
        assert topology.num_local_experts(rank) == expected
        assert topology.is_shared_rank(rank) == (rank < topology.num_shared_ranks)


@pytest.mark.parametrize("topology", SHAPES)
def test_every_source_reaches_each_shared_expert_once(topology):
    for source in range(topology.world_size):
        targets = list(topology.shared_ranks_of(source))
        assert [topology.shared_expert(rank) for rank in targets] == list(
            range(topology.num_shared_experts)
        )
        for rank in range(topology.num_shared_ranks):
            assert topology.serves(rank, source) == (rank in targets)


@pytest.mark.parametrize("topology", SHAPES)
def test_capacity_holds_the_worst_case(topology):
    tokens, top_k = 5, 2
    for rank in range(topology.world_size):
        if topology.is_shared_rank(rank):
            sources = sum(topology.serves(rank, s) for s in range(topology.world_size))
            assert topology.capacity(rank, tokens, top_k) >= tokens * sources
        else:
            each = min(top_k, topology.experts_per_rank)
            assert topology.capacity(rank, tokens, top_k) == tokens * topology.world_size * each


def test_the_worked_example():
    # W 4, S 2, NS 1, E 4, K 2, BS 2: rows 4 on the shared ranks and 16 on the others.
    topology = Topology(4, 4, 1, 2)
    assert [topology.capacity(rank, 2, 2) for rank in range(4)] == [4, 4, 16, 16]
    assert [list(topology.shared_ranks_of(source)) for source in range(4)] == [[0], [1], [0], [1]]

"""Placement of experts on ranks, and the most rows that a rank can receive.

Letters: W ranks, E routed experts, NS shared experts, S ranks reserved for them (the first of the
group), L routed experts on a MoE rank, R = S / NS replicas of each shared expert, K experts per
token.
Source: the expert_shard_type 0 layout of aclnnMoeDistributeDispatch.
"""

from __future__ import annotations

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class Topology:
    """The placement of experts on the ranks of an expert-parallel group.

    Attributes:
        world_size: W.
        num_experts: E, a multiple of W - S.
        num_shared_experts: NS as it takes effect: 0 when there are no shared ranks.
        num_shared_ranks: S, a multiple of NS.
    """

    world_size: int
    num_experts: int
    num_shared_experts: int = 0
    num_shared_ranks: int = 0

    @functools.cached_property
    def experts_per_rank(self) -> int:
        """L, the routed experts of each MoE rank."""
        return self.num_experts // (self.world_size - self.num_shared_ranks)

    @functools.cached_property
    def shared_replicas(self) -> int:
        """R, the ranks that hold a replica of one shared expert; 1 without shared ranks."""
        return self.num_shared_ranks // max(self.num_shared_experts, 1) or 1

    def is_shared_rank(self, rank: int) -> bool:
        """Whether ``rank`` holds a shared expert instead of routed ones."""
        return rank < self.num_shared_ranks

    def local_experts(self, rank: int) -> range:
        """Global ids of the routed experts on ``rank``; empty on a shared rank."""
        if self.is_shared_rank(rank):
            return range(0)
        start = (rank - self.num_shared_ranks) * self.experts_per_rank
        return range(start, start + self.experts_per_rank)

    def num_local_experts(self, rank: int) -> int:
        """L on a MoE rank, 1 on a shared rank."""
        return 1 if self.is_shared_rank(rank) else self.experts_per_rank

    def shared_expert(self, rank: int) -> int:
        """Number, from 0, of the shared expert that a shared rank holds."""
        return rank // self.shared_replicas

    def shared_ranks_of(self, source: int) -> range:
        """The NS ranks, one per shared expert, that receive the tokens of ``source``."""
        replicas = self.shared_replicas
        return range(source % replicas, self.num_shared_experts * replicas, replicas)

    def serves(self, shared_rank: int, source: int) -> bool:
        """Whether a shared rank receives the tokens of ``source``."""
        return shared_rank % self.shared_replicas == source % self.shared_replicas

    def capacity(self, rank: int, max_tokens: int, top_k: int) -> int:
        """A: the most rows ``rank`` can receive from ranks of at most ``max_tokens`` tokens."""
        if self.is_shared_rank(rank):
            sources = -(-self.world_size // self.shared_replicas)
            return max_tokens * sources
        return max_tokens * self.world_size * min(self.experts_per_rank, top_k)

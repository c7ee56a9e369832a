"""What each received row is: a copy of which token of which rank, for which expert.

Rows of a rank are ordered by (local expert, source rank, token, slot); on a rank of a shared expert
by (source rank, token). Slot K + j stands for shared expert j.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..topology import Topology


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows that one rank received.

    Attributes:
        source: [n] rank of the token.
        token: [n] index of the token there.
        slot: [n] of the token's experts, K + j for shared expert j.
        expert: [n] id of the routed expert, or -1 - j for shared expert j.
    """

    source: torch.Tensor
    token: torch.Tensor
    slot: torch.Tensor
    expert: torch.Tensor

    def __len__(self) -> int:
        return len(self.source)

    def describe(self, row: int) -> str:
        """In words."""
        expert = int(self.expert[row])
        name = f"expert {expert}" if expert >= 0 else f"shared expert {-1 - expert}"
        return (
            f"token {int(self.token[row])} of rank {int(self.source[row])}, "
            f"slot {int(self.slot[row])}, {name}"
        )

    def key(self) -> torch.Tensor:
        """[n, 3] source, token, slot, by which rows of two layouts are matched."""
        return torch.stack([self.source, self.token, self.slot], 1)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The routing of one rank.

    Attributes:
        ids: [BS, K] experts.
        active: [BS, K] bool.
    """

    ids: torch.Tensor
    active: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor | None) -> Batch:
        """From ``expert_ids`` and ``x_active_mask``, None or of one or two dimensions."""
        active = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None:
            active = (mask[:, None] if mask.dim() == 1 else mask).expand_as(ids).clone()
        return cls(ids.long(), active)

    @property
    def tokens(self) -> torch.Tensor:
        """[BS] bool, which tokens take part."""
        return self.active.any(1)


def received(topology: Topology, batches: Sequence[Batch], rank: int) -> Rows:
    """The rows of ``rank``, from the routing of all ranks."""
    if topology.is_shared_rank(rank):
        shared = topology.shared_expert(rank)
        sources = [s for s in range(topology.world_size) if topology.serves(rank, s)]
        tokens = [batches[source].tokens.nonzero()[:, 0] for source in sources]
        return _shared_rows(sources, tokens, batches[0].ids.shape[1] + shared, shared)
    first = topology.local_experts(rank).start
    local = topology.experts_per_rank
    parts = []
    for source, batch in enumerate(batches):
        wanted = batch.active & (batch.ids >= first) & (batch.ids < first + local)
        token, slot = wanted.nonzero(as_tuple=True)
        expert = batch.ids[token, slot]
        parts.append(torch.stack([expert, torch.full_like(token, source), token, slot]))
    columns = torch.cat(parts, 1)
    # The parts are in the order of source and token: a stable sort by expert completes it.
    expert, source, token, slot = columns[:, columns[0].argsort(stable=True)]
    return Rows(source, token, slot, expert)


def received_contiguous(topology: Topology, batches: Sequence[Batch], rank: int) -> Rows:
    """The rows of a shared rank by the split of the A3 kernels of 2025.

    A shared rank keeps its own tokens; any other rank r deals its BS tokens out in runs: shared
    rank c gets those from floor((c + r) * BS / S) to floor((c + 1 + r) * BS / S), counted from
    floor(r * BS / S).
    """
    shared = topology.num_shared_ranks
    sources, tokens = [], []
    for source, batch in enumerate(batches):
        ids = batch.tokens.nonzero()[:, 0]
        size = len(ids)
        if source < shared:
            part = ids if source == rank else ids[:0]
        else:
            begin = source * size // shared
            start, stop = ((rank + i + source) * size // shared - begin for i in (0, 1))
            part = ids[start:stop]
        sources.append(source)
        tokens.append(part)
    # The own tokens come first.
    order = sorted(range(len(sources)), key=lambda i: sources[i] != rank)
    top_k = batches[0].ids.shape[1]
    return _shared_rows([sources[i] for i in order], [tokens[i] for i in order], top_k, 0)


def _shared_rows(
    sources: Sequence[int], tokens: Sequence[torch.Tensor], slot: int, shared: int
) -> Rows:
    token = torch.cat([*tokens, torch.empty(0, dtype=torch.long)])
    sizes = torch.tensor([len(part) for part in tokens], dtype=torch.long)
    source = torch.tensor(sources, dtype=torch.long).repeat_interleave(sizes)
    return Rows(source, token, torch.full_like(token, slot), torch.full_like(token, -1 - shared))

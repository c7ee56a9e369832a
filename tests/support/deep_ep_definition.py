"""What DeepEP's calls return, in loops over ranks and tokens."""

from __future__ import annotations

import dataclasses

import torch

from moe_triton import testing


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's tokens.

    Attributes:
        x: [T, H].
        ids: [T, K] int64, distinct within a row, -1 for none.
        weights: [T, K] float32.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclasses.dataclass(frozen=True)
class World:
    """The tokens of all ranks.

    Attributes:
        batches: of each rank.
        num_experts: E.
        max_tokens: M, no rank has more.
    """

    batches: list[Batch]
    num_experts: int
    max_tokens: int

    @property
    def size(self) -> int:
        return len(self.batches)

    @property
    def local(self) -> int:
        """L: experts of a rank."""
        return self.num_experts // self.size

    def arrivals(self, rank: int) -> list[tuple[int, int]]:
        """(source, token) of each row that a rank receives, in order."""
        return [
            (source, token)
            for source, batch in enumerate(self.batches)
            for token, ids in enumerate(batch.ids.tolist())
            if any(self.owner(i) == rank for i in ids)
        ]

    def owner(self, expert: int) -> int:
        return expert // self.local if expert >= 0 else -1

    def rows(self, rank: int, name: str) -> torch.Tensor:
        """The received rows of ``x``, ``ids`` or ``weights``, as they were sent."""
        first = getattr(self.batches[0], name)
        rows = [getattr(self.batches[s], name)[t] for s, t in self.arrivals(rank)]
        return torch.stack(rows) if rows else first.new_empty((0, *first.shape[1:]))

    def local_ids(self, rank: int) -> torch.Tensor:
        """[R, K] received ids counted from the rank's first expert, -1 for other ranks'."""
        ids = self.rows(rank, "ids") - rank * self.local
        return ids.masked_fill((ids < 0) | (ids >= self.local), -1)

    def expert_rows(self, rank: int) -> list[list[tuple[int, int, int]]]:
        """(source, token, slot) of the rows of each local expert, in order."""
        return [
            [
                (source, token, self.batches[source].ids[token].tolist().index(expert))
                for source, token in self.arrivals(rank)
                if expert in self.batches[source].ids[token].tolist()
            ]
            for expert in range(rank * self.local, (rank + 1) * self.local)
        ]


def draw(
    size: int,
    *,
    local: int = 3,
    top_k: int = 2,
    hidden: int = 8,
    most: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> World:
    """A world of random sizes; a rank may have no token."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = size * local
    batches = []
    for _ in range(size):
        tokens = int(torch.randint(most + 1, (), generator=generator))
        order = torch.rand((tokens, num_experts), generator=generator).argsort(1)
        ids = order[:, :top_k].contiguous()
        ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
        x = torch.randn((tokens, hidden), generator=generator).to(dtype)
        batches.append(Batch(x, ids, torch.rand(ids.shape, generator=generator)))
    return World(batches, num_experts, most)


def fold(start: list[torch.Tensor], rows: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The sum of some rows in float32, in order, rounded once."""
    total = torch.zeros_like(like, dtype=torch.float32)
    for row in [*start, *rows]:
        total = total + row.float()
    return total.to(like.dtype)


def run(world: World, fn) -> list:
    """``fn(context, batch)`` on every rank, as a thread."""
    return testing.run_local(world.size, lambda ctx: fn(ctx, world.batches[ctx.rank]))

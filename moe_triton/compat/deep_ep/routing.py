"""Which rows go where, and the order of rows and sums; nothing here communicates.

Letters: T tokens of this rank, K experts per token, W ranks, E experts, L = E / W experts of a
rank, S rows sent by this rank, R rows received. A row is one token for one rank, sent once however
many of the token's experts that rank has. Rows are sent by (rank, token) and so arrive by (source,
token).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...layout import NOWHERE


class SendOrder(NamedTuple):
    """The rows that a rank sends.

    Example: 3 tokens, 2 ranks, in_rank [[1, 1], [0, 1], [1, 0]]:
        tokens [0, 2, 0, 1], row_of [[0, 2], [-1, 3], [1, -1]], counts [2, 2]

    Attributes:
        tokens: [S] int64 token of each row.
        row_of: [T, W] int64 row of each token for each rank, or ``NOWHERE``.
        counts: [W] rows for each rank.
    """

    tokens: torch.Tensor
    row_of: torch.Tensor
    counts: list[int]


class ExpandedLayout(NamedTuple):
    """One row for each local expert of a received token, sorted by expert.

    Attributes:
        slots: [R, K] int64 expanded row of each received row's expert, or ``NOWHERE``.
        counts: [L] int64 rows of each local expert, without padding.
        ends: [L] int64 end of each local expert's rows: they begin at the previous end, rounded up
            to a multiple of the alignment.
    """

    slots: torch.Tensor
    counts: torch.Tensor
    ends: torch.Tensor


def owners(topk_idx: torch.Tensor, experts_per_rank: int) -> torch.Tensor:
    """[T, K] int64 rank of each expert, ``NOWHERE`` for negative ids."""
    ranks = torch.div(topk_idx.long(), experts_per_rank, rounding_mode="floor")
    return ranks.clamp_(min=NOWHERE)


def tokens_in_ranks(ranks: torch.Tensor, world_size: int) -> torch.Tensor:
    """[T, W] bool: whether a token has experts on a rank, of its [T, K] ``owners``."""
    return (ranks[:, :, None] == torch.arange(world_size, device=ranks.device)).any(1)


def send_order(in_rank: torch.Tensor) -> SendOrder:
    """The order of the rows of a [T, W] bool ``tokens_in_ranks``."""
    by_rank = in_rank.T
    numbers = by_rank.flatten().cumsum(0).view(by_rank.shape) - 1
    row_of = numbers.masked_fill_(~by_rank, NOWHERE).T
    return SendOrder(by_rank.nonzero()[:, 1], row_of, in_rank.sum(0).tolist())


def local_experts(topk_idx: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """Ids counted from the expert ``first`` of a rank; ``NOWHERE`` for those of other ranks."""
    ids = topk_idx.long() - first
    return ids.masked_fill_((ids < 0) | (ids >= count), NOWHERE)


def expert_counts(local_idx: torch.Tensor, count: int) -> torch.Tensor:
    """[L] int64 rows of each local expert in [R, K] local ids."""
    return torch.bincount(local_idx.flatten() + 1, minlength=count + 1)[1:]


def align(counts: torch.Tensor, alignment: int) -> torch.Tensor:
    """``counts`` rounded up to a multiple of ``alignment``."""
    return -(-counts // alignment) * alignment


def expand(local_idx: torch.Tensor, count: int, alignment: int) -> ExpandedLayout:
    """Lay out the experts of received rows, within an expert in the order of the rows.

    Example: local_idx [[0, 1], [1, -1], [-1, 0]], 2 experts, alignment 4:
        slots [[0, 4], [5, -1], [-1, 1]], counts [2, 2], ends [2, 6]

    Args:
        local_idx: [R, K] int64 local experts, or ``NOWHERE``.
        count: L.
        alignment: of the first row of each expert.
    """
    counts = expert_counts(local_idx, count)
    begins = align(counts, alignment).cumsum(0) - align(counts, alignment)
    flat = local_idx.flatten()
    order = torch.where(flat < 0, count, flat).argsort(stable=True)[: int(counts.sum())]
    experts = flat[order]
    within = torch.arange(len(order), device=flat.device) - (counts.cumsum(0) - counts)[experts]
    slots = torch.full_like(flat, NOWHERE)
    slots[order] = begins[experts] + within
    return ExpandedLayout(slots.view(local_idx.shape), counts, begins + counts)


def partial_sums(ranks: torch.Tensor, row_of: torch.Tensor) -> torch.Tensor:
    """[T, K] row that each slot adds to a token's sum, or ``NOWHERE``.

    A rank returns one row per token. It is added where the token's last expert on that rank stands,
    which fixes the order of the sum.

    Args:
        ranks: [T, K] ``owners``.
        row_of: [T, W] of ``SendOrder``.
    """
    same = ranks[:, :, None] == ranks[:, None, :]
    not_last = same.triu(1).any(2)
    rows = row_of.gather(1, ranks.clamp(min=0))
    return rows.masked_fill_(not_last | (ranks < 0), NOWHERE)


def number_copies(ranks: torch.Tensor, world_size: int) -> torch.Tensor:
    """[T, K] number of each copy when every expert's row is returned by itself, or ``NOWHERE``.

    Copies are numbered by (rank, token, slot).

    Args:
        ranks: [T, K] ``owners``.
        world_size: W.
    """
    flat = ranks.flatten()
    order = torch.where(flat < 0, world_size, flat).argsort(stable=True)
    numbers = torch.empty_like(order)
    numbers[order] = torch.arange(len(order), device=order.device)
    return numbers.masked_fill_(flat < 0, NOWHERE).view(ranks.shape)

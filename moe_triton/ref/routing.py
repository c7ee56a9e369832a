"""Which copy goes where: the plan of a rank's tokens, the numbers of the rows it receives."""

from __future__ import annotations

import torch

from ..layout import NOWHERE, Plan, Sources
from ._common import exclusive_cumsum


def plan(expert_ids: torch.Tensor, num_experts: int) -> Plan:
    """Count and rank the copies of [T, K] int32 ``expert_ids``; ids beyond [0, E) are not sent."""
    ids = expert_ids.reshape(-1).long()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    counts = torch.bincount(ids, minlength=num_experts + 1).int()
    order = torch.argsort(ids, stable=True)
    position = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    expand_idx = torch.empty_like(position)
    expand_idx[order] = position - exclusive_cumsum(counts)[ids[order]]
    expand_idx.masked_fill_(ids == num_experts, NOWHERE)
    return Plan(counts[:num_experts], expand_idx, order.int())


def sources(counts: torch.Tensor, alignment: int = 1) -> Sources:
    """Number the rows that [L, W] int32 ``counts`` (local expert, source) announce.

    Args:
        counts: rows for each local expert from each source.
        alignment: the rows of each expert are padded to a multiple of this.
    """
    world = counts.shape[1]
    rows = counts.sum(1, dtype=torch.int32)
    padded = (rows + alignment - 1) // alignment * alignment
    groups = torch.cat([counts, (padded - rows)[:, None]], dim=1).reshape(-1)
    group = torch.repeat_interleave(
        torch.arange(groups.numel(), device=counts.device), groups.long()
    )
    # Where the group's copies begin in its source's list, which runs over this rank's experts.
    first = torch.nn.functional.pad(exclusive_cumsum(counts, dim=0), (0, 1)).reshape(-1)
    within = torch.arange(group.numel(), device=counts.device) - exclusive_cumsum(groups)[group]
    source = group % (world + 1)
    return Sources(
        source.where(source < world, NOWHERE),
        (first[group] + within).long(),
        counts.reshape(-1).cumsum(0, dtype=torch.int32),
        padded.cumsum(0, dtype=torch.int32),
    )

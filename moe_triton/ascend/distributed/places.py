"""Where the experts of a call are, what a profile limits of it, and how long its ranks waited."""

from __future__ import annotations

from typing import Any

import torch

from ... import comm
from ...layout import NOWHERE
from ...ops import checks
from ...topology import Topology
from ..group_arguments import GroupArguments, ScaledDown, scaled_down
from ..op_names import family
from .groups import Ranks


def place(
    op: str, arguments: GroupArguments, ranks: Ranks, elastic_info: torch.Tensor | None
) -> tuple[Topology, ScaledDown | None]:
    """Where the experts are; from now on ``ranks`` are those that take part in this call."""
    topology = arguments.topology(op, ranks.group, family(op))
    if arguments.has_tp:
        arguments.check_pair(op, arguments.resolve_tp(op))
        contract = "be None when tp_world_size is 2"
        checks.value(op, "elastic_info", elastic_info is None, contract, "a tensor")
    elastic = scaled_down(op, elastic_info, topology, ranks.group.rank)
    if elastic is not None:
        ranks.ep = comm.default_communicator(comm.subgroup(ranks.group, elastic.members))
    return topology, elastic


def sizes(
    arguments: GroupArguments,
    topology: Topology,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    max_tokens: int,
) -> dict[str, Any]:
    """What a profile limits, in dispatch as in combine."""
    return {
        "max_tokens": max_tokens,
        "num_tokens": len(expert_ids),
        "hidden": x.shape[1],
        "top_k": expert_ids.shape[1],
        "world_size": topology.world_size,
        "num_experts": topology.num_experts,
        "experts_per_rank": topology.experts_per_rank,
        "num_shared_ranks": topology.num_shared_ranks,
        "num_shared_experts": topology.num_shared_experts,
        "num_zero_experts": arguments.zero_expert_num,
        "num_copy_experts": arguments.copy_expert_num,
        "num_const_experts": arguments.const_expert_num,
        "tp_world_size": arguments.tp_world_size,
        "comm_alg": arguments.comm_alg,
    }


def routed_ids(expert_ids: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
    """The ids, ``NOWHERE`` where a slot takes no part."""
    return expert_ids if active is None else expert_ids.where(active, NOWHERE)


def microseconds(
    waited: list[float], topology: Topology, elastic: ScaledDown | None
) -> torch.Tensor:
    """[W] int64, by the original numbers of the ranks; 0 for one that is gone, else at least 1."""
    members = range(topology.world_size) if elastic is None else elastic.members
    out = torch.zeros(topology.world_size, dtype=torch.int64)
    for rank, seconds in zip(members, waited, strict=True):
        out[rank] = max(round(seconds * 1e6), 1)
    return out

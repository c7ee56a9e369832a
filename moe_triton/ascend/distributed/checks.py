"""Checks of the tensors of dispatch and combine, and their form for the device steps."""

from __future__ import annotations

from typing import Any

import torch

from ... import comm
from ...errors import ArgumentValueError
from ...layout import NOWHERE, ZeroComputationExperts
from ...ops import checks
from ...topology import Topology
from ..group_arguments import GroupArguments, ScaledDown, scaled_down
from ..op_names import family, is_dispatch
from .groups import OpGroups


def check_tokens(
    op: str,
    arguments: GroupArguments,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_scales: torch.Tensor | None,
    x_active_mask: torch.Tensor | None,
    elastic: ScaledDown | None,
    topology: Topology,
    *,
    with_ids: bool = True,
) -> tuple[int, torch.Tensor | None]:
    """Check shapes and values that dispatch and combine share.

    ``with_ids`` is False in a split-phase op that gets the mask later, and checks the ids then.

    Returns:
        The largest batch of any rank, and the [BS, K] mask of active slots, None for all.
    """
    dispatch = is_dispatch(op)
    name = "x" if dispatch else "expand_x"
    checks.shape(op, name, x, (None, None), "(rows, H)", x.device)
    checks.value(op, name, x.shape[1] > 0, "have at least one column", f"shape {tuple(x.shape)}")
    rows = x.shape[0] if dispatch else None
    checks.shape(op, "expert_ids", expert_ids, (rows, None), "(BS, K)", x.device)
    num_tokens, top_k = expert_ids.shape
    num_zero_computation = arguments.num_zero_computation_experts
    most = topology.num_experts + num_zero_computation
    contract = f"have 1 to {most} columns, the number of experts"
    got = f"shape {tuple(expert_ids.shape)}"
    checks.value(op, "expert_ids", 1 <= top_k <= most, contract, got)
    expected = (num_tokens, top_k)
    checks.shape(op, "expert_scales", expert_scales, expected, "(BS, K)", x.device)
    max_tokens = arguments.max_tokens(op, num_tokens)
    active = active_slots(op, x_active_mask, num_tokens, top_k, x.device)
    unequal = arguments.may_differ(num_tokens)
    if active is not None:
        contract = f"be None when global_bs is neither 0 nor BS * W (here {arguments.global_bs})"
        checks.value(op, "x_active_mask", not unequal, contract, "a tensor")
    if arguments.comm_alg == "fullmesh_v2":
        for argument, present in (
            ("elastic_info", elastic is not None),
            ("zero_expert_num", arguments.zero_expert_num > 0),
            ("copy_expert_num", arguments.copy_expert_num > 0),
            ("const_expert_num", arguments.const_expert_num > 0),
            ("x_active_mask", active is not None),
            ("tp_world_size", arguments.has_tp),
            ("global_bs", unequal),
        ):
            contract = f"go without {argument} when it is 'fullmesh_v2'"
            checks.value(op, "comm_alg", not present, contract, f"{argument} as well")
    if not with_ids:
        return max_tokens, active
    # The ids of zero-computation experts follow those of the remaining routed ones.
    checks.expert_ids(
        op,
        "expert_ids",
        expert_ids,
        (topology if elastic is None else elastic.topology).num_experts,
        num_zero_computation=num_zero_computation,
        active=active,
    )
    return max_tokens, active


def flat_addend(
    op: str, addend: torch.Tensor | None, num_tokens: int, hidden: int, device: torch.device
) -> torch.Tensor | None:
    """shared_expert_x as (BS, H); it may come as (a, b, H) with a * b = BS."""
    if addend is None:
        return None
    fits = addend.dim() in (2, 3) and addend.shape[-1] == hidden
    checks.value(
        op,
        "shared_expert_x",
        fits and addend.numel() == num_tokens * hidden,
        f"have shape (BS, H) or (a, b, H) with a * b = BS = {num_tokens}, H = {hidden}",
        f"shape {tuple(addend.shape)}",
    )
    contract = f"be on {device}"
    checks.value(op, "shared_expert_x", addend.device == device, contract, addend.device)
    return addend.reshape(num_tokens, hidden)


def active_slots(
    op: str, mask: torch.Tensor | None, num_tokens: int, top_k: int, device: torch.device
) -> torch.Tensor | None:
    """x_active_mask as (BS, K); it may come as (BS,), True for the first tokens only."""
    if mask is None:
        return None
    if mask.dim() != 1:
        expected = (num_tokens, top_k)
        checks.shape(op, "x_active_mask", mask, expected, "(BS,) or (BS, K)", device)
        return mask
    checks.shape(op, "x_active_mask", mask, (num_tokens,), "(BS,) or (BS, K)", device)
    if device.type == "cpu" and bool((mask[1:] & ~mask[:-1]).any()):
        token = int((mask[1:] & ~mask[:-1]).nonzero()[0]) + 1
        contract = "be True for the first tokens only, unless it is (BS, K)"
        raise ArgumentValueError(op, "x_active_mask", contract, f"True for token {token} again")
    return mask[:, None].expand(-1, top_k)


def zero_computation_experts(
    op: str,
    arguments: GroupArguments,
    num_experts: int,
    ids: torch.Tensor,
    hidden: int,
    tokens: torch.Tensor | None,
    alpha_1: torch.Tensor | None,
    alpha_2: torch.Tensor | None,
    value: torch.Tensor | None,
) -> ZeroComputationExperts | None:
    """The zero-computation experts, after a check of their tensors; None without any."""
    constants = arguments.const_expert_num
    if constants or arguments.copy_expert_num:
        contract = "be given with copy or constant experts"
        checks.value(op, "ori_x", tokens is not None, contract, None)
        expected = (len(ids), hidden)
        checks.shape(op, "ori_x", tokens, expected, "(BS, H)", ids.device)
    if constants:
        contract = "be given with constant experts"
        for name, tensor, meaning in (
            ("const_expert_alpha_1", alpha_1, "(const_expert_num,) or (const_expert_num, H)"),
            ("const_expert_alpha_2", alpha_2, "(const_expert_num,) or (const_expert_num, H)"),
            ("const_expert_v", value, "(const_expert_num, H)"),
        ):
            checks.value(op, name, tensor is not None, contract, None)
            assert tensor is not None
            scalars = tensor.dim() == 1 and tensor is not value
            sizes = (constants,) if scalars else (constants, hidden)
            checks.shape(op, name, tensor, sizes, meaning, ids.device)
    if not arguments.num_zero_computation_experts:
        return None
    return ZeroComputationExperts(
        ids,
        num_experts + arguments.zero_expert_num,
        num_experts + arguments.zero_expert_num + arguments.copy_expert_num,
        num_experts + arguments.num_zero_computation_experts,
        tokens,
        alpha_1,
        alpha_2,
        value,
    )


def resolve_topology(
    op: str, arguments: GroupArguments, groups: OpGroups, elastic_info: torch.Tensor | None
) -> tuple[Topology, ScaledDown | None]:
    """The placement of the experts; scales ``groups.ep`` down to the remaining ranks."""
    topology = arguments.topology(op, groups.group, family(op))
    if arguments.has_tp:
        arguments.check_pair(op, arguments.resolve_tp(op))
        contract = "be None when tp_world_size is 2"
        checks.value(op, "elastic_info", elastic_info is None, contract, "a tensor")
    elastic = scaled_down(op, elastic_info, topology, groups.group.rank)
    if elastic is not None:
        groups.ep = comm.default_communicator(comm.subgroup(groups.group, elastic.members))
    return topology, elastic


def profiled_sizes(
    arguments: GroupArguments,
    topology: Topology,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    max_tokens: int,
) -> dict[str, Any]:
    """The sizes that a profile limits in dispatch and in combine."""
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
    """The ids, ``NOWHERE`` in slots that are not active."""
    return expert_ids if active is None else expert_ids.where(active, NOWHERE)


def wait_microseconds(
    waited: list[float], topology: Topology, elastic: ScaledDown | None
) -> torch.Tensor:
    """[W] int64, by the original ranks; 0 for a lost rank, else at least 1."""
    members = range(topology.world_size) if elastic is None else elastic.members
    out = torch.zeros(topology.world_size, dtype=torch.int64)
    for rank, seconds in zip(members, waited, strict=True):
        out[rank] = max(round(seconds * 1e6), 1)
    return out

"""The ops behind ``npu_moe_distribute_dispatch`` and ``_combine``, v1 and v2.

Both versions have one meaning. They differ in the third output of dispatch, by which combine finds
its way, and in which placements of shared experts they take.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import comm
from ..comm import Call, Finish, MoeConfig, Outputs, Tokens
from ..layout import NOWHERE
from ..profile import active_profile
from ..topology import Topology
from . import checks
from .arguments import GroupArguments, ScaledDown, scaled_down
from .inputs import check_tokens, flat_addend, special_experts
from .names import COMBINE, DISPATCH_V2, family
from .ranks import Ranks
from .returned import (
    ASSIST_WORDS,
    check_assist,
    check_expand_idx,
    received_counts,
    tp_counts,
)
from .steps import device_steps
from .tensor_parallel import add_halves, share_received

_QUANT = {0: None, 2: "int8"}
_RETURN_QUANT = {0: None, 2: "int8"}


class DispatchOutput(NamedTuple):
    """The outputs of both versions of dispatch; see ``compat.torch_npu``.

    ``expand_idx`` is the third output of v1 and ``assist_info`` that of v2, None in the other;
    ``waited`` is int64 [W] microseconds, what ``performance_info`` gains.
    """

    expand_x: torch.Tensor
    dynamic_scales: torch.Tensor | None
    expand_idx: torch.Tensor
    assist_info: torch.Tensor | None
    expert_token_nums: torch.Tensor
    ep_recv_counts: torch.Tensor
    tp_recv_counts: torch.Tensor | None
    expand_scales: torch.Tensor | None
    waited: torch.Tensor


class CombineOutput(NamedTuple):
    """The output of combine, and ``waited`` as in ``DispatchOutput``."""

    x: torch.Tensor
    waited: torch.Tensor


def distribute_dispatch(
    op: str,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
    performance_info: torch.Tensor | None = None,
    quant_mode: int = 0,
    expert_token_nums_type: int = 1,
    **reserved: object,
) -> DispatchOutput:
    """Send each token to its experts; shapes and errors in ``compat.torch_npu``.

    ``op`` is one of the dispatches of ``names``. ``performance_info`` is only looked at; it is for
    the caller to add ``waited``. ``reserved`` are arguments that must have their defaults.
    """
    ranks = Ranks.of(op, arguments, "gather")
    group = ranks.group
    with ranks.told(op, "dispatch", "gather"):
        checks.required(op, x=x, expert_ids=expert_ids)
        arguments.check_types(op)
        checks.integers(op, quant_mode=quant_mode, expert_token_nums_type=expert_token_nums_type)
        checks.dtype(op, "x", x, checks.FLOATS)
        checks.dtype(op, "expert_ids", expert_ids, (torch.int32,))
        checks.dtype(op, "scales", scales, (torch.float32,))
        checks.dtype(op, "expert_scales", expert_scales, (torch.float32,))
        checks.dtype(op, "x_active_mask", x_active_mask, (torch.bool,))
        checks.dtype(op, "elastic_info", elastic_info, (torch.int32,))
        checks.dtype(op, "performance_info", performance_info, (torch.int64,))
        topology, elastic = _place(op, arguments, ranks, elastic_info)
        max_tokens, active = check_tokens(
            op, arguments, x, expert_ids, expert_scales, x_active_mask, elastic, topology
        )
        checks.reserved(op, **reserved)
        per_rank = (topology.world_size,)
        checks.shape(op, "performance_info", performance_info, per_rank, "(W,)", x.device)
        active_profile().check(
            family(op),
            op,
            **_sizes(arguments, topology, x, expert_ids, max_tokens),
            quant_mode=quant_mode,
            masked=x_active_mask is not None,
            elastic=elastic_info is not None,
            with_scales=scales is not None,
            with_expert_scales=expert_scales is not None,
        )
        modes = [*_QUANT]
        checks.value(op, "quant_mode", quant_mode in modes, f"be in {modes}", quant_mode)
        checks.value(
            op,
            "expert_token_nums_type",
            expert_token_nums_type in (0, 1),
            "be 0 (prefix sums) or 1 (counts)",
            expert_token_nums_type,
        )
        if scales is not None:
            checks.value(
                op, "scales", quant_mode != 0, "be None when quant_mode is 0", tuple(scales.shape)
            )
            rows = topology.num_shared_experts + topology.num_experts
            expected = (rows, x.shape[1])
            checks.shape(op, "scales", scales, expected, "(shared + moe experts, H)", x.device)
        steps = device_steps(x.device)

    top_k = expert_ids.shape[1]
    config = MoeConfig(
        topology if elastic is None else elastic.topology,
        top_k,
        x.shape[1],
        max_tokens,
        x.dtype,
        _QUANT[quant_mode],
        per_expert=scales is not None,
        with_weights=expert_scales is not None,
    )
    agreed = arguments.agreed(op, x, "x", expert_ids) | {
        "quant_mode": int(quant_mode),
        "scales": "given" if scales is not None else None,
        "expert_scales": "given" if expert_scales is not None else None,
        "elastic_info": None if elastic is None else elastic.digest,
    }
    call = Call(op, config, agreed, steps)
    capacity = topology.capacity(group.rank, max_tokens, top_k)
    num_rows = capacity * (2 if arguments.has_tp else 1)
    tokens = Tokens(x, _routed_ids(expert_ids, active), expert_scales, scales, num_rows)
    with ranks.told(op, None, "gather"):
        transport = ranks.ep.transport(op)
        pending = transport.dispatch_setup(call, tokens)
        received = transport.dispatch_teardown(pending)

    ends, weights, tp_counts = received.sources.ends, received.weights, None
    num_own = len(received.sources.source)
    token_nums = received.counts.sum(1)
    if ranks.tp is not None:
        tp_call = Call(op, config, agreed | {"ep_rank_id": group.rank}, steps)
        peer = share_received(ranks.tp, tp_call, received.x, received.scales, ends)
        token_nums = token_nums + peer.count
        ends = torch.cat([ends, peer.ends])
        counts = [num_own, peer.count] if arguments.tp_rank_id == 0 else [peer.count, num_own]
        tp_counts = torch.tensor(counts, dtype=torch.int32, device=x.device)
        weights = None if weights is None else weights[:capacity].clone()
    elif elastic is not None:
        size = topology.world_size * topology.num_local_experts(group.rank)
        ends = torch.cat([ends, ends[-1:].expand(size - len(ends))])
    assist = None
    if op == DISPATCH_V2:
        size = max(expert_ids.numel(), capacity * ASSIST_WORDS)
        assist = torch.empty(size, dtype=torch.int32, device=x.device)
        slots = config.num_slots
        copies = received.copies
        columns = [received.sources.source, copies // slots, copies % slots]
        torch.stack(columns, dim=1, out=assist[: 3 * num_own].view(num_own, 3))
    return DispatchOutput(
        received.x,
        received.scales,
        received.plan.expand_idx,
        assist,
        token_nums.cumsum(0) if expert_token_nums_type == 0 else token_nums,
        ends,
        tp_counts,
        weights,
        _microseconds(pending.waited, topology, elastic),
    )


def distribute_combine(
    op: str,
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    index: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    arguments: GroupArguments,
    *,
    tp_send_counts: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
    ori_x: torch.Tensor | None = None,
    const_expert_alpha_1: torch.Tensor | None = None,
    const_expert_alpha_2: torch.Tensor | None = None,
    const_expert_v: torch.Tensor | None = None,
    performance_info: torch.Tensor | None = None,
    comm_quant_mode: int = 0,
    **reserved: object,
) -> CombineOutput:
    """Bring the experts' rows back and sum them; shapes and errors in ``compat.torch_npu``.

    ``op`` is ``names.COMBINE``, whose ``index`` is expand_idx, or ``names.COMBINE_V2``, whose
    ``index`` is assist_info_for_combine. ``performance_info`` and ``reserved`` are as in dispatch.
    """
    index_name = "expand_idx" if op == COMBINE else "assist_info_for_combine"
    ranks = Ranks.of(op, arguments, "gather")
    group = ranks.group
    with ranks.told(op, "combine", "gather"):
        needed = {"expand_x": expand_x, "expert_ids": expert_ids, index_name: index}
        needed |= {"ep_send_counts": ep_send_counts, "expert_scales": expert_scales}
        checks.required(op, **needed)
        arguments.check_types(op)
        checks.integers(op, comm_quant_mode=comm_quant_mode)
        checks.dtype(op, "expand_x", expand_x, checks.FLOATS)
        same = (expand_x.dtype,)
        for name, tensor, allowed in (
            ("expert_ids", expert_ids, (torch.int32,)),
            (index_name, index, (torch.int32,)),
            ("ep_send_counts", ep_send_counts, (torch.int32,)),
            ("expert_scales", expert_scales, (torch.float32,)),
            ("tp_send_counts", tp_send_counts, (torch.int32,)),
            ("x_active_mask", x_active_mask, (torch.bool,)),
            ("expand_scales", expand_scales, (torch.float32,)),
            ("shared_expert_x", shared_expert_x, same),
            ("elastic_info", elastic_info, (torch.int32,)),
            ("ori_x", ori_x, same),
            ("const_expert_alpha_1", const_expert_alpha_1, same),
            ("const_expert_alpha_2", const_expert_alpha_2, same),
            ("const_expert_v", const_expert_v, same),
            ("performance_info", performance_info, (torch.int64,)),
        ):
            checks.dtype(op, name, tensor, allowed)
        topology, elastic = _place(op, arguments, ranks, elastic_info)
        checks.reserved(op, **reserved)
        max_tokens, active = check_tokens(
            op, arguments, expand_x, expert_ids, expert_scales, x_active_mask, elastic, topology
        )
        active_profile().check(
            family(op),
            op,
            **_sizes(arguments, topology, expand_x, expert_ids, max_tokens),
            comm_quant_mode=comm_quant_mode,
            masked=x_active_mask is not None,
            elastic=elastic_info is not None,
            with_expand_scales=expand_scales is not None,
            with_shared_expert_x=shared_expert_x is not None,
        )
        num_tokens, top_k = expert_ids.shape
        hidden, device = expand_x.shape[1], expand_x.device
        per_rank = (topology.world_size,)
        checks.shape(op, "performance_info", performance_info, per_rank, "(W,)", device)
        _check_return_quant(op, comm_quant_mode, arguments, hidden)
        capacity = topology.capacity(group.rank, max_tokens, top_k)
        num_rows = capacity * (2 if arguments.has_tp else 1)
        checks.value(
            op,
            "expand_x",
            len(expand_x) >= num_rows,
            f"have at least {'T * ' if arguments.has_tp else ''}A = {num_rows} rows",
            f"shape {tuple(expand_x.shape)}",
        )
        addend = flat_addend(op, shared_expert_x, num_tokens, hidden, device)
        ids = _routed_ids(expert_ids, active)
        steps = device_steps(device)
        placement = topology if elastic is None else elastic.topology
        plan = steps.plan(ids, placement.num_experts)
        alphas = (const_expert_alpha_1, const_expert_alpha_2)
        special = special_experts(
            op, arguments, placement.num_experts, ids, hidden, ori_x, *alphas, const_expert_v
        )
        config = MoeConfig(
            placement,
            top_k,
            hidden,
            max_tokens,
            expand_x.dtype,
            quant_return=_RETURN_QUANT[comm_quant_mode],
        )
        counts = received_counts(op, topology, config, group.rank, ep_send_counts, arguments)
        sources = steps.sources(counts)
        if op == COMBINE:
            check_expand_idx(op, index, plan, expert_ids.numel())
        else:
            shared = topology.is_shared_rank(group.rank)
            check_assist(op, index, sources, config, shared, capacity)
        own, count = tp_counts(op, arguments, tp_send_counts, sources, num_rows)

    agreed = arguments.agreed(op, expand_x, "expand_x", expert_ids) | {
        "comm_quant_mode": int(comm_quant_mode),
        "elastic_info": None if elastic is None else elastic.digest,
    }
    call = Call(op, config, agreed, steps)
    y = expand_x
    if ranks.tp is not None:
        with ranks.told(op, "combine", None):
            tp_call = Call(op, config, agreed | {"ep_rank_id": group.rank}, steps)
            y = add_halves(ranks.tp, tp_call, expand_x, own, count, capacity)
    transport = ranks.ep.transport(op)
    pending = transport.combine_setup(call, Outputs(y, sources, ids, plan, expert_scales))
    out = transport.combine_teardown(pending, Finish(special, addend))
    if active is not None:
        out.masked_fill_(~active.any(1, keepdim=True), 0)
    return CombineOutput(out, _microseconds(pending.waited, topology, elastic))


def _place(
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
        ranks.ep = comm.default_endpoint(comm.subgroup(ranks.group, elastic.members))
    return topology, elastic


def _sizes(
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


def _routed_ids(expert_ids: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
    return expert_ids if active is None else expert_ids.where(active, NOWHERE)


def _microseconds(
    waited: list[float], topology: Topology, elastic: ScaledDown | None
) -> torch.Tensor:
    """[W] int64, by the original numbers of the ranks; 0 for one that is gone, else at least 1."""
    members = range(topology.world_size) if elastic is None else elastic.members
    out = torch.zeros(topology.world_size, dtype=torch.int64)
    for rank, seconds in zip(members, waited, strict=True):
        out[rank] = max(round(seconds * 1e6), 1)
    return out


def _check_return_quant(op: str, mode: int, arguments: GroupArguments, hidden: int) -> None:
    modes = [*_RETURN_QUANT]
    checks.value(op, "comm_quant_mode", mode in modes, f"be in {modes}", mode)
    if mode:
        contract = "be 0 when tp_world_size is 2"
        checks.value(op, "comm_quant_mode", not arguments.has_tp, contract, mode)
        contract = f"be 0 unless H is a multiple of {comm.RETURN_BLOCK}"
        got = f"{mode} with H = {hidden}"
        checks.value(op, "comm_quant_mode", hidden % comm.RETURN_BLOCK == 0, contract, got)

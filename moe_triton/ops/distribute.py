"""The ops behind ``npu_moe_distribute_dispatch`` and ``_combine``, v1 and v2.

Both versions have one meaning. They differ in the third output of dispatch, by which combine finds
its way, and in which placements of shared experts they take.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import comm
from ..comm import Call, Finish, MoeConfig, Outputs, Tokens
from ..errors import MoeError
from ..layout import NOWHERE, Plan, Sources, SpecialExperts
from ..profile import active_profile
from ..topology import Topology
from . import checks
from .arguments import GroupArguments, ScaledDown, active_slots, flat_addend, scaled_down
from .steps import device_steps
from .tensor_parallel import add_halves, share_received

DISPATCH = "npu_moe_distribute_dispatch"
COMBINE = "npu_moe_distribute_combine"
DISPATCH_V2 = "npu_moe_distribute_dispatch_v2"
COMBINE_V2 = "npu_moe_distribute_combine_v2"

ASSIST_WORDS = 128  # of the tensor for each row of expand_x; three are used
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


@dataclasses.dataclass
class _Ranks:
    """Whom an op talks to.

    Attributes:
        group: the whole expert-parallel group.
        ep: the endpoint of its ranks, of those that are left where it is scaled down.
        tp: the endpoint of the pair that shares experts, or None.
    """

    group: comm.Group
    ep: comm.Endpoint
    tp: comm.Endpoint | None = None

    @classmethod
    def of(cls, op: str, arguments: GroupArguments, tp_kind: str) -> _Ranks:
        """Find the groups; the first thing an op does, as it can tell nobody what fails before.

        Args:
            op: for error messages.
            arguments: where a pair cannot be found, that is for ``_place`` to say.
            tp_kind: as in ``told``.
        """
        tp = None
        if arguments.has_tp:
            with contextlib.suppress(MoeError):
                tp = comm.default_endpoint(arguments.resolve_tp(op))
        try:
            group = arguments.resolve_ep(op)
        except MoeError as error:
            if tp is not None:
                tp.reject(tp_kind, op, error)
            raise
        ep = comm.default_endpoint(group)
        # A group that is named as the pair as well must not be told twice.
        return cls(group, ep, None if tp is ep else tp)

    @contextlib.contextmanager
    def told(self, op: str, ep_kind: str | None, tp_kind: str | None) -> Iterator[None]:
        """Tell the peers who wait for this rank when it cannot go on.

        Args:
            op: for error messages.
            ep_kind: the operation that those of the expert-parallel group are coming to.
            tp_kind: the operation that the other rank of the pair is coming to.
        """
        try:
            yield
        except BaseException as error:
            # Where it came from the ranks of one group, those of the other do not know it.
            reason = MoeError(op, error.problem if isinstance(error, MoeError) else repr(error))
            if ep_kind is not None:
                self.ep.reject(ep_kind, op, reason)
            if tp_kind is not None and self.tp is not None:
                self.tp.reject(tp_kind, op, reason)
            raise


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

    ``op`` is ``DISPATCH`` or ``DISPATCH_V2``. ``performance_info`` is only looked at; it is for the
    caller to add ``waited``. ``reserved`` are arguments that must have their defaults.
    """
    ranks = _Ranks.of(op, arguments, "gather")
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
        max_tokens, active = _check_tokens(
            op, arguments, x, expert_ids, expert_scales, x_active_mask, elastic, topology
        )
        checks.reserved(op, **reserved)
        per_rank = (topology.world_size,)
        checks.shape(op, "performance_info", performance_info, per_rank, "(W,)", x.device)
        active_profile().check(
            _family(op),
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

    ``op`` is ``COMBINE``, whose ``index`` is expand_idx, or ``COMBINE_V2``, whose ``index`` is
    assist_info_for_combine. ``performance_info`` and ``reserved`` are as in dispatch.
    """
    index_name = "expand_idx" if op == COMBINE else "assist_info_for_combine"
    ranks = _Ranks.of(op, arguments, "gather")
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
        max_tokens, active = _check_tokens(
            op, arguments, expand_x, expert_ids, expert_scales, x_active_mask, elastic, topology
        )
        active_profile().check(
            _family(op),
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
        special = _special(
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
        counts = _received_counts(op, topology, config, group.rank, ep_send_counts, arguments)
        sources = steps.sources(counts)
        if op == COMBINE:
            _check_expand_idx(op, index, plan, expert_ids.numel())
        else:
            shared = topology.is_shared_rank(group.rank)
            _check_assist(op, index, sources, config, shared, capacity)
        own, count = _tp_counts(op, arguments, tp_send_counts, sources, num_rows)

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


def _family(op: str) -> str:
    return "v1" if op in (DISPATCH, COMBINE) else "v2"


def _place(
    op: str, arguments: GroupArguments, ranks: _Ranks, elastic_info: torch.Tensor | None
) -> tuple[Topology, ScaledDown | None]:
    """Where the experts are; from now on ``ranks`` are those that take part in this call."""
    topology = arguments.topology(op, ranks.group, _family(op))
    if arguments.has_tp:
        arguments.check_pair(op, arguments.resolve_tp(op))
        contract = "be None when tp_world_size is 2"
        checks.value(op, "elastic_info", elastic_info is None, contract, "a tensor")
    elastic = scaled_down(op, elastic_info, topology, ranks.group.rank)
    if elastic is not None:
        ranks.ep = comm.default_endpoint(comm.subgroup(ranks.group, elastic.members))
    return topology, elastic


def _check_tokens(
    op: str,
    arguments: GroupArguments,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_scales: torch.Tensor | None,
    x_active_mask: torch.Tensor | None,
    elastic: ScaledDown | None,
    topology: Topology,
) -> tuple[int, torch.Tensor | None]:
    """Check shapes and values that dispatch and combine share.

    Returns:
        The largest batch of any rank, and the [BS, K] slots that take part, None for all.
    """
    dispatch = op in (DISPATCH, DISPATCH_V2)
    name = "x" if dispatch else "expand_x"
    checks.shape(op, name, x, (None, None), "(rows, H)", x.device)
    checks.value(op, name, x.shape[1] > 0, "have at least one column", f"shape {tuple(x.shape)}")
    rows = x.shape[0] if dispatch else None
    checks.shape(op, "expert_ids", expert_ids, (rows, None), "(BS, K)", x.device)
    num_tokens, top_k = expert_ids.shape
    special = arguments.num_special_experts
    most = topology.num_experts + special
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
        for argument, given in (
            ("elastic_info", elastic is not None),
            ("zero_expert_num", arguments.zero_expert_num > 0),
            ("copy_expert_num", arguments.copy_expert_num > 0),
            ("const_expert_num", arguments.const_expert_num > 0),
            ("x_active_mask", active is not None),
            ("tp_world_size", arguments.has_tp),
            ("global_bs", unequal),
        ):
            contract = f"go without {argument} when it is 'fullmesh_v2'"
            checks.value(op, "comm_alg", not given, contract, f"{argument} as well")
    # Special experts follow the routed ones that are left.
    num_experts = (topology if elastic is None else elastic.topology).num_experts
    checks.expert_ids(op, "expert_ids", expert_ids, num_experts, num_special=special, active=active)
    return max_tokens, active


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


def _special(
    op: str,
    arguments: GroupArguments,
    num_experts: int,
    ids: torch.Tensor,
    hidden: int,
    tokens: torch.Tensor | None,
    alpha_1: torch.Tensor | None,
    alpha_2: torch.Tensor | None,
    value: torch.Tensor | None,
) -> SpecialExperts | None:
    """The experts without a network, if there are any and what they need is there."""
    constants = arguments.const_expert_num
    if constants or arguments.copy_expert_num:
        contract = "be given when there are copy or constant experts"
        checks.value(op, "ori_x", tokens is not None, contract, None)
        expected = (len(ids), hidden)
        checks.shape(op, "ori_x", tokens, expected, "(BS, H)", ids.device)
    if constants:
        contract = "be given when there are constant experts"
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
    if not arguments.num_special_experts:
        return None
    return SpecialExperts(
        ids,
        num_experts + arguments.zero_expert_num,
        num_experts + arguments.zero_expert_num + arguments.copy_expert_num,
        num_experts + arguments.num_special_experts,
        tokens,
        alpha_1,
        alpha_2,
        value,
    )


def _received_counts(
    op: str,
    topology: Topology,
    config: MoeConfig,
    rank: int,
    ends: torch.Tensor,
    arguments: GroupArguments,
) -> torch.Tensor:
    """[L, W] int32 rows of this rank, from ep_send_counts."""
    local = topology.num_local_experts(rank)
    size = topology.world_size * local
    if arguments.has_tp and len(ends) == size:
        pass  # the peer's half is not needed
    else:
        length = size * (2 if arguments.has_tp else 1)
        meaning = "(W * T * L,)" if arguments.has_tp else "(W * L,)"
        checks.shape(op, "ep_send_counts", ends, (length,), meaning, ends.device)
    left = config.topology.world_size
    ends = ends[: local * left]
    counts = ends.diff(prepend=ends.new_zeros(1)).view(local, left)
    most = config.max_tokens if topology.is_shared_rank(rank) else config.max_copies
    from_source = counts.sum(0)
    if ends.device.type == "cpu":
        checks.value(
            op,
            "ep_send_counts",
            counts.numel() == 0 or (int(counts.min()) >= 0 and int(from_source.max()) <= most),
            f"be non-decreasing prefix sums with at most {most} rows from each rank, as dispatch "
            "returned them",
            f"rows per rank {from_source.tolist()}",
        )
    return counts


def _check_expand_idx(op: str, expand_idx: torch.Tensor, plan: Plan, size: int) -> None:
    """The values have come back unchanged, so that no row goes astray."""
    checks.shape(op, "expand_idx", expand_idx, (size,), "(BS * K,)", plan.expand_idx.device)
    if expand_idx.device.type == "cpu":
        same = (expand_idx == plan.expand_idx) | (plan.expand_idx == NOWHERE)
        contract = "be what dispatch returned for these expert_ids"
        checks.value(op, "expand_idx", bool(same.all()), contract, "other values")


def _check_assist(
    op: str, assist: torch.Tensor, sources: Sources, config: MoeConfig, shared: bool, capacity: int
) -> None:
    """The triples have come back unchanged, so that no row goes astray."""
    name = "assist_info_for_combine"
    checks.shape(op, name, assist, (None,), "(A * 128,)", sources.ends.device)
    contract = f"have at least A * {ASSIST_WORDS} = {capacity * ASSIST_WORDS} elements"
    size = len(assist)
    checks.value(op, name, size >= capacity * ASSIST_WORDS, contract, f"{size} elements")
    if assist.device.type != "cpu":
        return
    n = len(sources.source)
    source, token, slot = assist[: 3 * n].view(n, 3).long().unbind(1)
    first, last = (config.top_k, config.num_slots) if shared else (0, config.top_k)
    holds = (source == sources.source) & (token >= 0) & (token < config.max_tokens)
    holds &= (slot >= first) & (slot < last)
    contract = "hold the triples that dispatch returned for these rows"
    if not bool(holds.all()):
        row = int((~holds).nonzero()[0])
        got = f"{assist[3 * row : 3 * row + 3].tolist()} for row {row}"
        checks.value(op, name, False, contract, got)
    # Rows of one expert and one source come in the order of the source's tokens.
    place = token * config.num_slots + slot
    begins = torch.zeros(n + 1, dtype=torch.bool)
    begins[sources.ends.long()] = True
    wrong = (place[1:] <= place[:-1]) & ~begins[1:n]
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0]) + 1
        checks.value(op, name, False, contract, f"row {row} before the one it follows")


def _tp_counts(
    op: str,
    arguments: GroupArguments,
    counts: torch.Tensor | None,
    sources: Sources,
    num_rows: int,
) -> tuple[int, int]:
    """How many rows of expand_x are this rank's, and how many the peer's behind them."""
    own = len(sources.source)
    if not arguments.has_tp:
        return own, 0
    contract = "be given when tp_world_size is 2"
    checks.value(op, "tp_send_counts", counts is not None, contract, None)
    assert counts is not None
    checks.shape(op, "tp_send_counts", counts, (2,), "(T,)", counts.device)
    mine, theirs = (int(counts[rank]) for rank in (arguments.tp_rank_id, 1 - arguments.tp_rank_id))
    contract = f"hold {own} rows for this rank, the last of ep_send_counts, and at most A of either"
    fits = mine == own and 0 <= theirs <= num_rows // 2
    checks.value(op, "tp_send_counts", fits, contract, counts.tolist())
    return own, theirs

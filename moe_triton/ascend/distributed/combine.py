"""Bringing experts' rows back to their tokens, v1 and v2, also with RMSNorm behind it."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, NamedTuple

import torch

from ... import comm
from ...comm import Call, CombineEpilogue, CombineInput, MoeConfig
from ...errors import ArgumentTypeError
from ...layout import Norm, RecvPermutation, RoutingPlan, ZeroComputationExperts
from ...ops import checks
from ...ops.device_steps import steps_on
from ...profile import active_profile
from ...topology import Topology
from ..group_arguments import GroupArguments, ScaledDown
from ..op_names import COMBINE, COMBINE_ADD_RMS_NORM, COMBINE_V2, family
from .checks import check_tokens, flat_addend, zero_computation_experts
from .dispatch_metadata import (
    ASSIST_WORDS,
    check_assist,
    check_assist_size,
    check_expand_idx,
    check_tp_counts,
    received_counts,
    tp_counts,
)
from .groups import Ranks
from .places import microseconds, place, routed_ids, sizes
from .tensor_parallel import add_halves

_RETURN_QUANT = {0: None, 2: "int8"}


class CombineOutput(NamedTuple):
    """The output of combine; ``waited`` as in ``DispatchOutput``; ``norm`` with its outputs."""

    x: torch.Tensor
    waited: torch.Tensor
    norm: Norm | None = None


@dataclasses.dataclass(frozen=True)
class _Normalized:
    """What the op with RMSNorm gets beside the others, or nothing where there is none."""

    residual_x: torch.Tensor | None
    gamma: torch.Tensor | None
    norm_eps: float

    def check_types(self, op: str, dtype: torch.dtype) -> None:
        checks.required(op, residual_x=self.residual_x, gamma=self.gamma)
        checks.dtype(op, "residual_x", self.residual_x, (dtype,))
        checks.dtype(op, "gamma", self.gamma, (dtype,))
        epsilon = self.norm_eps
        if not isinstance(epsilon, numbers.Real) or isinstance(epsilon, bool):
            raise ArgumentTypeError(op, "norm_eps", "be a number", repr(epsilon))

    def norm(self, op: str, num_tokens: int, hidden: int, device: torch.device) -> Norm:
        """The tensors, checked, and memory for what becomes of them."""
        assert self.residual_x is not None
        assert self.gamma is not None
        expected = (num_tokens, 1, hidden)
        checks.shape(op, "residual_x", self.residual_x, expected, "(BS, 1, H)", device)
        checks.shape(op, "gamma", self.gamma, (hidden,), "(H,)", device)
        checks.value(op, "norm_eps", self.norm_eps >= 0, "not be negative", self.norm_eps)
        residual = self.residual_x.reshape(num_tokens, hidden)
        y = residual.new_empty((num_tokens, hidden))
        rstd = y.new_empty(num_tokens, dtype=torch.float32)
        return Norm(residual, self.gamma, float(self.norm_eps), y, rstd)


@dataclasses.dataclass(frozen=True)
class Combine:
    """A combine whose arguments are right, but for what they say of the places of rows.

    Attributes:
        expand_x: [.., H] the experts' rows.
        weights: [BS, K] of the slots.
        index: where rows belong, as the version has it.
        by_token: whether that is expand_idx, not assist_info_for_combine.
        topology: of the whole group.
        elastic: what is left of the group, or None.
        active: [BS, K] the slots that take part, or None.
        ids: [BS, K] their experts.
        special: the experts without a network, or None.
        addend: [BS, H] rows to add, or None.
        norm: what RMSNorm needs, or None.
        counts: [L, W] rows of this rank.
        capacity: A.
        num_rows: rows that expand_x must have.
        config: for the transport.
        agreed: likewise.
    """

    expand_x: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor
    by_token: bool
    topology: Topology
    elastic: ScaledDown | None
    active: torch.Tensor | None
    ids: torch.Tensor
    special: ZeroComputationExperts | None
    addend: torch.Tensor | None
    norm: Norm | None
    counts: torch.Tensor
    capacity: int
    num_rows: int
    config: MoeConfig
    agreed: dict[str, Any]

    def check_index(
        self, op: str, plan: RoutingPlan, recv_permutation: RecvPermutation, rank: int
    ) -> None:
        """What dispatch said of the places of rows has come back."""
        if self.by_token:
            check_expand_idx(op, self.index, plan)
        else:
            shared = self.topology.is_shared_rank(rank)
            check_assist(op, _index_name(op), self.index, recv_permutation, self.config, shared)


def check_combine(
    op: str,
    ranks: Ranks,
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
    residual_x: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    **reserved: object,
) -> Combine:
    """The call that these arguments make, or the error of the first that is wrong.

    ``op`` is ``names.COMBINE``, whose ``index`` is expand_idx, ``COMBINE_V2``, whose ``index`` is
    assist_info_for_combine, or ``COMBINE_ADD_RMS_NORM``, whose is either and which alone takes
    ``residual_x`` and ``gamma``. ``performance_info`` is only looked at; it is for the caller to
    add ``waited``. ``reserved`` are arguments that must have their defaults.

    Tensors on the meta device have no values to be wrong; what they make is not for sending.
    """
    index_name = _index_name(op)
    normalized = None
    if op == COMBINE_ADD_RMS_NORM:
        normalized = _Normalized(residual_x, gamma, norm_eps)
    needed = {"expand_x": expand_x, "expert_ids": expert_ids, index_name: index}
    needed |= {"ep_send_counts": ep_send_counts, "expert_scales": expert_scales}
    checks.required(op, **needed)
    if normalized is not None:
        checks.required(op, residual_x=residual_x, gamma=gamma)
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
    if normalized is not None:
        normalized.check_types(op, expand_x.dtype)
    topology, elastic = place(op, arguments, ranks, elastic_info)
    checks.reserved(op, **reserved)
    max_tokens, active = check_tokens(
        op, arguments, expand_x, expert_ids, expert_scales, x_active_mask, elastic, topology
    )
    active_profile().check(
        family(op),
        op,
        **sizes(arguments, topology, expand_x, expert_ids, max_tokens),
        float16=expand_x.dtype == torch.float16,
        comm_quant_mode=comm_quant_mode,
        mask_dims=None if x_active_mask is None else x_active_mask.dim(),
        elastic=elastic_info is not None,
        with_expand_scales=expand_scales is not None,
        with_shared_expert_x=shared_expert_x is not None,
    )
    num_tokens, top_k = expert_ids.shape
    hidden, device = expand_x.shape[1], expand_x.device
    per_rank = (topology.world_size,)
    checks.shape(op, "performance_info", performance_info, per_rank, "(W,)", device)
    check_return_quant(op, comm_quant_mode, arguments, hidden)
    rank = ranks.group.rank
    capacity = topology.capacity(rank, max_tokens, top_k)
    num_rows = capacity * (2 if arguments.has_tp else 1)
    check_num_rows(op, expand_x, num_rows, has_tp=arguments.has_tp)
    addend = flat_addend(op, shared_expert_x, num_tokens, hidden, device)
    norm = None
    if normalized is not None:
        norm = normalized.norm(op, num_tokens, hidden, device)
    ids = routed_ids(expert_ids, active)
    placement = topology if elastic is None else elastic.topology
    alphas = (const_expert_alpha_1, const_expert_alpha_2)
    special = zero_computation_experts(
        op, arguments, placement.num_experts, ids, hidden, ori_x, *alphas, const_expert_v
    )
    config = return_config(placement, top_k, max_tokens, expand_x, comm_quant_mode)
    counts = received_counts(op, topology, config, rank, ep_send_counts, arguments)
    by_token = _check_index_shape(op, index, expert_ids.numel(), capacity, device)
    check_tp_counts(op, arguments, tp_send_counts)
    agreed = arguments.agreed(op, expand_x, "expand_x", expert_ids) | {
        "comm_quant_mode": int(comm_quant_mode),
        "elastic_info": None if elastic is None else elastic.digest,
    }
    return Combine(
        expand_x,
        expert_scales,
        index,
        by_token,
        topology,
        elastic,
        active,
        ids,
        special,
        addend,
        norm,
        counts,
        capacity,
        num_rows,
        config,
        agreed,
    )


def distribute_combine(op: str, arguments: GroupArguments, **given: Any) -> CombineOutput:
    """Bring the experts' rows back and sum them; shapes and errors in ``compat.torch_npu``.

    ``op`` and ``given`` are those of ``check_combine``.
    """
    ranks = Ranks.of(op, arguments, "gather")
    rank = ranks.group.rank
    with ranks.abort_peers_on_error(op, "combine", "gather"):
        combine = check_combine(op, ranks, arguments=arguments, **given)
        ids, config, topology = combine.ids, combine.config, combine.topology
        device = combine.expand_x.device
        steps = steps_on(device)
        plan = steps.routing_plan(ids, config.topology.num_experts)
        # The two ranks of a pair tell each other on the host how many rows they have.
        fixed = comm.fixed_shapes(device) and ranks.tp is None
        most = config.capacity(ranks.ep.group.rank) if fixed else None
        recv_permutation = steps.recv_permutation(combine.counts, capacity=most)
        combine.check_index(op, plan, recv_permutation, rank)
        sent = given.get("tp_send_counts")
        own, count = tp_counts(op, arguments, sent, recv_permutation, combine.num_rows)

    call = Call(op, config, combine.agreed, steps, device)
    y = combine.expand_x
    if ranks.tp is not None:
        with ranks.abort_peers_on_error(op, "combine", None):
            tp_call = Call(op, config, combine.agreed | {"ep_rank_id": rank}, steps, device)
            y = add_halves(ranks.tp, tp_call, y, own, count, combine.capacity)
    transport = ranks.ep.transport(op)
    pending = transport.combine_send(
        call, CombineInput(y, recv_permutation, ids, plan, combine.weights)
    )
    norm = combine.norm
    out = transport.combine_recv(pending, CombineEpilogue(combine.special, combine.addend, norm))
    normed = () if norm is None else (norm.y, norm.rstd[:, None])
    clear_inactive(combine.active, out, *normed)
    return CombineOutput(out, microseconds(pending.waited, topology, combine.elastic), norm)


def return_config(
    topology: Topology, top_k: int, max_tokens: int, expand_x: torch.Tensor, comm_quant_mode: int
) -> MoeConfig:
    """The sizes and formats of a combine."""
    return MoeConfig(
        topology,
        top_k,
        expand_x.shape[1],
        max_tokens,
        expand_x.dtype,
        quant_return=_RETURN_QUANT[comm_quant_mode],
    )


def clear_inactive(active: torch.Tensor | None, *outputs: torch.Tensor) -> None:
    """Zero the rows of tokens that take no part, in place; None for all active."""
    if active is not None:
        for out in outputs:
            out.masked_fill_(~active.any(1, keepdim=True), 0)


def check_num_rows(op: str, expand_x: torch.Tensor, num_rows: int, *, has_tp: bool = False) -> None:
    """``expand_x`` has the rows of dispatch's."""
    contract = f"have at least {'T * ' if has_tp else ''}A = {num_rows} rows"
    got = f"shape {tuple(expand_x.shape)}"
    checks.value(op, "expand_x", len(expand_x) >= num_rows, contract, got)


def _index_name(op: str) -> str:
    return "assist_info_for_combine" if op == COMBINE_V2 else "expand_idx"


def _check_index_shape(
    op: str, index: torch.Tensor, num_ids: int, capacity: int, device: torch.device
) -> bool:
    """Check what says where rows belong; returns whether it is expand_idx.

    With RMSNorm either will do: as K is at most 16, triples take more words than ids.
    """
    by_token = op == COMBINE
    if op == COMBINE_ADD_RMS_NORM:
        by_token = index.numel() == num_ids
    if by_token:
        checks.shape(op, "expand_idx", index, (num_ids,), "(BS * K,)", device)
    else:
        check_assist_size(op, _index_name(op), index, capacity * ASSIST_WORDS, device)
    return by_token


def check_return_quant(op: str, mode: int, arguments: GroupArguments, hidden: int) -> None:
    """``comm_quant_mode`` is one that this call can have."""
    modes = [*_RETURN_QUANT]
    checks.value(op, "comm_quant_mode", mode in modes, f"be in {modes}", mode)
    if mode:
        contract = "be 0 when tp_world_size is 2"
        checks.value(op, "comm_quant_mode", not arguments.has_tp, contract, mode)
        contract = f"be 0 unless H is a multiple of {comm.RETURN_BLOCK}"
        got = f"{mode} with H = {hidden}"
        checks.value(op, "comm_quant_mode", hidden % comm.RETURN_BLOCK == 0, contract, got)

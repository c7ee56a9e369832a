"""Combine of the experts' rows into their tokens, v1 and v2, and with RMSNorm after it."""

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
from ...ops.quantization import E8M0
from ...profile import active_profile
from ...topology import Topology
from ..group_arguments import GroupArguments, ScaledDown
from ..local.dynamic_quant import MX_BLOCK, quantize_mx_rows
from ..op_names import COMBINE, COMBINE_ADD_RMS_NORM, COMBINE_V2, family
from .checks import (
    check_tokens,
    flat_addend,
    profiled_sizes,
    resolve_topology,
    routed_ids,
    wait_microseconds,
    zero_computation_experts,
)
from .dispatch_metadata import (
    ASSIST_WORDS,
    check_assist,
    check_assist_size,
    check_expand_idx,
    check_tp_counts,
    flat_expand_idx,
    received_counts,
    tp_counts,
)
from .groups import OpGroups
from .tensor_parallel import add_halves

_RETURN_QUANT = {0: None, 2: "int8", 3: None, 4: None}
_MX = {3: torch.float8_e5m2, 4: torch.float8_e4m3fn}  # comm_quant_mode


class CombineOutput(NamedTuple):
    """The outputs of combine; ``waited`` as in ``DispatchOutput``, ``norm`` holds RMSNorm's."""

    x: torch.Tensor
    waited: torch.Tensor
    norm: Norm | None = None


@dataclasses.dataclass(frozen=True)
class _RmsNormArguments:
    """The arguments that only the op with RMSNorm has."""

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
        """Check the tensors, and allocate the outputs."""
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
class CheckedCombine:
    """A combine whose arguments have passed all checks but ``check_index``.

    Attributes:
        expand_x: [.., H] the experts' rows.
        weights: [BS, K] of the slots.
        index: (BS * K,) expand_idx, or assist_info_for_combine.
        is_expand_idx: which of the two it is.
        topology: of the whole group.
        elastic: the remaining ranks of the group, or None.
        active: [BS, K] bool mask of the slots, or None for all.
        ids: [BS, K] experts of the slots, ``NOWHERE`` in inactive ones.
        zero_computation: the zero-computation experts, or None.
        addend: [BS, H] rows to add, or None.
        norm: the tensors of RMSNorm, or None.
        counts: [L, W] rows of this rank.
        capacity: A.
        num_rows: rows that expand_x must have at least.
        config: for the transport.
        agreed: likewise.
    """

    expand_x: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor
    is_expand_idx: bool
    topology: Topology
    elastic: ScaledDown | None
    active: torch.Tensor | None
    ids: torch.Tensor
    zero_computation: ZeroComputationExperts | None
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
        """Check that ``index`` is the output of dispatch."""
        if self.is_expand_idx:
            check_expand_idx(op, self.index, plan)
        else:
            shared = self.topology.is_shared_rank(rank)
            check_assist(op, _index_name(op), self.index, recv_permutation, self.config, shared)


def check_combine(
    op: str,
    groups: OpGroups,
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
) -> CheckedCombine:
    """Check all arguments of a combine.

    ``op`` is ``op_names.COMBINE``, whose ``index`` is expand_idx, ``COMBINE_V2``, whose ``index``
    is assist_info_for_combine, or ``COMBINE_ADD_RMS_NORM``, which takes either of them, and alone
    has ``residual_x`` and ``gamma``. ``performance_info`` is only checked: the caller adds
    ``waited`` to it. ``reserved`` are arguments that must have their defaults.

    Tensors on the meta device have no values: their result must not be sent.
    """
    index_name = _index_name(op)
    rms_norm = None
    if op == COMBINE_ADD_RMS_NORM:
        rms_norm = _RmsNormArguments(residual_x, gamma, norm_eps)
    needed = {"expand_x": expand_x, "expert_ids": expert_ids, index_name: index}
    needed |= {"ep_send_counts": ep_send_counts, "expert_scales": expert_scales}
    checks.required(op, **needed)
    if rms_norm is not None:
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
    if rms_norm is not None:
        rms_norm.check_types(op, expand_x.dtype)
    topology, elastic = resolve_topology(op, arguments, groups, elastic_info)
    checks.reserved(op, **reserved)
    max_tokens, active = check_tokens(
        op, arguments, expand_x, expert_ids, expert_scales, x_active_mask, elastic, topology
    )
    active_profile().check(
        family(op),
        op,
        **profiled_sizes(arguments, topology, expand_x, expert_ids, max_tokens),
        float16=expand_x.dtype == torch.float16,
        comm_quant_mode=comm_quant_mode,
        mask_dims=None if x_active_mask is None else x_active_mask.dim(),
        index_dims=None if index_name != "expand_idx" else index.dim(),
        elastic=elastic_info is not None,
        with_expand_scales=expand_scales is not None,
        with_shared_expert_x=shared_expert_x is not None,
    )
    num_tokens, top_k = expert_ids.shape
    hidden, device = expand_x.shape[1], expand_x.device
    per_rank = (topology.world_size,)
    checks.shape(op, "performance_info", performance_info, per_rank, "(W,)", device)
    check_return_quant(op, comm_quant_mode, arguments, hidden, mx=op == COMBINE_V2)
    if comm_quant_mode in _MX:
        expand_x = mx_rounded(expand_x, _MX[comm_quant_mode])
    rank = groups.group.rank
    capacity = topology.capacity(rank, max_tokens, top_k)
    num_rows = capacity * (2 if arguments.has_tp else 1)
    check_num_rows(op, expand_x, num_rows, has_tp=arguments.has_tp)
    addend = flat_addend(op, shared_expert_x, num_tokens, hidden, device)
    norm = None
    if rms_norm is not None:
        norm = rms_norm.norm(op, num_tokens, hidden, device)
    ids = routed_ids(expert_ids, active)
    placement = topology if elastic is None else elastic.topology
    alphas = (const_expert_alpha_1, const_expert_alpha_2)
    zero_computation = zero_computation_experts(
        op, arguments, placement.num_experts, ids, hidden, ori_x, *alphas, const_expert_v
    )
    config = return_config(placement, top_k, max_tokens, expand_x, comm_quant_mode)
    counts = received_counts(op, topology, config, rank, ep_send_counts, arguments)
    is_expand_idx = _is_expand_idx(op, index, expert_ids.numel())
    if is_expand_idx:
        index = flat_expand_idx(op, index, expert_ids.numel(), device)
    else:
        check_assist_size(op, index_name, index, capacity * ASSIST_WORDS, device)
    check_tp_counts(op, arguments, tp_send_counts)
    agreed = arguments.agreed(op, expand_x, "expand_x", expert_ids) | {
        "comm_quant_mode": int(comm_quant_mode),
        "elastic_info": None if elastic is None else elastic.digest,
    }
    return CheckedCombine(
        expand_x,
        expert_scales,
        index,
        is_expand_idx,
        topology,
        elastic,
        active,
        ids,
        zero_computation,
        addend,
        norm,
        counts,
        capacity,
        num_rows,
        config,
        agreed,
    )


def distribute_combine(op: str, arguments: GroupArguments, **others: Any) -> CombineOutput:
    """Return the experts' rows and sum them; shapes and errors in ``compat.torch_npu``.

    ``op`` and ``others`` are those of ``check_combine``.
    """
    groups = OpGroups.resolve(op, arguments)
    rank = groups.group.rank
    with groups.abort_peers_on_error(op, "combine", tp=True):
        combine = check_combine(op, groups, arguments=arguments, **others)
        ids, config, topology = combine.ids, combine.config, combine.topology
        device = combine.expand_x.device
        steps = steps_on(device)
        plan = steps.routing_plan(ids, config.topology.num_experts)
        # The two ranks of a pair exchange their row counts on the host.
        fixed = comm.fixed_shapes(device) and groups.tp is None
        most = config.capacity(groups.ep.group.rank) if fixed else None
        recv_permutation = steps.recv_permutation(combine.counts, capacity=most)
        combine.check_index(op, plan, recv_permutation, rank)
        counts = others.get("tp_send_counts")
        own, count = tp_counts(op, arguments, counts, recv_permutation, combine.num_rows)

    call = Call(op, config, combine.agreed, steps, device)
    y = combine.expand_x
    if groups.tp is not None:
        with groups.abort_peers_on_error(op, "combine"):
            tp_call = Call(op, config, combine.agreed | {"ep_rank_id": rank}, steps, device)
            y = add_halves(groups.tp, tp_call, y, own, count, combine.capacity)
    transport = groups.ep.transport(op, call, "combine")
    pending = transport.combine_send(
        call, CombineInput(y, recv_permutation, ids, plan, combine.weights)
    )
    norm = combine.norm
    out = transport.combine_recv(
        pending, CombineEpilogue(combine.zero_computation, combine.addend, norm)
    )
    norm_outputs = () if norm is None else (norm.y, norm.rstd[:, None])
    zero_inactive(combine.active, out, *norm_outputs)
    return CombineOutput(out, wait_microseconds(pending.waited, topology, combine.elastic), norm)


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


def zero_inactive(active: torch.Tensor | None, *outputs: torch.Tensor) -> None:
    """Zero the rows of inactive tokens in place; None for all active."""
    if active is not None:
        for out in outputs:
            out.masked_fill_(~active.any(1, keepdim=True), 0)


def check_num_rows(op: str, expand_x: torch.Tensor, num_rows: int, *, has_tp: bool = False) -> None:
    """Check that ``expand_x`` has at least the rows of dispatch."""
    contract = f"have at least {'T * ' if has_tp else ''}A = {num_rows} rows"
    got = f"shape {tuple(expand_x.shape)}"
    checks.value(op, "expand_x", len(expand_x) >= num_rows, contract, got)


def _index_name(op: str) -> str:
    return "assist_info_for_combine" if op == COMBINE_V2 else "expand_idx"


def _is_expand_idx(op: str, index: torch.Tensor, num_ids: int) -> bool:
    """Whether ``index`` is expand_idx.

    The op with RMSNorm takes either: K is at most 16, so that triples take more words than ids.
    """
    return op == COMBINE or (op == COMBINE_ADD_RMS_NORM and index.numel() == num_ids)


def mx_rounded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[R, H] rows, rounded to MX of a float8 and back.

    The dtype of the rows holds every value of MX, so that they can travel in it: the result is that
    of rows that travel as MX.
    """
    codes, scales = quantize_mx_rows(rows, dtype)
    factors = scales.view(E8M0).float().repeat_interleave(MX_BLOCK, dim=1)[:, : rows.shape[1]]
    return (codes.float() * factors).to(rows.dtype)


def check_return_quant(
    op: str, mode: int, arguments: GroupArguments, hidden: int, *, mx: bool = False
) -> None:
    """Check ``comm_quant_mode``; ``mx`` says whether the op has the modes of MX."""
    modes = [mode for mode in _RETURN_QUANT if mx or mode not in _MX]
    checks.value(op, "comm_quant_mode", mode in modes, f"be in {modes}", mode)
    if mode:
        contract = "be 0 when tp_world_size is 2"
        checks.value(op, "comm_quant_mode", not arguments.has_tp, contract, mode)
    if _RETURN_QUANT[mode] is not None:
        contract = f"be 0 unless H is a multiple of {comm.RETURN_BLOCK}"
        got = f"{mode} with H = {hidden}"
        checks.value(op, "comm_quant_mode", hidden % comm.RETURN_BLOCK == 0, contract, got)

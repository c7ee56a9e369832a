"""Dispatch of tokens to their experts, v1 and v2: checks, communication and outputs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch

from ...comm import Call, DispatchInput, MoeConfig, Received
from ...layout import FLOAT8
from ...ops import checks, quantization
from ...ops.device_steps import steps_on
from ...profile import active_profile
from ...topology import Topology
from .. import quant_modes
from ..group_arguments import GroupArguments, ScaledDown
from ..op_names import DISPATCH_V2, family
from .checks import (
    check_tokens,
    profiled_sizes,
    resolve_topology,
    routed_ids,
    wait_microseconds,
)
from .dispatch_metadata import ASSIST_WORDS
from .groups import OpGroups
from .tensor_parallel import share_received


class DispatchOutput(NamedTuple):
    """The outputs of both versions of dispatch; see ``compat.torch_npu``.

    ``expand_idx`` is the third output of v1 and ``assist_info`` that of v2, None in the other
    version. ``dynamic_scales``, ``tp_recv_counts`` and ``expand_scales`` are None in a call that
    does not compute them. ``waited`` is int64 [W] microseconds, to add to ``performance_info``.
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


@dataclasses.dataclass(frozen=True)
class CheckedDispatch:
    """A dispatch whose arguments have passed all checks.

    Attributes:
        op: its name.
        x: [BS, H] the tokens.
        quantization: of the rows.
        topology: of the whole group.
        elastic: the remaining ranks of the group, or None.
        capacity: A.
        config: for the transport.
        agreed: likewise.
        inputs: likewise.
    """

    op: str
    x: torch.Tensor
    quantization: quant_modes.RowQuantization
    topology: Topology
    elastic: ScaledDown | None
    capacity: int
    config: MoeConfig
    agreed: dict[str, Any]
    inputs: DispatchInput

    @functools.cached_property
    def call(self) -> Call:
        """For the transport; ``UnavailableError`` if the back end of ``x`` cannot run."""
        device = self.x.device
        return Call(self.op, self.config, self.agreed, steps_on(device), device)

    def outputs(self, received: Received) -> Received:
        """``received`` with tokens and scales in the form of the op's outputs."""
        if self.quantization.prequantized:
            return quant_modes.split_scales(received, self.quantization, self.x.shape[1])
        if received.scales is None:
            return received
        scales = quantization.as_e8m0(self.quantization.quant, received.scales)
        return received._replace(scales=scales)


def check_dispatch(
    op: str,
    groups: OpGroups,
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
    y_dtype: object = None,
    x_dtype: object = None,
    scales_dtype: object = None,
    comm_type: int = 0,
) -> CheckedDispatch:
    """Check all arguments of a dispatch.

    Tensors on the meta device have no values: their result must not be sent.
    """
    checks.required(op, x=x, expert_ids=expert_ids)
    arguments.check_types(op)
    checks.integers(op, quant_mode=quant_mode, expert_token_nums_type=expert_token_nums_type)
    kinds = {"y_dtype": y_dtype, "x_dtype": x_dtype, "scales_dtype": scales_dtype}
    named = {name: quant_modes.named_dtype(op, name, kind) for name, kind in kinds.items()}
    x = quant_modes.stored_as(op, "x", x, named["x_dtype"])
    if scales is not None:
        scales = quant_modes.stored_as(op, "scales", scales, named["scales_dtype"])
    quant_modes.check_dtypes(op, x, scales)
    checks.dtype(op, "expert_ids", expert_ids, (torch.int32,))
    checks.dtype(op, "expert_scales", expert_scales, (torch.float32,))
    checks.dtype(op, "x_active_mask", x_active_mask, (torch.bool,))
    checks.dtype(op, "elastic_info", elastic_info, (torch.int32,))
    checks.dtype(op, "performance_info", performance_info, (torch.int64,))
    topology, elastic = resolve_topology(op, arguments, groups, elastic_info)
    max_tokens, active = check_tokens(
        op, arguments, x, expert_ids, expert_scales, x_active_mask, elastic, topology
    )
    per_rank = (topology.world_size,)
    checks.shape(op, "performance_info", performance_info, per_rank, "(W,)", x.device)
    check_token_nums_type(op, expert_token_nums_type)
    rows = quant_modes.row_quantization(op, x, scales, quant_mode, named["y_dtype"])
    active_profile().check(
        family(op),
        op,
        **profiled_sizes(arguments, topology, x, expert_ids, max_tokens),
        quant_mode=quant_mode,
        float8=_float8_argument(rows, quant_mode, named["y_dtype"]),
        comm_type=comm_type,
        mask_dims=None if x_active_mask is None else x_active_mask.dim(),
        elastic=elastic_info is not None,
        with_scales=scales is not None,
        with_expert_scales=expert_scales is not None,
    )
    sent, smooth_scales = x, scales
    if rows.prequantized:
        quant_modes.check_prequantized(op, x, scales)
        assert scales is not None
        sent, smooth_scales = quant_modes.append_scales(x, scales), None
    else:
        quantization.check_factors(op, scales, rows.quant, topology, x.shape[1], x.device)

    top_k = expert_ids.shape[1]
    config = MoeConfig(
        topology if elastic is None else elastic.topology,
        top_k,
        sent.shape[1],
        max_tokens,
        sent.dtype,
        rows.quant,
        per_expert=smooth_scales is not None and smooth_scales.dim() == 2,
        with_weights=expert_scales is not None,
    )
    agreed = arguments.agreed(op, x, "x", expert_ids) | {
        "quant_mode": int(quant_mode),
        "y_dtype": str(rows.dtype),
        "scales": _agreed_scales(scales, rows),
        "expert_scales": "given" if expert_scales is not None else None,
        "elastic_info": None if elastic is None else elastic.digest,
    }
    capacity = topology.capacity(groups.group.rank, max_tokens, top_k)
    num_rows = capacity * (2 if arguments.has_tp else 1)
    ids = routed_ids(expert_ids, active)
    return CheckedDispatch(
        op,
        x,
        rows,
        topology,
        elastic,
        capacity,
        config,
        agreed,
        DispatchInput(sent, ids, expert_scales, smooth_scales, num_rows),
    )


def _float8_argument(
    rows: quant_modes.RowQuantization, quant_mode: int, y_dtype: torch.dtype | None
) -> str | None:
    """The argument that asks for float8 rows outside the float8 modes 3 and 4, or None."""
    if rows.prequantized:
        return "x"
    return "y_dtype" if quant_mode == 2 and y_dtype in FLOAT8 else None


def _agreed_scales(scales: torch.Tensor | None, rows: quant_modes.RowQuantization) -> str | None:
    """The properties of the scales that must be equal on all ranks."""
    if scales is None:
        return None
    if rows.prequantized:
        return f"{scales.dtype}, {(*scales.shape[1:],)} for each token"
    return "given" if scales.dim() == 2 else "the same for all experts"


def distribute_dispatch(
    op: str, arguments: GroupArguments, *, expert_token_nums_type: int = 1, **others: Any
) -> DispatchOutput:
    """Send each token to its experts; shapes and errors in ``compat.torch_npu``.

    ``op`` is ``op_names.DISPATCH`` or ``DISPATCH_V2``; ``others`` are arguments of
    ``check_dispatch``. ``performance_info`` is only checked: the caller adds ``waited`` to it.
    """
    groups = OpGroups.resolve(op, arguments)
    with groups.abort_peers_on_error(op, "dispatch", tp=True):
        dispatch = check_dispatch(
            op,
            groups,
            arguments=arguments,
            expert_token_nums_type=expert_token_nums_type,
            **others,
        )
        call = dispatch.call
    topology, elastic = dispatch.topology, dispatch.elastic
    rank, capacity = groups.group.rank, dispatch.capacity
    with groups.abort_peers_on_error(op, None, tp=True):
        transport = groups.ep.transport(op, call)
        pending = transport.dispatch_send(call, dispatch.inputs)
        received = dispatch.outputs(transport.dispatch_recv(pending))

    recv_counts_cumsum = received.recv_permutation.recv_counts_cumsum
    weights, tp_counts, token_nums = received.weights, None, received.totals
    if groups.tp is not None:
        num_own = int(recv_counts_cumsum[-1])
        arguments_of_pair = {**call.arguments, "ep_rank_id": rank}
        tp_call = dataclasses.replace(call, arguments=arguments_of_pair)
        peer = share_received(groups.tp, tp_call, received.x, received.scales, recv_counts_cumsum)
        token_nums = token_nums + peer.count
        recv_counts_cumsum = torch.cat([recv_counts_cumsum, peer.recv_counts_cumsum])
        counts = [num_own, peer.count] if arguments.tp_rank_id == 0 else [peer.count, num_own]
        tp_counts = torch.tensor(counts, dtype=torch.int32, device=dispatch.x.device)
        weights = None if weights is None else weights[:capacity].clone()
    elif elastic is not None:
        size = topology.world_size * topology.num_local_experts(rank)
        recv_counts_cumsum = torch.cat(
            [recv_counts_cumsum, recv_counts_cumsum[-1:].expand(size - len(recv_counts_cumsum))]
        )
    profile, config = active_profile(), call.config
    spare = profile.spare_counts(topology.world_size, config.max_tokens, config.top_k)
    if spare:
        recv_counts_cumsum = torch.cat([recv_counts_cumsum, recv_counts_cumsum.new_empty(spare)])
    assist = None
    if op == DISPATCH_V2:
        size = capacity * ASSIST_WORDS
        assist = torch.empty(size, dtype=torch.int32, device=dispatch.x.device)
        slots = call.config.num_slots
        slot_ids = received.slot_ids
        columns = [received.recv_permutation.source, slot_ids // slots, slot_ids % slots]
        torch.stack(columns, dim=1, out=assist[: 3 * len(slot_ids)].view(-1, 3))
    return DispatchOutput(
        received.x,
        received.scales,
        received.plan.position_in_expert,
        assist,
        as_token_nums(token_nums, expert_token_nums_type),
        recv_counts_cumsum,
        tp_counts,
        weights,
        wait_microseconds(pending.waited, topology, elastic),
    )


def check_token_nums_type(op: str, kind: int) -> None:
    """Check ``expert_token_nums_type``."""
    contract = "be 0 (prefix sums) or 1 (counts)"
    checks.value(op, "expert_token_nums_type", kind in (0, 1), contract, kind)


def as_token_nums(token_nums: torch.Tensor, kind: int) -> torch.Tensor:
    """expert_token_nums of type ``kind``, from the rows per expert."""
    return token_nums.cumsum(0) if kind == 0 else token_nums

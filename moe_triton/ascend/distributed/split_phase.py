"""The split-phase ops: a setup sends and returns, its teardown waits, in order for each group.

A setup checks all arguments and aborts its peers on an error. A teardown must repeat the setup's
arguments; a wrong one leaves the operation in flight for another try.
Source: the operator documents of aclnnMoeDistributeDispatchSetup, ...DispatchTeardown,
        ...CombineSetup and ...CombineTeardown.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from ... import comm
from ...comm import Call, CombineEpilogue, CombineInput, MoeConfig, Pending
from ...layout import QUANTS, RowFormat, align
from ...ops import checks
from ...ops.device_steps import steps_on
from ...profile import active_profile
from ...topology import Topology
from .. import quant_modes
from ..group_arguments import GroupArguments
from ..op_names import COMBINE_SETUP, COMBINE_TEARDOWN, DISPATCH_SETUP, DISPATCH_TEARDOWN, family
from .checks import (
    active_slots,
    check_tokens,
    flat_addend,
    profiled_sizes,
    resolve_topology,
    routed_ids,
)
from .combine import check_num_rows, check_return_quant, return_config, zero_inactive
from .dispatch import CheckedDispatch, as_token_nums, check_dispatch, check_token_nums_type
from .dispatch_metadata import (
    ASSIST_WORDS,
    check_assist_size,
    check_expand_idx,
    flat_expand_idx,
    received_counts,
)
from .groups import OpGroups
from .pending_ops import PendingOp, find, start, torn_down

RECORD = 16  # words of comm_cmd_info for each record that Ascend's ops send


def _info(first: torch.Tensor, records: int, device: torch.device) -> torch.Tensor:
    """comm_cmd_info of ``records`` records: the number of the setup, then zeros."""
    info = torch.zeros(records * RECORD, dtype=torch.int32, device=device)
    info[:1] = first
    return info


def _repeated(
    arguments: GroupArguments, expert_ids: torch.Tensor, *, modes: dict[str, Any], **rows: Any
) -> dict[str, Any]:
    """The arguments of a setup that its teardown must repeat, by name; of tensors the form."""
    names = ["ep_world_size", "ep_rank_id", "moe_expert_num", "expert_shard_type"]
    names += ["shared_expert_rank_num", "global_bs"]
    shared = arguments.shared_expert_num if arguments.shared_expert_rank_num else 0
    return {
        **{name: getattr(arguments, name) for name in names},
        "shared_expert_num": shared,
        **{name: (tuple(tensor.shape), tensor.dtype) for name, tensor in rows.items()},
        "expert_ids": tuple(expert_ids.shape),
        **modes,
    }


def check_dispatch_setup(
    op: str,
    groups: OpGroups,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    scales: torch.Tensor | None = None,
    comm_type: int = 0,
    **others: Any,
) -> CheckedDispatch:
    """Check all arguments of a setup: those of ``check_dispatch``, and ``comm_type``."""
    checks.required(op, x=x, expert_ids=expert_ids)
    checks.integers(op, comm_type=comm_type)
    checks.dtype(op, "x", x, checks.FLOATS)  # a teardown cannot know the scales of float8 rows
    scales = _used_scales(scales, arguments)
    return check_dispatch(
        op, groups, x, expert_ids, arguments, scales=scales, comm_type=comm_type, **others
    )


def dispatch_setup(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    quant_mode: int = 0,
    comm_type: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token to its experts, without waiting; shapes in ``compat.torch_npu``.

    ``others`` are arguments of ``check_dispatch``.
    """
    op = DISPATCH_SETUP
    modes: dict[str, Any] = {"quant_mode": quant_mode, "comm_type": comm_type}
    groups = OpGroups.resolve(op, arguments)
    with groups.abort_peers_on_error(op, "dispatch"):
        dispatch = check_dispatch_setup(op, groups, x, expert_ids, arguments, **modes, **others)
        topology, inputs = dispatch.topology, dispatch.inputs
        plan = dispatch.call.steps.routing_plan(inputs.expert_ids, topology.num_experts)
        y = _messages(dispatch)
    pending = groups.ep.transport(op, dispatch.call).dispatch_send(dispatch.call, inputs)
    repeated = _repeated(arguments, expert_ids, modes=modes, x=x, y=y)
    first = start(groups.ep, "dispatch", op, PendingOp(pending, repeated, dispatch))
    records = len(y) + topology.world_size * topology.experts_per_rank
    return y, plan.position_in_expert, _info(first, records, x.device)


def _used_scales(scales: torch.Tensor | None, arguments: GroupArguments) -> torch.Tensor | None:
    """``scales`` without the last of E + 1 rows, allowed without shared ranks if portable."""
    experts = arguments.moe_expert_num
    if (
        isinstance(scales, torch.Tensor)
        and scales.dim() == 2
        and not arguments.shared_expert_rank_num
        and len(scales) == experts + 1
        and active_profile().name == "portable"
    ):
        return scales[:experts]
    return scales


def _check_sizes(
    op: str,
    groups: OpGroups,
    arguments: GroupArguments,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    **modes: Any,
) -> tuple[Topology, int]:
    """Check shapes and limits in all ops but the first; returns topology and largest batch."""
    topology, _ = resolve_topology(op, arguments, groups, None)
    max_tokens, _ = check_tokens(
        op,
        arguments,
        x,
        expert_ids,
        expert_scales,
        x_active_mask,
        None,
        topology,
        with_ids=False,
    )
    sizes = profiled_sizes(arguments, topology, x, expert_ids, max_tokens)
    active_profile().check(family(op), op, **sizes, **modes)
    return topology, max_tokens


@dataclasses.dataclass(frozen=True)
class DispatchTeardown:
    """A dispatch teardown; its fields are the arguments of the op."""

    x: torch.Tensor
    y: torch.Tensor
    expert_ids: torch.Tensor
    comm_cmd_info: torch.Tensor
    arguments: GroupArguments
    quant_mode: int = 0
    expert_token_nums_type: int = 1
    comm_type: int = 0

    @property
    def _modes(self) -> dict[str, Any]:
        return {"quant_mode": self.quant_mode, "comm_type": self.comm_type}

    def _check_types(self, op: str) -> None:
        """Check for missing arguments, types and modes."""
        x, y, expert_ids, info = self.x, self.y, self.expert_ids, self.comm_cmd_info
        checks.required(op, x=x, y=y, expert_ids=expert_ids, comm_cmd_info=info)
        self.arguments.check_types(op)
        kind = self.expert_token_nums_type
        checks.integers(op, **self._modes, expert_token_nums_type=kind)
        checks.dtype(op, "expert_ids", expert_ids, (torch.int32,))
        checks.dtype(op, "comm_cmd_info", info, (torch.int32,))
        checks.reserved(op, comm_alg=self.arguments.comm_alg)
        check_token_nums_type(op, kind)
        active_profile().check(family(op), op, token_nums_type=kind)

    def check(self, op: str, groups: OpGroups) -> None:
        """Check the arguments by themselves, as the setup may not have run yet."""
        self._check_types(op)
        checks.dtype(op, "x", self.x, checks.FLOATS)
        quant_modes.check_mode(op, self.quant_mode)
        _check_sizes(op, groups, self.arguments, self.x, self.expert_ids, **self._modes)

    def run(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Wait for the tokens; a wrong argument leaves the operation in flight."""
        op = DISPATCH_TEARDOWN
        communicator = comm.default_communicator(self.arguments.resolve_ep(op))
        self._check_types(op)
        repeated = _repeated(self.arguments, self.expert_ids, modes=self._modes, x=self.x, y=self.y)
        pending_op = find(op, communicator, "dispatch", self.comm_cmd_info, repeated)
        dispatch = pending_op.dispatch
        assert dispatch is not None
        with torn_down(op, communicator, "dispatch", pending_op) as transport:
            received = dispatch.outputs(transport.dispatch_recv(pending_op.pending))
        counts = received.recv_permutation.recv_counts_cumsum
        assist = counts.new_empty(max(dispatch.capacity * ASSIST_WORDS, len(counts)))
        assist[: len(counts)] = counts
        token_nums = as_token_nums(received.totals, self.expert_token_nums_type)
        return received.x, received.scales, assist, token_nums


class ReturnedRows(NamedTuple):
    """The rows that a combine setup sends.

    Attributes:
        config: for the transport.
        counts: [L, W] rows of this rank.
        capacity: A.
    """

    config: MoeConfig
    counts: torch.Tensor
    capacity: int


def check_combine_setup(
    op: str,
    groups: OpGroups,
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    arguments: GroupArguments,
    *,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
) -> ReturnedRows:
    """Check all arguments of a setup.

    Tensors on the meta device have no values: their result must not be sent.
    """
    rank, assist = groups.group.rank, assist_info_for_combine
    checks.required(op, expand_x=expand_x, expert_ids=expert_ids, assist_info_for_combine=assist)
    arguments.check_types(op)
    checks.integers(op, comm_quant_mode=comm_quant_mode, comm_type=comm_type)
    checks.dtype(op, "expand_x", expand_x, checks.FLOATS)
    checks.dtype(op, "expert_ids", expert_ids, (torch.int32,))
    checks.dtype(op, "assist_info_for_combine", assist, (torch.int32,))
    modes: dict[str, Any] = {"comm_quant_mode": comm_quant_mode, "comm_type": comm_type}
    topology, max_tokens = _check_sizes(op, groups, arguments, expand_x, expert_ids, **modes)
    top_k, hidden = expert_ids.shape[1], expand_x.shape[1]
    check_return_quant(op, comm_quant_mode, arguments, hidden)
    capacity = topology.capacity(rank, max_tokens, top_k)
    check_num_rows(op, expand_x, capacity)
    config = return_config(topology, top_k, max_tokens, expand_x, comm_quant_mode)
    words = topology.world_size * topology.num_local_experts(rank)
    name, least = "assist_info_for_combine", max(capacity * ASSIST_WORDS, words)
    check_assist_size(op, name, assist, least, expand_x.device)
    counts = received_counts(op, topology, config, rank, assist[:words], arguments, name=name)
    return ReturnedRows(config, counts, capacity)


def combine_setup(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    arguments: GroupArguments,
    *,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send the experts' rows back, without waiting; shapes in ``compat.torch_npu``."""
    op, modes = COMBINE_SETUP, {"comm_quant_mode": comm_quant_mode, "comm_type": comm_type}
    groups = OpGroups.resolve(op, arguments)
    with groups.abort_peers_on_error(op, "combine"):
        config, counts, capacity = check_combine_setup(
            op, groups, expand_x, expert_ids, assist_info_for_combine, arguments, **modes
        )
        steps = steps_on(expand_x.device)
        most = capacity if comm.fixed_shapes(expand_x.device) else None
        recv_permutation = steps.recv_permutation(counts, capacity=most)
        plan = steps.routing_plan(expert_ids, config.topology.num_experts)

    agreed = arguments.agreed(op, expand_x, "expand_x", expert_ids)
    agreed |= {"comm_quant_mode": int(comm_quant_mode)}
    call = Call(op, config, agreed, steps, expand_x.device)
    pending = groups.ep.transport(op, call, "combine").combine_send(
        call, CombineInput(expand_x, recv_permutation, expert_ids, plan, None)
    )
    sent = _sent_rows(pending, expand_x, capacity)
    repeated = _repeated(arguments, expert_ids, modes=modes, expand_x=expand_x, quant_expand_x=sent)
    first = start(groups.ep, "combine", op, PendingOp(pending, repeated))
    return sent, _info(first, capacity + config.topology.world_size, expand_x.device)


@dataclasses.dataclass(frozen=True)
class CombineTeardown:
    """A combine teardown; its fields are the arguments of the op."""

    expand_x: torch.Tensor
    quant_expand_x: torch.Tensor
    expert_ids: torch.Tensor
    expand_idx: torch.Tensor
    expert_scales: torch.Tensor
    comm_cmd_info: torch.Tensor
    arguments: GroupArguments
    x_active_mask: torch.Tensor | None = None
    shared_expert_x: torch.Tensor | None = None
    comm_quant_mode: int = 0
    comm_type: int = 0

    @property
    def _modes(self) -> dict[str, Any]:
        return {"comm_quant_mode": self.comm_quant_mode, "comm_type": self.comm_type}

    def _check_types(self, op: str) -> None:
        """Check for missing arguments, types and what the profile refuses of optional ones."""
        names = ("expand_x", "quant_expand_x", "expert_ids", "expand_idx", "expert_scales")
        checks.required(op, **{name: getattr(self, name) for name in (*names, "comm_cmd_info")})
        self.arguments.check_types(op)
        checks.integers(op, **self._modes)
        checks.dtype(op, "expand_x", self.expand_x, checks.FLOATS)
        for name, kind in (
            ("expert_ids", torch.int32),
            ("expand_idx", torch.int32),
            ("expert_scales", torch.float32),
            ("comm_cmd_info", torch.int32),
            ("x_active_mask", torch.bool),
            ("shared_expert_x", self.expand_x.dtype),
        ):
            checks.dtype(op, name, getattr(self, name), (kind,))
        checks.reserved(op, comm_alg=self.arguments.comm_alg)
        active_profile().check(
            family(op),
            op,
            num_shared_ranks=self.arguments.shared_expert_rank_num,
            num_shared_experts=self.arguments.shared_expert_num,
            mask_dims=None if self.x_active_mask is None else self.x_active_mask.dim(),
            index_dims=self.expand_idx.dim(),
            with_shared_expert_x=self.shared_expert_x is not None,
        )

    def _check_shapes(self, op: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Check expand_idx and shared_expert_x; returns them as (BS * K,) and (BS, H)."""
        device = self.expand_x.device
        index = flat_expand_idx(op, self.expand_idx, self.expert_ids.numel(), device)
        num_tokens, hidden = len(self.expert_ids), self.expand_x.shape[1]
        return index, flat_addend(op, self.shared_expert_x, num_tokens, hidden, device)

    def check(self, op: str, groups: OpGroups) -> None:
        """Check the arguments by themselves, as the setup may not have run yet."""
        self._check_types(op)
        _check_sizes(
            op,
            groups,
            self.arguments,
            self.expand_x,
            self.expert_ids,
            self.expert_scales,
            self.x_active_mask,
            **self._modes,
        )
        check_return_quant(op, self.comm_quant_mode, self.arguments, self.expand_x.shape[1])
        self._check_shapes(op)

    def run(self) -> torch.Tensor:
        """Wait for the rows and sum them; a wrong argument leaves the operation in flight."""
        op, expert_ids, weights = COMBINE_TEARDOWN, self.expert_ids, self.expert_scales
        communicator = comm.default_communicator(self.arguments.resolve_ep(op))
        self._check_types(op)
        repeated = _repeated(
            self.arguments,
            expert_ids,
            modes=self._modes,
            expand_x=self.expand_x,
            quant_expand_x=self.quant_expand_x,
        )
        pending_op = find(op, communicator, "combine", self.comm_cmd_info, repeated)
        call = pending_op.pending.call
        (num_tokens, top_k), device = expert_ids.shape, self.expand_x.device
        checks.shape(op, "expert_scales", weights, (num_tokens, top_k), "(BS, K)", device)
        active = active_slots(op, self.x_active_mask, num_tokens, top_k, device)
        num_experts = call.config.topology.num_experts
        checks.expert_ids(op, "expert_ids", expert_ids, num_experts, active=active)
        ids = routed_ids(expert_ids, active)
        plan = call.steps.routing_plan(ids, num_experts)
        index, addend = self._check_shapes(op)
        check_expand_idx(op, index, plan)
        # Mask and weights come only now: the rows in flight do not depend on them.
        pending_op.pending.data = pending_op.pending.data._replace(
            expert_ids=ids, plan=plan, weights=weights
        )
        with torn_down(op, communicator, "combine", pending_op) as transport:
            out = transport.combine_recv(pending_op.pending, CombineEpilogue(addend=addend))
        zero_inactive(active, out)
        return out


def message_format(quant: str | None, dtype: torch.dtype, hidden: int) -> RowFormat:
    """The format of a row of y: the payload, then the scales at the offset of Ascend's ops."""
    fmt = RowFormat.quantized(quant, dtype, hidden)
    scheme = "none" if quant is None else QUANTS[quant].scheme
    size = hidden * fmt.dtype.itemsize
    if scheme in ("none", "static"):
        return fmt._replace(stride=align(align(size, 32), 512))
    start = align(size, {"per_row": 32, "group": 128, "mx": 256}[scheme])
    total = start + fmt.num_scales * fmt.scale_dtype.itemsize
    return fmt._replace(scale_offset=start, stride=align(total, 512))


def _messages(dispatch: CheckedDispatch) -> torch.Tensor:
    """y: [BS * (K + NS), size], the row of each slot in token order, then the shared experts'.

    Written for the caller only: the rows of the operation itself are in the windows. The padding
    between payload, scales and end of a row is not written.
    """
    config, inputs, steps = dispatch.call.config, dispatch.inputs, dispatch.call.steps
    x, smooth_scales = inputs.x, inputs.smooth_scales
    num_tokens, top_k = inputs.expert_ids.shape
    num_shared = config.topology.num_shared_experts
    fmt = message_format(dispatch.quantization.quant, x.dtype, x.shape[1])
    shape = (num_tokens * (top_k + num_shared), fmt.stride)
    y = torch.empty(shape, dtype=torch.uint8, device=x.device)
    routed = y[: num_tokens * top_k].view(num_tokens, top_k, fmt.stride)
    shared = y[num_tokens * top_k :].view(num_shared, num_tokens, fmt.stride)
    columns = [*routed.unbind(1), *shared.unbind(0)]  # the rows of one slot of all tokens
    encoded = torch.empty((num_tokens, fmt.stride), dtype=torch.uint8, device=x.device)
    if smooth_scales is None or smooth_scales.dim() == 1:
        steps.encode(x, fmt, encoded, smooth_scales)
        for column in columns:
            column.copy_(encoded)
    else:
        expert = inputs.expert_ids.long().clamp(0, config.topology.num_experts - 1)
        for slot, column in enumerate(columns):
            row = num_shared + expert[:, slot] if slot < top_k else slot - top_k
            steps.encode(x, fmt, encoded, smooth_scales[row])
            column.copy_(encoded)
    return y.view(dispatch.quantization.dtype)


def _sent_rows(
    pending: Pending[CombineInput], expand_x: torch.Tensor, capacity: int
) -> torch.Tensor:
    """quant_expand_x: the rows as comm_quant_mode 2 sends them, else not written."""
    call, hidden = pending.call, expand_x.shape[1]
    size = quant_row_bytes(hidden)
    sent = torch.empty((capacity, size), dtype=torch.uint8, device=expand_x.device)
    fmt = call.config.return_format
    if fmt.scheme == "block8":
        n = len(pending.data.recv_permutation.source)
        placed = fmt._replace(scale_offset=align(hidden, 32), stride=size)
        call.steps.encode(expand_x[:n], placed, sent[:n])
    return sent.view(torch.int8)


def quant_row_bytes(hidden: int) -> int:
    """Bytes of a row of quant_expand_x."""
    return align(align(hidden, 32) + align(hidden, 8) // 8 * 4, 512)

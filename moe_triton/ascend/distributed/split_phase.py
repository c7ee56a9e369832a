"""The split-phase ops: a setup sends and returns, its teardown waits, in order for each group.

A setup checks everything and tells the peers what is wrong; a teardown only has to repeat the
setup's arguments, and a wrong one leaves the operation as it is, for another try.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from ... import comm
from ...comm import Call, CombineEpilogue, CombineInput, MoeConfig
from ...ops import checks
from ...ops.device_steps import steps_on
from ...profile import active_profile
from ...topology import Topology
from .. import quant_modes
from ..group_arguments import GroupArguments
from ..op_names import COMBINE_SETUP, COMBINE_TEARDOWN, DISPATCH_SETUP, DISPATCH_TEARDOWN, family
from .checks import active_slots, check_tokens, flat_addend
from .combine import check_num_rows, check_return_quant, clear_inactive, return_config
from .dispatch import Dispatch, as_token_nums, check_dispatch, check_token_nums_type
from .dispatch_metadata import ASSIST_WORDS, check_assist_size, check_expand_idx, received_counts
from .groups import Ranks
from .messages import messages, sent_rows
from .places import place, routed_ids, sizes
from .under_way import PendingOp, find, start, torn_down

RECORD = 16  # words of comm_cmd_info for each record that Ascend's ops send


def _info(first: torch.Tensor, records: int, device: torch.device) -> torch.Tensor:
    """comm_cmd_info for so many records: the number of the setup, then zeros."""
    info = torch.zeros(records * RECORD, dtype=torch.int32, device=device)
    info[:1] = first
    return info


def _group(arguments: GroupArguments) -> dict[str, Any]:
    """What a teardown repeats of the group."""
    names = ["ep_world_size", "ep_rank_id", "moe_expert_num", "expert_shard_type"]
    names += ["shared_expert_rank_num", "global_bs"]
    found = {name: getattr(arguments, name) for name in names}
    shared = arguments.shared_expert_num if arguments.shared_expert_rank_num else 0
    return found | {"shared_expert_num": shared}


def check_dispatch_setup(
    op: str,
    ranks: Ranks,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    scales: torch.Tensor | None = None,
    comm_type: int = 0,
    **given: Any,
) -> Dispatch:
    """What ``check_dispatch`` does, and what is the setup's own."""
    checks.required(op, x=x, expert_ids=expert_ids)
    checks.integers(op, comm_type=comm_type)
    checks.dtype(op, "x", x, checks.FLOATS)  # nothing would say what scales a teardown returns
    factors = _used_factors(scales, arguments)
    return check_dispatch(
        op, ranks, x, expert_ids, arguments, scales=factors, comm_type=comm_type, **given
    )


def dispatch_setup(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    quant_mode: int = 0,
    comm_type: int = 0,
    y_dtype: object = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token to its experts, without waiting; shapes in ``compat.torch_npu``."""
    op = DISPATCH_SETUP
    ranks = Ranks.of(op, arguments, "gather")
    with ranks.abort_peers_on_error(op, "dispatch", None):
        dispatch = check_dispatch_setup(
            op,
            ranks,
            x,
            expert_ids,
            arguments,
            scales=scales,
            x_active_mask=x_active_mask,
            quant_mode=quant_mode,
            y_dtype=y_dtype,
            comm_type=comm_type,
        )
        plan = dispatch.call.steps.routing_plan(
            dispatch.tokens.expert_ids, dispatch.topology.num_experts
        )
        y = messages(dispatch)
    pending = ranks.ep.transport(op).dispatch_send(dispatch.call, dispatch.tokens)
    started = PendingOp(
        pending,
        _group(arguments)
        | {
            "x": (tuple(x.shape), x.dtype),
            "y": (tuple(y.shape), y.dtype),
            "expert_ids": tuple(expert_ids.shape),
            "quant_mode": quant_mode,
            "comm_type": comm_type,
        },
        dispatch,
    )
    first = start(ranks.ep, "dispatch", op, started)
    topology = dispatch.topology
    records = len(y) + topology.world_size * topology.experts_per_rank
    return y, plan.position_in_expert, _info(first, records, x.device)


def _used_factors(scales: torch.Tensor | None, arguments: GroupArguments) -> torch.Tensor | None:
    """Without shared ranks one row more is passed over, except where a product refuses it."""
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
    ranks: Ranks,
    arguments: GroupArguments,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    **modes: Any,
) -> tuple[Topology, int]:
    """Check what all halves share but the first; returns the topology and the largest batch."""
    topology, _ = place(op, arguments, ranks, None)
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
    limited = sizes(arguments, topology, x, expert_ids, max_tokens)
    active_profile().check(family(op), op, **limited, **modes)
    return topology, max_tokens


def _check_dispatch_teardown_types(
    op: str,
    x: torch.Tensor,
    y: torch.Tensor,
    expert_ids: torch.Tensor,
    comm_cmd_info: torch.Tensor,
    arguments: GroupArguments,
    quant_mode: int,
    expert_token_nums_type: int,
    comm_type: int,
) -> None:
    """Nothing is missing, and all is of the right kind."""
    checks.required(op, x=x, y=y, expert_ids=expert_ids, comm_cmd_info=comm_cmd_info)
    arguments.check_types(op)
    integers = {"quant_mode": quant_mode, "expert_token_nums_type": expert_token_nums_type}
    checks.integers(op, **integers, comm_type=comm_type)
    checks.dtype(op, "expert_ids", expert_ids, (torch.int32,))
    checks.dtype(op, "comm_cmd_info", comm_cmd_info, (torch.int32,))
    checks.reserved(op, comm_alg=arguments.comm_alg)
    check_token_nums_type(op, expert_token_nums_type)
    active_profile().check(family(op), op, token_nums_type=expert_token_nums_type)


def check_dispatch_teardown(
    op: str,
    ranks: Ranks,
    x: torch.Tensor,
    y: torch.Tensor,
    expert_ids: torch.Tensor,
    comm_cmd_info: torch.Tensor,
    arguments: GroupArguments,
    *,
    quant_mode: int = 0,
    expert_token_nums_type: int = 1,
    comm_type: int = 0,
) -> None:
    """What can be said of a teardown without its setup, which may be yet to come."""
    kinds = (quant_mode, expert_token_nums_type, comm_type)
    _check_dispatch_teardown_types(op, x, y, expert_ids, comm_cmd_info, arguments, *kinds)
    checks.dtype(op, "x", x, checks.FLOATS)
    quant_modes.check_mode(op, quant_mode)
    modes: dict[str, Any] = {"quant_mode": quant_mode, "comm_type": comm_type}
    _check_sizes(op, ranks, arguments, x, expert_ids, **modes)


def dispatch_teardown(
    x: torch.Tensor,
    y: torch.Tensor,
    expert_ids: torch.Tensor,
    comm_cmd_info: torch.Tensor,
    arguments: GroupArguments,
    *,
    quant_mode: int = 0,
    expert_token_nums_type: int = 1,
    comm_type: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Wait for the tokens; a wrong argument leaves the operation in flight."""
    op = DISPATCH_TEARDOWN
    communicator = comm.default_communicator(arguments.resolve_ep(op))
    kinds = (quant_mode, expert_token_nums_type, comm_type)
    _check_dispatch_teardown_types(op, x, y, expert_ids, comm_cmd_info, arguments, *kinds)
    given = _group(arguments) | {
        "x": (tuple(x.shape), x.dtype),
        "y": (tuple(y.shape), y.dtype),
        "expert_ids": tuple(expert_ids.shape),
        "quant_mode": quant_mode,
        "comm_type": comm_type,
    }
    started = find(op, communicator, "dispatch", comm_cmd_info, given)
    dispatch = started.dispatch
    assert dispatch is not None
    with torn_down(op, communicator, "dispatch", started) as transport:
        received = dispatch.outputs(transport.dispatch_recv(started.pending))
    recv_counts_cumsum = received.recv_permutation.recv_counts_cumsum
    assist = recv_counts_cumsum.new_empty(
        max(dispatch.capacity * ASSIST_WORDS, len(recv_counts_cumsum))
    )
    assist[: len(recv_counts_cumsum)] = recv_counts_cumsum
    token_nums = as_token_nums(received.totals, expert_token_nums_type)
    return received.x, received.scales, assist, token_nums


class ReturnedRows(NamedTuple):
    """What a combine setup sends.

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
    ranks: Ranks,
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    arguments: GroupArguments,
    *,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
) -> ReturnedRows:
    """What these arguments send, or the error of the first that is wrong.

    Tensors on the meta device have no values to be wrong; what they make is not for sending.
    """
    rank, assist = ranks.group.rank, assist_info_for_combine
    checks.required(op, expand_x=expand_x, expert_ids=expert_ids, assist_info_for_combine=assist)
    arguments.check_types(op)
    checks.integers(op, comm_quant_mode=comm_quant_mode, comm_type=comm_type)
    checks.dtype(op, "expand_x", expand_x, checks.FLOATS)
    checks.dtype(op, "expert_ids", expert_ids, (torch.int32,))
    checks.dtype(op, "assist_info_for_combine", assist, (torch.int32,))
    modes: dict[str, Any] = {"comm_quant_mode": comm_quant_mode, "comm_type": comm_type}
    topology, max_tokens = _check_sizes(op, ranks, arguments, expand_x, expert_ids, **modes)
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
    op = COMBINE_SETUP
    ranks = Ranks.of(op, arguments, "gather")
    with ranks.abort_peers_on_error(op, "combine", None):
        config, counts, capacity = check_combine_setup(
            op,
            ranks,
            expand_x,
            expert_ids,
            assist_info_for_combine,
            arguments,
            comm_quant_mode=comm_quant_mode,
            comm_type=comm_type,
        )
        steps = steps_on(expand_x.device)
        recv_permutation = steps.recv_permutation(
            counts, capacity=capacity if comm.fixed_shapes(expand_x.device) else None
        )
        plan = steps.routing_plan(expert_ids, config.topology.num_experts)

    agreed = arguments.agreed(op, expand_x, "expand_x", expert_ids)
    agreed |= {"comm_quant_mode": int(comm_quant_mode)}
    outputs = CombineInput(expand_x, recv_permutation, expert_ids, plan, None)
    call = Call(op, config, agreed, steps, expand_x.device)
    pending = ranks.ep.transport(op).combine_send(call, outputs)
    sent = sent_rows(pending, expand_x, capacity)
    started = PendingOp(
        pending,
        _group(arguments)
        | {
            "expand_x": (tuple(expand_x.shape), expand_x.dtype),
            "quant_expand_x": (tuple(sent.shape), sent.dtype),
            "expert_ids": tuple(expert_ids.shape),
            "comm_quant_mode": comm_quant_mode,
            "comm_type": comm_type,
        },
    )
    first = start(ranks.ep, "combine", op, started)
    return sent, _info(first, capacity + config.topology.world_size, expand_x.device)


def _check_combine_teardown_types(
    op: str,
    arguments: GroupArguments,
    comm_quant_mode: int,
    comm_type: int,
    expand_x: torch.Tensor,
    quant_expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    expand_idx: torch.Tensor,
    expert_scales: torch.Tensor,
    comm_cmd_info: torch.Tensor,
    x_active_mask: torch.Tensor | None,
    shared_expert_x: torch.Tensor | None,
) -> None:
    """Nothing is missing, and all is of the right kind."""
    needed = {"expand_x": expand_x, "quant_expand_x": quant_expand_x, "expert_ids": expert_ids}
    needed |= {"expand_idx": expand_idx, "expert_scales": expert_scales}
    checks.required(op, **needed, comm_cmd_info=comm_cmd_info)
    arguments.check_types(op)
    checks.integers(op, comm_quant_mode=comm_quant_mode, comm_type=comm_type)
    checks.dtype(op, "expand_x", expand_x, checks.FLOATS)
    for name, tensor, kind in (
        ("expert_ids", expert_ids, torch.int32),
        ("expand_idx", expand_idx, torch.int32),
        ("expert_scales", expert_scales, torch.float32),
        ("comm_cmd_info", comm_cmd_info, torch.int32),
        ("x_active_mask", x_active_mask, torch.bool),
        ("shared_expert_x", shared_expert_x, expand_x.dtype),
    ):
        checks.dtype(op, name, tensor, (kind,))
    checks.reserved(op, comm_alg=arguments.comm_alg)
    active_profile().check(
        family(op),
        op,
        num_shared_ranks=arguments.shared_expert_rank_num,
        num_shared_experts=arguments.shared_expert_num,
        mask_dims=None if x_active_mask is None else x_active_mask.dim(),
        with_shared_expert_x=shared_expert_x is not None,
    )


def check_combine_teardown(
    op: str,
    ranks: Ranks,
    expand_x: torch.Tensor,
    quant_expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    expand_idx: torch.Tensor,
    expert_scales: torch.Tensor,
    comm_cmd_info: torch.Tensor,
    arguments: GroupArguments,
    *,
    x_active_mask: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
) -> None:
    """What can be said of a teardown without its setup, which may be yet to come."""
    tensors = (quant_expand_x, expert_ids, expand_idx, expert_scales, comm_cmd_info)
    optional = (x_active_mask, shared_expert_x)
    kinds = (comm_quant_mode, comm_type)
    _check_combine_teardown_types(op, arguments, *kinds, expand_x, *tensors, *optional)
    modes: dict[str, Any] = {"comm_quant_mode": comm_quant_mode, "comm_type": comm_type}
    _check_sizes(op, ranks, arguments, expand_x, expert_ids, expert_scales, x_active_mask, **modes)
    (num_tokens, top_k), hidden = expert_ids.shape, expand_x.shape[1]
    check_return_quant(op, comm_quant_mode, arguments, hidden)
    size = num_tokens * top_k
    checks.shape(op, "expand_idx", expand_idx, (size,), "(BS * K,)", expand_x.device)
    flat_addend(op, shared_expert_x, num_tokens, hidden, expand_x.device)


def combine_teardown(
    expand_x: torch.Tensor,
    quant_expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    expand_idx: torch.Tensor,
    expert_scales: torch.Tensor,
    comm_cmd_info: torch.Tensor,
    arguments: GroupArguments,
    *,
    x_active_mask: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    comm_quant_mode: int = 0,
    comm_type: int = 0,
) -> torch.Tensor:
    """Wait for the rows and sum them; a wrong argument leaves the operation in flight."""
    op = COMBINE_TEARDOWN
    communicator = comm.default_communicator(arguments.resolve_ep(op))
    tensors = (quant_expand_x, expert_ids, expand_idx, expert_scales, comm_cmd_info)
    optional = (x_active_mask, shared_expert_x)
    kinds = (comm_quant_mode, comm_type)
    _check_combine_teardown_types(op, arguments, *kinds, expand_x, *tensors, *optional)
    given = _group(arguments) | {
        "expand_x": (tuple(expand_x.shape), expand_x.dtype),
        "quant_expand_x": (tuple(quant_expand_x.shape), quant_expand_x.dtype),
        "expert_ids": tuple(expert_ids.shape),
        "comm_quant_mode": comm_quant_mode,
        "comm_type": comm_type,
    }
    started = find(op, communicator, "combine", comm_cmd_info, given)
    call = started.pending.call
    (num_tokens, top_k), hidden, device = expert_ids.shape, expand_x.shape[1], expand_x.device
    checks.shape(op, "expert_scales", expert_scales, (num_tokens, top_k), "(BS, K)", device)
    active = active_slots(op, x_active_mask, num_tokens, top_k, device)
    checks.expert_ids(op, "expert_ids", expert_ids, call.config.topology.num_experts, active=active)
    ids = routed_ids(expert_ids, active)
    plan = call.steps.routing_plan(ids, call.config.topology.num_experts)
    checks.shape(op, "expand_idx", expand_idx, (expert_ids.numel(),), "(BS * K,)", device)
    check_expand_idx(op, expand_idx, plan)
    addend = flat_addend(op, shared_expert_x, num_tokens, hidden, device)
    # The mask and the weights come only now; what has been sent does not depend on them.
    started.pending.data = dataclasses.replace(
        started.pending.data, expert_ids=ids, plan=plan, weights=expert_scales
    )
    with torn_down(op, communicator, "combine", started) as transport:
        out = transport.combine_recv(started.pending, CombineEpilogue(addend=addend))
    clear_inactive(active, out)
    return out

"""The ops behind ``npu_moe_distribute_dispatch`` and ``npu_moe_distribute_combine``, v1."""

from __future__ import annotations

import dataclasses
import numbers
from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import comm
from ..comm import Call, MoeConfig, Outputs, Tokens
from ..errors import MissingArgumentError, MoeError
from ..layout import Plan
from ..profile import active_profile
from ..topology import Topology
from . import checks
from .steps import device_steps

DISPATCH = "npu_moe_distribute_dispatch"
COMBINE = "npu_moe_distribute_combine"

_QUANT = {0: None, 2: "int8"}


@dataclasses.dataclass(frozen=True)
class GroupArguments:
    """The arguments that describe the group: equal on all ranks, in every layer, and in combine.

    The names are those of torch_npu. ``group_ep`` may also be a ``ProcessGroup``.
    """

    group_ep: dist.ProcessGroup | str
    ep_world_size: int
    ep_rank_id: int
    moe_expert_num: int
    group_tp: str = ""
    tp_world_size: int = 0
    tp_rank_id: int = 0
    expert_shard_type: int = 0
    shared_expert_num: int = 1
    shared_expert_rank_num: int = 0
    global_bs: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, numbers.Integral) and not isinstance(value, bool):
                object.__setattr__(self, field.name, int(value))  # numpy's are no JSON

    def check_types(self, op: str) -> None:
        """The name of the TP group is legal, and integers are integers."""
        checks.group_name(op, "group_tp", self.group_tp)
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("group_ep", "group_tp")
        }
        checks.integers(op, **values)

    def topology(self, op: str, group: comm.Group) -> Topology:
        """The placement of the experts on the ranks of ``group``."""
        world = group.size
        contract = f"be {world}, the size of the group"
        checks.value(op, "ep_world_size", self.ep_world_size == world, contract, self.ep_world_size)
        contract = f"be {group.rank}, this rank's place in the group"
        checks.value(op, "ep_rank_id", self.ep_rank_id == group.rank, contract, self.ep_rank_id)
        checks.value(
            op,
            "tp_world_size",
            self.tp_world_size in (0, 1),
            "be 0 or 1, as tensor parallelism is not supported",
            self.tp_world_size,
        )
        checks.value(op, "tp_rank_id", self.tp_rank_id == 0, "be 0 without TP", self.tp_rank_id)
        same = bool(self.group_tp) and self.group_tp == self.group_ep
        checks.value(op, "group_tp", not same, "differ from group_ep", repr(self.group_tp))
        checks.reserved(op, expert_shard_type=self.expert_shard_type)
        topology = checks.topology(
            op,
            world,
            self.moe_expert_num,
            self.shared_expert_num,
            self.shared_expert_rank_num,
        )
        if topology.num_shared_ranks:
            checks.value(
                op,
                "shared_expert_rank_num",
                world % topology.num_shared_ranks == 0,
                f"divide the {world} ranks of the group",
                self.shared_expert_rank_num,
            )
        return topology

    def max_tokens(self, op: str, num_tokens: int) -> int:
        """The largest batch of any rank: global_bs / W, or this rank's where global_bs is 0."""
        if self.global_bs == 0:
            return num_tokens
        world = self.ep_world_size
        checks.value(
            op,
            "global_bs",
            self.global_bs > 0 and self.global_bs % world == 0,
            f"be 0 or a positive multiple of ep_world_size = {world}",
            self.global_bs,
        )
        checks.value(
            op,
            "global_bs",
            self.global_bs >= num_tokens * world,
            f"be 0 or at least BS * ep_world_size = {num_tokens} * {world} = {num_tokens * world}",
            self.global_bs,
        )
        return self.global_bs // world

    def agreed(
        self, op: str, x: torch.Tensor, x_name: str, expert_ids: torch.Tensor
    ) -> dict[str, object]:
        """What must be equal on all ranks, under the names the caller knows."""
        return {
            "op": op,
            "ep_world_size": self.ep_world_size,
            "moe_expert_num": self.moe_expert_num,
            "shared_expert_rank_num": self.shared_expert_rank_num,
            "shared_expert_num": self.shared_expert_num if self.shared_expert_rank_num else 0,
            "global_bs": self.global_bs,
            f"{x_name}.shape[1]": x.shape[1],
            f"{x_name}.dtype": str(x.dtype),
            "expert_ids.shape[1]": expert_ids.shape[1],
        }


class DispatchOutput(NamedTuple):
    """The seven outputs of dispatch; see ``compat.torch_npu``."""

    expand_x: torch.Tensor
    dynamic_scales: torch.Tensor | None
    expand_idx: torch.Tensor
    expert_token_nums: torch.Tensor
    ep_recv_counts: torch.Tensor
    tp_recv_counts: torch.Tensor | None
    expand_scales: torch.Tensor | None


def distribute_dispatch(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    scales: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    quant_mode: int = 0,
    expert_token_nums_type: int = 1,
) -> DispatchOutput:
    """Send each token to its experts; shapes and errors in ``compat.torch_npu``."""
    op = DISPATCH
    group = _resolve(op, arguments)
    endpoint = comm.default_endpoint(group)
    try:
        checks.required(op, x=x, expert_ids=expert_ids)
        arguments.check_types(op)
        checks.integers(op, quant_mode=quant_mode, expert_token_nums_type=expert_token_nums_type)
        checks.dtype(op, "x", x, checks.FLOATS)
        checks.dtype(op, "expert_ids", expert_ids, (torch.int32,))
        checks.dtype(op, "scales", scales, (torch.float32,))
        checks.dtype(op, "expert_scales", expert_scales, (torch.float32,))
        checks.dtype(op, "x_active_mask", x_active_mask, (torch.bool,))
        topology = arguments.topology(op, group)
        max_tokens = _check_tokens(op, arguments, x, expert_ids, expert_scales, topology)
        checks.reserved(op, x_active_mask=x_active_mask)
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
    except MoeError as error:
        endpoint.reject("dispatch", op, error)
        raise

    config = MoeConfig(
        topology,
        expert_ids.shape[1],
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
    }
    call = Call(op, config, agreed | _batch(arguments, x.shape[0]), steps)
    transport = endpoint.transport(op)
    pending = transport.dispatch_setup(call, Tokens(x, expert_ids, expert_scales, scales))
    received = transport.dispatch_teardown(pending)
    token_nums = received.counts.sum(1)
    if expert_token_nums_type == 0:
        token_nums = token_nums.cumsum(0)
    return DispatchOutput(
        received.x,
        received.scales,
        received.plan.expand_idx,
        token_nums,
        received.sources.ends,
        None,
        received.weights,
    )


def distribute_combine(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    expand_idx: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    arguments: GroupArguments,
    *,
    expand_scales: torch.Tensor | None = None,
    shared_expert_x: torch.Tensor | None = None,
    comm_quant_mode: int = 0,
    **unused: object,
) -> torch.Tensor:
    """Bring the experts' rows back and sum them; shapes and errors in ``compat.torch_npu``.

    ``unused`` are the reserved arguments, which must have their defaults.
    """
    op = COMBINE
    group = _resolve(op, arguments)
    endpoint = comm.default_endpoint(group)
    try:
        checks.required(
            op,
            expand_x=expand_x,
            expert_ids=expert_ids,
            expand_idx=expand_idx,
            ep_send_counts=ep_send_counts,
            expert_scales=expert_scales,
        )
        arguments.check_types(op)
        checks.integers(op, comm_quant_mode=comm_quant_mode)
        checks.dtype(op, "expand_x", expand_x, checks.FLOATS)
        for name, index in (
            ("expert_ids", expert_ids),
            ("expand_idx", expand_idx),
            ("ep_send_counts", ep_send_counts),
        ):
            checks.dtype(op, name, index, (torch.int32,))
        checks.dtype(op, "expert_scales", expert_scales, (torch.float32,))
        checks.dtype(op, "expand_scales", expand_scales, (torch.float32,))
        checks.dtype(op, "shared_expert_x", shared_expert_x, (expand_x.dtype,))
        topology = arguments.topology(op, group)
        checks.reserved(op, **unused)
        contract = "be 0, as quantised returns are not supported"
        checks.value(op, "comm_quant_mode", comm_quant_mode == 0, contract, comm_quant_mode)
        max_tokens = _check_tokens(op, arguments, expand_x, expert_ids, expert_scales, topology)
        num_tokens, top_k = expert_ids.shape
        hidden, device = expand_x.shape[1], expand_x.device
        config = MoeConfig(topology, top_k, hidden, max_tokens, expand_x.dtype)
        local = topology.num_local_experts(group.rank)
        capacity = topology.capacity(group.rank, max_tokens, top_k)
        checks.value(
            op,
            "expand_x",
            len(expand_x) >= capacity,
            f"have at least A = {capacity} rows",
            f"shape {tuple(expand_x.shape)}",
        )
        expected = (num_tokens * top_k,)
        checks.shape(op, "expand_idx", expand_idx, expected, "(BS * K,)", device)
        expected = (topology.world_size * local,)
        checks.shape(op, "ep_send_counts", ep_send_counts, expected, "(W * L,)", device)
        addend = _flat_addend(op, shared_expert_x, num_tokens, hidden, device)
        steps = device_steps(device)
        plan = steps.plan(expert_ids, topology.num_experts)
        counts = ep_send_counts.diff(prepend=ep_send_counts.new_zeros(1)).view(local, -1)
        if device.type == "cpu":
            _check_routing(op, config, group.rank, expand_idx, plan, counts)
    except MoeError as error:
        endpoint.reject("combine", op, error)
        raise

    agreed = arguments.agreed(op, expand_x, "expand_x", expert_ids)
    call = Call(op, config, agreed | _batch(arguments, num_tokens), steps)
    outputs = Outputs(expand_x, steps.sources(counts), expert_ids, plan, expert_scales)
    transport = endpoint.transport(op)
    return transport.combine_teardown(transport.combine_setup(call, outputs), addend)


def _resolve(op: str, arguments: GroupArguments) -> comm.Group:
    """Find the group; only an error in its name cannot be told to the peers."""
    if arguments.group_ep is None or arguments.group_ep == "":
        raise MissingArgumentError(op, "group_ep", "name a group", repr(arguments.group_ep))
    checks.group_name(op, "group_ep", arguments.group_ep)
    rank = arguments.ep_rank_id
    return comm.resolve(
        op, arguments.group_ep, rank, argument="group_ep", rank_argument="ep_rank_id"
    )


def _batch(arguments: GroupArguments, num_tokens: int) -> dict[str, int]:
    """Without global_bs, every rank must have the same number of tokens."""
    return {} if arguments.global_bs else {"BS (global_bs = 0)": num_tokens}


def _check_tokens(
    op: str,
    arguments: GroupArguments,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_scales: torch.Tensor | None,
    topology: Topology,
) -> int:
    """Check shapes and values that dispatch and combine share; return the largest batch."""
    name = "x" if op == DISPATCH else "expand_x"
    checks.shape(op, name, x, (None, None), "(rows, H)", x.device)
    checks.value(op, name, x.shape[1] > 0, "have at least one column", f"shape {tuple(x.shape)}")
    rows = x.shape[0] if op == DISPATCH else None
    checks.shape(op, "expert_ids", expert_ids, (rows, None), "(BS, K)", x.device)
    num_tokens, top_k = expert_ids.shape
    contract = f"have 1 to {topology.num_experts} columns, the number of experts"
    got = f"shape {tuple(expert_ids.shape)}"
    checks.value(op, "expert_ids", 1 <= top_k <= topology.num_experts, contract, got)
    expected = (num_tokens, top_k)
    checks.shape(op, "expert_scales", expert_scales, expected, "(BS, K)", x.device)
    max_tokens = arguments.max_tokens(op, num_tokens)
    active_profile().check(
        "v1",
        op,
        max_tokens=max_tokens,
        num_tokens=num_tokens,
        hidden=x.shape[1],
        top_k=top_k,
        world_size=topology.world_size,
        num_experts=topology.num_experts,
        experts_per_rank=topology.experts_per_rank,
        num_shared_ranks=topology.num_shared_ranks,
        num_shared_experts=topology.num_shared_experts,
    )
    checks.expert_ids(op, "expert_ids", expert_ids, topology.num_experts)
    return max_tokens


def _flat_addend(
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


def _check_routing(
    op: str,
    config: MoeConfig,
    rank: int,
    expand_idx: torch.Tensor,
    plan: Plan,
    counts: torch.Tensor,
) -> None:
    """Values that dispatch returned have come back unchanged, so that no row goes astray."""
    checks.value(
        op,
        "expand_idx",
        torch.equal(expand_idx, plan.expand_idx),
        "be what dispatch returned for these expert_ids",
        "other values",
    )
    topology = config.topology
    shared = topology.is_shared_rank(rank)
    most = config.max_tokens if shared else config.max_copies
    from_source = counts.sum(0)
    checks.value(
        op,
        "ep_send_counts",
        counts.numel() == 0 or (int(counts.min()) >= 0 and int(from_source.max()) <= most),
        f"be non-decreasing prefix sums with at most {most} rows from each rank, as dispatch "
        "returned them",
        f"rows per rank {from_source.tolist()}",
    )

"""The arguments that describe a group of ranks, under the names of torch_npu."""

from __future__ import annotations

import dataclasses
import numbers
import zlib

import torch
import torch.distributed as dist

from .. import comm
from ..errors import MissingArgumentError
from ..ops import checks
from ..topology import Topology

_MOST_EXPERTS = 2**31 - 1
_MOST_SHARED = 4  # shared experts that v2 knows


@dataclasses.dataclass(frozen=True)
class GroupArguments:
    """Arguments equal on all ranks, in every layer, in dispatch and combine; except the rank ids.

    ``group_ep`` and ``group_tp`` may also be a ``ProcessGroup``.
    """

    group_ep: dist.ProcessGroup | str
    ep_world_size: int
    ep_rank_id: int
    moe_expert_num: int
    group_tp: dist.ProcessGroup | str = ""
    tp_world_size: int = 0
    tp_rank_id: int = 0
    expert_shard_type: int = 0
    shared_expert_num: int = 1
    shared_expert_rank_num: int = 0
    global_bs: int = 0
    zero_expert_num: int = 0
    copy_expert_num: int = 0
    const_expert_num: int = 0
    comm_alg: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, numbers.Integral) and not isinstance(value, bool):
                object.__setattr__(self, field.name, int(value))  # JSON rejects numpy's

    @property
    def num_zero_computation_experts(self) -> int:
        """Zero, copy and constant experts, whose ids follow those of the routed ones."""
        return self.zero_expert_num + self.copy_expert_num + self.const_expert_num

    @property
    def has_tp(self) -> bool:
        """Whether two ranks share each expert."""
        return self.tp_world_size == 2

    def resolve_ep(self, op: str) -> comm.Group:
        """The expert-parallel group; an error in its name cannot abort the peers."""
        if self.group_ep is None or self.group_ep == "":
            raise MissingArgumentError(op, "group_ep", "name a group", repr(self.group_ep))
        checks.group_name(op, "group_ep", self.group_ep)
        rank = self.ep_rank_id
        return comm.resolve(
            op, self.group_ep, rank, argument="group_ep", rank_argument="ep_rank_id"
        )

    def resolve_tp(self, op: str) -> comm.Group:
        """The pair of ranks that share experts."""
        checks.group_name(op, "group_tp", self.group_tp)
        contract = "name a group when tp_world_size is 2"
        checks.value(op, "group_tp", self.group_tp not in (None, ""), contract, repr(self.group_tp))
        rank = self.tp_rank_id
        group = comm.resolve(
            op, self.group_tp, rank, argument="group_tp", rank_argument="tp_rank_id"
        )
        checks.value(op, "group_tp", group.size == 2, "have two ranks", f"{group.size} ranks")
        return group

    def check_pair(self, op: str, pair: comm.Group) -> None:
        """Check ``tp_rank_id`` against the group."""
        contract = f"be {pair.rank}, this rank in the group"
        checks.value(op, "tp_rank_id", self.tp_rank_id == pair.rank, contract, self.tp_rank_id)

    def check_types(self, op: str) -> None:
        """Check the length of the TP group's name, and that integers are integers."""
        checks.group_name(op, "group_tp", self.group_tp)
        texts = ("group_ep", "group_tp", "comm_alg")
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in texts
        }
        checks.integers(op, **values)

    def topology(self, op: str, group: comm.Group, family: str) -> Topology:
        """The placement of the experts on the ranks of ``group``.

        Args:
            op: for error messages.
            group: the expert-parallel group, of its original size.
            family: as in ``op_names``; the shared ranks of "v1" divide the group, those of "split"
                are at most half of it.
        """
        world = group.size
        contract = f"be {world}, the size of the group"
        checks.value(op, "ep_world_size", self.ep_world_size == world, contract, self.ep_world_size)
        contract = f"be {group.rank}, this rank in the group"
        checks.value(op, "ep_rank_id", self.ep_rank_id == group.rank, contract, self.ep_rank_id)
        tp = self.tp_world_size
        checks.value(op, "tp_world_size", tp in (0, 1, 2), "be in [0, 2]", tp)
        if not self.has_tp:
            checks.value(op, "tp_rank_id", self.tp_rank_id == 0, "be 0 without TP", self.tp_rank_id)
        else:
            contract = "be 0 or 1"
            checks.value(op, "tp_rank_id", self.tp_rank_id in (0, 1), contract, self.tp_rank_id)
            # Without TP, callers may pass any name: the operators do not read it.
            differ = self.group_tp != self.group_ep
            checks.value(op, "group_tp", differ, "differ from group_ep", repr(self.group_tp))
        checks.reserved(op, expert_shard_type=self.expert_shard_type)
        topology = checks.topology(
            op, world, self.moe_expert_num, self.shared_expert_num, self.shared_expert_rank_num
        )
        shared = topology.num_shared_ranks
        if shared and family == "v1":
            contract = f"divide the {world} ranks of the group"
            checks.value(op, "shared_expert_rank_num", world % shared == 0, contract, shared)
        elif shared:
            number = self.shared_expert_num
            contract = f"be in [0, {_MOST_SHARED}]"
            checks.value(op, "shared_expert_num", number <= _MOST_SHARED, contract, number)
        if family == "split":
            contract = f"be in [0, {world // 2}], half of the group at most"
            checks.value(op, "shared_expert_rank_num", shared <= world // 2, contract, shared)
        if self.has_tp:
            local = topology.experts_per_rank
            contract = "leave one expert per rank when tp_world_size is 2"
            checks.value(op, "moe_expert_num", local == 1, contract, f"{local} per rank")
        self._check_zero_computation_experts(op)
        return topology

    def _check_zero_computation_experts(self, op: str) -> None:
        for name in ("zero_expert_num", "copy_expert_num", "const_expert_num"):
            number = getattr(self, name)
            checks.value(op, name, number >= 0, "not be negative", number)
            total = self.moe_expert_num + self.num_zero_computation_experts
            contract = f"leave fewer than {_MOST_EXPERTS} experts of all kinds"
            checks.value(op, name, total < _MOST_EXPERTS, contract, f"{total} in all")

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

    def may_differ(self, num_tokens: int) -> bool:
        """Whether ranks may have different numbers of tokens."""
        return self.global_bs not in (0, num_tokens * self.ep_world_size)

    def agreed(
        self, op: str, x: torch.Tensor, x_name: str, expert_ids: torch.Tensor
    ) -> dict[str, object]:
        """Values that must be equal on all ranks, under the names of the caller's arguments."""
        return {
            "op": op,
            "ep_world_size": self.ep_world_size,
            "moe_expert_num": self.moe_expert_num,
            "shared_expert_rank_num": self.shared_expert_rank_num,
            "shared_expert_num": self.shared_expert_num if self.shared_expert_rank_num else 0,
            "tp_world_size": max(self.tp_world_size, 1),
            "zero_expert_num": self.zero_expert_num,
            "copy_expert_num": self.copy_expert_num,
            "const_expert_num": self.const_expert_num,
            "global_bs": self.global_bs,
            f"{x_name}.shape[1]": x.shape[1],
            f"{x_name}.dtype": str(x.dtype),
            "expert_ids.shape[1]": expert_ids.shape[1],
            # Without global_bs, every rank must have the same number of tokens.
            **({} if self.global_bs else {"BS (global_bs = 0)": len(expert_ids)}),
        }


@dataclasses.dataclass(frozen=True)
class ScaledDown:
    """The remaining ranks of a group, from ``elastic_info``.

    Attributes:
        members: their old ranks, in the order of the new ones.
        topology: the placement of the experts on them.
        digest: of the tensor, which must be equal on all of them.
    """

    members: tuple[int, ...]
    topology: Topology
    digest: int


def scaled_down(
    op: str, info: torch.Tensor | None, topology: Topology, rank: int
) -> ScaledDown | None:
    """Read ``elastic_info``; None for a whole group.

    Args:
        op: for error messages.
        info: int32 (4 + 2 * W): a flag; the numbers of remaining ranks, shared ranks and routed
            experts; the new rank of each old one, -1 for a lost rank; the old rank of each new one.
        topology: of the whole group.
        rank: the old rank of this process.
    """
    if info is None:
        return None
    world = topology.world_size
    checks.shape(op, "elastic_info", info, (4 + 2 * world,), "(4 + 2 * W,)", info.device)
    values = [int(value) for value in info.tolist()]
    if values[0] == 0:
        return None
    left, shared, experts = values[1:4]
    to_new, to_old = values[4 : 4 + world], values[4 + world :]

    def require(holds: bool, contract: str, got: object) -> None:
        checks.value(op, "elastic_info", holds, contract, got)

    require(1 <= left <= world, f"leave 1 to {world} ranks", left)
    require(
        0 <= shared < left, f"leave a rank with routed experts among {left}", f"{shared} shared"
    )
    members = tuple(to_old[:left])
    remaining = [old for old in range(world) if to_new[old] != -1]
    inverse = sorted(members) == remaining and all(
        to_new[old] == new for new, old in enumerate(members)
    )
    require(inverse, "have tables that are inverse to each other", f"{to_new} and {to_old}")
    require(to_new[rank] != -1, "keep the calling rank", f"{to_new}, without rank {rank}")
    local = topology.experts_per_rank
    contract = f"leave L = {local} experts on each of {left - shared} ranks"
    require(experts == local * (left - shared), contract, f"{experts} experts")
    kinds = [topology.is_shared_rank(old) for old in members]
    contract = "keep shared ranks shared, and first"
    require(kinds == [new < shared for new in range(left)], contract, f"{shared} of {members}")
    number = topology.num_shared_experts if shared else 0
    contract = f"leave all {number} shared experts as many ranks"
    require(not number or shared % number == 0, contract, f"{shared} ranks")
    placement = Topology(left, experts, number, shared)
    served, room = (-(-each.world_size // each.shared_replicas) for each in (placement, topology))
    contract = f"leave a shared rank the tokens of at most {room} ranks, its capacity"
    require(not number or served <= room, contract, f"those of {served}")
    return ScaledDown(members, placement, zlib.crc32(str(values).encode()))

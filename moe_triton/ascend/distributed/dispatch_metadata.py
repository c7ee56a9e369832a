"""Checks that combine gets the metadata outputs of dispatch unchanged."""

from __future__ import annotations

import torch

from ...comm import MoeConfig
from ...layout import NOWHERE, RecvPermutation, RoutingPlan
from ...ops import checks
from ...profile import active_profile
from ...topology import Topology
from ..group_arguments import GroupArguments

ASSIST_WORDS = 128  # of assist_info_for_combine per row of expand_x; three are used


def received_counts(
    op: str,
    topology: Topology,
    config: MoeConfig,
    rank: int,
    recv_counts_cumsum: torch.Tensor,
    arguments: GroupArguments,
    *,
    name: str = "ep_send_counts",
) -> torch.Tensor:
    """[L, W] int32 rows of this rank, from their prefix sums."""
    local = topology.num_local_experts(rank)
    size = topology.world_size * local
    if not (arguments.has_tp and len(recv_counts_cumsum) == size):  # the peer's half is optional
        spare = active_profile().spare_counts(topology.world_size, config.max_tokens, config.top_k)
        length = size * (2 if arguments.has_tp else 1) + spare
        meaning = "(W * T * L,)" if arguments.has_tp else "(W * L,)"
        if spare:
            meaning = "(W * L + 2 * G * K * (W / 8),)"
        checks.shape(op, name, recv_counts_cumsum, (length,), meaning, recv_counts_cumsum.device)
    remaining = config.topology.world_size
    recv_counts_cumsum = recv_counts_cumsum[: local * remaining]
    counts = recv_counts_cumsum.diff(prepend=recv_counts_cumsum.new_zeros(1)).view(local, remaining)
    most = config.max_tokens if topology.is_shared_rank(rank) else config.max_slot_ids
    from_source = counts.sum(0)
    if recv_counts_cumsum.device.type == "cpu":
        checks.value(
            op,
            name,
            counts.numel() == 0 or (int(counts.min()) >= 0 and int(from_source.max()) <= most),
            f"be non-decreasing prefix sums with at most {most} rows from each rank, as dispatch "
            "returned them",
            f"rows per rank {from_source.tolist()}",
        )
    return counts


def flat_expand_idx(
    op: str, expand_idx: torch.Tensor, num_ids: int, device: torch.device
) -> torch.Tensor:
    """Check the number of elements of ``expand_idx``; returns it as (BS * K,)."""
    shape = (None,) * expand_idx.dim()
    checks.shape(op, "expand_idx", expand_idx, shape, "of any dimensions", device)
    contract = f"have BS * K = {num_ids} elements"
    got = f"shape {tuple(expand_idx.shape)}"
    checks.value(op, "expand_idx", expand_idx.numel() == num_ids, contract, got)
    return expand_idx.reshape(-1)


def check_expand_idx(op: str, expand_idx: torch.Tensor, plan: RoutingPlan) -> None:
    """Check the values on the CPU."""
    if expand_idx.device.type == "cpu":
        same = (expand_idx == plan.position_in_expert) | (plan.position_in_expert == NOWHERE)
        contract = "be what dispatch returned for these expert_ids"
        checks.value(op, "expand_idx", bool(same.all()), contract, "other values")


def check_assist_size(
    op: str, name: str, assist: torch.Tensor, least: int, device: torch.device
) -> None:
    """Check that there are ``least`` words or more, enough for A rows."""
    checks.shape(op, name, assist, (None,), "(A * 128,)", device)
    contract = f"have at least A * {ASSIST_WORDS} = {least} elements"
    checks.value(op, name, len(assist) >= least, contract, f"{len(assist)} elements")


def check_assist(
    op: str,
    name: str,
    assist: torch.Tensor,
    recv_permutation: RecvPermutation,
    config: MoeConfig,
    shared: bool,
) -> None:
    """Check the (source, token, slot) triples on the CPU."""
    if assist.device.type != "cpu":
        return
    n = int(recv_permutation.recv_counts_cumsum[-1])
    source, token, slot = assist[: 3 * n].view(n, 3).long().unbind(1)
    first, last = (config.top_k, config.num_slots) if shared else (0, config.top_k)
    holds = (source == recv_permutation.source[:n]) & (token >= 0) & (token < config.max_tokens)
    holds &= (slot >= first) & (slot < last)
    contract = "hold the triples that dispatch returned for these rows"
    if not bool(holds.all()):
        row = int((~holds).nonzero()[0])
        got = f"{assist[3 * row : 3 * row + 3].tolist()} for row {row}"
        checks.value(op, name, False, contract, got)
    # Rows of one expert and one source are in the order of the source's slots.
    slot_id = token * config.num_slots + slot
    group_starts = torch.zeros(n + 1, dtype=torch.bool)
    group_starts[recv_permutation.recv_counts_cumsum.long()] = True
    wrong = (slot_id[1:] <= slot_id[:-1]) & ~group_starts[1:n]
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0]) + 1
        checks.value(op, name, False, contract, f"row {row} out of order")


def check_tp_counts(op: str, arguments: GroupArguments, counts: torch.Tensor | None) -> None:
    """Check that ``tp_send_counts`` comes with a TP group, and its shape."""
    if arguments.has_tp:
        contract = "be given when tp_world_size is 2"
        checks.value(op, "tp_send_counts", counts is not None, contract, None)
        assert counts is not None
        checks.shape(op, "tp_send_counts", counts, (2,), "(T,)", counts.device)


def tp_counts(
    op: str,
    arguments: GroupArguments,
    counts: torch.Tensor | None,
    recv_permutation: RecvPermutation,
    num_rows: int,
) -> tuple[int, int]:
    """The numbers of rows of expand_x of this rank, and of the TP peer behind them."""
    own = len(recv_permutation.source)
    if not arguments.has_tp:
        return own, 0
    assert counts is not None
    mine, theirs = (int(counts[rank]) for rank in (arguments.tp_rank_id, 1 - arguments.tp_rank_id))
    contract = f"hold {own} rows for this rank, as in ep_send_counts, and at most A for either"
    fits = mine == own and 0 <= theirs <= num_rows // 2
    checks.value(op, "tp_send_counts", fits, contract, counts.tolist())
    return own, theirs

"""Count and rank the copies of a rank's tokens: where each goes.

    counts[e]     copies for expert e
    expand_idx[i] earlier positions with the same expert as position i
    order         positions sorted by (expert, position): i comes to start[e] + expand_idx[i]

Example: expert_ids [[0, 2], [2, 1], [0, 3]], E = 4:
    counts [2, 1, 2, 1], expand_idx [0, 0, 1, 0, 1, 0], sorted_slot_ids [0, 4, 3, 1, 2, 5]

Everything is counted, so every run gives the same plan. Ids beyond [0, E) count as expert E, which
is sorted last and not sent. Few positions are compared with each other, all with all, in a single
launch. Many are cut into blocks: a histogram of each, sums over the blocks before it, ranks within
it.

Shapes: N = T * K positions, E experts, B blocks.
Bytes:  few: reads N * 4 for each program; many: about N * 16 + B * E * 12.
Source: ``moe_triton.ref.routing_plan``.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl

from ..layout import NOWHERE, RoutingCopies, RoutingPlan
from . import launch_config
from ._checks import FLOATS, INDICES, check_tensor

_NOWHERE = tl.constexpr(NOWHERE)

_Copies: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@triton.jit
def _experts(expert_ids_ptr, position, num_positions, num_experts):
    """Experts at positions, E for what is not sent; past the end too, where nothing follows."""
    expert = tl.load(expert_ids_ptr + position, mask=position < num_positions, other=-1)
    sent = (expert >= 0) & (expert < num_experts)
    return tl.where(sent, expert, num_experts).to(tl.int32)


@triton.jit
def _keep(expert_ids_ptr, ids_copy_ptr, weights_ptr, weights_copy_ptr, position, inside):
    """Copy the ids and the weights at positions."""
    if ids_copy_ptr is not None:
        expert = tl.load(expert_ids_ptr + position, mask=inside, other=_NOWHERE)
        tl.store(ids_copy_ptr + position, expert.to(tl.int32), mask=inside)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + position, mask=inside, other=0.0)
        tl.store(weights_copy_ptr + position, weight, mask=inside)


@triton.jit(do_not_specialize=["num_positions", "num_experts"])
def _plan_few_kernel(
    expert_ids_ptr,  # [N] int32 | int64
    counts_ptr,  # [E] int32
    expand_idx_ptr,  # [N] int32
    sorted_slot_ids_ptr,  # [N] int32
    ids_copy_ptr,  # [N] int32, or None
    weights_ptr,  # [N] fp16 | bf16 | fp32 | fp64, or None
    weights_copy_ptr,  # [N] of the weights' dtype, or None
    num_positions,
    num_experts,
    OWN: tl.constexpr,  # positions, or experts, that a program works on at a time
    OTHERS: tl.constexpr,  # positions that they are compared with at a time
):
    for own in range(tl.program_id(0) * OWN, num_positions, tl.num_programs(0) * OWN):
        position = own + tl.arange(0, OWN)
        expert = _experts(expert_ids_ptr, position, num_positions, num_experts)
        earlier = tl.zeros([OWN], tl.int32)
        lower = tl.zeros([OWN], tl.int32)
        for begin in range(0, num_positions, OTHERS):
            other_position = begin + tl.arange(0, OTHERS)
            other = _experts(expert_ids_ptr, other_position, num_positions, num_experts)
            is_earlier = other_position[None, :] < position[:, None]
            same = (other[None, :] == expert[:, None]) & is_earlier
            earlier += tl.sum(same.to(tl.int32), axis=1)
            lower += tl.sum((other[None, :] < expert[:, None]).to(tl.int32), axis=1)
        inside = position < num_positions
        _keep(expert_ids_ptr, ids_copy_ptr, weights_ptr, weights_copy_ptr, position, inside)
        rank = tl.where(expert < num_experts, earlier, _NOWHERE)
        tl.store(expand_idx_ptr + position, rank, mask=inside)
        tl.store(sorted_slot_ids_ptr + lower + earlier, position, mask=inside)
    for own in range(tl.program_id(0) * OWN, num_experts, tl.num_programs(0) * OWN):
        expert = own + tl.arange(0, OWN)
        count = tl.zeros([OWN], tl.int32)
        for begin in range(0, num_positions, OTHERS):
            position = begin + tl.arange(0, OTHERS)
            other = _experts(expert_ids_ptr, position, num_positions, num_experts)
            count += tl.sum((other[None, :] == expert[:, None]).to(tl.int32), axis=1)
        tl.store(counts_ptr + expert, count, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_positions", "num_experts", "num_blocks"])
def _histogram_kernel(
    expert_ids_ptr,  # [N] int32 | int64
    histogram_ptr,  # [B, E + 1] int32
    num_positions,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,  # a power of two above E
):
    row_size = (num_experts + 1).to(tl.int64)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        position = block * BLOCK + tl.arange(0, BLOCK)
        # Triton 3.2 has no mask here: what is past the end comes last in the last bin.
        expert = _experts(expert_ids_ptr, position, num_positions, num_experts)
        bins = tl.arange(0, BINS)
        tl.store(
            histogram_ptr + block * row_size + bins,
            tl.histogram(expert, BINS),
            mask=bins <= num_experts,
        )


@triton.jit(do_not_specialize=["num_experts", "num_blocks"])
def _starts_kernel(
    histogram_ptr,  # [B, E + 1] int32
    starts_ptr,  # [B, E + 1] int32 place of each block's first copy for each expert in order
    counts_ptr,  # [E] int32
    first_ptr,  # [E + 1] int32 place of each expert's first copy in order
    num_experts,
    num_blocks,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    bins = num_experts + 1
    for begin in range(tl.program_id(0) * EXPERTS, bins, tl.num_programs(0) * EXPERTS):
        # All copies for the experts before these.
        lower = tl.zeros([EXPERTS], tl.int32)
        for below in range(0, begin, EXPERTS):
            expert = below + tl.arange(0, EXPERTS)
            for first_block in range(0, num_blocks, BLOCKS):
                block = first_block + tl.arange(0, BLOCKS)
                at = block.to(tl.int64)[:, None] * bins + expert[None, :]
                mask = (block < num_blocks)[:, None]
                lower += tl.sum(tl.load(histogram_ptr + at, mask=mask, other=0), axis=0)
        expert = begin + tl.arange(0, EXPERTS)
        total = tl.zeros([EXPERTS], tl.int32)
        for first_block in range(0, num_blocks, BLOCKS):
            block = first_block + tl.arange(0, BLOCKS)
            at = block.to(tl.int64)[:, None] * bins + expert[None, :]
            mask = (block < num_blocks)[:, None] & (expert < bins)[None, :]
            total += tl.sum(tl.load(histogram_ptr + at, mask=mask, other=0), axis=0)
        tl.store(counts_ptr + expert, total, mask=expert < num_experts)
        start = tl.sum(lower) + tl.cumsum(total, axis=0) - total
        tl.store(first_ptr + expert, start, mask=expert < bins)
        for first_block in range(0, num_blocks, BLOCKS):
            block = first_block + tl.arange(0, BLOCKS)
            at = block.to(tl.int64)[:, None] * bins + expert[None, :]
            mask = (block < num_blocks)[:, None] & (expert < bins)[None, :]
            counts = tl.load(histogram_ptr + at, mask=mask, other=0)
            before = tl.cumsum(counts, axis=0) - counts
            tl.store(starts_ptr + at, start[None, :] + before, mask=mask)
            start += tl.sum(counts, axis=0)


@triton.jit(do_not_specialize=["num_positions", "num_experts", "num_blocks"])
def _rank_kernel(
    expert_ids_ptr,  # [N] int32 | int64
    starts_ptr,  # [B, E + 1] int32
    first_ptr,  # [E + 1] int32
    expand_idx_ptr,  # [N] int32
    sorted_slot_ids_ptr,  # [N] int32
    ids_copy_ptr,  # [N] int32, or None
    weights_ptr,  # [N] fp16 | bf16 | fp32 | fp64, or None
    weights_copy_ptr,  # [N] of the weights' dtype, or None
    num_positions,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,  # positions of the block that all of it are compared with at a time
):
    row_size = (num_experts + 1).to(tl.int64)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        position = block * BLOCK + tl.arange(0, BLOCK)
        inside = position < num_positions
        _keep(expert_ids_ptr, ids_copy_ptr, weights_ptr, weights_copy_ptr, position, inside)
        expert = _experts(expert_ids_ptr, position, num_positions, num_experts)
        earlier = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, BLOCK, OTHERS):
            other_position = block * BLOCK + begin + tl.arange(0, OTHERS)
            other = _experts(expert_ids_ptr, other_position, num_positions, num_experts)
            is_earlier = other_position[None, :] < position[:, None]
            same = (other[None, :] == expert[:, None]) & is_earlier
            earlier += tl.sum(same.to(tl.int32), axis=1)
        start = starts_ptr + block * row_size
        place = tl.load(start + expert, mask=inside, other=0) + earlier
        rank = place - tl.load(first_ptr + expert, mask=inside, other=0)
        rank = tl.where(expert < num_experts, rank, _NOWHERE)
        tl.store(expand_idx_ptr + position, rank, mask=inside)
        tl.store(sorted_slot_ids_ptr + place, position, mask=inside)


def routing_plan(
    expert_ids: torch.Tensor, num_experts: int, kept: RoutingCopies | None = None
) -> RoutingPlan:
    """Count and rank the copies of [T, K] ``expert_ids``; ids beyond [0, E) are not sent.

    Args:
        expert_ids: [T, K] int32 or int64.
        num_experts: E.
        kept: what to copy on the way, or None; the copies are contiguous.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape.
    """
    device = expert_ids.device
    check_tensor(
        "plan", "expert_ids", expert_ids, dtypes=INDICES, shape=(None, None), device=device
    )
    slot_ids = _copies(expert_ids, kept)
    ids = expert_ids.contiguous().view(-1)
    num_positions = ids.numel()
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    position_in_expert = torch.empty(num_positions, dtype=torch.int32, device=device)
    order = torch.empty(num_positions, dtype=torch.int32, device=device)
    routing = RoutingPlan(counts, position_in_expert, order)
    shape = launch_config.plan_launch(device, num_positions)
    if shape.compare:
        _plan_few(ids, num_experts, routing, slot_ids, shape)
    else:
        _plan_many(ids, num_experts, routing, slot_ids, shape)
    return routing


def _copies(expert_ids: torch.Tensor, kept: RoutingCopies | None) -> _Copies:
    """The ids' copy, the weights and their copy, for the kernels; each may be None."""
    if kept is None:
        return None, None, None
    shape, device = tuple(expert_ids.shape), expert_ids.device
    given: dict[str, tuple[torch.Tensor, tuple[torch.dtype, ...]]] = {
        "kept.expert_ids": (kept.expert_ids, (torch.int32,))
    }
    weights = weights_copy = None
    if kept.weights is not None and kept.weights_copy is not None:
        given["kept.weights"] = kept.weights, FLOATS
        given["kept.weights_copy"] = kept.weights_copy, (kept.weights.dtype,)
        weights, weights_copy = kept.weights.contiguous(), kept.weights_copy
    for name, (tensor, dtypes) in given.items():
        check_tensor("plan", name, tensor, dtypes=dtypes, shape=shape, device=device)
    return kept.expert_ids, weights, weights_copy


def _plan_few(
    ids: torch.Tensor,
    num_experts: int,
    routing: RoutingPlan,
    slot_ids: _Copies,
    shape: launch_config.PlanLaunch,
) -> None:
    work = triton.cdiv(max(ids.numel(), num_experts, 1), shape.own)
    _plan_few_kernel[(min(work, shape.num_programs),)](
        ids,
        *routing,
        *slot_ids,
        ids.numel(),
        num_experts,
        OWN=shape.own,
        OTHERS=shape.others,
        num_warps=shape.num_warps,
    )


def _plan_many(
    ids: torch.Tensor,
    num_experts: int,
    routing: RoutingPlan,
    slot_ids: _Copies,
    shape: launch_config.PlanLaunch,
) -> None:
    device, bins, block = ids.device, num_experts + 1, shape.own
    num_blocks = triton.cdiv(ids.numel(), block)
    histogram, starts = torch.empty((2, num_blocks, bins), dtype=torch.int32, device=device)
    first = torch.empty(bins, dtype=torch.int32, device=device)
    sizes = (ids.numel(), num_experts, num_blocks)
    programs = min(num_blocks, shape.num_programs)
    _histogram_kernel[(programs,)](
        ids, histogram, *sizes, BLOCK=block, BINS=triton.next_power_of_2(bins)
    )
    tile = launch_config.one_program(device, num_blocks, shape.experts)
    _starts_kernel[(min(triton.cdiv(bins, tile.block), shape.num_programs),)](
        histogram,
        starts,
        routing.counts,
        first,
        num_experts,
        num_blocks,
        BLOCKS=tile.rows,
        EXPERTS=tile.block,
        num_warps=tile.num_warps,
    )
    _rank_kernel[(programs,)](
        ids,
        starts,
        first,
        routing.position_in_expert,
        routing.sorted_slot_ids,
        *slot_ids,
        *sizes,
        BLOCK=block,
        OTHERS=shape.others,
        num_warps=shape.num_warps,
    )

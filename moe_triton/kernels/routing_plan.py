"""Count the slots of each expert and sort them by expert.

    counts[e]              slots of expert e
    position_in_expert[i]  earlier slots with the same expert as slot i
    sorted_slot_ids        slots by (expert, slot id): i is at start[e] + position_in_expert[i]

A slot id is t * K + k. Everything is counted, so every run gives the same plan. Ids outside [0, E)
count as expert E, which is sorted last and not sent. Few slots are compared with each other, all
with all, in one launch. Many are cut into blocks: a histogram of each, sums over the blocks before
it, ranks within it.

Shapes: N = T * K slots, E experts, B blocks.
Bytes:  few: reads N * 4 for each program; many: about N * 16 + B * E * 12.
Source: ``moe_triton.ref.routing_plan``.
"""

from __future__ import annotations

import functools
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
def experts_of(expert_ids_ptr, slot_id, num_slots, num_experts) -> tl.tensor:
    """Experts of slots; E for slots that are not sent and past the end."""
    expert = tl.load(expert_ids_ptr + slot_id, mask=slot_id < num_slots, other=-1)
    sent = (expert >= 0) & (expert < num_experts)
    return tl.where(sent, expert, num_experts).to(tl.int32)


@triton.jit
def copy_routing(
    expert_ids_ptr, ids_copy_ptr, weights_ptr, weights_copy_ptr, slot_id, inside
) -> None:
    """Copy expert ids and weights of slots to the outputs that are not None."""
    if ids_copy_ptr is not None:
        expert = tl.load(expert_ids_ptr + slot_id, mask=inside, other=_NOWHERE)
        tl.store(ids_copy_ptr + slot_id, expert.to(tl.int32), mask=inside)
    if weights_copy_ptr is not None:
        weight = tl.load(weights_ptr + slot_id, mask=inside, other=0.0)
        tl.store(weights_copy_ptr + slot_id, weight, mask=inside)


@triton.jit
def compare_slots(
    expert_ids_ptr, slot_id, expert, num_slots, num_experts, OWN: tl.constexpr, OTHERS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Earlier slots with the same expert as [OWN] slots, and all slots with a lower one."""
    earlier = tl.zeros([OWN], tl.int32)
    lower = tl.zeros([OWN], tl.int32)
    for begin in range(0, num_slots, OTHERS):
        other_id = begin + tl.arange(0, OTHERS)
        other = experts_of(expert_ids_ptr, other_id, num_slots, num_experts)
        is_earlier = other_id[None, :] < slot_id[:, None]
        same = (other[None, :] == expert[:, None]) & is_earlier
        earlier += tl.sum(same.to(tl.int32), axis=1)
        lower += tl.sum((other[None, :] < expert[:, None]).to(tl.int32), axis=1)
    return earlier, lower


@triton.jit
def count_experts(
    expert_ids_ptr,
    counts_ptr,
    num_slots,
    num_experts,
    program,
    num_programs,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
) -> None:
    """Count the slots of the experts of one program, of ``num_programs`` that share them."""
    for own in range(program * OWN, num_experts, num_programs * OWN):
        expert = own + tl.arange(0, OWN)
        count = tl.zeros([OWN], tl.int32)
        for begin in range(0, num_slots, OTHERS):
            slot_id = begin + tl.arange(0, OTHERS)
            other = experts_of(expert_ids_ptr, slot_id, num_slots, num_experts)
            count += tl.sum((other[None, :] == expert[:, None]).to(tl.int32), axis=1)
        tl.store(counts_ptr + expert, count, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def _compare_kernel(
    expert_ids_ptr,  # [N] int32 | int64
    counts_ptr,  # [E] int32
    position_in_expert_ptr,  # [N] int32
    sorted_slot_ids_ptr,  # [N] int32
    ids_copy_ptr,  # [N] int32, or None
    weights_ptr,  # [N] fp16 | bf16 | fp32 | fp64, or None
    weights_copy_ptr,  # [N] of the weights' dtype, or None
    num_slots,
    num_experts,
    OWN: tl.constexpr,  # slots, or experts, that a program works on at a time
    OTHERS: tl.constexpr,  # slots that they are compared with at a time
):
    """Plan few slots: compare all with all.

    Example: expert_ids [[0, 2], [2, 1], [0, 3]], E = 4:
        counts [2, 1, 2, 1], position_in_expert [0, 0, 1, 0, 1, 0],
        sorted_slot_ids [0, 4, 3, 1, 2, 5].
    """
    for own in range(tl.program_id(0) * OWN, num_slots, tl.num_programs(0) * OWN):
        slot_id = own + tl.arange(0, OWN)
        expert = experts_of(expert_ids_ptr, slot_id, num_slots, num_experts)
        earlier, lower = compare_slots(
            expert_ids_ptr, slot_id, expert, num_slots, num_experts, OWN, OTHERS
        )
        inside = slot_id < num_slots
        copy_routing(expert_ids_ptr, ids_copy_ptr, weights_ptr, weights_copy_ptr, slot_id, inside)
        rank = tl.where(expert < num_experts, earlier, _NOWHERE)
        tl.store(position_in_expert_ptr + slot_id, rank, mask=inside)
        tl.store(sorted_slot_ids_ptr + lower + earlier, slot_id, mask=inside)
    count_experts(
        expert_ids_ptr, counts_ptr, num_slots, num_experts, tl.program_id(0), tl.num_programs(0),
        OWN, OTHERS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_blocks"])
def _histogram_kernel(
    expert_ids_ptr,  # [N] int32 | int64
    histogram_ptr,  # [B, E + 1] int32
    num_slots,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,  # a power of two above E
):
    """Count the slots of each expert in each block; bin E counts slots that are not sent.

    Example: as ``_compare_kernel``, blocks of 4: [[1, 1, 2, 0, 0], [1, 0, 0, 1, 2]]. The 2 are the
        slots past the end.
    """
    row_size = (num_experts + 1).to(tl.int64)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        slot_id = block * BLOCK + tl.arange(0, BLOCK)
        # The histogram of Triton 3.2 has no mask: slots past the end count in the last bin.
        expert = experts_of(expert_ids_ptr, slot_id, num_slots, num_experts)
        bins = tl.arange(0, BINS)
        tl.store(
            histogram_ptr + block * row_size + bins,
            tl.histogram(expert, BINS),
            mask=bins <= num_experts,
        )


@triton.jit(do_not_specialize=["num_experts", "num_blocks"])
def _block_starts_kernel(
    histogram_ptr,  # [B, E + 1] int32
    starts_ptr,  # [B, E + 1] int32 sorted position of the first slot of each expert in a block
    counts_ptr,  # [E] int32
    first_ptr,  # [E + 1] int32 sorted position of each expert's first slot
    num_experts,
    num_blocks,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Sum histograms over experts and blocks.

    Example: of ``_histogram_kernel``: counts [2, 1, 2, 1], first [0, 2, 3, 5, 6],
        starts [[0, 2, 3, 5, 6], [1, 3, 5, 5, 6]].
    """
    bins = num_experts + 1
    for begin in range(tl.program_id(0) * EXPERTS, bins, tl.num_programs(0) * EXPERTS):
        # Sum all slots of the experts before these.
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


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_blocks"])
def _rank_kernel(
    expert_ids_ptr,  # [N] int32 | int64
    starts_ptr,  # [B, E + 1] int32
    first_ptr,  # [E + 1] int32
    position_in_expert_ptr,  # [N] int32
    sorted_slot_ids_ptr,  # [N] int32
    ids_copy_ptr,  # [N] int32, or None
    weights_ptr,  # [N] fp16 | bf16 | fp32 | fp64, or None
    weights_copy_ptr,  # [N] of the weights' dtype, or None
    num_slots,
    num_experts,
    num_blocks,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,  # slots of the block that all of it are compared with at a time
):
    """Rank the slots of each block after the starts of their experts.

    Example: of ``_block_starts_kernel``: position_in_expert [0, 0, 1, 0, 1, 0],
        sorted_slot_ids [0, 4, 3, 1, 2, 5].
    """
    row_size = (num_experts + 1).to(tl.int64)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        slot_id = block * BLOCK + tl.arange(0, BLOCK)
        inside = slot_id < num_slots
        copy_routing(expert_ids_ptr, ids_copy_ptr, weights_ptr, weights_copy_ptr, slot_id, inside)
        expert = experts_of(expert_ids_ptr, slot_id, num_slots, num_experts)
        earlier = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, BLOCK, OTHERS):
            other_id = block * BLOCK + begin + tl.arange(0, OTHERS)
            other = experts_of(expert_ids_ptr, other_id, num_slots, num_experts)
            is_earlier = other_id[None, :] < slot_id[:, None]
            same = (other[None, :] == expert[:, None]) & is_earlier
            earlier += tl.sum(same.to(tl.int32), axis=1)
        start = starts_ptr + block * row_size
        sorted_position = tl.load(start + expert, mask=inside, other=0) + earlier
        rank = sorted_position - tl.load(first_ptr + expert, mask=inside, other=0)
        rank = tl.where(expert < num_experts, rank, _NOWHERE)
        tl.store(position_in_expert_ptr + slot_id, rank, mask=inside)
        tl.store(sorted_slot_ids_ptr + sorted_position, slot_id, mask=inside)


def routing_plan(
    expert_ids: torch.Tensor, num_experts: int, copies: RoutingCopies | None = None
) -> RoutingPlan:
    """Count the slots of each expert and sort them by expert; ids outside [0, E) are not sent.

    Arguments as in ``ref.routing_plan``; the outputs of ``copies`` are contiguous.

    Raises:
        ArgumentTypeError: another dtype.
        ArgumentValueError: a wrong shape.
    """
    op, device = "routing_plan", expert_ids.device
    check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=(None, None), device=device)
    copy_tensors: _Copies = (None, None, None)
    if copies is not None:
        check_copies(op, expert_ids, *copies)
        copy_tensors = copies.expert_ids, None, None
        if copies.weights is not None and copies.weights_copy is not None:
            copy_tensors = copies.expert_ids, copies.weights.contiguous(), copies.weights_copy
    ids = expert_ids.contiguous().view(-1)
    num_slots = ids.numel()
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    position_in_expert = torch.empty(num_slots, dtype=torch.int32, device=device)
    sorted_slot_ids = torch.empty(num_slots, dtype=torch.int32, device=device)
    plan = RoutingPlan(counts, position_in_expert, sorted_slot_ids)
    shape = launch_config.plan_launch(device, num_slots)
    if shape.compare:
        _plan_by_comparison(ids, num_experts, plan, copy_tensors, shape)
    else:
        _plan_by_histogram(ids, num_experts, plan, copy_tensors, shape)
    return plan


def check_copies(
    op: str,
    expert_ids: torch.Tensor,
    ids_copy: torch.Tensor | None,
    weights: torch.Tensor | None,
    weights_copy: torch.Tensor | None,
) -> None:
    """Check the fields of ``RoutingCopies``; a copy is made where there is something to copy."""
    check = functools.partial(
        check_tensor, op, shape=tuple(expert_ids.shape), device=expert_ids.device
    )
    if ids_copy is not None:
        check("copies.expert_ids", ids_copy, dtypes=(torch.int32,))
    if weights is not None and weights_copy is not None:
        check("copies.weights", weights, dtypes=FLOATS)
        check("copies.weights_copy", weights_copy, dtypes=(weights.dtype,))


def _plan_by_comparison(
    ids: torch.Tensor,
    num_experts: int,
    plan: RoutingPlan,
    copies: _Copies,
    shape: launch_config.PlanLaunch,
) -> None:
    work = launch_config.cdiv(max(ids.numel(), num_experts, 1), shape.own)
    _compare_kernel[(min(work, shape.num_programs),)](
        ids,
        *plan,
        *copies,
        ids.numel(),
        num_experts,
        OWN=shape.own,
        OTHERS=shape.others,
        num_warps=shape.num_warps,
    )


def _plan_by_histogram(
    ids: torch.Tensor,
    num_experts: int,
    plan: RoutingPlan,
    copies: _Copies,
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
    _block_starts_kernel[(min(triton.cdiv(bins, tile.block), shape.num_programs),)](
        histogram,
        starts,
        plan.counts,
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
        plan.position_in_expert,
        plan.sorted_slot_ids,
        *copies,
        *sizes,
        BLOCK=block,
        OTHERS=shape.others,
        num_warps=shape.num_warps,
    )

"""Send a rank's tokens in one launch: plan, rows into the own window, a record to every rank.

Some programs count the slots of each expert, as ``routing_plan`` does for few slots, and write the
routing where peers read it; the others write the rows, as ``quantize`` does. Neither needs the
other, as rows lie in the order of tokens. The program that ends last writes the records. Above the
number of slots that are compared with each other, the launches of ``routing_plan`` come first.

Shapes: T tokens, K experts and NS shared experts of a token, H hidden size, E experts, W ranks.
Bytes:  reads T * H * x.itemsize, writes T * stride, or T * (K + NS) * stride with smooth factors
        for each expert; T * K * 16 of routing; W * (16 + 4 * (1 + E)) of records.
Source: ``moe_triton.ref.dispatch_send``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError, MissingArgumentError
from ..layout import (
    NOWHERE,
    ExchangeLayout,
    RoutingCopies,
    SlotPositions,
    Windows,
    WindowsSignature,
)
from . import launch_config
from ._checks import FLOATS, INDICES, check_tensor
from ._common import TRITON_DTYPES
from ._windows import (
    NUM_ACTIVE,
    RECORD_BYTES,
    SENT,
    check_device,
    control_start,
    is_broken,
    last_program,
    next_epoch,
    pointer,
    write_records,
)
from .quantize import check_encode, encode_launch, encode_tensors, encode_tiles
from .routing_plan import compare_slots, copy_routing, count_experts, experts_of, routing_plan

_NOWHERE = tl.constexpr(NOWHERE)
_NO_COPIES = (None,) * len(RoutingCopies._fields)


@triton.jit
def _store_active_positions(
    expert_ids_ptr, out_ptr, copy_ptr, num_tokens, top_k, TOKENS: tl.constexpr, SLOTS: tl.constexpr
):
    """Store the position of each token among the active ones, and return their number."""
    slot = tl.arange(0, SLOTS)
    num_active = 0
    for begin in range(0, num_tokens, TOKENS):
        token = begin + tl.arange(0, TOKENS)
        inside = token < num_tokens
        at = (token * top_k)[:, None] + slot[None, :]
        mask = inside[:, None] & (slot < top_k)[None, :]
        ids = tl.load(expert_ids_ptr + at, mask=mask, other=_NOWHERE)
        # A token is active if any of its slots is.
        active = tl.max((ids != _NOWHERE).to(tl.int32), axis=1)
        position = num_active + tl.cumsum(active, axis=0) - active
        position = tl.where(active > 0, position, _NOWHERE)
        tl.store(out_ptr + token, position, mask=inside)
        if copy_ptr is not None:
            tl.store(copy_ptr + token, position, mask=inside)
        num_active += tl.sum(active)
    return num_active


@triton.jit(do_not_specialize=["num_tokens", "top_k"])
def _active_positions_kernel(
    expert_ids_ptr,  # [T, K] int32 | int64
    out_ptr,  # [T] int32
    num_tokens,
    top_k,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two
):
    """Number the active tokens.

    Example: expert_ids [[0, -1], [-1, -1], [3, 1]]: [0, -1, 1].
    """
    _store_active_positions(expert_ids_ptr, out_ptr, None, num_tokens, top_k, TOKENS, SLOTS)


def active_positions(expert_ids: torch.Tensor) -> torch.Tensor:
    """[T] int32 position of each token among the active ones, or ``NOWHERE``."""
    num_tokens, top_k = expert_ids.shape
    out = torch.empty(num_tokens, dtype=torch.int32, device=expert_ids.device)
    tokens, slots, num_warps = _token_block(expert_ids)
    _active_positions_kernel[(1,)](
        expert_ids.contiguous(), out, num_tokens, top_k, TOKENS=tokens, SLOTS=slots,
        num_warps=num_warps,
    )  # fmt: skip
    return out


def _token_block(expert_ids: torch.Tensor) -> tuple[int, int, int]:
    """Tokens, slots and warps of a block of ``_store_active_positions``."""
    slots = launch_config.next_power_of_2(expert_ids.shape[1])
    line = launch_config.line(expert_ids.device, expert_ids.shape[0] * slots)
    return max(line.block // slots, 1), slots, line.num_warps


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "top_k",
        "num_experts",
        "rank",
        "digest",
        "num_rows",
        "hidden_units",
        "group_units",
        "num_groups",
        "num_slots",
        "factor_slots",
        "num_factors",
        "x_units",
        "out_units",
        "scale_stride",
    ]
)
def _dispatch_send_kernel(
    bases_ptr,  # [W] int64
    state_ptr,  # [STATE_WORDS] int32
    problem_ptr,  # [PROBLEM_WORDS] int32
    x_ptr,  # [T, H] fp16 | bf16 | fp32 | fp64, for the scheme "none" integers as wide
    expert_ids_ptr,  # [T, K] int32 | int64
    weights_ptr,  # [T, K] fp16 | bf16 | fp32 | fp64, or None
    smooth_scales_ptr,  # [1], [H] or [NS + E, H] fp32, or None
    factor_ids_ptr,  # expert_ids where each slot has smooth factors of its own, or None
    ids_copy_ptr,  # [T, K] int32 output, or None
    weights_copy_ptr,  # [T, K] output of the weights' dtype, or None
    counts_ptr,  # [E] int32 output; input unless COMPARE
    position_in_expert_ptr,  # [T * K] int32 output; input unless COMPARE
    active_position_ptr,  # [T] int32 output, or None
    num_tokens,
    top_k,
    num_experts,
    rank,
    world,
    digest,
    slots,
    control_bytes,
    data_slots,
    data_bytes,
    number_bytes,
    positions_start,
    weights_start,
    rows_start,
    plan_programs,
    # Sizes of ``encode_tiles``.
    num_rows,
    hidden_units,
    group_units,
    num_groups,
    num_slots,
    factor_slots,
    num_factors,
    x_units,
    out_units,
    scale_stride,
    scale_offset,
    COMPARE: tl.constexpr,
    WEIGHT: tl.constexpr,  # dtype of the weights in windows, or None
    OUT: tl.constexpr,  # dtype of the codes as they are written
    SCALE: tl.constexpr,  # dtype of the scales, or None
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SCHEME: tl.constexpr,
    MAX: tl.constexpr,
    MANTISSA: tl.constexpr,
    FACTORS: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    ADJACENT: tl.constexpr,
    WHOLE: tl.constexpr,
    SLOTS: tl.constexpr,
    ACROSS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """Write the routing, the rows and the records of a rank's tokens.

    Example: expert_ids [[0, 2], [2, 1], [-1, -1]], E = 4, one shared expert, digest 7, epoch 1:
        record [1, 0, 7, 3] with the numbers [1, 1, 2, 0, 2], active_position [0, 1, -1],
        position_in_expert [0, 0, 1, 0, -1, -1].
    """
    program = tl.program_id(0)
    epoch = next_epoch(state_ptr, SENT)
    if not is_broken(problem_ptr):
        slot = (epoch & (data_slots - 1)).to(tl.int64)
        data = tl.load(bases_ptr + rank) + slots * control_bytes + slot * data_bytes
        if program < plan_programs:
            num_routed = num_tokens * top_k
            ids_out = pointer(data, tl.int32)
            positions_out = pointer(data + positions_start, tl.int32)
            for own in range(program * OWN, num_routed, plan_programs * OWN):
                slot_id = own + tl.arange(0, OWN)
                inside = slot_id < num_routed
                expert = experts_of(expert_ids_ptr, slot_id, num_routed, num_experts)
                if COMPARE:
                    position, _ = compare_slots(
                        expert_ids_ptr, slot_id, expert, num_routed, num_experts, OWN, OTHERS
                    )
                    position = tl.where(expert < num_experts, position, _NOWHERE)
                    tl.store(position_in_expert_ptr + slot_id, position, mask=inside)
                    copy_routing(
                        expert_ids_ptr, ids_copy_ptr, weights_ptr, weights_copy_ptr, slot_id, inside
                    )
                else:
                    position = tl.load(position_in_expert_ptr + slot_id, mask=inside, other=0)
                sent_id = tl.where(expert < num_experts, expert, _NOWHERE)
                tl.store(ids_out + slot_id, sent_id, mask=inside)
                tl.store(positions_out + slot_id, position, mask=inside)
                if WEIGHT is not None:
                    weights_out = pointer(data + weights_start, WEIGHT)
                    weight = tl.load(weights_ptr + slot_id, mask=inside, other=0.0)
                    tl.store(weights_out + slot_id, weight.to(WEIGHT), mask=inside)
            if COMPARE:
                count_experts(
                    expert_ids_ptr, counts_ptr, num_routed, num_experts, program, plan_programs,
                    OWN, OTHERS,
                )  # fmt: skip
            if active_position_ptr is not None and program == 0:
                copy = pointer(data + 2 * positions_start, tl.int32)
                num_active = _store_active_positions(
                    expert_ids_ptr, active_position_ptr, copy, num_tokens, top_k, TOKENS,
                    TOKEN_SLOTS,
                )  # fmt: skip
                tl.store(state_ptr + NUM_ACTIVE, num_active)
        else:
            row_data = data + rows_start
            if SCALE is None:
                scale_ptr: tl.constexpr = None
            else:
                scale_ptr = pointer(row_data + scale_offset, SCALE)
            encode_tiles(
                x_ptr, smooth_scales_ptr, factor_ids_ptr, None, None, pointer(row_data, OUT),
                scale_ptr, num_tokens, num_rows, hidden_units, group_units, num_groups, num_slots,
                factor_slots, num_factors, x_units, out_units, scale_stride,
                program - plan_programs, tl.num_programs(0) - plan_programs, SCHEME, MAX, MANTISSA,
                FACTORS, UNIT, ROWS, GROUPS, LANES, ADJACENT, WHOLE, SLOTS, ACROSS, ARITHMETIC,
            )  # fmt: skip

    # Look again: a recv on another stream may have broken the group.
    if last_program(state_ptr, SENT) and not is_broken(problem_ptr):
        control = control_start(epoch, slots, control_bytes)
        numbers_start = control + world * RECORD_BYTES + rank * number_bytes
        for begin in range(0, num_experts, BLOCK_E):
            at = begin + tl.arange(0, BLOCK_E)
            mask = at < num_experts
            numbers = tl.load(counts_ptr + at, mask=mask, other=0, volatile=True)
            for peer in range(world):
                out = tl.load(bases_ptr + peer) + numbers_start
                tl.store(pointer(out, tl.int32) + at, numbers, mask=mask)
        num_active = tl.load(state_ptr + NUM_ACTIVE, volatile=True)
        for peer in range(world):
            out = tl.load(bases_ptr + peer) + numbers_start
            tl.store(pointer(out, tl.int32) + num_experts, num_active)
        write_records(bases_ptr, control, rank, world, epoch, 0, digest, num_tokens, BLOCK_W)
        tl.store(state_ptr + SENT, epoch)


def dispatch_send(
    windows: Windows,
    layout: ExchangeLayout,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    smooth_scales: torch.Tensor | None,
    copies: RoutingCopies | None,
    *,
    digest: int,
) -> SlotPositions:
    """Write this rank's tokens into its window, and its record to every rank.

    Arguments as in ``ref.dispatch_send``.

    Raises:
        ArgumentTypeError: a wrong dtype.
        ArgumentValueError: a wrong shape, stride or device, or more tokens than the layout has.
        MissingArgumentError: no weights for a layout that has some.
    """
    ids_copy, given_weights, weights_copy = copies or _NO_COPIES
    if given_weights is None:
        weights_copy = None
    else:
        weights = given_weights
    plan = _plan(
        windows.signature, layout, x, expert_ids, weights, smooth_scales, ids_copy, weights_copy,
        digest,
    )  # fmt: skip
    ids = expert_ids.contiguous()
    if plan.compare:
        counts = torch.empty(layout.num_experts, dtype=torch.int32, device=x.device)
        position = torch.empty(ids.numel(), dtype=torch.int32, device=x.device)
    else:
        planned = routing_plan(ids, layout.num_experts, copies)
        counts, position = planned.counts, planned.position_in_expert
        ids_copy = weights_copy = None
    active = None
    if layout.num_shared_experts:
        active = torch.empty(len(x), dtype=torch.int32, device=x.device)
    slot_ids = ids if plan.per_slot else None
    rows, factors, slot_ids = encode_tensors(x, layout.row_format, smooth_scales, slot_ids)
    _dispatch_send_kernel[plan.grid](
        windows.bases,
        windows.state,
        windows.problem,
        rows,
        ids,
        None if weights is None else weights.contiguous(),
        factors,
        slot_ids,
        ids_copy,
        weights_copy,
        counts,
        position,
        active,
        *plan.sizes,
        **plan.constants,
    )
    return SlotPositions(counts, position, active)


class _Plan(NamedTuple):
    """A launch of ``_dispatch_send_kernel``.

    Attributes:
        compare: whether it plans the slots, or ``routing_plan`` does.
        per_slot: whether each slot has smooth factors of its own.
        grid: of the programs.
        sizes: the arguments after the tensors.
        constants: the constexprs and options.
    """

    compare: bool
    per_slot: bool
    grid: tuple[int]
    sizes: tuple[int, ...]
    constants: dict[str, Any]


@launch_config.planned
def _plan(
    windows: WindowsSignature,
    layout: ExchangeLayout,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None,
    smooth_scales: torch.Tensor | None,
    ids_copy: torch.Tensor | None,
    weights_copy: torch.Tensor | None,
    digest: int,
) -> _Plan:
    """Check the arguments of ``dispatch_send`` and plan its launch."""
    op, device, fmt = "dispatch_send", x.device, layout.row_format
    check_device(op, windows, device)
    num_tokens, num_experts, num_slots = len(x), layout.num_experts, layout.rows_per_token
    shape = (num_tokens, layout.top_k)
    check = functools.partial(check_tensor, op, shape=shape, device=device)
    check("expert_ids", expert_ids, dtypes=INDICES)
    if num_tokens > layout.max_tokens:
        raise ArgumentValueError(op, "x", f"have at most {layout.max_tokens} rows", num_tokens)
    if weights is None and layout.weight_dtype is not None:
        raise MissingArgumentError(op, "weights", "be a tensor for a layout with weights", None)
    if weights is not None:
        check("weights", weights, dtypes=FLOATS)
    if ids_copy is not None:
        check("copies.expert_ids", ids_copy, dtypes=(torch.int32,))
    if weights is not None and weights_copy is not None:
        check("copies.weights_copy", weights_copy, dtypes=(weights.dtype,))
    per_slot = layout.per_expert and smooth_scales is not None and smooth_scales.dim() == 2
    check_encode(op, x, fmt, smooth_scales, per_slot)
    plan = launch_config.plan_launch(device, expert_ids.numel())
    has_scales = fmt.scale_offset is not None
    launch = encode_launch(
        x, fmt, smooth_scales, expert_ids if per_slot else None, num_slots,
        fmt.stride // fmt.dtype.itemsize, fmt.stride // fmt.scale_dtype.itemsize,
    )  # fmt: skip
    tokens, token_slots, token_warps = _token_block(expert_ids)
    work = launch_config.cdiv(max(expert_ids.numel(), num_experts, 1), plan.own)
    plan_programs = min(work, plan.num_programs)
    num_warps = max(launch.num_warps, plan.num_warps, token_warps)
    row_programs = launch_config.at_a_time(
        device, launch.num_programs, num_warps, registers=64 if smooth_scales is None else 128
    )
    sizes = (
        num_tokens,
        layout.top_k,
        num_experts,
        windows.rank,
        windows.world_size,
        digest,
        *windows.ring,
        layout.dispatch_number_bytes,
        layout.positions_start,
        layout.weights_start,
        layout.rows_start,
        plan_programs,
        num_tokens * num_slots,
        *launch.sizes,
        fmt.scale_offset or 0,
    )
    constants = launch.constants | {
        "COMPARE": plan.compare,
        "WEIGHT": None if layout.weight_dtype is None else TRITON_DTYPES[layout.weight_dtype],
        "OUT": TRITON_DTYPES[launch.out_dtype],
        "SCALE": TRITON_DTYPES[fmt.scale_dtype] if has_scales else None,
        "OWN": plan.own,
        "OTHERS": plan.others,
        "TOKENS": tokens,
        "TOKEN_SLOTS": token_slots,
        "BLOCK_E": min(launch_config.next_power_of_2(num_experts), launch_config.widest(device)),
        "BLOCK_W": launch_config.next_power_of_2(windows.world_size),
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }
    return _Plan(plan.compare, per_slot, (plan_programs + row_programs,), sizes, constants)

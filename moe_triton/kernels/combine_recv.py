"""Receive the experts' rows in one launch: wait, find those of each token, sum them in place.

Every program waits. A slot's row is where the record of its holder says that the rows of this
rank's tokens begin, plus the position of the slot; it is read in the holder's window. The sums are
those of ``weighted_sum``.

Shapes: T tokens, K experts and NS shared experts of a token, H hidden size, W ranks.
Bytes:  reads T * (K + NS) * (H * b + 32), b bytes an element, and what ``weighted_sum`` reads
        beside the rows; writes as it does.
Source: ``moe_triton.ref.combine_recv``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import ArgumentTypeError, ArgumentValueError
from ..layout import (
    ExchangeLayout,
    Norm,
    SlotPositions,
    Windows,
    WindowsSignature,
    ZeroComputationExperts,
)
from . import launch_config
from ._checks import FLOATS, INDICES, check_tensor
from ._common import narrow
from ._windows import (
    RECEIVED,
    control_start,
    end_recv,
    is_broken,
    next_epoch,
    wait_arguments,
    wait_records,
)
from .dispatch_send import active_positions
from .weighted_sum import (
    check_row_format,
    check_terms,
    in_row,
    load_row,
    of_fields,
    sum_launch,
    sum_rows,
    sum_tensors,
    tile_columns,
    tile_tokens,
    window_row,
)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "first_copy",
        "first_constant",
        "end",
        "across",
        "rank",
        "kind",
        "digest",
        "severity",
        "patience",
        "num_shared_ranks",
        "first_shared_rank",
        "replicas",
        "capacity",
        "shared_capacity",
    ]
)
def _combine_recv_kernel(
    state_ptr,  # [STATE_WORDS] int32
    problem_ptr,  # [PROBLEM_WORDS] int32, in and out
    notice_ptr,  # [1] int32 of the host
    bases_ptr,  # [W] int64
    expert_ids_ptr,  # [T, K] int32 | int64
    positions_ptr,  # [T * K] int32
    active_ptr,  # [T] int32, or None
    # As in ``_weighted_sum_kernel``.
    weights_ptr,  # [T, K] fp32 | fp64, or None
    tokens_ptr,  # [T, H] of out's dtype, or None without copy and constant experts
    alpha_1_ptr,  # [n] or [n, H] of out's dtype, or None
    alpha_2_ptr,  # as alpha_1
    value_ptr,  # [n, H] of out's dtype, or None
    addend_ptr,  # [T, H] of out's dtype, or None
    out_ptr,  # [T, H] fp16 | bf16 | fp32 | fp64; with APART [T, SLOTS, H]
    residual_ptr,  # [T, H] of out's dtype; None without a norm, as the following three
    gamma_ptr,  # [H] of out's dtype
    y_ptr,  # [T, H] of out's dtype
    rstd_ptr,  # [T] fp32
    num_tokens,
    hidden,
    tokens_stride,
    addend_stride,
    out_stride,
    residual_stride,
    y_stride,
    first_copy,
    first_constant,
    end,
    one_by_hidden,
    epsilon,
    across,
    rank,
    world,
    kind,
    digest,
    severity,
    patience,
    slots,
    control_bytes,
    data_bytes,
    number_bytes,
    row_bytes,
    scale_offset,
    local,
    num_shared_ranks,
    first_shared_rank,
    replicas,
    capacity,
    shared_capacity,
    ROUTED: tl.constexpr,
    APART: tl.constexpr,  # store the row of each slot
    CLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDE_ALPHA: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PASSES: tl.constexpr,
):
    """Wait for the rows of this rank's tokens and sum them.

    Example: two ranks of two experts; rank 0 has expert_ids [[1, 2]], positions [0, 1], weights
        [[2, 0.5]], and finds the numbers [0, 2] of its own and [0, 3] of rank 1: row 2 of rank 0
        twice, plus half of row 1 of rank 1.
    """
    if not is_broken(problem_ptr):
        epoch = next_epoch(state_ptr, RECEIVED)
        control = tl.load(bases_ptr + rank) + control_start(epoch, slots, control_bytes)
        fine = wait_records(
            problem_ptr, notice_ptr, control, epoch, digest, world, kind, severity, patience, CLOCK,
            BLOCK_W,
        )  # fmt: skip
        data_start = slots * control_bytes
        if fine:
            if APART:
                DTYPE: tl.constexpr = out_ptr.dtype.element_ty
                cols = tile_columns(SCHEME, GROUP, BLOCK_H)
                num_tiles = tl.cdiv(num_tokens, BLOCK_T) * across
                for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
                    number = tile_tokens(tile // across * BLOCK_T, SCHEME, BLOCK_T)
                    active = number < num_tokens
                    token = number.to(tl.int64)
                    start = tile % across * BLOCK_H
                    here = start + cols
                    columns = in_row(start, hidden, SCHEME, GROUP, BLOCK_H)
                    for k in tl.static_range(SLOTS):
                        row_ptr, scales_ptr, present = window_row(
                            k, token, active, expert_ids_ptr, positions_ptr, active_ptr, bases_ptr,
                            control, world, number_bytes, data_start, data_bytes, row_bytes,
                            scale_offset, local, num_shared_ranks, first_shared_rank, replicas,
                            capacity, shared_capacity, ROUTED, SCHEME, BLOCK_T, DTYPE,
                        )  # fmt: skip
                        row = load_row(
                            row_ptr, scales_ptr, present, start, here, columns, hidden, SCHEME,
                            GROUP, BLOCK_H, DTYPE, ACC,
                        )  # fmt: skip
                        out = out_ptr + (token * SLOTS + k) * hidden + here
                        tl.store(out, narrow(row, DTYPE), mask=active & columns)
            else:
                sum_rows(
                    None, None, None, weights_ptr, expert_ids_ptr, tokens_ptr, alpha_1_ptr,
                    alpha_2_ptr, value_ptr, addend_ptr, out_ptr, residual_ptr, gamma_ptr, y_ptr,
                    rstd_ptr, num_tokens, 0, hidden, 0, tokens_stride, addend_stride, out_stride,
                    residual_stride, y_stride, first_copy, first_constant, end, one_by_hidden,
                    epsilon, across, positions_ptr, active_ptr, bases_ptr, control, world,
                    number_bytes, data_start, data_bytes, row_bytes, scale_offset, local,
                    num_shared_ranks, first_shared_rank, replicas, capacity, shared_capacity,
                    SLOTS, TOP_K, WIDE_ALPHA, SCHEME, GROUP, 1, 1, ACC, BLOCK_T, BLOCK_H, PASSES,
                    ROUTED,
                )  # fmt: skip
    end_recv(state_ptr, problem_ptr)


def combine_recv(
    windows: Windows,
    layout: ExchangeLayout,
    expert_ids: torch.Tensor,
    positions: SlotPositions,
    weights: torch.Tensor | None,
    zero_computation: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None,
    *,
    digest: int,
    timeout: float,
) -> None:
    """Wait for the records of all ranks and sum the rows of each token from their windows.

    Arguments as in ``ref.combine_recv``; time as in ``recv_records``.

    Raises:
        ArgumentTypeError: a wrong dtype.
        ArgumentValueError: a shape, stride, device or scheme that does not fit.
        MissingArgumentError: a value of constant experts without their alphas.
    """
    plan = _plan(
        windows.signature, layout, expert_ids, positions.position_in_expert, weights, addend, out,
        digest, timeout, *(zero_computation or ()), *(norm or ()),
    )  # fmt: skip
    ids, active = expert_ids.contiguous(), positions.active_position
    if layout.num_shared_experts and active is None:
        active = active_positions(ids)
    row_weights, _, *terms = sum_tensors(weights, zero_computation, addend, out, norm)
    _combine_recv_kernel[plan.grid](
        windows.state,
        windows.problem,
        windows.notice,
        windows.bases,
        ids,
        positions.position_in_expert,
        active,
        row_weights,
        *terms,
        *plan.sizes,
        **plan.constants,
    )


class _Plan(NamedTuple):
    """A launch of ``_combine_recv_kernel``.

    Attributes:
        grid: of the programs.
        sizes: the arguments after the tensors.
        constants: the constexprs and options.
    """

    grid: tuple[int]
    sizes: tuple[int | float, ...]
    constants: dict[str, Any]


@launch_config.planned
def _plan(
    windows: WindowsSignature,
    layout: ExchangeLayout,
    expert_ids: torch.Tensor,
    position_in_expert: torch.Tensor,
    weights: torch.Tensor | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    digest: int,
    timeout: float,
    *more: Any,
) -> _Plan:
    """Check the arguments of ``combine_recv`` and plan its launch.

    ``more`` are the fields of the zero-computation experts and of the norm, where there are any.
    """
    op, device, fmt = "combine_recv", windows.device, layout.return_format
    zero_computation, norm = of_fields(more)
    check = functools.partial(check_tensor, op, device=device)
    num_tokens, num_slots = len(expert_ids), layout.num_slots
    check("expert_ids", expert_ids, dtypes=INDICES, shape=(None, layout.top_k))
    apart = out.dim() == 3
    shape = (num_tokens, num_slots, fmt.hidden) if apart else (num_tokens, fmt.hidden)
    check("out", out, dtypes=FLOATS, shape=shape, strided_columns=False)
    if fmt.scheme == "none" and fmt.dtype != out.dtype:
        raise ArgumentTypeError(op, "out", f"be of the rows' dtype {fmt.dtype}", out.dtype)
    check_row_format(op, fmt)
    summed = out[:, 0] if apart else out
    if apart and not out.is_contiguous():
        raise ArgumentValueError(op, "out", "be contiguous for rows apart", out.stride())
    check_terms(op, num_slots, weights, zero_computation, addend, summed, norm)
    name, size = "positions.position_in_expert", (expert_ids.numel(),)
    check(name, position_in_expert, dtypes=(torch.int32,), shape=size)
    launch = sum_launch(fmt, num_slots, weights, zero_computation, addend, summed, norm)
    severity, patience, clock = wait_arguments(device, windows.hard, timeout)
    ring, replicas = windows.ring, layout.shared_replicas
    num_programs = launch_config.at_a_time(
        device, launch.num_programs, launch.num_warps, registers=64 if norm is None else 128
    )
    sizes = (
        num_tokens,
        fmt.hidden,
        *launch.sizes,
        windows.rank,
        windows.world_size,
        windows.kind,
        digest,
        severity,
        patience,
        ring.slots,
        ring.control_bytes,
        ring.data_bytes,
        layout.combine_number_bytes,
        fmt.stride,
        fmt.scale_offset or 0,
        max(layout.experts_per_rank, 1),
        layout.num_shared_ranks,
        windows.rank % replicas,
        replicas,
        layout.capacity,
        layout.shared_capacity,
    )
    constants = launch.constants | {
        "ROUTED": layout.top_k,
        "APART": apart,
        "CLOCK": clock,
        "BLOCK_W": launch_config.next_power_of_2(windows.world_size),
        "num_warps": launch.num_warps,
        "enable_fp_fusion": False,
    }
    return _Plan((num_programs,), sizes, constants)

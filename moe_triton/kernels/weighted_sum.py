"""Sums of rows: those of a token's experts, and those of ranks that share an expert.

    out[t] = sum_k weights[t, k] * term(t, k) + sum_j row(t, K + j) + addend[t]

in fp32, multiply then add in ascending order, rounded once; term(t, k) is row(t, k), or what a
zero-computation expert makes of the token. With a norm, a residual is added before rounding, and

    rstd[t] = 1 / sqrt(sum_h total[t, h]**2 * (1 / H) + epsilon)
    y[t]    = round(round(total[t] * rstd[t]) * gamma)

Letters: T tokens, K experts per token, NS shared experts, S = K + NS slots, H hidden size, N rows,
         b bytes of an element.
Bytes:   reads T * S * H * b, and T * H * b for each of tokens, addend and residual; writes
         T * H * b, with a norm twice that. Block8 rows have 1 byte an element and 2 a block.
Source:  the combine step of Ascend's ``npu_moe_distribute_combine`` family.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import ArgumentTypeError, ArgumentValueError, MissingArgumentError
from ..layout import Norm, RowFormat, ZeroComputationExperts
from ._checks import FLOATS, INDICES, check_tensor, with_adjacent_columns
from ._common import from_float32, narrow, to_float32, widen
from ._windows import EXTRA, RECORD_BYTES
from .launch_config import planned, tiles, token_tiles

# Where there is none, the kernel gets None for each of its tensors.
_NO_NORM = (None,) * len(Norm._fields)

# Optional parts of the sum are functions that the kernel calls under a constexpr condition, as a
# launch of Triton 3.2 rejects functions as constexpr arguments.


@triton.jit
def tile_columns(SCHEME: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr) -> tl.tensor:
    """Columns of a tile: [BLOCK_H], or [BLOCK_H / GROUP, GROUP] so that a scale meets its group."""
    if SCHEME == "block8":
        cols = tl.arange(0, BLOCK_H // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        tl.static_assert(SCHEME == "none", "unknown scheme of rows")
        cols = tl.arange(0, BLOCK_H)
    return cols


@triton.jit
def in_row(
    start, hidden, SCHEME: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr
) -> tl.tensor:
    """Which columns of the tile from ``start`` a row has, shaped as ``tile_columns``.

    Groups are whole: NPUs mask rows of a tile, and would store all columns for another mask.
    """
    if SCHEME == "block8":
        group = start // GROUP + tl.arange(0, BLOCK_H // GROUP)[:, None]
        inside = tl.broadcast_to(group < hidden // GROUP, [BLOCK_H // GROUP, GROUP])
    else:
        inside = start + tl.arange(0, BLOCK_H) < hidden
    return inside


@triton.jit
def tile_tokens(first, SCHEME: tl.constexpr, BLOCK_T: tl.constexpr) -> tl.tensor:
    """Tokens of a tile, int32, shaped to meet its columns.

    One token is a scalar, and so is the address of its row: hardware that copies whole rows needs
    that.
    """
    if BLOCK_T == 1:
        number = first
    elif SCHEME == "block8":
        number = (first + tl.arange(0, BLOCK_T))[:, None, None]
    else:
        number = (first + tl.arange(0, BLOCK_T))[:, None]
    return number


@triton.jit
def load_row(
    row_ptr,
    scales_ptr,  # of the row, or None
    present,  # whether the slot has a row
    start,
    here,  # the columns from start
    columns,  # which of them a row has
    hidden,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Part of a row, decoded, in ACC; zeros where the slot has no row."""
    x = tl.load(row_ptr + here, mask=present & columns, other=0)
    x = widen(x, ACC)
    if SCHEME == "block8":
        group = start // GROUP + tl.arange(0, BLOCK_H // GROUP)[:, None]
        mask = present & (group < hidden // GROUP)
        scale = tl.load(scales_ptr + group, mask=mask, other=0.0)
        x = widen(narrow(x * widen(scale, ACC), DTYPE), ACC)
    return x


@triton.jit
def _zero_computation_term(
    term,
    present,
    expert,
    own,  # part of the token itself
    here,
    columns,  # which of them a row has
    alpha_1_ptr,
    alpha_2_ptr,
    value_ptr,
    hidden,
    first_copy,
    first_constant,
    end,
    WIDE_ALPHA: tl.constexpr,
    ACC: tl.constexpr,
):
    """Term of a slot after copy and constant experts, and whether the slot has a term."""
    copied = (expert >= first_copy) & (expert < first_constant)
    term = tl.where(copied, own, term)
    present = present | copied
    if value_ptr is not None:
        constant = (expert >= first_constant) & (expert < end)
        inside = constant & columns
        # NPUs load a number where its mask is false, too.
        number = tl.where(constant, expert - first_constant, 0).to(tl.int64)
        value = tl.load(value_ptr + number * hidden + here, mask=inside, other=0.0)
        if WIDE_ALPHA:
            alpha_1 = tl.load(alpha_1_ptr + number * hidden + here, mask=inside, other=0.0)
            alpha_2 = tl.load(alpha_2_ptr + number * hidden + here, mask=inside, other=0.0)
        else:
            alpha_1 = tl.load(alpha_1_ptr + number, mask=constant, other=0.0)
            alpha_2 = tl.load(alpha_2_ptr + number, mask=constant, other=0.0)
        sum_of_two = widen(alpha_1, ACC) * own + widen(alpha_2, ACC) * widen(value, ACC)
        term = tl.where(constant, sum_of_two, term)
        present = present | constant
    return term, present


@triton.jit
def _plus_row(total, ptr, offset, inside, ACC: tl.constexpr):
    """``total`` plus part of the row at ``ptr``; ``total`` where that is None."""
    if ptr is not None:
        total = total + widen(tl.load(ptr + offset, mask=inside, other=0.0), ACC)
    return total


@triton.jit
def _squares(total, inside):
    """Squares of the sums; a NaN weight also makes the masked columns NaN, so drop them."""
    return tl.where(inside, total * total, 0.0)


@triton.jit
def _store_rstd(rstd_ptr, squares, active, one_by_hidden, epsilon, BLOCK_T: tl.constexpr):
    """Store the reciprocal root mean square of each token's row, fp32, and return it."""
    if BLOCK_T == 1:
        total = tl.sum(squares)
    elif len(squares.shape) == 2:
        total = tl.sum(squares, axis=1, keep_dims=True)
    else:
        total = tl.sum(tl.sum(squares, axis=2, keep_dims=True), axis=1, keep_dims=True)
    rstd = 1.0 / tl.sqrt(total.to(tl.float32) * one_by_hidden + epsilon)
    tl.store(rstd_ptr, rstd, mask=active)
    return rstd


@triton.jit
def _store_normed(y_ptr, gamma_ptr, total, rstd, here, columns, inside, DTYPE: tl.constexpr):
    """Store part of the normed row: rounded before gamma, and after."""
    gamma = tl.load(gamma_ptr + here, mask=columns, other=0.0)
    scaled = to_float32(narrow(total * rstd, DTYPE))
    tl.store(y_ptr, narrow(scaled * to_float32(gamma), DTYPE), mask=inside)


@triton.jit
def window_row(
    k: tl.constexpr,  # slot
    token,
    active,
    ids_ptr,
    positions_ptr,
    active_ptr,
    bases_ptr,
    control,
    world,
    number_bytes,
    data_start,
    data_bytes,
    row_bytes,
    scale_offset,
    local,
    num_shared_ranks,
    first_shared_rank,
    replicas,
    capacity,
    shared_capacity,
    ROUTED: tl.constexpr,
    SCHEME: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Pointers to the row of a slot in its holder's window and to its scales; whether it has one.

    Args:
        k: the slot; those from ROUTED on are of shared experts.
        token: scalar or block of tokens.
        active: whether they are.
        ids_ptr: [T, K] expert ids.
        positions_ptr: [T * K] ``SlotPositions.position_in_expert``.
        active_ptr: [T] ``SlotPositions.active_position``, or None.
        bases_ptr: [W] addresses of the windows.
        control: address of the own control slot.
        world: W.
        number_bytes: from the numbers of one holder to those of the next.
        data_start: bytes before the first data slot.
        data_bytes: from one data slot to the next.
        row_bytes: from row to row.
        scale_offset: bytes from a row to its scales.
        local: L.
        num_shared_ranks: S.
        first_shared_rank: the rank of this rank's first shared expert.
        replicas: ranks of one shared expert.
        capacity: rows of a rank with routed experts; slots past them were dropped.
        shared_capacity: likewise, with a shared expert.
        ROUTED: K.
        SCHEME: of the rows.
        BLOCK_T: tokens.
        DTYPE: of the sum.
    """
    if k < ROUTED:
        at = token * ROUTED + k
        position = tl.load(positions_ptr + at, mask=active, other=-1)
        present = position >= 0
        expert = tl.load(ids_ptr + at, mask=present, other=0).to(tl.int32)
        holder = num_shared_ranks + expert // local
        number = expert % local
        room = capacity
    else:
        position = tl.load(active_ptr + token, mask=active, other=-1)
        present = position >= 0
        holder = first_shared_rank + (k - ROUTED) * replicas + tl.zeros_like(position)
        number = tl.zeros_like(position)
        room = shared_capacity
    numbers = control + world * RECORD_BYTES + holder.to(tl.int64) * number_bytes
    numbers = numbers.to(tl.pointer_type(tl.int32))
    row = tl.load(numbers + number, mask=present, other=0) + position
    record = (control + holder.to(tl.int64) * RECORD_BYTES).to(tl.pointer_type(tl.int32))
    slot = tl.load(record + EXTRA, mask=present, other=0)
    present = present & (row < room)
    address = tl.load(bases_ptr + holder, mask=present, other=0) + data_start
    address += slot.to(tl.int64) * data_bytes + row.to(tl.int64) * row_bytes
    if SCHEME == "block8":
        row_ptr = address.to(tl.pointer_type(tl.int8))
    else:
        row_ptr = address.to(tl.pointer_type(DTYPE))
    scales_ptr = (address + scale_offset).to(tl.pointer_type(DTYPE))
    if BLOCK_T == 1:
        row_ptr = tl.multiple_of(row_ptr, 16)
        scales_ptr = tl.multiple_of(scales_ptr, 16)
    return row_ptr, scales_ptr, present


@triton.jit
def sum_rows(
    rows_ptr,
    scales_ptr,
    index_ptr,
    weights_ptr,
    ids_ptr,
    tokens_ptr,
    alpha_1_ptr,
    alpha_2_ptr,
    value_ptr,
    addend_ptr,
    out_ptr,
    residual_ptr,
    gamma_ptr,
    y_ptr,
    rstd_ptr,
    num_tokens,
    num_rows,
    hidden,
    row_step,
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
    # Of ``window_row``; unused without ROUTED.
    positions_ptr,
    active_ptr,
    bases_ptr,
    control,
    world,
    number_bytes,
    data_start,
    data_bytes,
    row_bytes,
    scale_offset,
    local,
    num_shared_ranks,
    first_shared_rank,
    replicas,
    capacity,
    shared_capacity,
    SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDE_ALPHA: tl.constexpr,
    SCHEME: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    SCALES_UNIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PASSES: tl.constexpr,
    ROUTED: tl.constexpr,  # K where rows lie in windows, or None
) -> None:
    """The sums of ``_weighted_sum_kernel``, of rows in windows or at an index."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    NORM: tl.constexpr = gamma_ptr is not None
    cols = tile_columns(SCHEME, GROUP, BLOCK_H)
    num_tiles = tl.cdiv(num_tokens, BLOCK_T) * across
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        number = tile_tokens(tile // across * BLOCK_T, SCHEME, BLOCK_T)
        active = number < num_tokens
        token = number.to(tl.int64)
        if PASSES == 2:
            squares = tl.zeros((active & (cols < hidden)).shape, ACC)

        # The second pass makes the sums again rather than keep a row of any length.
        for phase in tl.static_range(PASSES):
            if phase == 1:
                rstd = _store_rstd(
                    rstd_ptr + token, squares, active, one_by_hidden, epsilon, BLOCK_T
                )
            for start in range(tile % across * BLOCK_H, hidden, across * BLOCK_H):
                here = start + cols
                columns = in_row(start, hidden, SCHEME, GROUP, BLOCK_H)
                inside = active & columns
                total = tl.zeros(inside.shape, ACC)
                if tokens_ptr is not None:
                    own = tl.load(tokens_ptr + token * tokens_stride + here, mask=inside, other=0.0)
                    own = widen(own, ACC)
                # Unrolled, so that several rows of a token are in flight at a time.
                for k in tl.static_range(SLOTS):
                    if ROUTED is not None:
                        row_ptr, row_scales_ptr, present = window_row(
                            k, token, active, ids_ptr, positions_ptr, active_ptr, bases_ptr,
                            control, world, number_bytes, data_start, data_bytes, row_bytes,
                            scale_offset, local, num_shared_ranks, first_shared_rank, replicas,
                            capacity, shared_capacity, ROUTED, SCHEME, BLOCK_T, DTYPE,
                        )  # fmt: skip
                    else:
                        row = tl.load(index_ptr + token * SLOTS + k, mask=active, other=-1)
                        tl.device_assert(row < num_rows, "index out of range")
                        present = row >= 0
                        # Products with a constant show the compiler how rows are aligned.
                        row_ptr = rows_ptr + row * row_step * UNIT
                        row_scales_ptr = scales_ptr
                        if SCHEME == "block8":
                            row_scales_ptr = scales_ptr + row * row_step * SCALES_UNIT
                    term = load_row(
                        row_ptr, row_scales_ptr, present, start, here, columns, hidden, SCHEME,
                        GROUP, BLOCK_H, DTYPE, ACC,
                    )  # fmt: skip
                    if k < TOP_K:
                        if tokens_ptr is not None:
                            expert = tl.load(ids_ptr + token * TOP_K + k, mask=active, other=-1)
                            term, present = _zero_computation_term(
                                term, present, expert, own, here, columns, alpha_1_ptr,
                                alpha_2_ptr, value_ptr, hidden, first_copy, first_constant, end,
                                WIDE_ALPHA, ACC,
                            )  # fmt: skip
                        if weights_ptr is not None:
                            # Load 0 for a slot without a term: its weight may be NaN.
                            weight_ptr = weights_ptr + token * TOP_K + k
                            term = term * tl.load(weight_ptr, mask=present, other=0.0).to(ACC)
                    total = total + term
                total = _plus_row(total, addend_ptr, token * addend_stride + here, inside, ACC)
                total = _plus_row(total, residual_ptr, token * residual_stride + here, inside, ACC)
                if NORM and phase == 0:
                    if PASSES == 2:
                        squares = squares + _squares(total, inside)
                    else:
                        part = _squares(total, inside)
                        rstd = _store_rstd(
                            rstd_ptr + token, part, active, one_by_hidden, epsilon, BLOCK_T
                        )
                if phase == PASSES - 1:
                    # In the last pass only: out may be the residual or the addend.
                    out = out_ptr + token * out_stride + here
                    tl.store(out, narrow(total, DTYPE), mask=inside)
                    if NORM:
                        y = y_ptr + token * y_stride + here
                        _store_normed(y, gamma_ptr, total, rstd, here, columns, inside, DTYPE)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_rows",
        "row_step",
        "first_copy",
        "first_constant",
        "end",
        "across",
    ]
)
def _weighted_sum_kernel(
    rows_ptr,  # [N, >= H] of out's dtype, or int8 for block8; row_step * UNIT apart
    scales_ptr,  # [N, H / GROUP] fp16 | bf16, row_step * SCALES_UNIT apart, or None
    index_ptr,  # [T, SLOTS] int64, negative where the slot has no row
    weights_ptr,  # [T, TOP_K] fp32 | fp64, or None
    # Zero-computation experts: all None without copy and constant experts.
    ids_ptr,  # [T, TOP_K] int32 | int64 expert ids
    tokens_ptr,  # [T, H] of out's dtype; rows tokens_stride apart
    alpha_1_ptr,  # [n] or [n, H] of out's dtype, or None
    alpha_2_ptr,  # as alpha_1
    value_ptr,  # [n, H] of out's dtype, or None
    addend_ptr,  # [T, H] of out's dtype, or None
    out_ptr,  # [T, H] fp16 | bf16 | fp32 | fp64
    # Norm: all None without one.
    residual_ptr,  # [T, H] of out's dtype
    gamma_ptr,  # [H] of out's dtype
    y_ptr,  # [T, H] of out's dtype
    rstd_ptr,  # [T] fp32
    num_tokens,
    num_rows,
    hidden,
    row_step,
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
    across,  # tiles beside each other, which take the blocks of columns in turn
    SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,  # slots with a weight or an expert id
    WIDE_ALPHA: tl.constexpr,  # the alphas are [n, H]
    SCHEME: tl.constexpr,  # "none" | "block8"
    GROUP: tl.constexpr,  # elements that share a scale
    UNIT: tl.constexpr,  # elements between rows, of which their distance is a multiple
    SCALES_UNIT: tl.constexpr,  # as many bytes in scales
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PASSES: tl.constexpr,  # 2 for a norm of rows longer than a tile, else 1
):
    """Sum the rows of each token.

    Example: rows [[1, 2], [3, 4], [5, 6]], index [[0, 2], [1, -1], [-1, -1]],
        weights [[1, 2], [0.5, 8], [1, 1]]: out [[11, 14], [1.5, 2], [0, 0]].
    """
    sum_rows(
        rows_ptr, scales_ptr, index_ptr, weights_ptr, ids_ptr, tokens_ptr, alpha_1_ptr,
        alpha_2_ptr, value_ptr, addend_ptr, out_ptr, residual_ptr, gamma_ptr, y_ptr, rstd_ptr,
        num_tokens, num_rows, hidden, row_step, tokens_stride, addend_stride, out_stride,
        residual_stride, y_stride, first_copy, first_constant, end, one_by_hidden, epsilon,
        across, None, None, None, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, SLOTS, TOP_K,
        WIDE_ALPHA, SCHEME, GROUP, UNIT, SCALES_UNIT, ACC, BLOCK_T, BLOCK_H, PASSES, None,
    )  # fmt: skip


def weighted_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    weights: torch.Tensor | None,
    zero_computation: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None = None,
) -> None:
    """Sum the rows of each token in fp32, ascending, and round once.

    Arguments as in ``ref.weighted_sum``; a row index below 0 is ``NOWHERE``.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape, stride, device or scheme that does not fit.
        MissingArgumentError: a value of constant experts without their alphas.
    """
    launch = _plan_sum(
        rows, index, fmt, weights, addend, out, *(zero_computation or ()), *(norm or ()),
    )  # fmt: skip
    if launch is None:
        return
    _weighted_sum_kernel[(launch.num_programs,)](
        rows.view(fmt.dtype),
        fmt.scales(rows) if fmt.scheme == "block8" else None,
        index.contiguous(),
        *sum_tensors(weights, zero_computation, addend, out, norm),
        out.shape[0],
        rows.shape[0],
        out.shape[1],
        *launch.sizes,
        **launch.constants,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


@planned
def _plan_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    weights: torch.Tensor | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    *more: Any,
) -> SumLaunch | None:
    """Check the arguments of ``weighted_sum`` and plan its launch; None with nothing to sum.

    ``more`` are the fields of the zero-computation experts and of the norm, where there are any.
    """
    op = "weighted_sum"
    zero_computation, norm = of_fields(more)
    _check_rows(op, rows, index, fmt, out)
    check_terms(op, index.shape[1], weights, zero_computation, addend, out, norm)
    if out.numel() == 0:
        return None
    launch = sum_launch(fmt, index.shape[1], weights, zero_computation, addend, out, norm)
    unit = math.gcd(rows.stride(0), 16)
    units = {
        "UNIT": unit // fmt.dtype.itemsize,
        "SCALES_UNIT": unit // fmt.scale_dtype.itemsize if fmt.scheme == "block8" else 0,
    }
    return launch._replace(
        sizes=(rows.stride(0) // unit, *launch.sizes), constants=units | launch.constants
    )


def of_fields(fields: tuple[Any, ...]) -> tuple[ZeroComputationExperts | None, Norm | None]:
    """The zero-computation experts and the norm of their fields, of which either may be missing."""
    of_norm = len(Norm._fields) if len(fields) % len(ZeroComputationExperts._fields) else 0
    experts, norm = fields[: len(fields) - of_norm], fields[len(fields) - of_norm :]
    return ZeroComputationExperts(*experts) if experts else None, Norm(*norm) if norm else None


class SumLaunch(NamedTuple):
    """Arguments of ``sum_rows`` beside tensors, and its launch.

    Attributes:
        sizes: the numbers from the stride of the tokens on.
        constants: the constexprs, but for the units of rows.
        num_programs: size of the grid.
        num_warps: of a program.
    """

    sizes: tuple[int | float, ...]
    constants: dict[str, Any]
    num_programs: int
    num_warps: int


def sum_launch(
    fmt: RowFormat,
    num_slots: int,
    weights: torch.Tensor | None,
    zero_computation: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None,
) -> SumLaunch:
    """The launch that sums ``num_slots`` rows of each token, from signatures alone.

    Arguments as in ``weighted_sum``, which go to the kernel as ``sum_tensors`` returns them.
    """
    num_tokens, hidden = out.shape
    ids = tokens = alpha_1 = None
    first_copy = first_constant = end = 0
    if zero_computation is not None and zero_computation.tokens is not None:
        ids, first_copy, first_constant, end, tokens, alpha_1, _, _ = zero_computation
    residual, _, epsilon, y, _ = norm or (None, None, 0.0, None, None)
    columns = weights if weights is not None else ids
    launch = token_tiles(out.device, num_tokens, hidden, whole_rows=norm is not None)
    across = 1 if norm is not None else -(-hidden // launch.block)
    return SumLaunch(
        (
            *map(_row_stride, (tokens, addend, out, residual, y)), first_copy, first_constant, end,
            1.0 / max(hidden, 1), epsilon, across,
        ),
        {
            "SLOTS": num_slots,
            "TOP_K": 0 if columns is None else columns.shape[1],
            "WIDE_ALPHA": alpha_1 is not None and alpha_1.dim() == 2,
            "SCHEME": fmt.scheme,
            "GROUP": fmt.block if fmt.scheme == "block8" else 0,
            "ACC": tl.float64 if out.dtype == torch.float64 else tl.float32,
            "BLOCK_T": launch.rows,
            "BLOCK_H": launch.block,
            "PASSES": 2 if norm is not None and hidden > launch.block else 1,
        },
        launch.num_programs,
        launch.num_warps,
    )  # fmt: skip


def sum_tensors(
    weights: torch.Tensor | None,
    zero_computation: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None,
) -> tuple[torch.Tensor | None, ...]:
    """The tensors that ``sum_rows`` takes, from the weights to rstd."""
    ids = tokens = alpha_1 = alpha_2 = value = None
    if zero_computation is not None and zero_computation.tokens is not None:
        ids, _, first_constant, end, tokens, alpha_1, alpha_2, value = zero_computation
        if first_constant == end:  # no address of an empty tensor, which an NPU would load from
            alpha_1 = alpha_2 = value = None
    residual, gamma, _, y, rstd = norm or _NO_NORM
    return (
        _contiguous(weights), _contiguous(ids), _with_adjacent_columns(tokens),
        _contiguous(alpha_1), _contiguous(alpha_2), _contiguous(value),
        _with_adjacent_columns(addend), out, _with_adjacent_columns(residual), gamma, y, rstd,
    )  # fmt: skip


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _with_adjacent_columns(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else with_adjacent_columns(x)


def _row_stride(x: torch.Tensor | None) -> int:
    """The stride of the rows of ``_with_adjacent_columns``."""
    if x is None:
        return 0
    return x.stride(0) if x.shape[1] <= 1 or x.stride(1) == 1 else x.shape[1]


def _check_rows(
    op: str, rows: torch.Tensor, index: torch.Tensor, fmt: RowFormat, out: torch.Tensor
) -> None:
    check = functools.partial(check_tensor, op, device=rows.device)
    check("out", out, dtypes=FLOATS, shape=(None, None), strided_columns=False)
    shape = (None, fmt.stride)
    check("rows", rows, dtypes=(torch.uint8,), shape=shape, strided_columns=False)
    check("index", index, dtypes=(torch.int64,), shape=(len(out), None))
    if fmt.hidden != out.shape[1]:
        raise ArgumentValueError(op, "out", f"have {fmt.hidden} columns", tuple(out.shape))
    if fmt.scheme == "none" and fmt.dtype != out.dtype:
        raise ArgumentTypeError(op, "out", f"be of the rows' dtype {fmt.dtype}", out.dtype)
    check_row_format(op, fmt)


def check_row_format(op: str, fmt: RowFormat) -> None:
    """Raise unless rows of a format can be summed."""
    if fmt.scheme not in ("none", "block8"):
        raise ArgumentValueError(op, "fmt", 'be of scheme "none" or "block8"', repr(fmt.scheme))
    if fmt.scheme == "block8" and (
        fmt.block < 1 or fmt.block & (fmt.block - 1) or fmt.hidden % fmt.block
    ):
        contract = f"have blocks of a power of two that divides {fmt.hidden} columns"
        raise ArgumentValueError(op, "fmt", contract, fmt.block)


def check_terms(
    op: str,
    num_slots: int,
    weights: torch.Tensor | None,
    zero_computation: ZeroComputationExperts | None,
    addend: torch.Tensor | None,
    out: torch.Tensor,
    norm: Norm | None,
) -> None:
    """Check the terms of sums of ``num_slots`` rows; arguments as in ``weighted_sum``."""
    dtype, (num_tokens, hidden) = out.dtype, out.shape
    check = functools.partial(check_tensor, op, device=out.device)
    top_k = None
    if weights is not None:
        dtypes = (torch.float32, torch.promote_types(dtype, torch.float32))
        check("weights", weights, dtypes=dtypes, shape=(num_tokens, None))
        top_k = weights.shape[1]
        _check_columns(op, "weights", weights, num_slots)
    full_rows: dict[str, torch.Tensor | None] = {"addend": addend}
    if zero_computation is not None:
        ids, name = zero_computation.expert_ids, "zero_computation.expert_ids"
        check(name, ids, dtypes=INDICES, shape=(num_tokens, top_k))
        _check_columns(op, name, ids, num_slots)
        full_rows["zero_computation.tokens"] = zero_computation.tokens
        if zero_computation.value is not None:
            _check_constants(op, zero_computation, out)
    if norm is not None:
        full_rows |= {"norm.residual": norm.residual, "norm.y": norm.y}
        for name, vector, wanted, size in (
            ("norm.gamma", norm.gamma, dtype, hidden),
            ("norm.rstd", norm.rstd, torch.float32, num_tokens),
        ):
            check(name, vector, dtypes=(wanted,), shape=(size,), strided_columns=False)
    for name, rows in full_rows.items():
        if rows is not None:
            # norm.y is the one output among them: it cannot be copied to adjacent columns.
            strided = name != "norm.y"
            shape = (num_tokens, hidden)
            check(name, rows, dtypes=(dtype,), shape=shape, strided_columns=strided)


def _check_columns(op: str, name: str, tensor: torch.Tensor, num_slots: int) -> None:
    if tensor.shape[1] > num_slots:
        contract = f"have at most {num_slots} columns, one for each slot"
        raise ArgumentValueError(op, name, contract, tuple(tensor.shape))


def _check_constants(op: str, experts: ZeroComputationExperts, out: torch.Tensor) -> None:
    """Check the tensors of constant experts."""
    number, hidden = experts.end - experts.first_constant, out.shape[1]
    check = functools.partial(check_tensor, op, dtypes=(out.dtype,), device=out.device)
    assert experts.value is not None
    shape: tuple[int, ...] = (number, hidden)
    check("zero_computation.value", experts.value, shape=shape)
    for name in ("alpha_1", "alpha_2"):
        alpha = getattr(experts, name)
        if alpha is None:
            raise MissingArgumentError(
                op, f"zero_computation.{name}", "be a tensor beside zero_computation.value", None
            )
        if name == "alpha_1":
            shape = (number, hidden)[: alpha.dim()]
        elif alpha.dim() != len(shape):
            contract = f"have as many dimensions as alpha_1 ({len(shape)})"
            raise ArgumentValueError(op, "zero_computation.alpha_2", contract, alpha.dim())
        check(f"zero_computation.{name}", alpha, shape=shape)


@triton.jit(do_not_specialize=["num_rows", "across"])
def _add_rows_kernel(
    own_ptr,  # [n, H] fp16 | bf16 | fp32
    peer_ptr,  # [n, H] of own's dtype
    out_ptr,  # [n, H] of own's dtype
    num_rows,
    hidden,
    own_stride,
    peer_stride,
    out_stride,
    across,  # tiles beside each other
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Add the rows of two ranks.

    Example: in bf16, own [[1, 256], [2, 0.5]] and peer [[3, 1], [-2, 0.5]]: out [[4, 256], [0, 1]].
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    num_tiles = tl.cdiv(num_rows, BLOCK_R) * across
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = (tile // across * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
        col = (tile % across * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
        mask = (row < num_rows) & (col < hidden)
        own = tl.load(own_ptr + row * own_stride + col, mask=mask, other=0.0)
        peer = tl.load(peer_ptr + row * peer_stride + col, mask=mask, other=0.0)
        total = from_float32(to_float32(own) + to_float32(peer), DTYPE)
        tl.store(out_ptr + row * out_stride + col, total, mask=mask)


def add_rows(own: torch.Tensor, peer: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sums of [n, H] rows of two ranks into ``out``, in fp32 and rounded once.

    Arguments as in ``ref.add_rows``; ``out`` may be one of the two.

    Raises:
        ArgumentTypeError: a dtype that is not listed above, or differs.
        ArgumentValueError: a shape, stride or device that does not fit.
    """
    num_rows, hidden = shape = tuple(own.shape)
    check = functools.partial(check_tensor, "add_rows", device=own.device)
    check("own", own, dtypes=FLOATS[:3], shape=(None, None))
    check("peer", peer, dtypes=(own.dtype,), shape=shape)
    check("out", out, dtypes=(own.dtype,), shape=shape, strided_columns=False)
    if own.numel() == 0:
        return
    own, peer = with_adjacent_columns(own), with_adjacent_columns(peer)
    launch = tiles(own.device, num_rows, hidden)
    _add_rows_kernel[(launch.num_programs,)](
        own,
        peer,
        out,
        num_rows,
        hidden,
        own.stride(0),
        peer.stride(0),
        out.stride(0),
        triton.cdiv(hidden, launch.block),
        BLOCK_R=launch.rows,
        BLOCK_H=launch.block,
        num_warps=launch.num_warps,
    )

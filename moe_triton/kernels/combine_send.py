"""Send the experts' rows back in one launch: into the own window, with a record to every rank.

The rows are written as ``quantize`` does; none where experts have written them in place. The
program that ends last writes the records, whose numbers say where each rank finds its rows.

Shapes: n rows, H hidden size, L local experts, W ranks.
Bytes:  reads n * H * y.itemsize, writes n * stride and W * (16 + 8 * L).
Source: ``moe_triton.ref.combine_send``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..layout import ExchangeLayout, Windows, WindowsSignature
from . import launch_config
from ._checks import check_tensor
from ._common import TRITON_DTYPES
from ._windows import (
    DATA_SLOT,
    RECORD_BYTES,
    SENT,
    control_start,
    is_broken,
    last_program,
    next_epoch,
    pointer,
    write_records,
)
from .quantize import check_encode, encode_launch, encode_tensors, encode_tiles


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "local",
        "rank",
        "digest",
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
def _combine_send_kernel(
    bases_ptr,  # [W] int64
    state_ptr,  # [STATE_WORDS] int32
    problem_ptr,  # [PROBLEM_WORDS] int32
    y_ptr,  # [n, H] fp16 | bf16 | fp32 | fp64, for the scheme "none" integers as wide; or None
    count_ptr,  # [1] int32 rows to write, or None for n
    group_starts_ptr,  # [L, W + 1] int32
    num_rows,
    local,
    rank,
    world,
    digest,
    slots,
    control_bytes,
    data_slots,
    data_bytes,
    number_bytes,
    counts_start,  # numbers before the counts
    # Sizes of ``encode_tiles``.
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
    OUT: tl.constexpr,
    SCALE: tl.constexpr,
    LOCAL: tl.constexpr,
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
    """Write the experts' rows and the records of a rank.

    Example: group_starts [[0, 1, 2], [2, 3, 4]], epoch 1, digest 7, data slot 0: rank 0 finds the
        record [1, 0, 7, 0] with the numbers [0, 2, 1, 1], rank 1 with [1, 3, 1, 1].
    """
    slot = tl.zeros((), tl.int32)
    if y_ptr is not None:  # noqa: SIM102 - known to the compiler
        if not is_broken(problem_ptr):
            # The slot after the last one: peers may still read that.
            slot = (tl.load(state_ptr + DATA_SLOT) + 1) & (data_slots - 1)
            data = tl.load(bases_ptr + rank) + slots * control_bytes
            data += slot.to(tl.int64) * data_bytes
            if SCALE is None:
                scale_ptr: tl.constexpr = None
            else:
                scale_ptr = pointer(data + scale_offset, SCALE)
            encode_tiles(
                y_ptr, None, None, None, count_ptr, pointer(data, OUT), scale_ptr, num_rows,
                num_rows, hidden_units, group_units, num_groups, num_slots, factor_slots,
                num_factors, x_units, out_units, scale_stride, tl.program_id(0),
                tl.num_programs(0), SCHEME, MAX, MANTISSA, FACTORS, UNIT, ROWS, GROUPS, LANES,
                ADJACENT, WHOLE, SLOTS, ACROSS, ARITHMETIC,
            )  # fmt: skip
    # Look again: a recv on another stream may have broken the group.
    if last_program(state_ptr, SENT) and not is_broken(problem_ptr):
        epoch = next_epoch(state_ptr, SENT)
        control = control_start(epoch, slots, control_bytes)
        numbers_start = control + world * RECORD_BYTES + rank * number_bytes
        expert = tl.arange(0, LOCAL)
        mask = expert < local
        for peer in range(world):
            out = pointer(tl.load(bases_ptr + peer) + numbers_start, tl.int32)
            at = group_starts_ptr + expert * (world + 1) + peer
            start = tl.load(at, mask=mask, other=0)
            end = tl.load(at + 1, mask=mask, other=0)
            tl.store(out + expert, start, mask=mask)
            tl.store(out + counts_start + expert, end - start, mask=mask)
        write_records(bases_ptr, control, rank, world, epoch, 0, digest, slot, BLOCK_W)
        tl.store(state_ptr + SENT, epoch)
        tl.store(state_ptr + DATA_SLOT, slot)


def combine_send(
    windows: Windows,
    layout: ExchangeLayout,
    y: torch.Tensor | None,
    group_starts: torch.Tensor,
    count: torch.Tensor | None,
    *,
    digest: int,
) -> None:
    """Write the experts' rows into this rank's window, and its record to every rank.

    Arguments as in ``ref.combine_send``; ``count`` stays on the device.

    Raises:
        ArgumentTypeError: a wrong dtype.
        ArgumentValueError: a wrong shape, stride or device.
    """
    plan = _plan(windows.signature, layout, y, group_starts, count, digest)
    rows = None
    if y is not None:
        rows, _, _ = encode_tensors(y[: plan.num_rows], layout.return_format)
    _combine_send_kernel[plan.grid](
        windows.bases,
        windows.state,
        windows.problem,
        rows,
        count,
        group_starts.contiguous(),
        *plan.sizes,
        **plan.constants,
    )


class _Plan(NamedTuple):
    """A launch of ``_combine_send_kernel``.

    Attributes:
        num_rows: of the experts, cut to the capacity.
        grid: of the programs.
        sizes: the arguments after the tensors.
        constants: the constexprs and options.
    """

    num_rows: int
    grid: tuple[int]
    sizes: tuple[int, ...]
    constants: dict[str, Any]


@launch_config.planned
def _plan(
    windows: WindowsSignature,
    layout: ExchangeLayout,
    y: torch.Tensor | None,
    group_starts: torch.Tensor,
    count: torch.Tensor | None,
    digest: int,
) -> _Plan:
    """Check the arguments of ``combine_send`` and plan its launch."""
    op, device, fmt = "combine_send", windows.device, layout.return_format
    world, local = windows.world_size, layout.num_local_experts(windows.rank)
    check = functools.partial(check_tensor, op, device=device)
    check("group_starts", group_starts, dtypes=(torch.int32,), shape=(local, world + 1))
    if count is not None:
        check("count", count, dtypes=(torch.int32,), shape=(1,))
    has_scales = fmt.scale_offset is not None
    rows = torch.empty((0, fmt.hidden), dtype=fmt.dtype, device=device)
    if y is not None:
        check("y", y, dtypes=(y.dtype,), shape=(None, fmt.hidden))
        rows = y[: layout.rank_capacity(windows.rank)]
        check_encode(op, rows, fmt, None, per_slot=False)
    launch = encode_launch(
        rows, fmt, None, None, 1, fmt.stride // fmt.dtype.itemsize,
        fmt.stride // fmt.scale_dtype.itemsize,
    )  # fmt: skip
    num_programs = launch_config.at_a_time(
        device, launch.num_programs, launch.num_warps, registers=80 if has_scales else 64
    )
    sizes = (
        len(rows),
        local,
        windows.rank,
        world,
        digest,
        *windows.ring,
        layout.combine_number_bytes,
        max(layout.experts_per_rank, 1),
        *launch.sizes,
        fmt.scale_offset or 0,
    )
    constants = launch.constants | {
        "OUT": TRITON_DTYPES[launch.out_dtype],
        "SCALE": TRITON_DTYPES[fmt.scale_dtype] if has_scales else None,
        "LOCAL": launch_config.next_power_of_2(local),
        "BLOCK_W": launch_config.next_power_of_2(world),
        "num_warps": launch.num_warps,
        "enable_fp_fusion": False,
    }
    return _Plan(len(rows), (num_programs,), sizes, constants)

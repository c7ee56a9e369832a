"""Receive tokens in one launch: wait, number the rows, gather each once for all of its experts.

Every program waits, and sums the counts of all sources to the first row of each (local expert,
source). A slot's row is that plus its position, so that any program can place any row. Programs
take turns at the tokens of all sources, beginning with different ones. A row is read once and
stored for each of its experts on this rank.

Shapes: T tokens of a source, K experts and NS shared experts of a token, H hidden size, L local
        experts, W ranks, n rows received, C scales of a row.
Bytes:  reads W * T * K * 8 of routing and the rows of the tokens that have an expert here; writes
        n * (H * b + C * scale bytes + 12 + weight bytes), b bytes an element.
Source: ``moe_triton.ref.dispatch_recv``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..errors import ArgumentTypeError, ArgumentValueError
from ..layout import NOWHERE, ExchangeLayout, ReceivedRows, Windows, WindowsSignature
from . import launch_config
from ._common import TRITON_DTYPES, WORDS
from ._groups import check_load
from ._windows import (
    EXTRA,
    RECEIVED,
    RECORD_BYTES,
    control_start,
    end_recv,
    is_broken,
    next_epoch,
    pointer,
    wait_arguments,
    wait_records,
)

_NOWHERE = tl.constexpr(NOWHERE)


@triton.jit
def _load_counts(
    numbers,
    number_bytes,
    first,
    rank,
    world,
    replicas,
    local,
    LOCAL: tl.constexpr,
    WORLD: tl.constexpr,
):
    """[LOCAL, WORLD] rows for each local expert from each source, 0 past both ends.

    Args:
        numbers: address of the numbers of all sources.
        number_bytes: from those of one source to the next.
        first: number of the first local expert.
        rank: this rank.
        world: W.
        replicas: ranks that share the sources of a shared expert, or 1.
        local: L.
        LOCAL: L rounded up to a power of two.
        WORLD: W rounded up to a power of two.
    """
    source = tl.arange(0, WORLD)[None, :]
    expert = tl.arange(0, LOCAL)[:, None]
    start = (numbers + source.to(tl.int64) * number_bytes).to(tl.pointer_type(tl.int32))
    served = source % replicas == rank % replicas
    mask = (source < world) & (expert < local) & served
    return tl.load(start + (first + expert), mask=mask, other=0)


@triton.jit
def _copy_row(
    row, present, dest, x_ptr, width_units, x_units, WORD: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load [ROWS] rows and store each for [ROWS, SLOTS] destinations, negative for none.

    The address of one row is a scalar, those of several are [ROWS, 1].
    """
    slot = tl.arange(0, SLOTS)[None, :]
    if ROWS == 1:
        source = pointer(row, WORD)
    else:
        source = tl.multiple_of(row.to(tl.pointer_type(WORD)), [16, 16])
    width = width_units * UNIT
    for begin in range(0, width, BLOCK):
        col = begin + tl.arange(0, BLOCK)[None, :]
        inside = col < width
        words = tl.load(source + col, mask=present & inside, other=0)
        for k in tl.static_range(TOP):
            out = tl.max(tl.where(slot == k, dest, -1), axis=1, keep_dims=True).to(tl.int64)
            at = out * (x_units * UNIT) + col
            tl.store(x_ptr + at, words, mask=inside & (out >= 0))


@triton.jit
def _zero_rows(ptr, first, end, stride, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the rows from ``first`` to ``end``."""
    for begin in range(first, end, ROWS):
        row = (begin + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)[None, :]
            zeros = tl.zeros([ROWS, BLOCK], ptr.dtype.element_ty)
            tl.store(ptr + row * stride + col, zeros, mask=(row < end) & (col < width))


@triton.jit(
    do_not_specialize=[
        "rank", "kind", "digest", "severity", "patience", "num_rows", "room", "first", "slot_base",
    ]
)  # fmt: skip
def _dispatch_recv_kernel(
    bases_ptr,  # [W] int64
    state_ptr,  # [STATE_WORDS] int32
    problem_ptr,  # [PROBLEM_WORDS] int32, in and out
    notice_ptr,  # [1] int32 of the host
    x_ptr,  # [num_rows, width] words
    scale_ptr,  # [num_rows, C] integers as wide as a scale, or None
    row_weights_ptr,  # [num_rows] fp32 | fp64, or None
    source_ptr,  # [room] int64
    slot_ids_ptr,  # [room] int32
    counts_ptr,  # [L, W] int32
    recv_counts_cumsum_ptr,  # [L * W] int32
    offsets_ptr,  # [L] int32
    group_starts_ptr,  # [L, W + 1] int32
    totals_ptr,  # [L] int32 | int64
    load_ptr,  # [L] int64, or None
    rank,
    world,
    kind,
    digest,
    severity,
    patience,
    slots,
    control_bytes,
    data_slots,
    data_bytes,
    number_bytes,
    positions_start,
    weights_start,
    rows_start,
    row_bytes,
    scale_offset,
    num_rows,
    room,
    first,  # number of the first local expert
    local,
    replicas,
    max_tokens,
    top_k,
    num_slots,
    slot_base,  # of the slots of a shared expert
    alignment,
    width_units,
    x_units,
    num_scales,
    SHARED: tl.constexpr,  # this rank has a shared expert
    PER_SLOT: tl.constexpr,  # a row for each slot
    PADDED: tl.constexpr,
    WORD: tl.constexpr,
    SCALE: tl.constexpr,  # dtype of the words of scales, or None
    UNIT: tl.constexpr,
    TOP: tl.constexpr,  # slots of a token that may come here
    SLOTS: tl.constexpr,  # as many, rounded up to a power of two
    LOCAL: tl.constexpr,
    WORLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    LINE: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Wait, number and gather the rows for this rank.

    Example: two ranks of two experts each, K = 2; rank 0 has expert_ids [[1, 0]], rank 1 has
        [[0, 3], [1, 2]]. Rank 0 receives counts [[1, 1], [1, 1]], offsets [2, 4],
        group_starts [[0, 1, 2], [2, 3, 4]], source [0, 1, 0, 1], slot_ids [1, 0, 0, 2].
    """
    program = tl.program_id(0)
    fine = False
    if not is_broken(problem_ptr):
        epoch = next_epoch(state_ptr, RECEIVED)
        control = tl.load(bases_ptr + rank) + control_start(epoch, slots, control_bytes)
        fine = wait_records(
            problem_ptr, notice_ptr, control, epoch, digest, world, kind, severity, patience, CLOCK,
            WORLD,
        )  # fmt: skip
        if fine:
            numbers = control + world * RECORD_BYTES
            counts = _load_counts(
                numbers, number_bytes, first, rank, world, replicas, local, LOCAL, WORLD
            )
            rows = tl.sum(counts, axis=1)
            padded = (rows + alignment - 1) // alignment * alignment
            offsets = tl.cumsum(padded, axis=0)
            starts = (offsets - padded)[:, None] + tl.cumsum(counts, axis=1) - counts
            expert = tl.arange(0, LOCAL)
            source = tl.arange(0, WORLD)
            if program == 0:
                is_expert = expert < local
                mask = is_expert[:, None] & (source < world)[None, :]
                at = expert[:, None] * world + source[None, :]
                tl.store(counts_ptr + at, counts, mask=mask)
                before = tl.cumsum(rows, axis=0) - rows
                sums = before[:, None] + tl.cumsum(counts, axis=1)
                tl.store(recv_counts_cumsum_ptr + at, sums, mask=mask)
                tl.store(group_starts_ptr + at + expert[:, None], starts, mask=mask)
                last = expert * (world + 1) + world
                tl.store(group_starts_ptr + last, offsets - padded + rows, mask=is_expert)
                tl.store(offsets_ptr + expert, tl.minimum(offsets, room), mask=is_expert)
                tl.store(totals_ptr + expert, rows.to(totals_ptr.dtype.element_ty), mask=is_expert)
                if load_ptr is not None:
                    load = tl.load(load_ptr + expert, mask=is_expert, other=0)
                    tl.store(load_ptr + expert, load + rows, mask=is_expert)

            flat_starts = tl.reshape(starts, [LOCAL * WORLD])
            data_start = (
                slots * control_bytes + (epoch & (data_slots - 1)).to(tl.int64) * data_bytes
            )
            slot = tl.arange(0, SLOTS)[None, :]
            for tile in range(program, world * tl.cdiv(max_tokens, ROWS), tl.num_programs(0)):
                # Ranks begin with different sources, so that not all of them read rank 0 first.
                sender = (tile + rank + 1) % world
                first_token = tile // world * ROWS
                record = pointer(control + sender * RECORD_BYTES, tl.int32)
                num_tokens = tl.load(record + EXTRA)
                if first_token < num_tokens and sender % replicas == rank % replicas:
                    data = tl.load(bases_ptr + sender) + data_start
                    token = first_token + tl.arange(0, ROWS)[:, None]
                    inside = (token < num_tokens) & (slot < TOP)
                    if SHARED:
                        active = pointer(data + 2 * positions_start, tl.int32) + token + slot
                        position = tl.load(active, mask=inside, other=_NOWHERE)
                        group = tl.zeros([ROWS, SLOTS], tl.int32) + sender
                        here = position >= 0
                    else:
                        at = token * top_k + slot
                        ids = tl.load(pointer(data, tl.int32) + at, mask=inside, other=_NOWHERE)
                        group = (ids - first) * WORLD + sender
                        here = (ids >= first) & (ids < first + local)
                        group = tl.where(here, group, 0)
                        places = pointer(data + positions_start, tl.int32) + at
                        position = tl.load(places, mask=here, other=0)
                    flat_group = tl.reshape(group, [ROWS * SLOTS])
                    start = tl.reshape(tl.gather(flat_starts, flat_group, axis=0), [ROWS, SLOTS])
                    dest = start + position
                    here = here & (dest < room)
                    dest = tl.where(here, dest, -1)
                    number = slot_base + slot
                    sent_from = tl.zeros([ROWS, SLOTS], tl.int64) + sender
                    tl.store(source_ptr + dest, sent_from, mask=here)
                    tl.store(slot_ids_ptr + dest, token * num_slots + number, mask=here)
                    if row_weights_ptr is not None:
                        DTYPE: tl.constexpr = row_weights_ptr.dtype.element_ty
                        if SHARED:
                            weight = tl.full([ROWS, SLOTS], 1.0, DTYPE)
                        else:
                            weights = pointer(data + weights_start, DTYPE)
                            weight = tl.load(weights + token * top_k + slot, mask=here, other=0.0)
                        tl.store(row_weights_ptr + dest, weight, mask=here)

                    row_data = data + rows_start
                    for part in tl.static_range(TOP if PER_SLOT else 1):
                        token_row = first_token.to(tl.int64) if ROWS == 1 else token.to(tl.int64)
                        target = dest
                        if PER_SLOT:
                            token_row = token_row * num_slots + slot_base + part
                            target = tl.where(slot == part, dest, -1)
                        row = row_data + token_row * row_bytes
                        present = tl.max(target, axis=1, keep_dims=True) >= 0
                        _copy_row(
                            row, present, target, x_ptr, width_units, x_units, WORD, UNIT, ROWS,
                            SLOTS, TOP, BLOCK,
                        )  # fmt: skip
                        if SCALE is not None:
                            _copy_row(
                                row + scale_offset, present, target, scale_ptr, num_scales,
                                num_scales, SCALE, 1, ROWS, SLOTS, TOP, SCALES,
                            )  # fmt: skip

            if PADDED:
                for owner in range(program, local, tl.num_programs(0)):
                    one = expert == owner
                    end = tl.minimum(tl.sum(tl.where(one, offsets, 0)), room)
                    begin = tl.sum(tl.where(one, offsets - padded + rows, 0))
                    _zero_rows(x_ptr, begin, end, x_units * UNIT, width_units * UNIT, ROWS, BLOCK)
                    if SCALE is not None:
                        _zero_rows(scale_ptr, begin, end, num_scales, num_scales, ROWS, SCALES)
                    for row in range(begin, end, LINE):
                        at = row + tl.arange(0, LINE)
                        none = tl.full([LINE], _NOWHERE, tl.int64)
                        tl.store(source_ptr + at, none, mask=at < end)
                        tl.store(slot_ids_ptr + at, none.to(tl.int32), mask=at < end)
                        if row_weights_ptr is not None:
                            zeros = tl.zeros([LINE], row_weights_ptr.dtype.element_ty)
                            tl.store(row_weights_ptr + at, zeros, mask=at < end)
            # Nothing comes for the rows after the last one.
            end = tl.minimum(tl.sum(padded), room)
            for row in range(end + program * LINE, num_rows, tl.num_programs(0) * LINE):
                at = row + tl.arange(0, LINE)
                none = tl.full([LINE], _NOWHERE, tl.int64)
                tl.store(source_ptr + at, none, mask=at < room)
                tl.store(slot_ids_ptr + at, none.to(tl.int32), mask=at < room)
                if row_weights_ptr is not None:
                    zeros = tl.zeros([LINE], row_weights_ptr.dtype.element_ty)
                    tl.store(row_weights_ptr + at, zeros, mask=at < num_rows)
    if program == 0 and not fine:
        # Work that is already queued behind this call finds no rows.
        expert = tl.arange(0, LOCAL)
        none = tl.zeros([LOCAL], tl.int32)
        tl.store(offsets_ptr + expert, none, mask=expert < local)
        none = none.to(totals_ptr.dtype.element_ty)
        tl.store(totals_ptr + expert, none, mask=expert < local)
        for pair in range(0, local * world, LINE):
            at = pair + tl.arange(0, LINE)
            zeros = tl.zeros([LINE], tl.int32)
            tl.store(counts_ptr + at, zeros, mask=at < local * world)
            tl.store(recv_counts_cumsum_ptr + at, zeros, mask=at < local * world)
    end_recv(state_ptr, problem_ptr)


def dispatch_recv(
    windows: Windows,
    layout: ExchangeLayout,
    num_rows: int | None,
    load: torch.Tensor | None,
    *,
    totals_dtype: torch.dtype,
    digest: int,
    timeout: float,
) -> ReceivedRows:
    """Wait for the records of all ranks and gather the rows for this rank.

    Arguments as in ``ref.dispatch_recv``; time as in ``recv_records``.

    Raises:
        ArgumentTypeError: a wrong dtype.
        ArgumentValueError: a wrong shape, stride or device.
    """
    if num_rows is None:
        num_rows = int(dispatch_totals(windows, layout, digest=digest, timeout=timeout)[-1])
    plan = _plan(windows.signature, layout, num_rows, load, totals_dtype, digest, timeout)
    fmt, world, empty = layout.row_format, windows.world_size, plan.empty
    local, room = plan.local, plan.room
    scales = weights = None
    if fmt.scale_offset is not None:
        scales = empty(fmt.scale_shape(num_rows), dtype=fmt.scale_dtype)
    if layout.weight_dtype is not None:
        weights = empty(num_rows, dtype=layout.weight_dtype)
    received = ReceivedRows(
        x=empty((num_rows, fmt.hidden), dtype=fmt.dtype),
        scales=scales,
        weights=weights,
        source=empty(room, dtype=torch.int64),
        slot_ids=empty(room),
        counts=empty((local, world)),
        recv_counts_cumsum=empty(local * world),
        offsets=empty(local),
        group_starts=empty((local, world + 1)),
        totals=empty(local, dtype=totals_dtype),
    )
    _dispatch_recv_kernel[plan.grid](
        windows.bases,
        windows.state,
        windows.problem,
        windows.notice,
        received.x.view(plan.word),
        None if scales is None else scales.view(WORDS[fmt.scale_dtype.itemsize]),
        weights,
        received.source,
        received.slot_ids,
        received.counts,
        received.recv_counts_cumsum,
        received.offsets,
        received.group_starts,
        received.totals,
        load,
        *plan.sizes,
        **plan.constants,
    )
    return received


class _Plan(NamedTuple):
    """A launch of ``_dispatch_recv_kernel``.

    Attributes:
        empty: ``torch.empty`` for int32 on the device.
        local: experts of this rank.
        room: rows that are numbered.
        word: dtype that moves the payload.
        grid: of the programs.
        sizes: the arguments after the tensors.
        constants: the constexprs and options.
    """

    empty: Callable[..., torch.Tensor]
    local: int
    room: int
    word: torch.dtype
    grid: tuple[int]
    sizes: tuple[int, ...]
    constants: dict[str, Any]


@launch_config.planned
def _plan(
    windows: WindowsSignature,
    layout: ExchangeLayout,
    num_rows: int,
    load: torch.Tensor | None,
    totals_dtype: torch.dtype,
    digest: int,
    timeout: float,
) -> _Plan:
    """Check the arguments of ``dispatch_recv`` and plan its launch."""
    op, device, fmt, rank = "dispatch_recv", windows.device, layout.row_format, windows.rank
    if num_rows < 0:
        raise ArgumentValueError(op, "num_rows", "be at least 0", num_rows)
    if totals_dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(op, "totals_dtype", "be int32 or int64", totals_dtype)
    world, local = windows.world_size, layout.num_local_experts(rank)
    check_load(op, load, local, device)
    room = min(num_rows, layout.rank_capacity(rank))
    first = layout.first_expert(rank)
    shared = first < 0
    top = 1 if shared else layout.top_k
    row_bytes = fmt.hidden * fmt.dtype.itemsize
    word = math.gcd(4, row_bytes)
    width = row_bytes // word
    unit = math.gcd(16 // word, width)
    severity, patience, clock = wait_arguments(device, windows.hard, timeout)
    tiles = launch_config.tiles(device, layout.max_tokens, width, indexed=True)
    line = launch_config.line(device, max(num_rows, 1))
    has_scales = fmt.scale_offset is not None
    num_tiles = world * launch_config.cdiv(layout.max_tokens, tiles.rows)
    most = launch_config.at_a_time(
        device, launch_config.policy(device).num_programs, tiles.num_warps, registers=96
    )
    sizes = (
        rank,
        world,
        windows.kind,
        digest,
        severity,
        patience,
        *windows.ring,
        layout.dispatch_number_bytes,
        layout.positions_start,
        layout.weights_start,
        layout.rows_start,
        fmt.stride,
        fmt.scale_offset or 0,
        num_rows,
        room,
        layout.num_experts if shared else first,
        local,
        layout.shared_replicas if shared else 1,
        layout.max_tokens,
        layout.top_k,
        layout.num_slots,
        layout.top_k + rank // layout.shared_replicas if shared else 0,
        layout.alignment,
        width // unit,
        width // unit,
        fmt.num_scales if has_scales else 0,
    )
    constants = {
        "SHARED": shared,
        "PER_SLOT": layout.per_expert,
        "PADDED": layout.alignment > 1,
        "WORD": TRITON_DTYPES[WORDS[word]],
        "SCALE": TRITON_DTYPES[WORDS[fmt.scale_dtype.itemsize]] if has_scales else None,
        "UNIT": unit,
        "TOP": top,
        "SLOTS": launch_config.next_power_of_2(top),
        "LOCAL": launch_config.next_power_of_2(local),
        "WORLD": launch_config.next_power_of_2(world),
        "ROWS": tiles.rows,
        "BLOCK": tiles.block,
        "SCALES": launch_config.next_power_of_2(fmt.num_scales),
        "LINE": line.block,
        "CLOCK": clock,
        "num_warps": tiles.num_warps,
    }
    grid = (max(min(num_tiles, most), 1),)
    empty = functools.partial(torch.empty, dtype=torch.int32, device=device)
    return _Plan(empty, local, room, WORDS[word], grid, sizes, constants)


@triton.jit(
    do_not_specialize=[
        "rank",
        "kind",
        "digest",
        "severity",
        "patience",
        "num_shared_ranks",
    ]
)
def _dispatch_totals_kernel(
    bases_ptr,  # [W] int64
    state_ptr,  # [STATE_WORDS] int32
    problem_ptr,  # [PROBLEM_WORDS] int32, in and out
    notice_ptr,  # [1] int32 of the host
    totals_ptr,  # [W + 1] int32
    rank,
    world,
    kind,
    digest,
    severity,
    patience,
    slots,
    control_bytes,
    number_bytes,
    num_experts,
    experts_per_rank,
    num_shared_ranks,
    replicas,
    alignment,
    LOCAL: tl.constexpr,
    WORLD: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Count the rows of every rank, then those of this one with padding.

    Example: of ``_dispatch_recv_kernel``, rank 0: [4, 2, 4].
    """
    peer = tl.arange(0, WORLD)
    tl.store(totals_ptr + peer, tl.zeros([WORLD], tl.int32), mask=peer < world)
    tl.store(totals_ptr + world, 0)
    if not is_broken(problem_ptr):
        epoch = next_epoch(state_ptr, RECEIVED)
        control = tl.load(bases_ptr + rank) + control_start(epoch, slots, control_bytes)
        fine = wait_records(
            problem_ptr, notice_ptr, control, epoch, digest, world, kind, severity, patience, CLOCK,
            WORLD,
        )  # fmt: skip
        if fine:
            numbers = control + world * RECORD_BYTES
            for holder in range(world):
                is_shared = holder < num_shared_ranks
                start = tl.where(
                    is_shared, num_experts, (holder - num_shared_ranks) * experts_per_rank
                )
                groups = tl.where(is_shared, replicas, 1)
                size = tl.where(is_shared, 1, experts_per_rank)
                counts = _load_counts(
                    numbers, number_bytes, start, holder, world, groups, size, LOCAL, WORLD
                )
                rows = tl.sum(counts, axis=1)
                tl.store(totals_ptr + holder, tl.sum(rows))
                if holder == rank:
                    padded = (rows + alignment - 1) // alignment * alignment
                    tl.store(totals_ptr + world, tl.sum(padded))


def dispatch_totals(
    windows: Windows, layout: ExchangeLayout, *, digest: int, timeout: float
) -> torch.Tensor:
    """Wait for the records of all ranks and count the rows that each rank receives.

    Arguments as in ``ref.dispatch_totals``; time as in ``recv_records``.
    """
    device, world = windows.device, windows.world_size
    totals = torch.empty(world + 1, dtype=torch.int32, device=device)
    severity, patience, clock = wait_arguments(device, windows.hard, timeout)
    _dispatch_totals_kernel[(1,)](
        windows.bases,
        windows.state,
        windows.problem,
        windows.notice,
        totals,
        windows.rank,
        world,
        windows.kind,
        digest,
        severity,
        patience,
        windows.ring.slots,
        windows.ring.control_bytes,
        layout.dispatch_number_bytes,
        layout.num_experts,
        layout.experts_per_rank,
        layout.num_shared_ranks,
        layout.shared_replicas,
        layout.alignment,
        LOCAL=launch_config.next_power_of_2(layout.experts_per_rank),
        WORLD=launch_config.next_power_of_2(world),
        CLOCK=clock,
    )
    return totals

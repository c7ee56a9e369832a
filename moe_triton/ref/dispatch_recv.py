"""Receive tokens: number the rows that all ranks sent this one, and gather them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..layout import FLOAT8, NOWHERE, ExchangeLayout, ReceivedRows, RowFormat, Windows
from ..layout.windows import EXTRA, RECEIVED
from ._windows import HostWindows, host

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64}


def dispatch_totals(
    windows: Windows,
    layout: ExchangeLayout,
    *,
    digest: int,
    timeout: float,  # noqa: ARG001 - the host has waited
) -> torch.Tensor:
    """Wait for the records of all ranks and count the rows that each rank receives.

    The epoch still has to be received.

    Args:
        windows: of dispatch.
        layout: of the call.
        digest: as in ``recv_records``.
        timeout: as in ``recv_records``.

    Returns:
        [W + 1] int32 rows of every rank without padding, then those of this rank with padding;
        zeros after a problem.
    """
    memory = host(windows)
    world, shared_ranks = windows.world_size, layout.num_shared_ranks
    totals = np.zeros(world + 1, np.int32)
    epoch = memory.next_epoch(RECEIVED)
    if memory.broken or memory.records(epoch, digest) is None:
        return torch.from_numpy(totals)
    numbers = memory.numbers(epoch, layout.dispatch_number_bytes)[:, : layout.num_experts + 1]
    experts = numbers[:, :-1].sum(0)
    totals[shared_ranks:world] = experts.reshape(world - shared_ranks, -1).sum(1)
    if shared_ranks:
        replicas = layout.shared_replicas
        active = np.bincount(np.arange(world) % replicas, numbers[:, -1], replicas)
        totals[:shared_ranks] = active[np.arange(shared_ranks) % replicas]
    first = layout.first_expert(memory.rank)
    rows = totals[memory.rank, None] if first < 0 else experts[first:][: layout.experts_per_rank]
    totals[world] = _padded(rows, layout.alignment).sum()
    return torch.from_numpy(totals)


def _padded(rows: np.ndarray, alignment: int) -> np.ndarray:
    return (rows + (alignment - 1)) // alignment * alignment


def dispatch_recv(
    windows: Windows,
    layout: ExchangeLayout,
    num_rows: int | None,
    load: torch.Tensor | None,
    *,
    totals_dtype: torch.dtype,
    digest: int,
    timeout: float,  # noqa: ARG001 - the host has waited
) -> ReceivedRows:
    """Wait for the records of all ranks and gather the rows for this rank.

    Rows are in (local expert, source, slot id) order. Those past ``num_rows`` are dropped.

    Args:
        windows: of dispatch.
        layout: of the call.
        num_rows: rows of the result; None for as many as come.
        load: [L] int64, the rows of each local expert without padding are added to it; or None.
        totals_dtype: int32 or int64, of ``totals``.
        digest: as in ``recv_records``.
        timeout: as in ``recv_records``.
    """
    memory, fmt = host(windows), layout.row_format
    epoch = memory.next_epoch(RECEIVED)
    records = None if memory.broken else memory.records(epoch, digest)
    if records is None:
        memory.received(epoch)
        return _void(memory, layout, num_rows or 0, totals_dtype)

    groups = _groups(memory, layout, epoch)
    counts = np.array(groups[:, :-1], order="C")
    of_groups = groups.cumsum(dtype=np.int32).reshape(groups.shape)
    starts, ends = of_groups - groups, of_groups[:, -1]
    most = layout.rank_capacity(memory.rank)
    if num_rows is None:
        num_rows = min(int(ends[-1]), most)
    room = min(num_rows, most)
    offsets = np.minimum(ends, room)
    rows = _rows(memory, layout, epoch, records, starts)
    if ends[-1] > room:
        rows = _Rows(*(values[rows.row < room] for values in rows))
    source = np.full(room, NOWHERE, np.int64)
    source[rows.row] = rows.source
    slot_ids = np.full(room, NOWHERE, np.int32)
    slot_ids[rows.row] = rows.slot_id

    origins = memory.row_origins(memory.data_slot(epoch), layout.rows_start)
    sent = rows.slot_id if layout.per_expert else rows.token
    index = np.zeros(offsets[-1], np.int64)
    index[rows.row] = origins[rows.source] + sent * (fmt.stride // 16)
    x, scales = _gather(memory, fmt, index, num_rows)
    if len(rows.row) < len(index):
        padding = torch.from_numpy((source[: len(index)] == NOWHERE).nonzero()[0])
        for table in (x.view(torch.uint8), scales):
            if table is not None:
                table[padding] = 0
    totals = counts.sum(1)
    if load is not None:
        load += torch.from_numpy(totals)
    memory.received(epoch)
    return ReceivedRows(
        x=x,
        scales=scales,
        weights=_weights(memory, layout, epoch, rows, num_rows),
        source=torch.from_numpy(source),
        slot_ids=torch.from_numpy(slot_ids),
        counts=torch.from_numpy(counts),
        recv_counts_cumsum=torch.from_numpy(counts.cumsum(dtype=np.int32)),
        offsets=torch.from_numpy(offsets),
        group_starts=torch.from_numpy(starts),
        totals=torch.from_numpy(totals.astype(_NUMPY[totals_dtype], copy=False)),
    )


class _Rows(NamedTuple):
    """Received rows, in the order in which they were found; [n] integers.

    Attributes:
        source: rank that sent the row.
        token: of the row at its source.
        slot: of the row at its source, token * K + slot; of no meaning for a shared expert.
        slot_id: of the row at its source, token * (K + NS) + slot.
        row: of the result.
    """

    source: np.ndarray
    token: np.ndarray
    slot: np.ndarray
    slot_id: np.ndarray
    row: np.ndarray


def _groups(memory: HostWindows, layout: ExchangeLayout, epoch: int) -> np.ndarray:
    """[L, W + 1] int32 rows for each local expert from each source, then those of its padding."""
    first, rank = layout.first_expert(memory.rank), memory.rank
    numbers = memory.numbers(epoch, layout.dispatch_number_bytes)
    groups = np.zeros((layout.num_local_experts(rank), len(numbers) + 1), np.int32)
    if first >= 0:
        groups[:, :-1] = numbers[:, first : first + layout.experts_per_rank].T
    else:
        served = slice(rank % layout.shared_replicas, -1, layout.shared_replicas)
        groups[0, served] = numbers[served.start :: served.step, layout.num_experts]
    if layout.alignment > 1:
        groups[:, -1] = -groups.sum(1) % layout.alignment
    return groups


def _rows(
    memory: HostWindows,
    layout: ExchangeLayout,
    epoch: int,
    records: np.ndarray,
    starts: np.ndarray,
) -> _Rows:
    """Find the rows for this rank among the slots of all sources.

    Args:
        memory: the windows.
        layout: of the call.
        epoch: of the dispatch.
        records: [W, 4].
        starts: [L, W + 1] first row of each (local expert, source).
    """
    num_tokens, first = records[:, EXTRA, None], layout.first_expert(memory.rank)
    data = memory.data_words(memory.data_slot(epoch))
    if first < 0:
        replicas = layout.shared_replicas
        number = np.arange(num_tokens.max())
        position = memory.words.take(data + (layout.active_start // 4 + number))
        served = np.arange(len(records)) % replicas == memory.rank % replicas
        sent = (number < num_tokens) & (position >= 0) & served[:, None]
        source, token = sent.nonzero()
        slot_id = token * layout.num_slots + (layout.top_k + memory.rank // replicas)
        row = starts[0, source] + position[source, token]
        return _Rows(source, token, slot_id, slot_id, row)
    num_slots = num_tokens * layout.top_k
    number = np.arange(num_slots.max())
    places = data + number
    expert = memory.words.take(places) - np.int32(first)
    # Negative ids are large as unsigned integers.
    sent = (expert.view(np.uint32) < layout.experts_per_rank) & (number < num_slots)
    source, slot = sent.nonzero()
    position = memory.words.take(places[sent] + layout.positions_start // 4)
    row = starts[expert[sent], source] + position
    token = slot // layout.top_k
    slot_id = slot + token * layout.num_shared_experts
    return _Rows(source, token, slot, slot_id, row)


def _gather(
    memory: HostWindows, fmt: RowFormat, index: np.ndarray, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gather payload and scales of the rows at an index; others follow up to ``num_rows``."""
    n, where, payload = len(index), torch.from_numpy(index), memory.payload(fmt)
    x = torch.empty((num_rows, fmt.hidden), dtype=payload.dtype)
    torch.index_select(payload, 0, where, out=x if n == num_rows else x[:n])
    if fmt.dtype in FLOAT8:
        x = x.view(fmt.dtype)
    if fmt.scale_offset is None:
        return x, None
    scales = torch.empty(fmt.scale_shape(num_rows), dtype=fmt.scale_dtype)
    table = memory.cached(("scales", fmt), lambda: fmt.scales(memory.rows(fmt)))
    torch.index_select(table, 0, where, out=scales[:n].view(n, fmt.num_scales))
    return x, scales


def _weights(
    memory: HostWindows, layout: ExchangeLayout, epoch: int, rows: _Rows, num_rows: int
) -> torch.Tensor | None:
    """[num_rows] weights of the rows, 0 without one."""
    if layout.weight_dtype is None:
        return None
    size = layout.weight_dtype.itemsize
    weights = np.zeros(num_rows, f"f{size}")
    if layout.first_expert(memory.rank) < 0:
        weights[rows.row] = 1.0
    else:
        start = memory.ring.data_start(memory.data_slot(epoch)) + layout.weights_start
        first = (memory.offsets + start) // size
        weights[rows.row] = memory.elements(size).take(first[rows.source] + rows.slot)
    return torch.from_numpy(weights)


def _void(
    memory: HostWindows, layout: ExchangeLayout, num_rows: int, totals_dtype: torch.dtype
) -> ReceivedRows:
    """The result after a problem: no rows."""
    fmt, world = layout.row_format, layout.world_size
    local = layout.num_local_experts(memory.rank)
    room = min(num_rows, layout.rank_capacity(memory.rank))
    scales = weights = None
    if fmt.scale_offset is not None:
        scales = torch.empty(fmt.scale_shape(num_rows), dtype=fmt.scale_dtype)
    if layout.weight_dtype is not None:
        weights = torch.empty(num_rows, dtype=layout.weight_dtype)
    return ReceivedRows(
        torch.empty((num_rows, fmt.hidden), dtype=fmt.dtype),
        scales,
        weights,
        torch.empty(room, dtype=torch.int64),
        torch.empty(room, dtype=torch.int32),
        torch.zeros((local, world), dtype=torch.int32),
        torch.zeros(local * world, dtype=torch.int32),
        torch.zeros(local, dtype=torch.int32),
        torch.empty((local, world + 1), dtype=torch.int32),
        torch.zeros(local, dtype=totals_dtype),
    )

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
    number_bytes = layout.dispatch_number_bytes
    numbers = memory.numbers(epoch, number_bytes, 0, layout.num_experts + 1)
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
    num_rows: int,
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
        num_rows: rows of the result.
        load: [L] int64, the rows of each local expert without padding are added to it; or None.
        totals_dtype: int32 or int64, of ``totals``.
        digest: as in ``recv_records``.
        timeout: as in ``recv_records``.
    """
    memory, world = host(windows), windows.world_size
    fmt, rank = layout.row_format, memory.rank
    local, room = layout.num_local_experts(rank), min(num_rows, layout.rank_capacity(rank))
    x = torch.empty((num_rows, fmt.hidden), dtype=fmt.dtype)
    scales = None
    if fmt.scale_offset is not None:
        scales = torch.empty(fmt.scale_shape(num_rows), dtype=fmt.scale_dtype)
    epoch = memory.next_epoch(RECEIVED)
    records = None if memory.broken else memory.records(epoch, digest)
    if records is None:
        memory.received(epoch)
        return _void(layout, world, local, room, x, scales, totals_dtype)

    counts = _counts(memory, layout, epoch)
    rows = counts.sum(1, dtype=np.int32)
    padded = _padded(rows, layout.alignment)
    groups = np.concatenate([counts, (padded - rows)[:, None]], axis=1)
    starts = groups.cumsum(dtype=np.int32).reshape(groups.shape) - groups
    offsets = np.minimum(padded.cumsum(dtype=np.int32), room)
    found = _rows(memory, layout, epoch, records, starts)
    if len(found.row) and int(found.row.max()) >= room:
        found = _Rows(*(values[found.row < room] for values in found))
    source = np.full(room, NOWHERE, np.int64)
    slot_ids = np.full(room, NOWHERE, np.int32)
    source[found.row] = found.source
    slot_ids[found.row] = found.token * layout.num_slots + found.slot

    sent = found.token
    if layout.per_expert:
        sent = sent * layout.num_slots + found.slot
    origins = memory.row_origins(memory.data_slot(epoch), layout.rows_start)
    index = np.zeros(int(offsets[-1]), np.int64)
    index[found.row] = origins[found.source] + sent.astype(np.int64) * (fmt.stride // 16)
    _gather(memory, fmt, index, x, scales)
    if len(found.row) < len(index):
        padding = torch.from_numpy((source[: len(index)] == NOWHERE).nonzero()[0])
        for table in (x.view(torch.uint8), scales):
            if table is not None:
                table[padding] = 0
    if load is not None:
        load += torch.from_numpy(rows)
    memory.received(epoch)
    return ReceivedRows(
        x=x,
        scales=scales,
        weights=_weights(memory, layout, epoch, found, num_rows),
        source=torch.from_numpy(source),
        slot_ids=torch.from_numpy(slot_ids),
        counts=torch.from_numpy(counts),
        recv_counts_cumsum=torch.from_numpy(counts.cumsum(dtype=np.int32)),
        offsets=torch.from_numpy(offsets),
        group_starts=torch.from_numpy(starts),
        totals=torch.from_numpy(rows.astype(_NUMPY[totals_dtype])),
    )


class _Rows(NamedTuple):
    """Received rows, in the order in which they were found; [n] integers.

    Attributes:
        source: rank that sent the row.
        token: of the row at its source.
        slot: of the token.
        row: of the result.
    """

    source: np.ndarray
    token: np.ndarray
    slot: np.ndarray
    row: np.ndarray


def _counts(memory: HostWindows, layout: ExchangeLayout, epoch: int) -> np.ndarray:
    """[L, W] int32 rows for each local expert from each source."""
    first = layout.first_expert(memory.rank)
    number_bytes = layout.dispatch_number_bytes
    if first >= 0:
        numbers = memory.numbers(epoch, number_bytes, first, layout.experts_per_rank)
        return np.ascontiguousarray(numbers.T)
    active = memory.numbers(epoch, number_bytes, layout.num_experts, 1).T
    replicas = layout.shared_replicas
    served = np.arange(active.shape[1]) % replicas == memory.rank % replicas
    return np.where(served, active, 0).astype(np.int32)


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
    num_tokens, first = records[:, EXTRA], layout.first_expert(memory.rank)
    data = memory.offsets // 4 + memory.ring.data_start(memory.data_slot(epoch)) // 4
    if first < 0:
        served = np.arange(len(records)) % layout.shared_replicas == (
            memory.rank % layout.shared_replicas
        )
        number = np.arange(int(num_tokens.max()))
        position = memory.words[(data + layout.active_start // 4)[:, None] + number]
        sent = (number < num_tokens[:, None]) & (position >= 0) & served[:, None]
        source, token = sent.nonzero()
        shared = layout.top_k + memory.rank // layout.shared_replicas
        row = starts[0, source] + position[source, token]
        return _Rows(source, token, np.full_like(token, shared), row)
    slots = num_tokens * layout.top_k
    number = np.arange(int(slots.max()))
    ids = memory.words[data[:, None] + number]
    ids -= first
    # Negative ids are large as unsigned integers.
    sent = (ids.view(np.uint32) < layout.experts_per_rank) & (number < slots[:, None])
    source, at = sent.nonzero()
    position = memory.words[data[source] + (layout.positions_start // 4) + at]
    row = starts[ids[source, at], source] + position
    return _Rows(source, at // layout.top_k, at % layout.top_k, row)


def _gather(
    memory: HostWindows,
    fmt: RowFormat,
    index: np.ndarray,
    x: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Gather payload and scales of the rows at an index."""
    n, where = len(index), torch.from_numpy(index)
    if fmt.dtype in FLOAT8:  # torch cannot select every float8: use its bytes.
        x = x.view(torch.uint8)
    payload = memory.cached(("payload", fmt), lambda: fmt.payload(memory.rows(fmt)).view(x.dtype))
    torch.index_select(payload, 0, where, out=x[:n])
    if scales is not None:
        table = memory.cached(("scales", fmt), lambda: fmt.scales(memory.rows(fmt)))
        torch.index_select(table, 0, where, out=scales[:n].view(n, fmt.num_scales))


def _weights(
    memory: HostWindows, layout: ExchangeLayout, epoch: int, found: _Rows, num_rows: int
) -> torch.Tensor | None:
    """[num_rows] weights of the rows, 0 without one."""
    if layout.weight_dtype is None:
        return None
    weights = torch.zeros(num_rows, dtype=layout.weight_dtype)
    if layout.first_expert(memory.rank) < 0:
        weights.numpy()[found.row] = 1.0
        return weights
    itemsize = layout.weight_dtype.itemsize
    table = memory.cached(
        ("weights", itemsize),
        lambda: memory.bytes[: len(memory.bytes) // itemsize * itemsize].view(f"f{itemsize}"),
    )
    start = memory.ring.data_start(memory.data_slot(epoch)) + layout.weights_start
    first = (memory.offsets + start) // itemsize
    weights.numpy()[found.row] = table[
        first[found.source] + found.token * layout.top_k + found.slot
    ]
    return weights


def _void(
    layout: ExchangeLayout,
    world: int,
    local: int,
    room: int,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    totals_dtype: torch.dtype,
) -> ReceivedRows:
    """The result after a problem: no rows."""
    weights = None
    if layout.weight_dtype is not None:
        weights = torch.empty(len(x), dtype=layout.weight_dtype)
    empty = x.new_empty
    return ReceivedRows(
        x,
        scales,
        weights,
        empty(room, dtype=torch.int64),
        empty(room, dtype=torch.int32),
        torch.zeros((local, world), dtype=torch.int32),
        torch.zeros(local * world, dtype=torch.int32),
        torch.zeros(local, dtype=torch.int32),
        empty((local, world + 1), dtype=torch.int32),
        torch.zeros(local, dtype=totals_dtype),
    )

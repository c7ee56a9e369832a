"""Receive the experts' rows: find those of each token in the windows and sum them."""

from __future__ import annotations

import numpy as np
import torch

from ..layout import (
    NOWHERE,
    ExchangeLayout,
    Norm,
    SlotPositions,
    Windows,
    ZeroComputationExperts,
)
from ..layout.windows import EXTRA, RECEIVED
from ._windows import HostWindows, host
from .dispatch_send import active_positions
from .weighted_sum import sum_payload


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
    timeout: float,  # noqa: ARG001 - the host has waited
) -> None:
    """Wait for the records of all ranks and sum the rows of each token from their windows.

    Sums as in ``weighted_sum``; outputs are untouched after a problem.

    Args:
        windows: of combine.
        layout: of the call.
        expert_ids: [T, K] int32 or int64 of this rank's tokens.
        positions: their positions.
        weights: as in ``weighted_sum``.
        zero_computation: as in ``weighted_sum``.
        addend: as in ``weighted_sum``.
        out: [T, H] output; or [T, K + NS, H] for the row of each slot, zeros where it has none:
            then nothing else is given.
        norm: as in ``weighted_sum``.
        digest: as in ``recv_records``.
        timeout: as in ``recv_records``.
    """
    memory, fmt = host(windows), layout.return_format
    epoch = memory.next_epoch(RECEIVED)
    records = None if memory.broken else memory.records(epoch, digest)
    if records is not None:
        index = _row_index(memory, layout, epoch, records, expert_ids, positions)
        rows = memory.rows(fmt) if fmt.scale_offset is not None else memory.payload(fmt)
        if out.dim() == 3:
            flat, each = out.view(-1, fmt.hidden), index.reshape(-1, 1)
            sum_payload(rows, each, fmt, None, None, None, flat)
        else:
            sum_payload(rows, index, fmt, weights, zero_computation, addend, out, norm)
    memory.received(epoch)


def _row_index(
    memory: HostWindows,
    layout: ExchangeLayout,
    epoch: int,
    records: np.ndarray,
    expert_ids: torch.Tensor,
    positions: SlotPositions,
) -> np.ndarray:
    """[T, K + NS] int64 index in ``HostWindows.rows`` of each slot's row, or ``NOWHERE``."""
    local, shared = layout.experts_per_rank, layout.num_shared_ranks
    ids, step = expert_ids.numpy(), np.int64(layout.return_format.stride // 16)
    starts = memory.numbers(epoch, layout.combine_number_bytes)
    origins = memory.row_origins(records[:, EXTRA], 0)
    position = positions.position_in_expert.numpy().reshape(ids.shape)
    # A slot that is not sent takes the first expert or the last.
    of_experts = starts[shared:, :local]
    row = of_experts.reshape(-1).take(ids, mode="clip") + position
    first = (origins[shared:, None] + of_experts * step).take(ids, mode="clip")
    index = first + position * step
    index[(position < 0) | (row >= layout.capacity)] = NOWHERE
    if not layout.num_shared_experts:
        return index
    given = positions.active_position
    active = active_positions(ids) if given is None else given.numpy()
    holders = np.array(layout.shared_ranks_of(memory.rank))
    row = starts[holders, 0] + active[:, None]
    sent = (active[:, None] != NOWHERE) & (row < layout.shared_capacity)
    shared_index = np.where(sent, origins[holders] + row.astype(np.int64) * step, NOWHERE)
    return np.concatenate([index, shared_index], axis=1)

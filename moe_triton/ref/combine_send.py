"""Send the experts' rows back: into this rank's window, with a record to every rank."""

from __future__ import annotations

import numpy as np
import torch

from ..layout import ExchangeLayout, Windows
from ..layout.windows import DATA_SLOT, SENT
from ._windows import host
from .quantize import encode_apart


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

    Args:
        windows: of combine.
        layout: of the call.
        y: [n, H] rows in the order of dispatch, those past the capacity without meaning; or None
            where they are in data slot 0 already.
        group_starts: [L, W + 1] int32 of dispatch.
        count: [1] int32: only this many rows are written; None for all n.
        digest: of the arguments, int32.
    """
    memory = host(windows)
    if memory.broken:
        return
    slot, fmt = 0, layout.return_format
    if y is not None:
        slot = memory.next_data_slot()
        most = layout.rank_capacity(memory.rank)
        n = min(y.shape[0], most) if count is None else min(y.shape[0], most, int(count))
        payload, scales = memory.own_rows(fmt, slot, 0)
        encode_apart(y[:n], fmt, payload[:n], None if scales is None else scales[:n])
    epoch, number_bytes = memory.next_epoch(SENT), layout.combine_number_bytes
    starts = group_starts.numpy()
    local, wide = len(starts), layout.experts_per_rank
    numbers = np.zeros((windows.world_size, 2 * wide), np.int32)
    numbers[:, :local] = starts[:, :-1].T
    # Also on a shared rank, of one expert, the counts come after as many numbers.
    np.subtract(starts[:, 1:].T, starts[:, :-1].T, out=numbers[:, wide : wide + local])
    memory.send(epoch, numbers, number_bytes, digest=digest, extra=slot)
    memory.state[DATA_SLOT] = slot

"""Send the experts' rows back: into this rank's window, with a record to every rank."""

from __future__ import annotations

import numpy as np
import torch

from ..layout import ExchangeLayout, Windows
from ..layout.windows import DATA_SLOT, SENT
from ._windows import host
from .quantize import encode


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
        y = y[: layout.rank_capacity(memory.rank)]
        rows = memory.data(memory.rank, slot, 0, len(y) * fmt.stride)
        encode(y, fmt, rows.view(len(y), fmt.stride), count=count)
    epoch, number_bytes = memory.next_epoch(SENT), layout.combine_number_bytes
    starts = group_starts.numpy()
    numbers = np.concatenate([starts[:, :-1], np.diff(starts)]).T  # [W, 2 L]
    if len(starts) < layout.experts_per_rank:  # of a shared rank: its counts come after L numbers
        numbers = _spread(numbers, layout.experts_per_rank)
    memory.send(epoch, numbers, number_bytes, digest=digest, extra=slot)
    memory.state[DATA_SLOT] = slot


def _spread(numbers: np.ndarray, local: int) -> np.ndarray:
    """[W, 2] as [W, 2 L] of a rank with L experts."""
    wide = np.zeros((len(numbers), 2 * local), np.int32)
    wide[:, ::local] = numbers
    return wide

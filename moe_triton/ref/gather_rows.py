"""Rows gathered from the windows of all ranks."""

from __future__ import annotations

import torch

from ..layout import FLOAT8, NOWHERE, RowFormat


def gather_rows(
    rows: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    x: torch.Tensor,
    scales: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Gather payload and scales of rows into the outputs of dispatch.

    Args:
        rows: [N, stride] uint8; rows may overlap, as in windows that are indexed every 16 bytes.
        index: [n] int32 or int64 rows to gather; ``NOWHERE`` makes a row of zeros.
        fmt: format of the rows.
        x: [A, H] output, of the payload's dtype; rows after the n-th are untouched.
        scales: [A] output of the scales' dtype, [A, C] where a row has several, or None.
        count: [1] int32: only this many rows are gathered; None for all n.
    """
    if count is not None:
        index = index[: int(count)]
    n, payload = index.numel(), fmt.payload(rows)
    if fmt.dtype in FLOAT8:
        # torch cannot select and fill every float8: use its bytes.
        payload, x = payload.view(torch.uint8), x.view(torch.uint8)
    absent = (index == NOWHERE).nonzero()[:, 0]
    if len(absent) == n:
        x[:n] = 0
        if scales is not None:
            scales[:n] = 0
        return
    # An absent row gathers some other row, and is zeroed afterwards.
    index = index.clamp(min=0) if len(absent) else index
    torch.index_select(payload, 0, index, out=x[:n])
    if scales is not None:
        scales = scales.view(len(scales), fmt.num_scales)
        scales[:n] = fmt.scales(rows)[index]
    for out in (x, scales) if len(absent) else ():
        if out is not None:
            out.index_fill_(0, absent, 0)


def zero_padding(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor | None = None) -> None:
    """Zero the rows of [A, C] ``x`` whose index is negative.

    Args:
        x: zeroed in place; rows after the n-th are untouched.
        index: [n] int32 or int64, negative for a row to zero.
        count: [1] int32: only this many indices are used; None for all n.
    """
    if count is not None:
        index = index[: int(count)]
    # torch cannot fill every float8: use its bytes.
    x.view(torch.uint8).index_fill_(0, (index < 0).nonzero()[:, 0], 0)

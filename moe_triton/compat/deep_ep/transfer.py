"""The buffer's connection to its group, and rows of several tensors sent as one.

The rows travel through the all-to-all-v of ``moe_triton.comm``: shared windows between the ranks of
a host, torch.distributed between hosts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from ... import comm
from ...errors import MoeError
from ...layout import NOWHERE, RowFormat
from ...ops import steps_on
from .routing import SendOrder

_KIND = "exchange"  # of the transport's operations


class RowExchange:
    """All-to-all-v of rows between the ranks of a buffer; all ranks issue the same calls.

    Args:
        op: for error messages.
        group: a process group, or a name that ``moe_triton.comm`` knows.
        timeout: seconds any wait for peers may take.

    Attributes:
        rank: this rank.
        size: W.
    """

    def __init__(self, op: str, group: dist.ProcessGroup | str | None, timeout: float) -> None:
        resolved = comm.resolve(op, group)
        self.rank, self.size = resolved.rank, resolved.size
        self._communicator = comm.open_communicator(
            resolved, transport="auto", in_flight=1, timeout=timeout
        )

    @contextlib.contextmanager
    def abort_peers_on_error(self, op: str) -> Iterator[None]:
        """Refuse a call: the peers, which wait for this rank's rows, raise too."""
        try:
            yield
        except MoeError as error:
            self._communicator.abort_peers(_KIND, op, error)
            raise

    def exchange(
        self, op: str, columns: Sequence[torch.Tensor], counts: list[int]
    ) -> tuple[list[torch.Tensor], list[int]]:
        """Send consecutive rows to each rank.

        Args:
            op: for error messages.
            columns: tensors [S, ...] whose rows travel together; trailing shapes and dtypes are
                equal on all ranks.
            counts: [W] rows for each rank.

        Returns:
            The received rows [R, ...] of each column, by (source, position), and their number from
            each rank.
        """
        rows = [as_bytes(column.detach().contiguous()) for column in columns]
        packed = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        call = comm.exchange_call(op, self.size, steps_on(packed.device), packed.device)
        transport = self._communicator.transport(op, call, _KIND)
        received = transport.all_to_all_v(call, packed, counts)
        row_bytes = packed.shape[1]
        data = torch.cat(received).view(-1, row_bytes)
        unpacked = [column.new_empty((len(data), *column.shape[1:])) for column in columns]
        for column, part in zip(
            unpacked, data.split([row.shape[1] for row in rows], 1), strict=True
        ):
            # A copy: in the packed rows elements need not be aligned.
            as_bytes(column).copy_(part)
        return unpacked, [part.numel() // row_bytes for part in received]

    def barrier(self, op: str) -> None:
        """Wait until all ranks have called it."""
        self.exchange(op, [torch.zeros(self.size, 1)], [1] * self.size)

    def close(self) -> None:
        """Release the windows. Peers notice when they next wait for this rank."""
        comm.close_communicator(self._communicator)


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> [N, bytes of a row] uint8, a view of a contiguous tensor."""
    columns = math.prod(rows.shape[1:])
    if rows.numel() == 0:  # any strides count as contiguous
        return rows.new_empty((len(rows), columns * rows.itemsize), dtype=torch.uint8)
    return rows.view(len(rows), columns).view(torch.uint8)


def take(columns: Sequence[torch.Tensor], order: SendOrder) -> list[torch.Tensor]:
    """The rows of [T, ...] tensors in the order in which they are sent."""
    return [gather_rows(column, order.tokens) for column in columns]


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x[index]`` for any dtype: torch cannot index every float8."""
    x = x.detach().contiguous()
    rows = x.new_empty((len(index), *x.shape[1:]))
    torch.index_select(as_bytes(x), 0, index, out=as_bytes(rows))
    return rows


def ordered_sum(
    rows: torch.Tensor, index: torch.Tensor, addends: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Sum rows for each token in float32, in the order of the columns, and round once.

    Args:
        rows: [N, H] fp16, bf16, fp32 or fp64.
        index: [T, S] int64 rows, or ``NOWHERE``.
        addends: [T, H] tensors, added before the rows.

    Returns:
        [T, H] of the dtype of ``rows``.
    """
    fmt = RowFormat.tight(rows.dtype, rows.shape[1])
    num_tokens, first = len(index), len(rows)
    own = torch.arange(num_tokens, device=index.device)[:, None]
    for number, addend in enumerate(addends):
        rows = torch.cat([rows, addend])
        index = torch.cat(
            [index[:, :number], first + number * num_tokens + own, index[:, number:]], 1
        )
    if len(rows) == 0 or num_tokens == 0:
        return rows.new_zeros((num_tokens, rows.shape[1]))
    missing = fmt.stride // rows.itemsize - rows.shape[1]
    raw = pad(rows, (0, missing)).contiguous().view(torch.uint8)
    out = rows.new_empty((num_tokens, rows.shape[1]))
    steps_on(rows.device).weighted_sum(raw, index.contiguous(), fmt, None, None, None, out)
    return out


def gather_or_zero(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[index]``, and zeros where the index is ``NOWHERE``; for small rows."""
    if len(rows) == 0:
        return rows.new_zeros((*index.shape, *rows.shape[1:]))
    found = rows[index.clamp(min=0)]
    absent = (index == NOWHERE).view(*index.shape, *(1,) * (rows.dim() - 1))
    return found.masked_fill(absent, 0)

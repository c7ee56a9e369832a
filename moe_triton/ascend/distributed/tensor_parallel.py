"""Tensor parallelism: the two ranks of a pair share each expert and exchange their rows.

Dispatch appends the peer's rows to each rank's own. Each rank computes with its half of the expert,
and combine adds the peer's part to the own rows before they return.
"""

from __future__ import annotations

import dataclasses

import torch

from ... import comm
from ...comm import Call, PackedReader
from ...errors import RoutingMismatchError


@dataclasses.dataclass(frozen=True)
class PeerRows:
    """The rows that the peer received.

    Attributes:
        count: its rows.
        recv_counts_cumsum: [W] int32 inclusive prefix sums of them by source.
    """

    count: int
    recv_counts_cumsum: torch.Tensor


def share_received(
    communicator: comm.Communicator,
    call: Call,
    x: torch.Tensor,
    scales: torch.Tensor | None,
    recv_counts_cumsum: torch.Tensor,
) -> PeerRows:
    """Append the peer's rows to the own ones.

    Args:
        communicator: of the pair.
        call: the call.
        x: [2 * A, H], the own rows; the peer's are written behind them.
        scales: [2 * A] or [2 * A, C] alike, or None.
        recv_counts_cumsum: [W] int32 prefix sums of the own rows.
    """
    own = int(recv_counts_cumsum[-1])
    capacity, hidden = len(x) // 2, x.shape[1]
    parts = [recv_counts_cumsum, x[:own]]
    sizes = [4 * len(recv_counts_cumsum), capacity * hidden * x.element_size()]
    if scales is not None:
        parts.append(scales[:own])
        sizes.append(capacity * scales.shape[1:].numel() * scales.element_size())

    def consume(received: list[torch.Tensor]) -> PeerRows:
        reader = PackedReader(received[1 - communicator.group.rank])
        peer_ends = reader.take((len(recv_counts_cumsum),), torch.int32).clone()
        count = int(peer_ends[-1])
        x[own : own + count] = reader.take((count, hidden), x.dtype)
        if scales is not None:
            shape = (count, *scales.shape[1:])
            scales[own : own + count] = reader.take(shape, scales.dtype)
        return PeerRows(count, peer_ends)

    transport = communicator.transport(call.op, call, "gather")
    pending = transport.all_gather_send(call, parts, comm.packed_bytes(sizes))
    return transport.all_gather_recv(pending, consume)


def add_halves(
    communicator: comm.Communicator,
    call: Call,
    y: torch.Tensor,
    own: int,
    count: int,
    capacity: int,
) -> torch.Tensor:
    """[own, H] the own rows, each the sum of both ranks' parts.

    Args:
        communicator: of the pair.
        call: the call.
        y: [.., H] outputs: the own rows, then the peer's.
        own: number of own rows.
        count: number of the peer's rows.
        capacity: A, the most rows of either rank.
    """
    hidden = y.shape[1]
    total = y.new_empty((own, hidden))
    peer = 1 - communicator.group.rank

    def consume(received: list[torch.Tensor]) -> None:
        reader = PackedReader(received[peer])
        returned = int(reader.take((1,), torch.int32))
        if returned != own:
            raise RoutingMismatchError(call.op, peer, "the TP pair", own, returned)
        call.steps.add_rows(y[:own], reader.take((own, hidden), y.dtype), total)

    transport = communicator.transport(call.op, call, "gather")
    parts = [torch.tensor([count], dtype=torch.int32), y[own : own + count]]
    num_bytes = comm.packed_bytes([4, capacity * hidden * y.element_size()])
    pending = transport.all_gather_send(call, parts, num_bytes)
    transport.all_gather_recv(pending, consume)
    return total

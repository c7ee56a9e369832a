"""Dispatch and combine over windows: ranks write their own rows, and their peers read them.

The memory may be that of the host, of a device on which all ranks of a process work, or of the
devices of several processes. ``ring_protocol`` says who waits for whom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from ..errors import ArgumentValueError, MoeError, RoutingMismatchError
from ..layout import NOWHERE, ReceivedRows, RecvPermutation, SlotPositions
from ..layout.windows import DATA
from .packing import write_packed
from .ring_protocol import RingProtocol, Terms
from .row_exchange import check_overflow, copies_of
from .transport import (
    Call,
    CombineEpilogue,
    CombineInput,
    DispatchInput,
    Pending,
    Received,
    WindowSteps,
    capturing,
    outside_autograd,
    phase,
    profiled,
)
from .window import MoeConfig, PeerWindows, bytes_ring

_T = TypeVar("_T")
_Input = TypeVar("_Input")


@dataclasses.dataclass(frozen=True)
class _Sent:
    """State of an operation between its phases.

    Attributes:
        windows: of all ranks.
        digest: of the arguments.
        positions: of the slots of a dispatch.
        records: the steps that wait for bytes on a device; None where the host waits.
    """

    windows: PeerWindows
    digest: int
    positions: SlotPositions | None = None
    records: WindowSteps | None = None


class SymmetricTransport:
    """The transport "local", "shm" or "symm_mem": windows that all ranks of the group read."""

    def __init__(self, protocol: RingProtocol) -> None:
        self.group_name = protocol.group.name
        self._protocol = protocol
        self._rank = protocol.rank

    @property
    def name(self) -> str:
        """Where the windows are."""
        return self._protocol.memory_name

    @outside_autograd
    def prepare(self, call: Call, kind: str) -> None:
        """Allocate the windows of ``kind`` by an operation without data."""
        protocol, op = self._protocol, call.op
        if kind in ("gather", "exchange"):
            terms = self._terms_of_bytes(call, call.arguments, 0)
        else:
            terms = _terms(call, kind, protocol.in_flight)
        digest = terms.digest
        epoch = protocol.acquire(kind, op)
        try:
            windows = protocol.handshake(kind, epoch, op, terms, call.steps)
            call.steps.send_record(windows.steps, digest=digest, status=DATA)
        except BaseException as error:
            protocol.abort(kind, epoch, error)
            raise
        protocol.signal(kind, epoch)
        protocol.wait(kind, epoch, op)
        timeout = protocol.kernel_timeout(windows.device)
        call.steps.recv_records(windows.steps, digest=digest, timeout=timeout)
        protocol.release(kind, epoch)

    @phase("dispatch send")
    def dispatch_send(self, call: Call, tokens: DispatchInput) -> Pending[DispatchInput]:
        """Write the tokens and a record; waits for peers only while arguments are new."""
        protocol, config = self._protocol, call.config
        epoch = protocol.acquire("dispatch", call.op)
        try:
            terms = _terms(call, "dispatch", protocol.in_flight)
            windows = protocol.handshake("dispatch", epoch, call.op, terms, call.steps)
            copies, own = copies_of(tokens)
            positions = call.steps.dispatch_send(
                windows.steps,
                config.layout,
                tokens.x,
                tokens.expert_ids,
                tokens.weights if config.with_weights else None,
                tokens.smooth_scales,
                copies,
                digest=terms.digest,
            )
        except BaseException as error:
            protocol.abort("dispatch", epoch, error)
            raise
        protocol.signal("dispatch", epoch)
        return Pending(self, call, own, epoch, _Sent(windows, terms.digest, positions))

    @phase("dispatch recv")
    def dispatch_recv(self, pending: Pending[DispatchInput]) -> Received:
        """Wait for all ranks' tokens and gather those for this rank."""
        protocol, call, sent = self._protocol, pending.call, self._wait("dispatch", pending)
        try:
            rows = self._receive_rows(call, pending.data, sent)
        except BaseException:
            protocol.owe("dispatch", pending.epoch)
            raise
        protocol.release("dispatch", pending.epoch)
        assert sent.positions is not None
        return _received(call, rows, pending.data.num_rows, sent.positions)

    def _receive_rows(self, call: Call, tokens: DispatchInput, sent: _Sent) -> ReceivedRows:
        windows, layout = sent.windows.steps, call.config.layout
        timeout = self._protocol.kernel_timeout(sent.windows.device)
        num_rows, limit = tokens.num_rows, call.config.max_rows
        unknown = num_rows is None and call.fixed_shapes
        if unknown or (limit is not None and not capturing(call.device)):
            totals = call.steps.dispatch_totals(
                windows, layout, digest=sent.digest, timeout=timeout
            ).tolist()
            self._protocol.raise_if_broken(call.op)
            check_overflow(call, totals[:-1])
            num_rows = totals[-1] if num_rows is None else num_rows
        return call.steps.dispatch_recv(
            windows,
            layout,
            num_rows,
            tokens.load,
            totals_dtype=tokens.totals_dtype,
            digest=sent.digest,
            timeout=timeout,
        )

    @phase("combine send")
    def combine_send(self, call: Call, inputs: CombineInput) -> Pending[CombineInput]:
        """Write the experts' rows, unless they are in the window already, and a record."""
        protocol, config = self._protocol, call.config
        epoch = protocol.acquire("combine", call.op)
        try:
            self._check_rows(call, inputs)
            in_a_row = not protocol.combine_slot_free
            terms = _terms(call, "combine", protocol.in_flight, in_a_row)
            windows = protocol.handshake("combine", epoch, call.op, terms, call.steps)
            y = self._rows_to_send(call, windows, inputs)
            protocol.claim_combine_slot(epoch)
            permutation = inputs.recv_permutation
            call.steps.combine_send(
                windows.steps,
                config.layout,
                y,
                permutation.group_starts,
                permutation.offsets[-1:] if call.fixed_shapes else None,
                digest=terms.digest,
            )
        except BaseException as error:
            protocol.abort("combine", epoch, error)
            raise
        protocol.signal("combine", epoch)
        return Pending(self, call, inputs, epoch, _Sent(windows, terms.digest))

    def _check_rows(self, call: Call, inputs: CombineInput) -> None:
        """Refuse rows that the combine after their ``output_rows`` has overwritten."""
        if not inputs.borrowed and self._protocol.in_combine_window(inputs.y):
            contract = "not be output_rows() from before another combine, which voids them"
            raise ArgumentValueError(call.op, "y", contract, "other rows of the window")

    def _rows_to_send(
        self, call: Call, windows: PeerWindows, inputs: CombineInput
    ) -> torch.Tensor | None:
        """[n, H] rows to copy into the window; None where they have been written there."""
        if windows.in_place(inputs.y, call.config.return_format):
            return None
        y = inputs.y[: inputs.recv_permutation.source.shape[0]]
        return y.clone() if windows.holds(y) else y  # source and target might overlap

    @phase("combine recv")
    def combine_recv(
        self, pending: Pending[CombineInput], epilogue: CombineEpilogue
    ) -> torch.Tensor:
        """Wait for all ranks' rows and compute each token's weighted sum from their windows."""
        protocol, call, sent = self._protocol, pending.call, self._wait("combine", pending)
        inputs, config = pending.data, call.config
        ids, plan = inputs.expert_ids, inputs.plan
        shape = (len(ids), config.num_slots) if epilogue.apart else (len(ids),)
        try:
            if not call.fixed_shapes:
                self._check_returns(call, inputs, sent, pending.epoch)
            out = inputs.y.new_empty((*shape, config.hidden))
            call.steps.combine_recv(
                sent.windows.steps,
                config.layout,
                ids,
                SlotPositions(plan.counts, plan.position_in_expert),
                None if epilogue.apart else inputs.weights,
                None if epilogue.apart else epilogue.special,
                None if epilogue.apart else epilogue.addend,
                out,
                None if epilogue.apart else epilogue.norm,
                digest=sent.digest,
                timeout=protocol.kernel_timeout(sent.windows.device),
            )
        except BaseException:
            protocol.owe("combine", pending.epoch)
            raise
        protocol.release("combine", pending.epoch)
        return out

    def _check_returns(self, call: Call, inputs: CombineInput, sent: _Sent, epoch: int) -> None:
        """Raise unless every rank returns as many rows as this one sent it, expert by expert."""
        layout, plan = call.config.layout, inputs.plan
        local, first = layout.experts_per_rank, layout.num_shared_ranks
        numbers = sent.windows.numbers(epoch, layout.combine_number_bytes)
        counts = numbers[:, local : 2 * local]
        returned, sent_counts = counts[first:], plan.counts.numpy()
        if returned.tobytes() != sent_counts.tobytes():
            returned = returned.reshape(-1)
            expert = int((returned != sent_counts).argmax())
            raise RoutingMismatchError(
                call.op,
                first + expert // local,
                f"expert {expert}",
                int(sent_counts[expert]),
                int(returned[expert]),
            )
        if layout.num_shared_experts:
            tokens = int((inputs.expert_ids != NOWHERE).any(1).sum())
            for shared, holder in enumerate(layout.shared_ranks_of(self._rank)):
                got = int(counts[holder, 0])
                if got != tokens:
                    target = f"shared expert {shared}"
                    raise RoutingMismatchError(call.op, holder, target, tokens, got)

    @phase("gather send")
    def all_gather_send(
        self, call: Call, parts: Sequence[torch.Tensor], num_bytes: int
    ) -> Pending[None]:
        """Write the parts into this rank's window."""
        return self._send_bytes(call, "gather", call.arguments, num_bytes, parts)

    @phase("gather recv")
    def all_gather_recv(
        self, pending: Pending[None], consume: Callable[[list[torch.Tensor]], _T]
    ) -> _T:
        """Wait for all ranks and read their windows."""
        return self._read_bytes("gather", pending, consume)

    def _send_bytes(
        self,
        call: Call,
        kind: str,
        arguments: Mapping[str, object],
        num_bytes: int,
        parts: Sequence[torch.Tensor],
    ) -> Pending[None]:
        """Write parts into this rank's slot of ``num_bytes``."""
        protocol, op, device = self._protocol, call.op, call.device
        records = None if protocol.host_waits(device) else call.steps
        terms = self._terms_of_bytes(call, arguments, num_bytes)
        digest = terms.digest
        epoch = protocol.acquire(kind, op)
        try:
            windows = protocol.handshake(kind, epoch, op, terms, records)
            write_packed(windows.data(self._rank, protocol.slot(epoch)), parts)
            if records is not None:
                records.send_record(windows.steps, digest=digest, status=DATA)
        except BaseException as error:
            protocol.abort(kind, epoch, error)
            raise
        protocol.signal(kind, epoch)
        return Pending(self, call, None, epoch, _Sent(windows, digest, records=records))

    def _terms_of_bytes(self, call: Call, arguments: Mapping[str, object], num_bytes: int) -> Terms:
        """The terms of an operation whose data slots hold ``num_bytes``."""
        ring = bytes_ring(self._protocol.size, num_bytes, self._protocol.in_flight)
        return Terms.of(ring, call.device, *arguments.items())

    def _read_bytes(
        self,
        kind: str,
        pending: Pending[None],
        consume: Callable[[list[torch.Tensor]], _T],
    ) -> _T:
        """Wait for all ranks; ``consume`` of their slots.

        The sizes of what they hold are read by the host, which therefore waits for a device.
        """
        protocol, sent = self._protocol, self._wait(kind, pending)
        windows, slot = sent.windows, protocol.slot(pending.epoch)
        try:
            if sent.records is not None:
                timeout = protocol.kernel_timeout(windows.device)
                sent.records.recv_records(windows.steps, digest=sent.digest, timeout=timeout)
                protocol.synchronize(pending.call.op, windows.device)
            return consume([windows.data(owner, slot) for owner in range(protocol.size)])
        finally:
            protocol.release(kind, pending.epoch)

    def _wait(self, kind: str, pending: Pending[_Input]) -> _Sent:
        sent = pending.state
        assert isinstance(sent, _Sent)
        with profiled(pending.call.op, f"{kind} wait", self.group_name):
            pending.waited = self._protocol.wait(kind, pending.epoch, pending.call.op)
        return sent

    @outside_autograd
    def output_rows(self, config: MoeConfig, num_rows: int) -> torch.Tensor | None:
        """Rows of the next combine's slot, so that experts can write them in place."""
        windows = self._protocol.borrowable_windows()
        needed = config.ring("combine", self._protocol.in_flight)
        if windows is None or config.return_format.scale_offset is not None:
            return None
        if not windows.ring.holds(needed):
            return None
        return config.layout.output_rows(windows.steps, num_rows)

    @outside_autograd
    def all_to_all_v(self, call: Call, x: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Exchange counts through one operation, then rows through a second."""
        row_bytes, world, rank = x.shape[1], self._protocol.size, self._rank
        arguments: dict[str, object] = {"op": call.op, "row_bytes": row_bytes}
        table = torch.tensor(counts, dtype=torch.int64)

        def read_counts(slots: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([slot[: 8 * world] for slot in slots]).view(torch.int64).cpu()

        matrix = self._exchange(call, arguments, 8 * world, table, read_counts)
        largest = int(matrix.sum(1).max()) * row_bytes
        # A power of two, so that windows grow only a few times.
        capacity = 1 << max(largest - 1, 4095).bit_length()
        sizes = (matrix[:, rank] * row_bytes).tolist()
        ends = (matrix.cumsum(1)[:, rank] * row_bytes).tolist()

        def read_rows(slots: list[torch.Tensor]) -> list[torch.Tensor]:
            rows = zip(slots, ends, sizes, strict=True)
            return [slot[end - size : end].clone() for slot, end, size in rows]

        arguments["capacity"] = capacity
        return self._exchange(call, arguments, capacity, x.reshape(-1), read_rows)

    def _exchange(
        self,
        call: Call,
        arguments: Mapping[str, object],
        num_bytes: int,
        part: torch.Tensor,
        read: Callable[[list[torch.Tensor]], _T],
    ) -> _T:
        """Show ``part`` to all ranks; ``read`` gets theirs."""
        pending = self._send_bytes(call, "exchange", arguments, num_bytes, [part])
        return self._read_bytes("exchange", pending, read)

    def window_bytes(self, kind: str) -> int:
        """Bytes of this rank's windows, all slots and records included."""
        return self._protocol.window_bytes(kind)

    def abort_peers(self, kind: str, op: str, error: MoeError) -> None:
        """Send an abort with the reason in place of data."""
        self._protocol.abort_peers(kind, op, error)

    def raise_if_broken(self, op: str) -> None:
        """Raise while the group is broken."""
        self._protocol.raise_if_broken(op)

    def close(self) -> None:
        """Release the windows."""
        self._protocol.close()


def _terms(call: Call, kind: str, in_flight: int, in_a_row: bool = False) -> Terms:
    """The terms of a dispatch or combine."""
    key = (kind, in_flight, in_a_row)
    if key not in call.derived:
        ring = call.config.ring(kind, in_flight, in_a_row=in_a_row)
        call.derived[key] = Terms.of(ring, call.device, *call.arguments.items())
    terms: Terms = call.derived[key]
    return terms


def _received(
    call: Call, rows: ReceivedRows, num_rows: int | None, positions: SlotPositions
) -> Received:
    """The rows, of which ``num_rows`` have been allocated; None for exactly those that came."""
    source, slot_ids = rows.source, rows.slot_ids
    if num_rows is not None and not call.fixed_shapes:
        n = int(rows.offsets.numpy()[-1])
        source, slot_ids = source[:n], slot_ids[:n]
    permutation = RecvPermutation(
        source, None, rows.recv_counts_cumsum, rows.offsets, rows.group_starts
    )
    return Received(
        rows.x,
        rows.scales,
        rows.weights,
        rows.counts,
        permutation,
        slot_ids,
        rows.totals,
        positions,
    )

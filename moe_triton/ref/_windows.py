"""Windows in host memory, as NumPy and PyTorch see them: records, numbers, rows.

One tensor spans the windows of all ranks, so that a step reads those of all peers at once. Views
are made once: making one costs as much as moving some kilobytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from ..layout import FLOAT8, RowFormat, Windows
from ..layout.windows import (
    ABORTED,
    BROKEN,
    DATA_SLOT,
    DIGEST,
    EPOCH,
    EXTRA,
    KIND,
    LATE,
    MISMATCH,
    OVERRUN,
    PROBLEM_EPOCH,
    PROBLEM_RANK,
    RECEIVED,
    RECORD_WORDS,
    SEEN,
    SENT,
    SEVERITY,
    SOFT,
    STATUS,
    WANTED,
    WHAT,
)

_T = TypeVar("_T")
_WORD = np.arange(RECORD_WORDS)


def wrap(epoch: int) -> int:
    """``epoch`` modulo 2**32, as a signed 32-bit integer."""
    return (epoch + 2**31) % 2**32 - 2**31


_FINE = struct.Struct("=3i")  # epoch, status and digest of a record


class HostWindows:
    """Views of one rank's ``Windows``. Offsets in ``words`` are those of int32."""

    def __init__(self, windows: Windows) -> None:
        assert windows.span is not None
        # Not the windows themselves, which keep these views: a cycle would keep the memory, too.
        self.ring, self.rank = windows.ring, windows.rank
        self._kind, self._hard, self._views = windows.kind, windows.hard, dict[Any, Any]()
        self.span = windows.span
        self.bytes: np.ndarray = windows.span.numpy()
        self.words = self.bytes[: len(self.bytes) // 4 * 4].view(np.int32)
        self.offsets: np.ndarray = windows.bases.numpy() - windows.span.data_ptr()
        self.own = int(self.offsets[self.rank])
        self._word_offsets, self._row_offsets = self.offsets // 4, self.offsets // 16
        self.state: np.ndarray = windows.state.numpy()
        self.problem: np.ndarray = windows.problem.numpy()
        self.notice: np.ndarray = windows.notice.numpy()
        self._world_size = world = windows.world_size
        # In each control slot, the words of this rank's records at each rank and of each rank's at
        # this one.
        sent = (self._word_offsets + self.rank * RECORD_WORDS)[:, None] + _WORD
        received = (self.own // 4 + np.arange(world) * RECORD_WORDS)[:, None] + _WORD
        controls = [self.control(slot) for slot in range(self.ring.slots)]
        self._sent_records = [sent + control for control in controls]
        self._received_records = [received + control for control in controls]

    @property
    def broken(self) -> bool:
        """Whether no step does anything any more."""
        return bool(self.problem[SEVERITY] >= BROKEN)

    def next_epoch(self, half: int) -> int:
        """The epoch that the next step of ``SENT`` or ``RECEIVED`` works on."""
        return wrap(int(self.state[half]) + 1)

    def control_slot(self, epoch: int) -> int:
        """The control slot of an epoch."""
        return epoch & (self.ring.slots - 1)

    def control(self, epoch: int) -> int:
        """Words before the control slot of an epoch."""
        return self.control_slot(epoch) * self.ring.control_bytes // 4

    def data_slot(self, epoch: int) -> int:
        """The data slot of a dispatch."""
        return epoch & (self.ring.data_slots - 1)

    def next_data_slot(self) -> int:
        """The data slot of combine rows that are copied."""
        return (int(self.state[DATA_SLOT]) + 1) & (self.ring.data_slots - 1)

    def data(self, slot: int, start: int, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 of a data slot of this rank."""
        first = self.own + self.ring.data_start(slot) + start
        return self.span[first : first + num_bytes]

    def own_rows(
        self, fmt: RowFormat, slot: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Payload and scales of all rows in a data slot of this rank, after ``start`` bytes."""

        def make() -> tuple[torch.Tensor, torch.Tensor | None]:
            count = (self.ring.data_bytes - start) // fmt.stride
            rows = self.data(slot, start, count * fmt.stride).view(count, fmt.stride)
            return fmt.payload(rows), None if fmt.scale_offset is None else fmt.scales(rows)

        return self.cached(("own rows", fmt, slot, start), make)

    def elements(self, itemsize: int) -> np.ndarray:
        """The span as floating-point numbers of some bytes each."""
        size = len(self.bytes) // itemsize * itemsize
        return self.cached(("elements", itemsize), lambda: self.bytes[:size].view(f"f{itemsize}"))

    def rows(self, fmt: RowFormat) -> torch.Tensor:
        """[N, stride] uint8: a row beginning every 16 bytes of the span."""
        return self.cached(("rows", fmt), lambda: self._every_row(fmt.stride))

    def payload(self, fmt: RowFormat) -> torch.Tensor:
        """[N, H] the payload of ``rows``; its bytes where torch cannot select the dtype."""
        bits = torch.uint8 if fmt.dtype in FLOAT8 else fmt.dtype
        return self.cached(("payload", fmt), lambda: fmt.payload(self.rows(fmt)).view(bits))

    def _every_row(self, stride: int) -> torch.Tensor:
        count = max((self.span.numel() - stride) // 16 + 1, 0)
        return self.span.as_strided((count, stride), (16, 1))

    def row_origins(self, slots: np.ndarray | int, start: int) -> np.ndarray:
        """[W] int64 index in ``rows`` of each rank's first row in a data slot of its own."""
        first, step = (self.ring.data_start(0) + start) // 16, np.int64(self.ring.data_bytes // 16)
        return self._row_offsets + (slots * step + first)

    def data_words(self, slot: int) -> np.ndarray:
        """[W, 1] index in ``words`` of each rank's data slot."""
        return (self._word_offsets + self.ring.data_start(slot) // 4)[:, None]

    def cached(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        """``make()``, once."""
        if key not in self._views:
            self._views[key] = make()
        found: _T = self._views[key]
        return found

    # Sending.

    def send(
        self, epoch: int, numbers: np.ndarray | None, number_bytes: int, *, digest: int, extra: int,
        status: int = 0,
    ) -> None:  # fmt: skip
        """Write this rank's records, which the host's flag releases, and end the send.

        Args:
            epoch: of the records.
            numbers: [N] for all ranks or [W, N], one row each, int32; or None.
            number_bytes: from the numbers of one source to those of the next.
            digest: of the arguments.
            extra: word of the record.
            status: of the record.
        """
        if numbers is not None:
            key = (self.control_slot(epoch), number_bytes, numbers.shape[-1])
            if numbers.ndim == 1:
                # Long, and the same for all: copied to each.
                for target in self.cached(("targets", *key), lambda: self._targets(*key)):
                    target[:] = numbers
            else:
                self.words[self.cached(("places", *key), lambda: self._places(*key))] = numbers
        self.words[self._sent_records[self.control_slot(epoch)]] = (epoch, status, digest, extra)
        self.state[SENT] = epoch

    def _places(self, slot: int, number_bytes: int, width: int) -> np.ndarray:
        """[W, width] index in ``words`` of this rank's numbers at each rank."""
        before = self.control(slot) + self._world_size * RECORD_WORDS
        start = self._word_offsets + (before + self.rank * number_bytes // 4)
        return start[:, None] + np.arange(width)

    def _targets(self, slot: int, number_bytes: int, width: int) -> list[np.ndarray]:
        """The same words, a view of each rank's."""
        starts = self._places(slot, number_bytes, 1)[:, 0].tolist()
        return [self.words[start : start + width] for start in starts]

    # Receiving.

    def records(self, epoch: int, digest: int) -> np.ndarray | None:
        """[W, 4] the records of an epoch, or None after a problem, which is reported."""
        records = self.words.take(self._received_records[self.control_slot(epoch)])
        if records[:, :EXTRA].tobytes() == _FINE.pack(epoch, 0, digest) * self._world_size:
            return records
        self._report(records, epoch, digest)
        return None

    def _report(self, records: np.ndarray, epoch: int, digest: int) -> None:
        """Keep the problem of the records, unless there is a worse one; the worst, lowest rank."""
        ahead = (records[:, EPOCH].astype(np.int64) - epoch).astype(np.int32)
        what = np.where(records[:, DIGEST] != digest, MISMATCH, 0)
        what = np.where(records[:, STATUS] != 0, ABORTED, what)
        what = np.where(ahead < 0, LATE, np.where(ahead > 0, OVERRUN, what))
        worst, rank = int(what.max()), int(what.argmax())
        severity = BROKEN if worst >= LATE or self._hard else SOFT
        if self.problem[SEVERITY] >= severity:
            return
        mismatch = worst == MISMATCH
        self.problem[SEVERITY] = severity
        self.problem[KIND] = self._kind
        self.problem[PROBLEM_EPOCH] = epoch
        self.problem[PROBLEM_RANK] = rank
        self.problem[SEEN] = records[rank, DIGEST if mismatch else EPOCH]
        self.problem[WANTED] = digest if mismatch else epoch
        self.problem[WHAT] = self.notice[0] = worst

    def received(self, epoch: int) -> None:
        """End the recv of an epoch, unless the group is broken."""
        if not self.broken:
            self.state[RECEIVED] = epoch

    def numbers(self, epoch: int, number_bytes: int) -> np.ndarray:
        """[W, N] numbers of all sources, a view."""
        world = self._world_size
        start = self.own // 4 + self.control(epoch) + world * RECORD_WORDS
        return self.words[start : start + world * number_bytes // 4].reshape(world, -1)


def host(windows: Windows) -> HostWindows:
    """The views of windows, made once."""
    views = windows.views
    if "host" not in views:
        views["host"] = HostWindows(windows)
    found: HostWindows = views["host"]
    return found

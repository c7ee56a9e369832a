"""Windows: memory of every rank that its peers read, laid out alike on all ranks.

A rank has one block of memory for each kind of operation. A block is a ring of control slots, then
a ring of data slots; offsets are equal on all ranks.

    control slot   records [W] of 16 bytes; numbers [W, N] int32          written by source s at s
    data slot      dispatch: ids [T, K] int32 | positions [T, K] int32 | active [T] int32 (with
                   shared experts) | weights [T, K] (if they travel) | rows [R] of a stride
                   combine: rows [A] of a stride        written by the owner, read by peers
    record         epoch, status, digest, extra; int32
                   dispatch: extra = tokens, numbers = rows for each of the E experts, then the
                   tokens that are active
                   combine:  extra = data slot of the rows, numbers = the first row of the source's
                             tokens for each local expert, then their number, [2, L]

A rank writes rows into its own block, and to each peer one record with its numbers. Records of all
calls lie at the same places, and never where rows of another call may lie: calls of different sizes
share a block. Operation number i of a kind, its epoch, uses control slot i % slots. A dispatch uses
the data slot of the same number; a combine uses the one after the last, or slot 0 where experts
wrote their rows in place.

Letters: W ranks, E routed experts, L experts of a rank, NS shared experts, S shared ranks, T most
tokens of a rank, K experts per token, R rows that a rank sends, A most rows that a rank receives.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentTypeError, ArgumentValueError
from .row_format import RowFormat, align

# Words of a record.
EPOCH, STATUS, DIGEST, EXTRA = range(4)
RECORD_WORDS = 4
RECORD_BYTES = 4 * RECORD_WORDS
#: Status of a record: data, or an abort without any.
DATA, ABORT = 0, 1

#: Words of a rank's state of a kind, in memory of its own: epochs of the last send and the last
#: recv, programs of either that have ended, the data slot of the last combine, and active tokens of
#: the last dispatch, which a kernel's programs hand on.
SENT, RECEIVED, SENDERS_DONE, RECEIVERS_DONE, DATA_SLOT, NUM_ACTIVE = range(6)
STATE_WORDS = 8

#: Words of a problem. Its epoch and rank are those of the record; seen and wanted are epochs, or
#: digests of a mismatch. Severity is claimed first: BROKEN ends all operations of the group.
WHAT, KIND, PROBLEM_EPOCH, PROBLEM_RANK, SEEN, WANTED, SEVERITY = range(7)
PROBLEM_WORDS = 8
#: Values of the word WHAT. After LATE and OVERRUN the group is broken.
MISMATCH, ABORTED, LATE, OVERRUN = 1, 2, 3, 4
#: Values of the word SEVERITY.
SOFT, BROKEN = 1, 2


class Ring(NamedTuple):
    """The slots of a block.

    Attributes:
        slots: control slots, a power of two.
        control_bytes: from one control slot to the next, a multiple of 16.
        data_slots: a power of two, at most ``slots``.
        data_bytes: from one data slot to the next, a multiple of 16.
    """

    slots: int
    control_bytes: int
    data_slots: int
    data_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of the block."""
        return self.data_start(self.data_slots)

    def holds(self, other: Ring) -> bool:
        """Whether calls made for ``other`` fit into a block of this ring."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def record(self, epoch: int, source: int) -> int:
        """Byte offset of the record that ``source`` writes for an epoch; its first word."""
        return (epoch & (self.slots - 1)) * self.control_bytes + source * RECORD_BYTES

    def data_start(self, slot: int) -> int:
        """Byte offset of a data slot."""
        return self.slots * self.control_bytes + slot * self.data_bytes

    def clear(self, block: torch.Tensor, world_size: int, epoch: int = 0) -> None:
        """Set the epochs of all records of a new [num_bytes] uint8 block to a past one."""
        words = block[: self.slots * self.control_bytes].view(torch.int32).view(self.slots, -1)
        words[:, : world_size * RECORD_WORDS : RECORD_WORDS] = epoch


@dataclasses.dataclass(frozen=True)
class ExchangeLayout:
    """Sizes of a dispatch and its combine, equal on all ranks, and the offsets in their slots.

    Attributes:
        world_size: W.
        num_experts: E.
        experts_per_rank: L of the ranks with routed experts, which come after the shared ranks.
        top_k: K.
        max_tokens: T.
        row_format: of a dispatched row.
        return_format: of a combine row.
        capacity: A of a rank with routed experts, padding included.
        shared_capacity: A of a rank with a shared expert.
        num_shared_experts: NS.
        num_shared_ranks: S.
        alignment: the rows of each local expert are padded to a multiple of this.
        per_expert: each expert has its own smooth scales, so that a row is sent for every slot.
        weight_dtype: of the weights that travel with the tokens, or None.
    """

    world_size: int
    num_experts: int
    experts_per_rank: int
    top_k: int
    max_tokens: int
    row_format: RowFormat
    return_format: RowFormat
    capacity: int
    shared_capacity: int = 0
    num_shared_experts: int = 0
    num_shared_ranks: int = 0
    alignment: int = 1
    per_expert: bool = False
    weight_dtype: torch.dtype | None = None

    def __hash__(self) -> int:
        return self._hash  # of many fields, and every launch looks its plan up

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @functools.cached_property
    def num_slots(self) -> int:
        """K + NS."""
        return self.top_k + self.num_shared_experts

    @functools.cached_property
    def rows_per_token(self) -> int:
        """Rows of a token in a dispatch slot."""
        return self.num_slots if self.per_expert else 1

    @functools.cached_property
    def shared_replicas(self) -> int:
        """Ranks that hold a replica of one shared expert."""
        return self.num_shared_ranks // max(self.num_shared_experts, 1) or 1

    def first_expert(self, rank: int) -> int:
        """The first routed expert of a rank; negative for a rank with a shared expert."""
        return (rank - self.num_shared_ranks) * self.experts_per_rank

    def num_local_experts(self, rank: int) -> int:
        """L on a rank with routed experts, 1 on a rank with a shared one."""
        return self.experts_per_rank if rank >= self.num_shared_ranks else 1

    def rank_capacity(self, rank: int) -> int:
        """A of a rank."""
        return self.capacity if rank >= self.num_shared_ranks else self.shared_capacity

    def shared_ranks_of(self, source: int) -> range:
        """The NS ranks, one per shared expert, that receive the tokens of ``source``."""
        replicas = self.shared_replicas
        return range(source % replicas, self.num_shared_experts * replicas, replicas)

    # Dispatch.

    @functools.cached_property
    def dispatch_number_bytes(self) -> int:
        """Bytes of the numbers of one source."""
        return align(4 * (self.num_experts + 1))

    @functools.cached_property
    def positions_start(self) -> int:
        """Bytes from the ids, which begin the data slot, to the positions in experts."""
        return align(4 * self.max_tokens * self.top_k)

    @functools.cached_property
    def active_start(self) -> int:
        """Bytes before the positions among active tokens."""
        return 2 * self.positions_start

    @functools.cached_property
    def weights_start(self) -> int:
        """Bytes before the weights."""
        active = 4 * self.max_tokens if self.num_shared_experts else 0
        return self.active_start + align(active)

    @functools.cached_property
    def rows_start(self) -> int:
        """Bytes before the rows."""
        itemsize = 0 if self.weight_dtype is None else self.weight_dtype.itemsize
        return self.weights_start + align(itemsize * self.max_tokens * self.top_k)

    def dispatch_ring(self, slots: int) -> Ring:
        """The ring that dispatches need."""
        control = self.world_size * (RECORD_BYTES + self.dispatch_number_bytes)
        rows = self.max_tokens * self.rows_per_token * self.row_format.stride
        return Ring(slots, control, slots, self.rows_start + rows)

    # Combine.

    @functools.cached_property
    def combine_number_bytes(self) -> int:
        """Bytes of the numbers of one source."""
        return align(8 * max(self.experts_per_rank, 1))

    def combine_ring(self, slots: int, data_slots: int = 1) -> Ring:
        """The ring that combines need.

        One data slot is enough where a whole dispatch lies between any two combines.
        """
        control = self.world_size * (RECORD_BYTES + self.combine_number_bytes)
        capacity = max(self.capacity, self.shared_capacity if self.num_shared_ranks else 0)
        return Ring(slots, control, data_slots, capacity * self.return_format.stride)

    def output_rows(self, windows: Windows, num_rows: int) -> torch.Tensor:
        """[num_rows, H] rows of this rank's data slot 0 of combine, for experts to write in place.

        ``windows.own`` is required, and a return format without scales.
        """
        fmt, key = self.return_format, ("output rows", self.return_format)
        if key not in windows.views:
            assert windows.own is not None
            start, count = windows.ring.data_start(0), windows.ring.data_bytes // fmt.stride
            slot = windows.own[start : start + count * fmt.stride]
            windows.views[key] = fmt.payload(slot.view(count, fmt.stride))
        rows: torch.Tensor = windows.views[key]
        return rows[:num_rows]


class WindowsSignature(NamedTuple):
    """What launches are planned from; the attributes of ``Windows``."""

    kind: int
    rank: int
    world_size: int
    ring: Ring
    hard: bool
    device: torch.device


@dataclasses.dataclass(eq=False)
class Windows:
    """The blocks of all ranks for one kind of operation, as the steps of one rank use them.

    Attributes:
        kind: number of the kind, for problems.
        rank: this rank.
        ring: of every block.
        bases: [W] int64 address of each rank's block, on the device of the blocks.
        state: [STATE_WORDS] int32 on that device, zeros at first; DATA_SLOT and the first epochs
            may start at any value that is equal on all ranks.
        problem: [PROBLEM_WORDS] int32 on that device, zeros without a problem; one for all kinds.
        notice: [1] int32 in pinned host memory: WHAT of the problem; a hint to look at it.
        own: [num_bytes] uint8 block of this rank, or None where only its address is known.
        hard: an abort or a mismatch breaks the group, as a time-out does: for ranks that do not
            wait within the call, and so would raise at different ones.
        span: uint8 host memory from the lowest block to the end of the highest, of which only the
            blocks may be accessed; None on devices. ``ref`` needs it.
        views: of the blocks, which steps cache.

    Raises:
        ArgumentTypeError: a tensor of another dtype.
        ArgumentValueError: a tensor of another shape or device, slots that are no power of two, or
            not of a multiple of 16 bytes.
    """

    kind: int
    rank: int
    ring: Ring
    bases: torch.Tensor
    state: torch.Tensor
    problem: torch.Tensor
    notice: torch.Tensor
    own: torch.Tensor | None = None
    hard: bool = False
    span: torch.Tensor | None = None
    views: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check once what the steps of every call rely on."""
        self._check_tensor("bases", torch.int64, len(self.bases))
        self._check_tensor("state", torch.int32, STATE_WORDS)
        self._check_tensor("problem", torch.int32, PROBLEM_WORDS)
        slots, control, data_slots, data = self.ring
        for name, number in (("slots", slots), ("data_slots", data_slots)):
            if number < 1 or number & (number - 1):
                raise ArgumentValueError("Windows", f"ring.{name}", "be a power of two", number)
        if control % 16 or data % 16:
            contract = "have slots of a multiple of 16 bytes"
            raise ArgumentValueError("Windows", "ring", contract, (control, data))

    def _check_tensor(self, name: str, dtype: torch.dtype, size: int) -> None:
        tensor = getattr(self, name)
        if tensor.dtype != dtype:
            raise ArgumentTypeError("Windows", name, f"be {dtype}", tensor.dtype)
        if tensor.shape != (size,) or not tensor.is_contiguous():
            contract = f"be a contiguous tensor of shape ({size},)"
            raise ArgumentValueError("Windows", name, contract, tuple(tensor.shape))
        if tensor.device != self.bases.device:
            raise ArgumentValueError("Windows", name, f"be on {self.device}", tensor.device)

    @functools.cached_property
    def world_size(self) -> int:
        """W."""
        return len(self.bases)

    @functools.cached_property
    def device(self) -> torch.device:
        """Of the blocks."""
        return self.bases.device

    @functools.cached_property
    def signature(self) -> WindowsSignature:
        """All that does not change but the memory."""
        return WindowsSignature(
            self.kind, self.rank, self.world_size, self.ring, self.hard, self.device
        )


class SlotPositions(NamedTuple):
    """Where the slots of one rank's tokens lie among the rows of their experts.

    Attributes:
        counts: [E] slots of each expert.
        position_in_expert: [T*K] earlier slots that chose the same expert, or ``NOWHERE``.
        active_position: [T] earlier tokens that are active, or ``NOWHERE`` for an inactive one;
            None without shared experts. A token is active unless all of its ids are ``NOWHERE``.
    """

    counts: torch.Tensor
    position_in_expert: torch.Tensor
    active_position: torch.Tensor | None = None


class ReceivedRows(NamedTuple):
    """The output of ``dispatch_recv``, in the order of ``RecvPermutation``.

    Rows after the n-th are untouched. After a problem the counts, their sums, ``offsets`` and
    ``totals`` are zeros, and everything else is untouched.

    Attributes:
        x: [num_rows, H] payload; padding is zero.
        scales: [num_rows] or [num_rows, C], or None.
        weights: [num_rows] routing weight of each row, 1 for a shared expert, 0 for padding; or
            None.
        source: [n] int64 rank that sent the row, or ``NOWHERE`` for padding and after the rows.
        slot_ids: [n] slot id of each row at its source, or ``NOWHERE``.
        counts: [L, W] rows for each local expert from each source.
        recv_counts_cumsum: [L*W] inclusive prefix sums of the counts.
        offsets: [L] end of each local expert's rows, padding included, at most n.
        group_starts: [L, W + 1] first row of each (local expert, source), then of its padding.
        totals: [L] rows of each local expert, without padding.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor | None
    source: torch.Tensor
    slot_ids: torch.Tensor
    counts: torch.Tensor
    recv_counts_cumsum: torch.Tensor
    offsets: torch.Tensor
    group_starts: torch.Tensor
    totals: torch.Tensor

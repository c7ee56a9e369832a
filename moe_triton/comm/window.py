"""The windows peers write into: layout, size and the ring of slots.

A window is split into ``slots`` equal parts that operations use in turn. A slot begins with one
flag record per source, four int32 words (epoch, status, digest of the arguments, unused), and goes
on with what the kind of operation needs:

    dispatch   [W] headers (token count, counts[E], slots[C], weights[C]), then [W][rows] x stride
    combine    [blocks] x H rows, one block per rank that answers
    exchange   [W] bytes of any kind

Source r writes what has index r, and nothing else; the owner only reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..layout import DispatchWindow, RowFormat
from ..topology import Topology
from .memory import Block

FLAG_WORDS = 4
FLAG_BYTES = 4 * FLAG_WORDS
_MAX_VIEWS = 64  # sets of views an arena remembers


def align(num_bytes: int, to: int = 16) -> int:
    """``num_bytes`` rounded up to a multiple of ``to``."""
    return -(-num_bytes // to) * to


def num_slots(in_flight: int) -> int:
    """Slots of a ring that lets ``in_flight`` setups run ahead of teardowns.

    At least twice as many: a slot is written again by the push of i + 2f, which follows its
    writer's teardown of i + f, which saw every peer's push of i + f, which followed that peer's
    teardown of i. A power of two, so that slot = epoch % slots goes on correctly when the 32-bit
    epoch wraps.
    """
    return 2 << (in_flight - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The sizes and formats of dispatch and combine, equal on all ranks of a group.

    Attributes:
        topology: placement of the experts.
        top_k: K.
        hidden: H.
        max_tokens: most tokens of a rank.
        dtype: of the tokens and of the experts' outputs.
        quant: None, or "int8" for rows quantised per token on the way to the experts.
        per_expert: each expert has a smooth row of its own, so that copies of a token differ.
        with_weights: the routing weights travel with the tokens.
        compact: each rank knows the place of its rows in a combine window (it kept the handle of
            dispatch); otherwise the window has a block of full size for every rank.
    """

    topology: Topology
    top_k: int
    hidden: int
    max_tokens: int
    dtype: torch.dtype = torch.bfloat16
    quant: str | None = None
    per_expert: bool = False
    with_weights: bool = False
    compact: bool = True

    @functools.cached_property
    def max_copies(self) -> int:
        """C: the most copies one rank can send to another."""
        return self.max_tokens * min(self.top_k, self.topology.experts_per_rank)

    @functools.cached_property
    def row_format(self) -> RowFormat:
        """How a dispatched row travels."""
        if self.quant is None:
            num_bytes = self.hidden * self.dtype.itemsize
            return RowFormat(self.dtype, self.hidden, align(num_bytes), None)
        offset = align(self.hidden)
        return RowFormat(torch.int8, self.hidden, offset + 16, offset)

    @functools.cached_property
    def dispatch(self) -> DispatchLayout:
        """Layout of a dispatch slot."""
        copies, experts = self.max_copies, self.topology.num_experts
        rows = copies if self.per_expert else self.max_tokens
        words = 4 + experts + copies * (2 if self.with_weights else 1)
        return DispatchLayout(self, align(4 * words), rows)

    @functools.cached_property
    def combine(self) -> CombineLayout:
        """Layout of a combine slot."""
        return CombineLayout(self)


@dataclasses.dataclass(frozen=True)
class DispatchLayout:
    """Where things lie in a dispatch slot, behind the flags."""

    config: MoeConfig
    header_bytes: int  # of each source
    rows: int  # of each source

    @functools.cached_property
    def num_bytes(self) -> int:
        """Size of a slot without its flags."""
        world, stride = self.config.topology.world_size, self.config.row_format.stride
        return world * (self.header_bytes + self.rows * stride)

    def view(self, data: torch.Tensor) -> DispatchWindow:
        """The slot whose bytes begin with ``data``, as one structure over all sources."""
        config = self.config
        world, experts = config.topology.world_size, config.topology.num_experts
        copies, stride = config.max_copies, config.row_format.stride
        rows_start = world * self.header_bytes
        header = data[:rows_start].view(torch.int32).view(world, -1)
        slots, weights = 4 + experts, 4 + experts + copies
        return DispatchWindow(
            num_tokens=header[:, :1],
            counts=header[:, 4:slots],
            slots=header[:, slots:weights],
            weights=(
                header[:, weights : weights + copies].view(torch.float32)
                if config.with_weights
                else None
            ),
            rows=data[rows_start : self.num_bytes].view(world, self.rows, stride),
        )


def source_part(window: DispatchWindow, rank: int) -> DispatchWindow:
    """What source ``rank`` writes of a window."""
    weights = None if window.weights is None else window.weights[rank]
    return DispatchWindow(
        window.num_tokens[rank],
        window.counts[rank],
        window.slots[rank],
        weights,
        window.rows[rank],
    )


@dataclasses.dataclass(frozen=True)
class CombineLayout:
    """Where the rows of a combine slot lie: one block per MoE rank, then one per shared expert.

    The copies a token rank sent to MoE rank d come back in the order of its plan, (expert, flat
    position). Compact blocks follow each other without gaps, which makes the window one row per
    copy.
    """

    config: MoeConfig

    @functools.cached_property
    def routed_rows(self) -> int:
        """Rows of all MoE ranks' blocks."""
        config, topology = self.config, self.config.topology
        if config.compact:
            return config.max_tokens * config.top_k
        return (topology.world_size - topology.num_shared_ranks) * config.max_copies

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of the window."""
        shared = self.config.topology.num_shared_experts * self.config.max_tokens
        return self.routed_rows + shared

    @functools.cached_property
    def num_bytes(self) -> int:
        """Size of a slot without its flags."""
        return align(self.num_rows * self.config.hidden * self.config.dtype.itemsize)

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """[num_rows, H] rows of the slot whose bytes begin with ``data``."""
        config = self.config
        used = self.num_rows * config.hidden * config.dtype.itemsize
        return data[:used].view(config.dtype).view(self.num_rows, config.hidden)

    def shared_base(self, rank: int) -> int:
        """First row of the block of a shared rank."""
        return self.routed_rows + self.config.topology.shared_expert(rank) * self.config.max_tokens

    def block_base(self, rank: int) -> int:
        """First row of the block of a MoE rank, where blocks have full size."""
        return (rank - self.config.topology.num_shared_ranks) * self.config.max_copies


@dataclasses.dataclass(frozen=True)
class WindowBytes:
    """Bytes of one rank's windows, ring and flags included."""

    dispatch: int
    combine: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.dispatch + self.combine


def ring_bytes(world_size: int, slot_bytes: int, in_flight: int) -> int:
    """Bytes of a ring whose slots hold ``slot_bytes`` beside their flags."""
    return num_slots(in_flight) * (align(world_size * FLAG_BYTES) + align(slot_bytes))


def window_bytes(config: MoeConfig, *, in_flight: int = 1) -> WindowBytes:
    """Memory that each rank of a group sets aside for dispatch and combine.

    Args:
        config: the sizes.
        in_flight: operations that may be set up before the first is torn down.
    """
    world = config.topology.world_size
    return WindowBytes(
        ring_bytes(world, config.dispatch.num_bytes, in_flight),
        ring_bytes(world, config.combine.num_bytes, in_flight),
    )


def clear_flags(block: Block, world_size: int, slots: int, epoch: int) -> None:
    """Set all flags of new windows to an epoch that is over."""
    words = block.data.view(torch.int32).view(slots, -1)[:, : world_size * FLAG_WORDS]
    words[:, ::FLAG_WORDS] = epoch


class Arena:
    """The windows of all ranks for one kind of operation, as this rank has mapped them.

    Layouts are laid over its slots, so that calls of different sizes share the memory.
    """

    def __init__(self, blocks: list[Block], slots: int) -> None:
        self.blocks = blocks
        self.slots = slots
        self.stride = blocks[0].data.numel() // slots
        self._flags = align(len(blocks) * FLAG_BYTES)
        self._base = [block.data.data_ptr() for block in blocks]
        self._views: dict[tuple[object, ...], Any] = {}

    @property
    def capacity(self) -> int:
        """Bytes of a slot behind its flags."""
        return self.stride - self._flags

    def flag_address(self, owner: int, slot: int, source: int) -> int:
        """Where ``source`` writes its flag record in the window of ``owner``."""
        return self._base[owner] + slot * self.stride + source * FLAG_BYTES

    def data(self, owner: int, slot: int) -> torch.Tensor:
        """The bytes of a slot behind its flags."""
        start = slot * self.stride
        return self.blocks[owner].data[start + self._flags : start + self.stride]

    def dispatch_window(self, layout: DispatchLayout, rank: int, slot: int) -> DispatchWindow:
        """This rank's own window."""
        return self._cached((layout, slot, "own"), lambda: layout.view(self.data(rank, slot)))

    def dispatch_parts(self, layout: DispatchLayout, rank: int, slot: int) -> list[DispatchWindow]:
        """This rank's part of every rank's window."""
        return self._cached(
            (layout, slot, "parts"),
            lambda: [
                source_part(layout.view(self.data(owner, slot)), rank)
                for owner in range(len(self.blocks))
            ],
        )

    def combine_windows(self, layout: CombineLayout, slot: int) -> list[torch.Tensor]:
        """Every rank's window."""
        return self._cached(
            (layout, slot, "rows"),
            lambda: [layout.view(self.data(owner, slot)) for owner in range(len(self.blocks))],
        )

    def _cached(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        # Views cost microseconds each, and a call needs several per peer.
        if key not in self._views:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = make()
        return self._views[key]

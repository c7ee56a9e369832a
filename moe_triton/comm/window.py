"""Windows, memory of each rank that all ranks of a group read: sizes, slots and addresses.

``layout/windows.py`` says what lies where in a window. Here is how many slots a window has, and how
one rank sees the windows of all ranks. A row is written once, in its owner's window, and every rank
that needs it gathers it from there: in host memory a load from a peer's window costs as much as one
from the own window (measured on one memory node). A combine window is therefore as large as the
most rows a rank can receive; the system commits its pages as rows are written.

Kinds without device steps of their own lay bytes into the data slots:

    gather     one part for all ranks
    exchange   [W] int64 rows for each rank, then the rows, in the order of the ranks
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import TypeVar

import numpy as np
import torch

from ..layout import ExchangeLayout, Ring, RowFormat, Windows, align
from ..layout.windows import RECEIVED, RECORD_BYTES, SENT, STATE_WORDS
from ..topology import Topology
from .memory import Block

_Ids = TypeVar("_Ids", np.ndarray, torch.Tensor)

RETURN_BLOCK = 8  # elements that share a scale in quantised combine rows


def num_slots(in_flight: int) -> int:
    """Slots of a ring with f = ``in_flight`` setups ahead of teardowns: 2f or more.

    The setup of i + 2f, which writes the slot of i again, follows its writer's teardown of i + f.
    That teardown saw every peer's flag of i + f, which followed the peer's teardown of i. A power
    of two, so that slot = epoch % slots stays correct when the 32-bit epoch wraps.
    """
    return 2 << (in_flight - 1).bit_length()


def combine_slots(in_flight: int, *, in_a_row: bool = False) -> int:
    """Data slots of combine: one where a whole dispatch lies between any two combines.

    The records of that dispatch followed the peers' teardowns of the last combine, which nobody
    reads any more. Several operations in flight, or combines ``in_a_row``, take a ring.
    """
    return 1 if in_flight == 1 and not in_a_row else num_slots(in_flight)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The sizes and formats of dispatch and combine, equal on all ranks of a group.

    Attributes:
        topology: placement of the experts.
        top_k: K.
        hidden: H.
        max_tokens: most tokens of a rank.
        dtype: of the tokens and of the experts' outputs.
        quant: how rows are quantised on the way to the experts, a name of ``layout.QUANTS``, or
            None.
        per_expert: each expert has its own smooth scales, so that copies of a token differ.
        with_weights: the routing weights travel with the tokens.
        max_rows: most rows a rank receives; None for the worst case.
        alignment: the rows of each local expert are padded to a multiple of this.
        quant_return: None, or "int8" for combine rows quantised in blocks.
    """

    topology: Topology
    top_k: int
    hidden: int
    max_tokens: int
    dtype: torch.dtype = torch.bfloat16
    quant: str | None = None
    per_expert: bool = False
    with_weights: bool = False
    max_rows: int | None = None
    alignment: int = 1
    quant_return: str | None = None

    @property
    def num_slots(self) -> int:
        """K + NS: slots of a token, routed and shared."""
        return self.top_k + self.topology.num_shared_experts

    @functools.cached_property
    def max_slot_ids(self) -> int:
        """C: the most routed slots that one rank can send to another."""
        return self.max_tokens * min(self.top_k, self.topology.experts_per_rank)

    @functools.cached_property
    def row_format(self) -> RowFormat:
        """Format of a dispatched row."""
        return RowFormat.quantized(self.quant, self.dtype, self.hidden)

    @functools.cached_property
    def return_format(self) -> RowFormat:
        """Format of a combine row."""
        if self.quant_return is None:
            return RowFormat.tight(self.dtype, self.hidden)
        return RowFormat.tight(torch.int8, self.hidden, "block8", self.dtype, RETURN_BLOCK)

    @functools.cached_property
    def weight_dtype(self) -> torch.dtype:
        """Of the routing weights: float32, for float64 float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def row_of(self, slot_ids: _Ids) -> _Ids:
        """The row of its source that each slot id, token * (K + NS) + slot, names."""
        return slot_ids if self.per_expert else slot_ids // self.num_slots

    def capacity(self, rank: int) -> int:
        """A: the most rows that ``rank`` receives, padding included."""
        if rank not in self._capacities:
            self._capacities[rank] = self._capacity(rank)
        return self._capacities[rank]

    @functools.cached_property
    def _capacities(self) -> dict[int, int]:
        return {}

    def _capacity(self, rank: int) -> int:
        most = self.topology.capacity(rank, self.max_tokens, self.top_k)
        if self.max_rows is not None:
            most = min(most, self.max_rows)
        return most + self.topology.num_local_experts(rank) * (self.alignment - 1)

    @functools.cached_property
    def layout(self) -> ExchangeLayout:
        """What the device steps of windows take."""
        topology = self.topology
        shared = topology.num_shared_ranks
        return ExchangeLayout(
            world_size=topology.world_size,
            num_experts=topology.num_experts,
            experts_per_rank=topology.experts_per_rank,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            row_format=self.row_format,
            return_format=self.return_format,
            # The first rank has the capacity of all shared ranks, the last that of all others.
            capacity=self.capacity(topology.world_size - 1),
            shared_capacity=self.capacity(0) if shared else 0,
            num_shared_experts=topology.num_shared_experts,
            num_shared_ranks=shared,
            alignment=self.alignment,
            per_expert=self.per_expert,
            weight_dtype=self.weight_dtype if self.with_weights else None,
        )

    def ring(self, kind: str, in_flight: int, *, in_a_row: bool = False) -> Ring:
        """The ring of "dispatch" or "combine"; for ``in_a_row`` see ``combine_slots``."""
        key = (kind, in_flight, in_a_row)
        if key not in self._rings:
            slots, layout = num_slots(in_flight), self.layout
            data_slots = combine_slots(in_flight, in_a_row=in_a_row)
            combine = kind == "combine"
            self._rings[key] = (
                layout.combine_ring(slots, data_slots) if combine else layout.dispatch_ring(slots)
            )
        return self._rings[key]

    @functools.cached_property
    def _rings(self) -> dict[tuple[str, int, bool], Ring]:
        return {}


@dataclasses.dataclass(frozen=True)
class WindowBytes:
    """Bytes of one rank's windows, ring and records included.

    Attributes:
        dispatch: of dispatch.
        combine: of combine; twice as much from the first combine on that follows another without a
            dispatch between them.
    """

    dispatch: int
    combine: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.dispatch + self.combine


def window_bytes(config: MoeConfig, *, in_flight: int = 1) -> WindowBytes:
    """Window memory of each rank for dispatch and combine.

    Args:
        config: the sizes.
        in_flight: setups that may run ahead of teardowns.
    """
    rings = (config.ring(kind, in_flight) for kind in ("dispatch", "combine"))
    return WindowBytes(*(ring.num_bytes for ring in rings))


def bytes_ring(world_size: int, num_bytes: int, in_flight: int) -> Ring:
    """A ring whose data slots hold ``num_bytes``."""
    slots = num_slots(in_flight)
    return Ring(slots, world_size * RECORD_BYTES, slots, align(num_bytes))


def union(first: Ring, second: Ring) -> Ring:
    """The smallest ring that serves the calls of both."""
    return Ring(*map(max, zip(first, second, strict=True)))


def host_span(blocks: list[torch.Tensor]) -> torch.Tensor:
    """uint8 host memory from the lowest block to the end of the highest.

    It spans foreign memory between the blocks, which nobody may access, and keeps none of them.
    """
    lowest = min(block.data_ptr() for block in blocks)
    highest = max(block.data_ptr() + block.numel() for block in blocks)
    memory = (ctypes.c_uint8 * (highest - lowest)).from_address(lowest)
    return torch.frombuffer(memory, dtype=torch.uint8)


class PeerWindows:
    """The windows of all ranks for one kind of operation, as this rank has mapped them.

    Calls of different sizes share the memory: each lays its own layout over the slots.

    Args:
        blocks: of all ranks, alike.
        ring: of each block.
        rank: this rank.
        kind: number of the kind.
        epoch: the last one before these windows.
        problem: [PROBLEM_WORDS] int32 on their device, shared by the kinds.
        notice: [1] int32 in host memory.
        hard: an abort breaks the group.

    Attributes:
        steps: the windows as device steps take them.
    """

    def __init__(
        self,
        blocks: list[Block],
        ring: Ring,
        rank: int,
        *,
        kind: int,
        epoch: int,
        problem: torch.Tensor,
        notice: torch.Tensor,
        hard: bool,
    ) -> None:
        self.blocks = blocks
        own = blocks[rank].data
        self._own = range(own.data_ptr(), own.data_ptr() + own.numel())
        device = own.device
        state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=device)
        state[[SENT, RECEIVED]] = epoch
        addresses = [block.data.data_ptr() for block in blocks]
        self.steps = Windows(
            kind=kind,
            rank=rank,
            ring=ring,
            bases=torch.tensor(addresses, dtype=torch.int64, device=device),
            state=state,
            problem=problem,
            notice=notice,
            own=own,
            hard=hard,
        )
        if device.type == "cpu":
            self.steps.span = host_span([block.data for block in blocks])
            self._words = own.numpy().view(np.int32)
        else:
            # Calls may use another stream than the one that has written the state.
            torch.get_device_module(device).current_stream(device).synchronize()

    @property
    def ring(self) -> Ring:
        """Of each block."""
        return self.steps.ring

    @property
    def device(self) -> torch.device:
        """Of the memory."""
        return self.steps.device

    def serves(self, ring: Ring, device: torch.device) -> bool:
        """Whether calls made for ``ring`` fit, in the memory of ``device``."""
        own = self.device
        # "cuda" without an index is the device that was current.
        same = own.type == device.type and device.index in (None, own.index)
        return same and self.ring.holds(ring)

    def data(self, owner: int, slot: int) -> torch.Tensor:
        """The bytes of a data slot."""
        start = self.ring.data_start(slot)
        return self.blocks[owner].data[start : start + self.ring.data_bytes]

    def numbers(self, epoch: int, num_bytes: int) -> np.ndarray:
        """[W, N] int32 numbers of all ranks for this one, of ``num_bytes`` each; a view.

        Only in host memory.
        """
        world = self.steps.world_size
        start = self.ring.record(epoch, world) // 4
        return self._words[start : start + world * num_bytes // 4].reshape(world, -1)

    def holds(self, rows: torch.Tensor) -> bool:
        """Whether a tensor lies in the window of this rank."""
        return rows.data_ptr() in self._own

    def in_place(self, rows: torch.Tensor, fmt: RowFormat) -> bool:
        """Whether rows lie where ``ExchangeLayout.output_rows`` does."""
        return (
            rows.data_ptr() == self._own.start + self.ring.data_start(0)
            and fmt.scale_offset is None
            and rows.stride() == (fmt.stride // fmt.dtype.itemsize, 1)
        )

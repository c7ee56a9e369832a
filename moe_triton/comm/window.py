"""Windows, memory that all ranks of a group can access: layout, size and the ring of slots.

Each rank has a window for each kind of operation, split into ``slots`` equal parts that operations
use in turn. A slot begins with one flag record per source, four int32 words (epoch, status, digest
of the arguments, stream of the device), followed by the data of the kind. Windows in device memory
have their flags in host memory; the flag area of the slot is then unused.

    dispatch   [W] headers (token count, counts[E], slot_ids[C], weights[C]); [R] rows
    combine    [L, W + 1] the first row of each (local expert, source); [A] rows
    gather     bytes, one part for all ranks
    exchange   [W] bytes, one part for each rank

The sources write flags and everything with one part per source; the owner writes rows and group
starts, and the peers read them. In host memory a load from a peer's window costs as much as one
from the own window (measured on one memory node), so a row is written once, in its owner's window,
and every rank that needs it gathers it from there. A combine window is therefore as large as the
most rows a rank can receive; the system commits its pages as rows are written.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..layout import DispatchHeader, RowFormat, align
from ..topology import Topology
from . import atomics
from .memory import Block

FLAG_WORDS = 4
FLAG_BYTES = 4 * FLAG_WORDS
RETURN_BLOCK = 8  # elements that share a scale in quantised combine rows
_MAX_VIEWS = 1024  # views cached by PeerWindows


def num_slots(in_flight: int) -> int:
    """Slots of a ring with f = ``in_flight`` setups ahead of teardowns: 2f or more.

    The setup of i + 2f, which writes the slot of i again, follows its writer's teardown of i + f.
    That teardown saw every peer's flag of i + f, which followed the peer's teardown of i. A power
    of two, so that slot = epoch % slots stays correct when the 32-bit epoch wraps.
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

    def row_of(self, slot_ids: torch.Tensor) -> torch.Tensor:
        """The row of its source that each slot id, token * (K + NS) + slot, names; int64."""
        return (slot_ids if self.per_expert else slot_ids // self.num_slots).long()

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
    def dispatch(self) -> DispatchLayout:
        """Layout of a dispatch slot."""
        return DispatchLayout(self)

    @functools.cached_property
    def combine(self) -> CombineLayout:
        """Layout of a combine slot."""
        return CombineLayout(self)


@dataclasses.dataclass(frozen=True)
class DispatchLayout:
    """Byte layout of a dispatch slot behind the flags."""

    config: MoeConfig

    @functools.cached_property
    def header_bytes(self) -> int:
        """Size of one source's header."""
        config = self.config
        weight_bytes = config.weight_dtype.itemsize if config.with_weights else 0
        return self._weights_start + align(config.max_slot_ids * weight_bytes)

    @functools.cached_property
    def _weights_start(self) -> int:
        config = self.config
        return align(4 * (4 + config.topology.num_experts + config.max_slot_ids))

    @functools.cached_property
    def num_rows(self) -> int:
        """R: rows that a rank writes."""
        config = self.config
        return config.max_tokens * (config.num_slots if config.per_expert else 1)

    @property
    def rows_start(self) -> int:
        """Bytes before the rows."""
        return self.config.topology.world_size * self.header_bytes

    @property
    def num_bytes(self) -> int:
        """Size of a slot without its flags."""
        return self.rows_start + self.num_rows * self.config.row_format.stride

    def headers(self, data: torch.Tensor) -> DispatchHeader:
        """The headers of all sources, stacked, in the slot whose bytes begin with ``data``."""
        config = self.config
        records = data[: self.rows_start].view(config.topology.world_size, self.header_bytes)
        words = records[:, : self._weights_start].view(torch.int32)
        slot_ids = 4 + config.topology.num_experts
        weights = None
        if config.with_weights:
            weights = records[:, self._weights_start :].view(config.weight_dtype)
            weights = weights[:, : config.max_slot_ids]
        return DispatchHeader(
            num_tokens=words[:, :1],
            counts=words[:, 4:slot_ids],
            slot_ids=words[:, slot_ids : slot_ids + config.max_slot_ids],
            weights=weights,
        )

    def rows(self, data: torch.Tensor) -> torch.Tensor:
        """[R, stride] uint8 rows of the slot whose bytes begin with ``data``."""
        rows = data[self.rows_start : self.num_bytes]
        return rows.view(self.num_rows, self.config.row_format.stride)


def header_of(headers: DispatchHeader, source: int) -> DispatchHeader:
    """One source's header."""
    weights = None if headers.weights is None else headers.weights[source]
    return DispatchHeader(
        headers.num_tokens[source], headers.counts[source], headers.slot_ids[source], weights
    )


@dataclasses.dataclass(frozen=True)
class CombineLayout:
    """Byte layout of a combine slot behind the flags."""

    config: MoeConfig

    @functools.cached_property
    def groups(self) -> tuple[int, int]:
        """(L, W + 1): row groups by (local expert, source), and the padding of each expert."""
        topology = self.config.topology
        return topology.experts_per_rank, topology.world_size + 1

    @functools.cached_property
    def num_rows(self) -> int:
        """A: the most rows of any rank."""
        config = self.config
        return max(config.capacity(0), config.capacity(config.topology.world_size - 1))

    @property
    def rows_start(self) -> int:
        """Bytes before the rows."""
        return align(4 * math.prod(self.groups))

    @property
    def num_bytes(self) -> int:
        """Size of a slot without its flags."""
        return self.rows_start + self.num_rows * self.config.return_format.stride

    def group_starts(self, data: torch.Tensor) -> torch.Tensor:
        """[L, W + 1] int32 first rows of the slot whose bytes begin with ``data``."""
        return data[: 4 * math.prod(self.groups)].view(torch.int32).view(self.groups)

    def rows(self, data: torch.Tensor) -> torch.Tensor:
        """[A, stride] uint8 rows of the slot whose bytes begin with ``data``."""
        rows = data[self.rows_start : self.num_bytes]
        return rows.view(self.num_rows, self.config.return_format.stride)


@dataclasses.dataclass(frozen=True)
class WindowBytes:
    """Bytes of one rank's windows, ring and flags included."""

    dispatch: int
    combine: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.dispatch + self.combine


def flag_bytes(world_size: int) -> int:
    """Bytes of the flags of one slot."""
    return align(world_size * FLAG_BYTES)


def ring_bytes(world_size: int, slot_bytes: int, in_flight: int) -> int:
    """Bytes of a ring whose slots hold ``slot_bytes`` behind their flags."""
    return num_slots(in_flight) * (flag_bytes(world_size) + align(slot_bytes))


def window_bytes(config: MoeConfig, *, in_flight: int = 1) -> WindowBytes:
    """Window memory of each rank for dispatch and combine.

    Args:
        config: the sizes.
        in_flight: setups that may run ahead of teardowns.
    """
    world = config.topology.world_size
    return WindowBytes(
        ring_bytes(world, config.dispatch.num_bytes, in_flight),
        ring_bytes(world, config.combine.num_bytes, in_flight),
    )


def clear_flags(block: Block, world_size: int, slots: int, epoch: int) -> None:
    """Set all flags of new windows to a past epoch."""
    flags = block.data if block.flags is None else block.flags
    words = flags.view(torch.int32).view(slots, -1)[:, : world_size * FLAG_WORDS]
    words[:, ::FLAG_WORDS] = epoch


class GlobalRows(NamedTuple):
    """The rows of all ranks' windows as one tensor.

    Attributes:
        rows: [N, stride] uint8, a row beginning every 16 bytes from the lowest window to the
            highest, in the memory of the host or of one device. It spans foreign memory between
            the windows, which no index names.
        origins: [W] int64 index of each rank's first row.
        step: indices from one row of a rank to its next.
    """

    rows: torch.Tensor
    origins: torch.Tensor
    step: int


def _memory_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8 at an address; the caller may read only mapped parts of it.

    Raises:
        NotImplementedError: PyTorch cannot wrap addresses of this device.
    """
    if device.type == "cpu":
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8)
    if device.type != "cuda":
        raise NotImplementedError(f"tensors over addresses of {device}")
    return torch.as_tensor(_CudaArray(address, num_bytes), device=device)


class _CudaArray:
    """Device memory under the CUDA array interface, which ROCm shares."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class PeerWindows:
    """The windows of all ranks for one kind of operation, as this rank has mapped them.

    Calls of different sizes share the memory: each lays its own layout over the slots.
    """

    def __init__(self, blocks: list[Block], slots: int) -> None:
        self.blocks = blocks
        self.slots = slots
        self.stride = blocks[0].data.numel() // slots
        self._flags = flag_bytes(len(blocks))
        self._base = [block.data.data_ptr() for block in blocks]
        # Address of each rank's first flag record, and bytes between those of its slots.
        self._flag_records = [
            (block.data.data_ptr(), self.stride)
            if block.flags is None
            else (block.flags.data_ptr(), self._flags)
            for block in blocks
        ]
        self._views: dict[tuple[object, ...], Any] = {}
        # In units of 16 bytes from the lowest window; equal for every slot.
        lowest = min(self._base)
        self._origins = torch.tensor(
            [(base - lowest) // 16 for base in self._base], device=blocks[0].data.device
        )

    @property
    def capacity(self) -> int:
        """Bytes of a slot behind its flags."""
        return self.stride - self._flags

    def serves(self, slot_bytes: int, device: torch.device) -> bool:
        """Whether slots hold ``slot_bytes`` in the memory of ``device``."""
        own = self.blocks[0].data.device
        # "cuda" without an index is the device that was current.
        same = own.type == device.type and device.index in (None, own.index)
        return same and slot_bytes <= self.capacity

    def stream(self) -> int:
        """32 bits of the stream on which this thread uses the windows; 0 for host memory.

        A stream runs work in the order of issue, so a flag may stand for issued work.
        """
        device = self.blocks[0].data.device
        if device.type != "cuda":
            return 0
        return atomics.wrap(torch.cuda.current_stream(device).cuda_stream)

    def flag_address(self, owner: int, slot: int, source: int) -> int:
        """Address of the flag record of ``source`` in the window of ``owner``."""
        base, stride = self._flag_records[owner]
        return base + slot * stride + source * FLAG_BYTES

    def data(self, owner: int, slot: int) -> torch.Tensor:
        """The bytes of a slot behind its flags."""
        start = slot * self.stride
        return self.blocks[owner].data[start + self._flags : start + self.stride]

    def holds(self, owner: int, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the window of ``owner``."""
        offset = tensor.data_ptr() - self._base[owner]
        return 0 <= offset < self.slots * self.stride

    def view(
        self, owner: int, slot: int, layout: object, make: Callable[[torch.Tensor], Any]
    ) -> Any:
        """``make`` applied to a slot's bytes; cached, as each view costs microseconds."""
        key = (owner, slot, layout, make.__name__)
        return self._cached(key, lambda: make(self.data(owner, slot)))

    def global_rows(self, slot: int, start: int, stride: int) -> GlobalRows:
        """All ranks' rows of a slot.

        Args:
            slot: of the ring.
            start: bytes before the first row, behind the flags.
            stride: bytes from row to row, a multiple of 16.
        """
        return self._cached(
            (slot, start, stride), lambda: self._make_global_rows(slot, start, stride)
        )

    def _make_global_rows(self, slot: int, start: int, stride: int) -> GlobalRows:
        first = slot * self.stride + self._flags + start
        ends = [
            base + block.data.numel() for base, block in zip(self._base, self.blocks, strict=True)
        ]
        lowest, highest = min(self._base) + first, max(ends)
        memory = _memory_at(lowest, highest - lowest, self.blocks[0].data.device)
        count = max((highest - lowest - stride) // 16 + 1, 0)
        return GlobalRows(memory.as_strided((count, stride), (16, 1)), self._origins, stride // 16)

    def _cached(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        if key not in self._views:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = make()
        return self._views[key]

"""Memory that all ranks of a group can reach: layout, size and the ring of slots.

Each rank has a window for each kind of operation, split into ``slots`` equal parts that operations
use in turn. A slot begins with one flag record per source, four int32 words (epoch, status, digest
of the arguments, stream of the device), and goes on with what the kind needs. Where the flags are
apart in host memory, as with windows in that of a device, their place in the slot stays empty.

    dispatch   [W] headers (token count, counts[E], copies[C], weights[C]); [R] rows
    combine    [L, W + 1] the first row of each (local expert, source); [A] rows
    gather     bytes of any kind, one piece for all ranks
    exchange   [W] bytes of any kind, a piece for each rank

What has one part for each source is written by the sources, flags included; rows and their numbers
are the owner's, and the others read them. In host memory a load from a peer's window costs what a
load from one's own costs (on one memory node; others were not measured), so a row is written once,
where it is, and every rank that wants it gathers it from there into its place. That makes a combine
window as large as the most rows a rank can receive; of that, pages are taken as rows are written.
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
RETURN_BLOCK = 8  # elements that share a scale when rows return quantised
_MAX_VIEWS = 1024  # views an arena remembers


def num_slots(in_flight: int) -> int:
    """Slots of a ring that lets ``in_flight`` setups run ahead of teardowns.

    At least twice as many: a slot is written again by the setup of i + 2f, which follows its
    writer's teardown of i + f, which saw every peer's flag of i + f, which followed that peer's
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
        quant: how rows are quantised on the way to the experts, a name of ``layout.QUANTS``, or
            None.
        per_expert: each expert has a smooth row of its own, so that copies of a token differ.
        with_weights: the routing weights travel with the tokens.
        max_rows: most rows a rank receives, where that is less than the worst case; or None.
        alignment: the rows of each local expert are padded to a multiple of this.
        quant_return: None, or "int8" for rows quantised in blocks on the way back.
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
        """K + NS: the places a token can go to."""
        return self.top_k + self.topology.num_shared_experts

    @functools.cached_property
    def max_slot_ids(self) -> int:
        """C: the most copies one rank can send to another."""
        return self.max_tokens * min(self.top_k, self.topology.experts_per_rank)

    @functools.cached_property
    def row_format(self) -> RowFormat:
        """How a dispatched row travels."""
        return RowFormat.quantized(self.quant, self.dtype, self.hidden)

    @functools.cached_property
    def return_format(self) -> RowFormat:
        """How a row returns from its expert."""
        if self.quant_return is None:
            return RowFormat.tight(self.dtype, self.hidden)
        return RowFormat.tight(torch.int8, self.hidden, "block8", self.dtype, RETURN_BLOCK)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the routing weights: float32, for float64 float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def row_of(self, slot_ids: torch.Tensor) -> torch.Tensor:
        """Which of its source's rows each copy, token * (K + NS) + slot, is; int64."""
        return (slot_ids if self.per_expert else slot_ids // self.num_slots).long()

    def capacity(self, rank: int) -> int:
        """A: the rows that ``rank`` sets aside for what it receives, and their padding."""
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
    """Where things lie in a dispatch slot, behind the flags."""

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
    """Where things lie in a combine slot, behind the flags."""

    config: MoeConfig

    @functools.cached_property
    def groups(self) -> tuple[int, int]:
        """(L, W + 1): rows by (local expert, source), and the padding of each expert."""
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
    """Bytes of a ring whose slots hold ``slot_bytes`` beside their flags."""
    return num_slots(in_flight) * (flag_bytes(world_size) + align(slot_bytes))


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
    flags = block.data if block.flags is None else block.flags
    words = flags.view(torch.int32).view(slots, -1)[:, : world_size * FLAG_WORDS]
    words[:, ::FLAG_WORDS] = epoch


class GlobalRows(NamedTuple):
    """The rows of all ranks' windows as one tensor.

    Attributes:
        rows: [N, stride] uint8, a row beginning every 16 bytes from the lowest window to the
            highest, in host memory or in that of one device. In between lies memory of others,
            which no index names.
        origins: [W] int64 index of each rank's first row.
        step: from one row of a rank to its next.
    """

    rows: torch.Tensor
    origins: torch.Tensor
    step: int


def _memory_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8 of an address space, which the caller knows to be readable where it reads.

    Raises:
        NotImplementedError: PyTorch makes no tensors of addresses of such a device.
    """
    if device.type == "cpu":
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8)
    if device.type != "cuda":
        raise NotImplementedError(f"tensors over addresses of {device}")
    return torch.as_tensor(_CudaArray(address, num_bytes), device=device)


class _CudaArray:
    """Memory as CUDA and ROCm programs in Python hand it to each other."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class PeerWindows:
    """The windows of all ranks for one kind of operation, as this rank has mapped them.

    Layouts are laid over its slots, so that calls of different sizes share the memory.
    """

    def __init__(self, blocks: list[Block], slots: int) -> None:
        self.blocks = blocks
        self.slots = slots
        self.stride = blocks[0].data.numel() // slots
        self._flags = flag_bytes(len(blocks))
        self._base = [block.data.data_ptr() for block in blocks]
        # Where the flags of each rank begin, and how far apart those of its slots are.
        self._flag_records = [
            (block.data.data_ptr(), self.stride)
            if block.flags is None
            else (block.flags.data_ptr(), self._flags)
            for block in blocks
        ]
        self._views: dict[tuple[object, ...], Any] = {}
        # In 16 bytes from the lowest window; the same for every slot.
        lowest = min(self._base)
        self._origins = torch.tensor(
            [(base - lowest) // 16 for base in self._base], device=blocks[0].data.device
        )

    @property
    def capacity(self) -> int:
        """Bytes of a slot behind its flags."""
        return self.stride - self._flags

    def serves(self, slot_bytes: int, device: torch.device) -> bool:
        """Whether slots hold that much, in the memory of that device."""
        own = self.blocks[0].data.device
        # Without a number "cuda" is whichever was current.
        same = own.type == device.type and device.index in (None, own.index)
        return same and slot_bytes <= self.capacity

    def stream(self) -> int:
        """32 bits that stand for the stream on which this thread works with the windows.

        On one stream what is issued later runs later, so that a flag may stand for work that has
        only been issued.
        """
        device = self.blocks[0].data.device
        if device.type != "cuda":
            return 0
        return atomics.wrap(torch.cuda.current_stream(device).cuda_stream)

    def flag_address(self, owner: int, slot: int, source: int) -> int:
        """Where ``source`` writes its flag record in the window of ``owner``."""
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
        """What ``make`` makes of a slot's bytes; remembered, as views cost microseconds each."""
        key = (owner, slot, layout, make.__name__)
        return self._remember(key, lambda: make(self.data(owner, slot)))

    def global_rows(self, slot: int, start: int, stride: int) -> GlobalRows:
        """All ranks' rows of a slot.

        Args:
            slot: of the ring.
            start: bytes before the first row, behind the flags.
            stride: bytes from row to row, a multiple of 16.
        """
        return self._remember((slot, start, stride), lambda: self._make_reach(slot, start, stride))

    def _make_reach(self, slot: int, start: int, stride: int) -> GlobalRows:
        first = slot * self.stride + self._flags + start
        recv_counts_cumsum = [
            base + block.data.numel() for base, block in zip(self._base, self.blocks, strict=True)
        ]
        lowest, highest = min(self._base) + first, max(recv_counts_cumsum)
        memory = _memory_at(lowest, highest - lowest, self.blocks[0].data.device)
        count = max((highest - lowest - stride) // 16 + 1, 0)
        return GlobalRows(memory.as_strided((count, stride), (16, 1)), self._origins, stride // 16)

    def _remember(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        if key not in self._views:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = make()
        return self._views[key]

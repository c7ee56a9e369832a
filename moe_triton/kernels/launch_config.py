"""Launch configuration of the kernels: number of programs, tile sizes and warps.

A policy is a few numbers for a kind of device; the launch follows from them and from the shape of
the work. Nothing is tuned at run time, so that the first call costs as much as the others. Kernels
walk their tiles in strides of the number of programs, so any of these choices is correct.

    GPU          a tile fits the registers of 8 warps with 4 loads of 16 bytes a lane in flight;
                 tall tiles of short rows only where they still keep all processors busy
    NPU          a tile and what is made of it fit the unified buffer twice, as the next tile is
                 loaded meanwhile; one program for each vector core
    interpreter  a tile costs about a millisecond of any size: as large as fits the caches
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import triton

from ..signatures import once_per_signature

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Launch:
    """Grid and tiles of a launch.

    Attributes:
        num_programs: size of the grid, at least 1.
        rows: rows of a tile, a power of two.
        block: elements of a tile's row, a power of two, also for rows without elements.
        num_warps: of a program; for GPUs.
    """

    num_programs: int
    rows: int
    block: int
    num_warps: int


@dataclasses.dataclass(frozen=True, eq=False)  # one object a device: launches are cached by it
class Policy:
    """Limits of the tiles and grids of a device.

    Attributes:
        tile: maximum elements of a tile.
        block: maximum elements of a tile's row.
        num_programs: maximum programs of a grid, of which each takes several tiles.
        processors: of a GPU, whose grids have a program for each tile: a processor that is done
            takes the next one, and no last wave of programs runs on some of them only. 0 for
            others.
        busy: tiles that keep the device busy; rows share a tile if at least this many remain.
        lanes: of a warp.
        token_block: maximum elements of a tile that sums several rows of a token; 0 for tiles as
            those of other kernels.
        line: maximum numbers of a block of a flat array.
        compared: maximum slots of a plan that are compared all with all.
        own: slots of a program that are compared with others.
        ranked: slots of a block in a plan of more slots.
        comparisons: maximum slots of a block times those that they are compared with at a time.
        gathers: whether a tile can gather rows from anywhere; else an indexed row is a tile.
        least: minimum elements of a block; masks cut what is past the end.
        padded: how many times smaller a tile is whose groups leave lanes idle.
        arithmetic: "plain" where an fma may round twice, "fma" where it rounds once, "ptx" where
            inline PTX of sm_89 converts to float8 too.
    """

    tile: int
    block: int
    num_programs: int
    busy: int
    lanes: int
    token_block: int
    line: int
    compared: int
    own: int
    ranked: int
    comparisons: int
    processors: int = 0
    gathers: bool = True
    least: int = 1
    padded: int = 1
    arithmetic: str = "plain"


# Two programs: with one, tests would never stride from tile to tile.
INTERPRETER = Policy(
    2**17,
    2**13,
    num_programs=2,
    busy=1,
    lanes=32,
    token_block=0,
    line=2**13,
    compared=256,
    own=128,
    ranked=512,
    comparisons=2**16,
)


def gpu_policy(processors: int, lanes: int, arithmetic: str = "fma") -> Policy:
    """For a GPU by its number of processors (multiprocessors, units, subslices) and warp size."""
    return Policy(
        2**13,
        2**13,
        num_programs=8 * processors,
        busy=2 * processors,
        lanes=lanes,
        token_block=1024,
        line=1024,
        compared=4096,
        own=16,
        ranked=256,
        comparisons=2**12,
        processors=processors,
        arithmetic=arithmetic,
    )


def npu_policy(cores: int) -> Policy:
    """For an NPU by its number of vector cores: 40 of a 910B3 and B4, 48 of a 910B1, B2 and A3.

    Codes of a row with factors take 60 bytes an element, float8 of groups that leave lanes idle up
    to 300, and 192 KB must hold them. A block of one element makes triton-ascend 3.2 fail.
    """
    return dataclasses.replace(
        gpu_policy(cores, 32, "plain"),
        tile=2**11,
        block=2**11,
        num_programs=cores,
        busy=cores,
        processors=0,
        token_block=2**11,
        gathers=False,
        least=16,
        padded=4,
    )


@functools.lru_cache(maxsize=64)
def policy(device: torch.device) -> Policy:
    """Policy of a device."""
    if device.type == "cpu":
        return INTERPRETER
    if device.type == "npu":
        utils = triton.runtime.driver.active.utils
        return npu_policy(int(utils.get_device_properties(device.index or 0)["num_vectorcore"]))
    if device.type == "xpu":
        return gpu_policy(int(torch.xpu.get_device_properties(device).gpu_subslice_count), 32)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return gpu_policy(properties.multi_processor_count, 64)
    arithmetic = cuda_arithmetic(10 * properties.major + properties.minor)
    return gpu_policy(properties.multi_processor_count, 32, arithmetic)


def planned(plan: Callable[..., _T]) -> Callable[..., _T]:
    """Check and plan a launch once for each signature of its arguments.

    Args:
        plan: as for ``once_per_signature``; its first argument has the device of the launch.
    """
    return once_per_signature(plan, within=lambda first, *_: policy(first.device))


def cuda_arithmetic(capability: int) -> str:
    """``Policy.arithmetic`` of an NVIDIA GPU.

    AMD's float8 differ from those of rows (gfx942), or do not saturate (gfx950).
    """
    return "ptx" if capability >= 89 else "fma"


# Triton's own are constexpr functions, whose every call on the host costs microseconds.
def cdiv(number: int, divisor: int) -> int:
    """``number / divisor``, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, which is positive."""
    return 1 << (number - 1).bit_length()


def _num_warps(limits: Policy, num_elements: int) -> int:
    """Warps for a tile: 32 elements a lane, at most 256 lanes."""
    return max(min(num_elements // (32 * limits.lanes), 256 // limits.lanes), 1)


def _num_programs(limits: Policy, num_tiles: int) -> int:
    """Size of the grid over tiles of which none waits for another."""
    return max(min(num_tiles, 2**31 - 1 if limits.processors else limits.num_programs), 1)


def at_a_time(
    device: torch.device, num_programs: int, num_warps: int, *, registers: int = 64
) -> int:
    """Size of a grid whose programs wait or count each other: no more than run at a time.

    Args:
        device: where the kernel runs.
        num_programs: wanted.
        num_warps: of a program.
        registers: maximum of a lane; a processor of a GPU has 2**16 at least.
    """
    limits = policy(device)
    if not limits.processors:
        return num_programs
    of_processor = 2**16 // (registers * num_warps * limits.lanes)
    return min(num_programs, limits.processors * max(of_processor, 1))


def widest(device: torch.device, *, padded: bool = False) -> int:
    """Maximum elements of a tile's row: a kernel walks longer rows in steps of this."""
    limits = policy(device)
    return limits.block // (limits.padded if padded else 1)


def tiles(
    device: torch.device,
    num_rows: int,
    width: int,
    *,
    indexed: bool = False,
    padded: bool = False,
) -> Launch:
    """Tiles over [num_rows, width] elements.

    Args:
        device: where the kernel runs.
        num_rows: rows of the work.
        width: elements of a row that several tiles may share, or of a step where one program walks
            a row.
        indexed: whether rows are addressed by an index.
        padded: whether groups of a row leave lanes idle.
    """
    return _tiles(policy(device), num_rows, width, indexed, padded)


@functools.lru_cache(maxsize=4096)
def _tiles(
    limits: Policy, num_rows: int, width: int, indexed: bool = False, padded: bool = False
) -> Launch:
    share = limits.padded if padded else 1
    block = min(next_power_of_2(max(width, limits.least)), limits.block // share)
    across = cdiv(max(width, 1), block)
    rows = 1
    while (
        (limits.gathers or not indexed)
        and rows < num_rows
        and 2 * rows * block <= limits.tile // share
        and across * cdiv(num_rows, 2 * rows) >= limits.busy
    ):
        rows *= 2
    return Launch(
        num_programs=_num_programs(limits, across * cdiv(num_rows, rows)),
        rows=rows,
        block=block,
        num_warps=_num_warps(limits, rows * block),
    )


def token_tiles(
    device: torch.device, num_tokens: int, width: int, *, whole_rows: bool = False
) -> Launch:
    """Tiles over [num_tokens, width] sums of several rows each.

    On accelerators a tile belongs to one token: a lane has 16 bytes of each of the token's rows in
    flight.

    Args:
        device: where the kernel runs.
        num_tokens: rows of the result.
        width: elements of a row.
        whole_rows: whether one program walks a row, in steps if it is longer than a tile.
    """
    return _token_tiles(policy(device), num_tokens, width, whole_rows)


@functools.lru_cache(maxsize=4096)
def _token_tiles(limits: Policy, num_tokens: int, width: int, whole_rows: bool) -> Launch:
    if not limits.token_block:
        return _tiles(limits, num_tokens, min(width, limits.block) if whole_rows else width)
    # A row that fits stays in registers; a longer one is read twice, in small steps.
    fits = whole_rows and width <= limits.block
    most = limits.block if fits else limits.token_block
    block = min(next_power_of_2(max(width, limits.least)), most)
    num_tiles = num_tokens * (1 if whole_rows else cdiv(width, block))
    return Launch(
        num_programs=_num_programs(limits, num_tiles),
        rows=1,
        block=block,
        # A lane that holds its part of a row needs more than the 64 registers of 1024 lanes.
        num_warps=max(min(block // (16 if fits else 8), 1024) // limits.lanes, 1),
    )


def one_program(device: torch.device, num_rows: int, width: int) -> Launch:
    """Tiles over [num_rows, width] numbers for one program that walks down the rows."""
    return _one_program(policy(device), num_rows, width)


@functools.lru_cache(maxsize=4096)
def _one_program(limits: Policy, num_rows: int, width: int) -> Launch:
    block = next_power_of_2(max(width, limits.least))
    # A few numbers a lane: sums along both axes take registers too.
    rows = max(min(next_power_of_2(max(num_rows, 1)), limits.tile // (4 * block)), 1)
    return Launch(1, rows, block, _num_warps(limits, 4 * rows * block))


def line(device: torch.device, num_elements: int, *, others: int = 1) -> Launch:
    """Blocks of a flat array of numbers, such as indices.

    Args:
        device: where the kernel runs.
        num_elements: numbers of the array.
        others: size of the grid's other dimension.
    """
    return _line(policy(device), num_elements, others)


@functools.lru_cache(maxsize=4096)
def _line(limits: Policy, num_elements: int, others: int) -> Launch:
    block = min(next_power_of_2(max(num_elements, limits.least)), limits.line)
    most = max(limits.num_programs // max(others, 1), 1)
    num_programs = max(min(cdiv(num_elements, block), most), 1)
    return Launch(num_programs, 1, block, _num_warps(limits, 8 * block))


@dataclasses.dataclass(frozen=True)
class PlanLaunch:
    """Launch of a routing plan.

    Attributes:
        compare: whether to compare all slots with each other, in one launch.
        own: slots of a program that are compared with others; else slots of a block.
        others: slots that they are compared with at a time.
        experts: experts whose counts a program sums over the blocks.
        num_programs: maximum programs of a grid, of which each takes several tiles.
        processors: of a GPU, whose grids have a program for each tile: a processor that is done
            takes the next one, and no last wave of programs runs on some of them only. 0 for
            others.
        num_warps: of a program.
    """

    compare: bool
    own: int
    others: int
    experts: int
    num_programs: int
    num_warps: int


def plan_launch(device: torch.device, num_slots: int) -> PlanLaunch:
    """Launch of a plan of ``num_slots`` slots.

    Comparing all with all costs the square of their number, a histogram two launches more.
    """
    return _plan_launch(policy(device), num_slots)


@functools.lru_cache(maxsize=4096)
def _plan_launch(limits: Policy, num_slots: int) -> PlanLaunch:
    compare = num_slots <= limits.compared
    # Larger blocks compare more slots, smaller ones sum more histograms.
    own = limits.own if compare else limits.ranked * (1 if num_slots <= 2**16 else 2)
    others = 128 if compare else limits.comparisons // own
    # A few comparisons a lane: each takes a predicate register.
    warps = _num_warps(limits, 4 * own * others)
    experts = max(limits.tile // 512, 16)
    return PlanLaunch(compare, own, others, experts, limits.num_programs, warps)

"""How many programs a kernel gets and how large their tiles are: the one place that decides it.

A policy is a few numbers for a kind of device; the launch follows from them and from the shape of
the work. Nothing is tuned at run time, so that the first call costs what the others do. Kernels
walk their tiles in strides of the number of programs, so any of these choices is right.

    GPU          a tile is what 8 warps hold in registers with 4 loads of 16 bytes a lane in flight;
                 tall tiles of short rows only when there are enough of them for all processors
    NPU          the same tiles, one program for each vector core
    interpreter  a tile costs about a millisecond whatever its size, so: as large as caches like
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Launch:
    """How to launch a kernel.

    Attributes:
        num_programs: size of the grid, at least 1.
        rows: rows of a tile, a power of two.
        block: elements of a tile's row, a power of two.
        num_warps: of a program; for GPUs.
    """

    num_programs: int
    rows: int
    block: int
    num_warps: int


@dataclasses.dataclass(frozen=True)
class _Policy:
    """What the tiles of a device look like.

    Attributes:
        tile: most elements of a tile.
        block: most elements of a tile's row.
        num_programs: most programs of a grid.
        busy: tiles that keep the device busy; rows share a tile when that leaves as many.
        lanes: of a warp.
    """

    tile: int
    block: int
    num_programs: int
    busy: int
    lanes: int


@functools.lru_cache(maxsize=64)
def _policy(device: torch.device) -> _Policy:
    if device.type == "cpu":
        # Two programs, because a grid of one would never take the stride from tile to tile.
        return _Policy(2**17, 2**13, num_programs=2, busy=1, lanes=32)
    if device.type == "npu":
        utils = triton.runtime.driver.active.utils
        cores = int(utils.get_device_properties(device.index or 0)["num_vectorcore"])
        return _Policy(2**13, 2**13, num_programs=cores, busy=cores, lanes=32)
    if device.type == "xpu":
        cores = int(torch.xpu.get_device_properties(device).gpu_subslice_count)
        return _Policy(2**13, 2**13, num_programs=8 * cores, busy=2 * cores, lanes=32)
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    lanes = 64 if torch.version.hip else 32
    return _Policy(2**13, 2**13, num_programs=8 * cores, busy=2 * cores, lanes=lanes)


def widest(device: torch.device) -> int:
    """Most elements of a tile's row: a kernel walks longer rows in steps of this."""
    return _policy(device).block


def tiles(device: torch.device, num_rows: int, width: int) -> Launch:
    """Tiles over [num_rows, width] elements.

    Args:
        device: where the kernel runs.
        num_rows: rows of the work.
        width: elements of a row that different tiles may take; where one program walks a row, the
            elements of a step.
    """
    policy = _policy(device)
    block = min(triton.next_power_of_2(max(width, 1)), policy.block)
    across = triton.cdiv(max(width, 1), block)
    rows = 1
    while (
        rows < num_rows
        and 2 * rows * block <= policy.tile
        and across * triton.cdiv(num_rows, 2 * rows) >= policy.busy
    ):
        rows *= 2
    num_tiles = across * triton.cdiv(num_rows, rows)
    return Launch(
        num_programs=max(min(num_tiles, policy.num_programs), 1),
        rows=rows,
        block=block,
        # 32 elements a lane, at most 256 lanes.
        num_warps=max(min(rows * block // (32 * policy.lanes), 256 // policy.lanes), 1),
    )

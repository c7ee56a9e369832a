"""Records without data: prepare windows, abort a call, wait early, end an aborted epoch.

One program writes, or waits for, the records that ``moe_triton.layout.windows`` describes. A wait
of its own holds one processor, where a step that waits holds as many as its grid has programs.

Letters: W ranks.
Bytes:   16 for each of W ranks.
Source:  ``moe_triton.ref``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..layout import Windows
from . import launch_config
from ._windows import (
    RECEIVED,
    SENT,
    control_start,
    end_recv,
    is_broken,
    next_epoch,
    wait_arguments,
    wait_records,
    write_records,
)


@triton.jit(do_not_specialize=["rank", "status", "digest", "extra"])
def _send_record_kernel(
    bases_ptr,  # [W] int64
    state_ptr,  # [STATE_WORDS] int32
    problem_ptr,  # [PROBLEM_WORDS] int32
    rank,
    world,
    slots,
    control_bytes,
    status,
    digest,
    extra,
    BLOCK_W: tl.constexpr,
):
    """Write this rank's record to every rank.

    Example: epoch 6, status 1, digest 7, extra 9: every rank finds the record [6, 1, 7, 9].
    """
    if not is_broken(problem_ptr):
        epoch = next_epoch(state_ptr, SENT)
        control = control_start(epoch, slots, control_bytes)
        write_records(bases_ptr, control, rank, world, epoch, status, digest, extra, BLOCK_W)
        tl.store(state_ptr + SENT, epoch)


def send_record(windows: Windows, *, digest: int, status: int, extra: int = 0) -> None:
    """Send every rank a record without data.

    Arguments as in ``ref.send_record``.
    """
    _send_record_kernel[(1,)](
        windows.bases,
        windows.state,
        windows.problem,
        windows.rank,
        windows.world_size,
        windows.ring.slots,
        windows.ring.control_bytes,
        status,
        digest,
        extra,
        BLOCK_W=launch_config.next_power_of_2(windows.world_size),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["rank", "kind", "digest", "severity", "patience"])
def _recv_records_kernel(
    bases_ptr,  # [W] int64
    state_ptr,  # [STATE_WORDS] int32
    problem_ptr,  # [PROBLEM_WORDS] int32, in and out
    notice_ptr,  # [1] int32 of the host, out
    rank,
    world,
    kind,
    slots,
    control_bytes,
    digest,
    severity,
    patience,  # ticks, without a clock looks
    PEEK: tl.constexpr,
    CLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Wait for the records of all ranks.

    Example: epoch 5, digest 7, records [[5, 0, 7, 0], [1, 0, 7, 0], [5, 0, 7, 0]]: after the
        time-out, problem [LATE, kind, 5, 1, 1, 5, BROKEN, 0].
    """
    if not is_broken(problem_ptr):
        epoch = next_epoch(state_ptr, RECEIVED)
        control = tl.load(bases_ptr + rank) + control_start(epoch, slots, control_bytes)
        wait_records(
            problem_ptr, notice_ptr, control, epoch, digest, world, kind, severity, patience, CLOCK,
            BLOCK_W,
        )  # fmt: skip
    if not PEEK:
        end_recv(state_ptr, problem_ptr)


def recv_records(windows: Windows, *, digest: int, timeout: float, peek: bool = False) -> None:
    """Wait for the records of all ranks.

    Arguments as in ``ref.recv_records``. Time is that of a GPU's clock; the interpreter has none
    and takes 2**20 looks for a second.
    """
    severity, patience, clock = wait_arguments(windows.device, windows.hard, timeout)
    _recv_records_kernel[(1,)](
        windows.bases,
        windows.state,
        windows.problem,
        windows.notice,
        windows.rank,
        windows.world_size,
        windows.kind,
        windows.ring.slots,
        windows.ring.control_bytes,
        digest,
        severity,
        patience,
        PEEK=peek,
        CLOCK=clock,
        BLOCK_W=launch_config.next_power_of_2(windows.world_size),
        num_warps=1,
    )

"""Device code of the steps over windows: records, waits, and the end of a grid.

A step reads its epoch from device memory, so that a captured graph moves through the ring. Every
program of a grid comes to ``last_program``; the last one to come writes the records, or ends the
epoch. Nobody waits for it.

    send   data;  barrier, fetch-add (acquire, release);  last program: numbers, words 1 to 3;
           barrier;  epoch of all records, released to the system
    recv   epochs, relaxed, until none is behind or time is up;  one acquire from the system of all;
           barrier;  status and digest;  data

Epochs are compared by their signed difference, which survives their wrap-around.

Source: the memory models of PTX and C++. ``moe_triton.layout.windows`` describes the memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ..layout import WindowsSignature
from ..layout import windows as words

RECORD_BYTES = tl.constexpr(words.RECORD_BYTES)
EXTRA = tl.constexpr(words.EXTRA)
_STATUS, _DIGEST = tl.constexpr(words.STATUS), tl.constexpr(words.DIGEST)
SENT, RECEIVED = tl.constexpr(words.SENT), tl.constexpr(words.RECEIVED)
NUM_ACTIVE = tl.constexpr(words.NUM_ACTIVE)
DATA_SLOT = tl.constexpr(words.DATA_SLOT)
_SENDERS_DONE = tl.constexpr(words.SENDERS_DONE)
_WHAT, _KIND = tl.constexpr(words.WHAT), tl.constexpr(words.KIND)
_EPOCH, _RANK = tl.constexpr(words.PROBLEM_EPOCH), tl.constexpr(words.PROBLEM_RANK)
_SEEN, _WANTED = tl.constexpr(words.SEEN), tl.constexpr(words.WANTED)
_SEVERITY = tl.constexpr(words.SEVERITY)
_MISMATCH, _ABORTED = tl.constexpr(words.MISMATCH), tl.constexpr(words.ABORTED)
_LATE, _OVERRUN = tl.constexpr(words.LATE), tl.constexpr(words.OVERRUN)
_SOFT, _BROKEN = tl.constexpr(words.SOFT), tl.constexpr(words.BROKEN)

# Clocks: None counts looks, for the interpreter.
GLOBAL_TIMER, REAL_TIME = tl.constexpr("globaltimer"), tl.constexpr("memrealtime")
_TICKS_PER_SECOND = {"globaltimer": 10**9, "memrealtime": 10**8, None: 2**20}


@triton.jit
def ahead(seen, wanted):
    """The signed difference of two epochs."""
    return (seen.to(tl.int64) - wanted.to(tl.int64)).to(tl.int32)


@triton.jit
def clock(CLOCK: tl.constexpr):
    """The time of a GPU in ticks."""
    if CLOCK == GLOBAL_TIMER:
        # All lanes take the latest reading: a loop whose lanes diverge at its barrier never ends.
        ticks = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;",
            "=l,r",
            [tl.arange(0, 32)],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
        now = tl.max(ticks, axis=0)
    else:
        tl.static_assert(CLOCK == REAL_TIME, "unknown clock")
        now = tl.extra.hip.memrealtime()
    return now


@triton.jit
def is_broken(problem_ptr):
    """Whether no step does anything any more."""
    return tl.load(problem_ptr + _SEVERITY, volatile=True) >= _BROKEN


@triton.jit
def next_epoch(state_ptr, HALF: tl.constexpr):
    """The epoch that the next step of ``SENT`` or ``RECEIVED`` works on."""
    return tl.load(state_ptr + HALF) + 1


@triton.jit
def control_start(epoch, slots, control_bytes):
    """Bytes before the control slot of an epoch."""
    # A mask, not %: its sign for negative epochs differs between Triton and the host.
    return (epoch & (slots - 1)).to(tl.int64) * control_bytes


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    """An address, a multiple of 16, as a pointer."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def last_program(state_ptr, HALF: tl.constexpr):
    """Whether this is the last program of its grid to come here; every program has to come."""
    done_ptr = state_ptr + _SENDERS_DONE + HALF
    # Barrier: other threads may have written the data that the fetch-add releases.
    tl.debug_barrier()
    last = tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(done_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def write_records(
    bases_ptr, control, rank, world, epoch, status, digest, extra, BLOCK_W: tl.constexpr
) -> None:
    """Write this rank's record to every rank, after all earlier writes.

    Args:
        bases_ptr: [W] int64.
        control: bytes before the control slot.
        rank: this rank.
        world: W.
        epoch: word of the records, as the following three.
        status: likewise.
        digest: likewise.
        extra: likewise.
        BLOCK_W: W rounded up to a power of two.
    """
    peer = tl.arange(0, BLOCK_W)
    mask = peer < world
    address = tl.load(bases_ptr + peer, mask=mask, other=0) + control + rank * RECORD_BYTES
    record = address.to(tl.pointer_type(tl.int32))
    none = tl.zeros([BLOCK_W], tl.int32)
    tl.store(record + _STATUS, none + status, mask=mask)
    tl.store(record + _DIGEST, none + digest, mask=mask)
    tl.store(record + EXTRA, none + extra, mask=mask)
    # Barrier: other threads may have written the words that the epochs release.
    tl.debug_barrier()
    tl.atomic_xchg(record, none + epoch, mask=mask, sem="release", scope="sys")


@triton.jit
def wait_records(
    problem_ptr,
    notice_ptr,
    control,
    epoch,
    digest,
    world,
    kind,
    severity,
    patience,
    CLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Wait for the records of all ranks; whether their data may be read.

    Args:
        problem_ptr: [PROBLEM_WORDS] int32, in and out.
        notice_ptr: [1] int32 of the host, out.
        control: address of the own control slot.
        epoch: of the records.
        digest: of the records.
        world: W.
        kind: for the problem.
        severity: of an abort or a mismatch.
        patience: ticks to wait, without a clock looks.
        CLOCK: ``GLOBAL_TIMER``, ``REAL_TIME`` or None.
        BLOCK_W: W rounded up to a power of two.
    """
    rank = tl.arange(0, BLOCK_W)
    mask = rank < world
    record = (control + rank * RECORD_BYTES).to(tl.pointer_type(tl.int32))
    waited = tl.zeros((), tl.int64)
    if CLOCK is not None:
        start = clock(CLOCK)
    # Look without an order: each acquire of a vector is a read-modify-write for every word.
    seen = tl.load(record, mask=mask, other=0, volatile=True)
    behind = tl.sum(((ahead(seen, epoch) < 0) & mask).to(tl.int32), axis=0)
    while (behind > 0) & (waited < patience):
        # Read the clock before the flags, so that a flag set before the deadline counts.
        if CLOCK is not None:
            waited = clock(CLOCK) - start
        else:
            waited += 1
        seen = tl.load(record, mask=mask, other=0, volatile=True)
        behind = tl.sum(((ahead(seen, epoch) < 0) & mask).to(tl.int32), axis=0)
    seen = tl.atomic_add(
        record, tl.zeros([BLOCK_W], tl.int32), mask=mask, sem="acquire", scope="sys"
    )
    # Barrier: other threads read the data that these have acquired.
    tl.debug_barrier()
    status = tl.load(record + _STATUS, mask=mask, other=0, volatile=True)
    seen_digest = tl.load(record + _DIGEST, mask=mask, other=0, volatile=True)
    difference = ahead(seen, epoch)
    what = tl.where(seen_digest != digest, _MISMATCH, 0)
    what = tl.where(status != 0, _ABORTED, what)
    what = tl.where(difference < 0, _LATE, what)
    what = tl.where(difference > 0, _OVERRUN, what)
    what = tl.where(mask, what, 0)
    worst = tl.max(what, axis=0)
    if worst != 0:
        severity = tl.where(worst >= _LATE, _BROKEN, severity)
        # Programs may find different problems: the first one writes, unless a later one is worse.
        claimed = tl.atomic_max(problem_ptr + _SEVERITY, severity, sem="acq_rel", scope="gpu")
        if claimed < severity:
            culprit = tl.min(tl.where(what == worst, rank, BLOCK_W), axis=0)
            found = tl.where(worst == _MISMATCH, seen_digest, seen)
            found = tl.sum(tl.where(rank == culprit, found, 0), axis=0)
            tl.store(problem_ptr + _KIND, kind)
            tl.store(problem_ptr + _EPOCH, epoch)
            tl.store(problem_ptr + _RANK, culprit)
            tl.store(problem_ptr + _SEEN, found)
            tl.store(problem_ptr + _WANTED, tl.where(worst == _MISMATCH, digest, epoch))
            tl.debug_barrier()
            tl.atomic_xchg(problem_ptr + _WHAT, worst, sem="release", scope="gpu")
            tl.store(notice_ptr, worst)
    return worst == 0


@triton.jit
def end_recv(state_ptr, problem_ptr) -> None:
    """End the epoch of a recv, by the last program and unless the group is broken."""
    # Look again: another program of the grid may have run out of time.
    if last_program(state_ptr, RECEIVED) and not is_broken(problem_ptr):
        tl.store(state_ptr + RECEIVED, next_epoch(state_ptr, RECEIVED))


def check_device(op: str, windows: WindowsSignature, device: torch.device) -> None:
    """Raise unless windows are on the device of a step's tensors."""
    if windows.device != device:
        raise ArgumentValueError(op, "windows", f"be on {device}", windows.device)


def clock_of(device: torch.device) -> str | None:
    """The clock of a device, or None where Triton reads none."""
    if device.type != "cuda":
        return None
    return "memrealtime" if torch.version.hip else "globaltimer"


def wait_arguments(device: torch.device, hard: bool, timeout: float) -> tuple[int, int, str | None]:
    """Severity of an abort, patience and clock of ``wait_records``."""
    name = clock_of(device)
    severity = words.BROKEN if hard else words.SOFT
    return severity, int(timeout * _TICKS_PER_SECOND[name]), name

"""Flags between ranks that share memory: written after the data, waited for with a time-out.

A record is four int32 words (epoch, status, digest, stream) in the window of the waiting rank, one
for each writing rank, in the ring slot epoch % slots.

    write: data, by any earlier kernel; status and digest; barrier; epoch, released to the system
    wait:  epoch, acquired from the system, until it is the wanted one; status and digest

Epochs are compared by their signed difference, which survives their wrap-around: 0 is the wanted
epoch, negative an earlier one, positive an overrun. They are read from device memory, so that a
captured graph moves through the ring.

Letters: W ranks.
Bytes:   16 for each of W ranks.
Source:  the memory models of PTX and C++. The clock is inline assembly, so this is the only file
         of which Ascend compiles nothing. Transports signal on the host today; these kernels are
         for windows in the device memory of several processes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ._checks import check_tensor

RECORD_WORDS = 4

#: Values of ``problem[0]``; after ``LATE`` or ``OVERRUN`` the group is broken.
MISMATCH, ABORTED, LATE, OVERRUN = 1, 2, 3, 4
PROBLEM_WORDS = 6  # kind, operation, epoch, rank, seen, wanted

_MISMATCH, _ABORTED = tl.constexpr(MISMATCH), tl.constexpr(ABORTED)
_LATE, _OVERRUN = tl.constexpr(LATE), tl.constexpr(OVERRUN)
_NANOSECONDS = 10**9


@triton.jit
def _record(address, epoch, slots, slot_bytes):
    """Pointer to the record of ``epoch``; in slot 0 it is at ``address``."""
    # A mask, not %: its sign for negative epochs differs between Triton and the host.
    slot = (epoch & (slots - 1)).to(tl.int64)
    return (address + slot * slot_bytes).to(tl.pointer_type(tl.int32))


@triton.jit
def _ahead(seen, wanted):
    """The signed difference of two epochs."""
    return (seen.to(tl.int64) - wanted.to(tl.int64)).to(tl.int32)


@triton.jit
def _nanoseconds():
    """The clock of an NVIDIA GPU."""
    # All lanes take the latest reading: a loop whose lanes diverge at its barrier never ends.
    ticks = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;",
        "=l,r",
        [tl.arange(0, 32)],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )
    return tl.max(ticks, axis=0)


@triton.jit(do_not_specialize=["num_ranks", "slots", "slot_bytes", "status", "digest"])
def _write_flags_kernel(
    addresses_ptr,  # [W] int64
    epoch_ptr,  # [1] int32
    problem_ptr,  # [PROBLEM_WORDS] int32
    num_ranks,
    slots,
    slot_bytes,
    status,
    digest,
    BLOCK_W: tl.constexpr,
):
    """Write the record of an epoch to every window.

    Example: epoch 6, status 1, digest 7, slots 4: the record in slot 2 is [6, 1, 7, untouched].
    """
    rank = tl.arange(0, BLOCK_W)
    mask = (rank < num_ranks) & (tl.load(problem_ptr) < _LATE)
    epoch = tl.load(epoch_ptr)
    record_ptr = _record(
        tl.load(addresses_ptr + rank, mask=mask, other=0), epoch, slots, slot_bytes
    )
    tl.store(record_ptr + 1, status, mask=mask)
    tl.store(record_ptr + 2, digest, mask=mask)
    # Barrier: other threads may have written the words that the epoch releases.
    tl.debug_barrier()
    tl.atomic_xchg(record_ptr, epoch, mask=mask, sem="release", scope="sys")


def write_flags(
    addresses: torch.Tensor,
    epoch: torch.Tensor,
    problem: torch.Tensor,
    *,
    slots: int,
    slot_bytes: int,
    status: int,
    digest: int,
) -> None:
    """Write this rank's record of an epoch to every rank, after all earlier writes to memory.

    Does nothing in a broken group.

    Args:
        addresses: [W] int64, where this rank's record lies in slot 0 of each rank's window.
        epoch: [1] int32, of the operation.
        problem: [PROBLEM_WORDS] int32 of ``wait_flags``, zeros without a problem.
        slots: of the ring, a power of two.
        slot_bytes: from slot to slot.
        status: 0 for data, anything else for an abort.
        digest: 32-bit digest of the arguments of the operation.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape, stride, device or number that does not fit.
    """
    _check("write_flags", addresses, epoch, problem, slots, slot_bytes)
    _write_flags_kernel[(1,)](
        addresses,
        epoch,
        problem,
        len(addresses),
        slots,
        slot_bytes,
        status,
        digest,
        BLOCK_W=triton.next_power_of_2(len(addresses)),
        num_warps=1,
    )


@triton.jit(
    do_not_specialize=["num_ranks", "slots", "slot_bytes", "digest", "operation", "patience"]
)
def _wait_flags_kernel(
    addresses_ptr,  # [W] int64
    epoch_ptr,  # [1] int32
    problem_ptr,  # [PROBLEM_WORDS] int32, in and out
    records_ptr,  # [W, 4] int32
    waited_ptr,  # [W] int64
    num_ranks,
    slots,
    slot_bytes,
    digest,
    operation,
    patience,  # nanoseconds with a clock, else polls
    CLOCK: tl.constexpr,
):
    """Wait for the record of an epoch from every rank.

    Example: epoch 5, digest 7, records [[5, 0, 7], [1, 0, 7], [5, 0, 7]] of three ranks: after the
        time-out, problem [LATE, operation, 5, 1, 1, 5].
    """
    problem = tl.load(problem_ptr)
    if problem < _LATE:
        wanted = tl.load(epoch_ptr)
        start = tl.zeros((), tl.int64)
        if CLOCK:
            start = _nanoseconds()
        waited = tl.zeros((), tl.int64)
        for rank in range(num_ranks):
            record_ptr = _record(tl.load(addresses_ptr + rank), wanted, slots, slot_bytes)
            # A scalar becomes a plain load with acquire; a block would become read-modify-writes.
            seen = tl.atomic_add(record_ptr, 0, sem="acquire", scope="sys")
            while (_ahead(seen, wanted) < 0) & (waited < patience):
                # Read the clock before the flag, so that a flag set before the deadline counts.
                if CLOCK:
                    waited = _nanoseconds() - start
                else:
                    waited += 1
                seen = tl.atomic_add(record_ptr, 0, sem="acquire", scope="sys")
            status = tl.load(record_ptr + 1, volatile=True)
            seen_digest = tl.load(record_ptr + 2, volatile=True)
            tl.store(records_ptr + rank * 4, seen)
            tl.store(records_ptr + rank * 4 + 1, status)
            tl.store(records_ptr + rank * 4 + 2, seen_digest)
            tl.store(records_ptr + rank * 4 + 3, 0)
            tl.store(waited_ptr + rank, waited)

            difference = _ahead(seen, wanted)
            kind = tl.where(seen_digest != digest, _MISMATCH, 0)
            kind = tl.where(status != 0, _ABORTED, kind)
            kind = tl.where(difference < 0, _LATE, kind)
            kind = tl.where(difference > 0, _OVERRUN, kind)
            # Keep the first problem, unless a later one breaks the group.
            if (kind != 0) & ((problem == 0) | ((problem < _LATE) & (kind >= _LATE))):
                problem = kind
                tl.store(problem_ptr, kind)
                tl.store(problem_ptr + 1, operation)
                tl.store(problem_ptr + 2, wanted)
                tl.store(problem_ptr + 3, rank)
                tl.store(problem_ptr + 4, tl.where(kind == _MISMATCH, seen_digest, seen))
                tl.store(problem_ptr + 5, tl.where(kind == _MISMATCH, digest, wanted))


def wait_flags(
    addresses: torch.Tensor,
    epoch: torch.Tensor,
    problem: torch.Tensor,
    records: torch.Tensor,
    waited: torch.Tensor,
    *,
    slots: int,
    slot_bytes: int,
    digest: int,
    operation: int,
    timeout: float,
    polls: int = 2**20,
) -> None:
    """Wait until every rank's record is of an epoch, or report a problem after the time-out.

    Read the data only if ``problem[0] == 0``. Does nothing in a broken group; to wait again, clear
    ``problem``.

    Args:
        addresses: [W] int64, where each rank's record lies in slot 0 of this rank's window.
        epoch: [1] int32, of the operation.
        problem: [PROBLEM_WORDS] int32, zeros without a problem. Receives the first problem: its
            kind (``MISMATCH``, ``ABORTED``, ``LATE``, ``OVERRUN``), operation, epoch, rank, and the
            seen and the wanted epoch, or digests for ``MISMATCH``. The last two kinds break the
            group, and replace the others.
        records: [W, 4] int32 output, the last reading of each record.
        waited: [W] int64 output, nanoseconds, or polls, until each record was seen in turn.
        slots: of the ring, a power of two.
        slot_bytes: from slot to slot.
        digest: of this rank's arguments; those of the other ranks must be equal.
        operation: number for ``problem``.
        timeout: seconds, by the clock of an NVIDIA GPU.
        polls: time-out in readings of late records, for the interpreter, which has no clock, and
            GPUs whose clock Triton cannot read.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape, stride, device or number that does not fit.
    """
    op, device, ranks = "wait_flags", addresses.device, len(addresses)
    _check(op, addresses, epoch, problem, slots, slot_bytes)
    for name, tensor, dtype, shape in (
        ("records", records, torch.int32, (ranks, RECORD_WORDS)),
        ("waited", waited, torch.int64, (ranks,)),
    ):
        check_tensor(op, name, tensor, dtypes=(dtype,), shape=shape, device=device)
        if not tensor.is_contiguous():
            raise ArgumentValueError(op, name, "be contiguous", f"strides {tensor.stride()}")
    clock = device.type == "cuda" and torch.version.hip is None
    _wait_flags_kernel[(1,)](
        addresses,
        epoch,
        problem,
        records,
        waited,
        ranks,
        slots,
        slot_bytes,
        digest,
        operation,
        int(timeout * _NANOSECONDS) if clock else polls,
        CLOCK=clock,
        num_warps=1,
    )


def _check(
    op: str,
    addresses: torch.Tensor,
    epoch: torch.Tensor,
    problem: torch.Tensor,
    slots: int,
    slot_bytes: int,
) -> None:
    check = functools.partial(check_tensor, op, device=addresses.device, strided_columns=False)
    check("addresses", addresses, dtypes=(torch.int64,), shape=(None,))
    check("epoch", epoch, dtypes=(torch.int32,), shape=(1,))
    check("problem", problem, dtypes=(torch.int32,), shape=(PROBLEM_WORDS,))
    if len(addresses) == 0:
        raise ArgumentValueError(op, "addresses", "have at least one rank", "none")
    if slots < 1 or slots & (slots - 1):
        raise ArgumentValueError(op, "slots", "be a power of two", slots)
    if slot_bytes < 0 or slot_bytes % 16:
        raise ArgumentValueError(op, "slot_bytes", "be a multiple of 16", slot_bytes)

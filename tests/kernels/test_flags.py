"""Flags: words and slots, every end of a wait, epochs that wrap around, two processes at once."""

from __future__ import annotations

import functools

import pytest
import torch

from moe_triton import testing
from moe_triton.comm import atomics
from moe_triton.comm.window import FLAG_BYTES, FLAG_WORDS
from moe_triton.errors import MoeError
from moe_triton.kernels import flags, wait_flags, write_flags

DIGEST = -0x1234567
SLOTS, SLOT_BYTES = 4, 256
POISON = -0x5555_5556
LAST, FIRST = 2**31 - 1, -(2**31)  # epochs on both sides of their wrap


class Window:
    """A window of one rank: in each slot a record for each of W ranks."""

    def __init__(self, ranks, device, memory=None):
        if memory is None:
            memory = torch.full(
                (SLOTS * SLOT_BYTES // 4,), POISON, dtype=torch.int32, device=device
            )
        self.words = memory.view(SLOTS, -1)
        self.records = self.words[:, : ranks * FLAG_WORDS].view(SLOTS, ranks, FLAG_WORDS)
        self.addresses = [self.words.data_ptr() + rank * FLAG_BYTES for rank in range(ranks)]

    def put(self, epoch, rank, seen, status=0, digest=DIGEST):
        words = torch.tensor([seen, status, digest, 0], dtype=torch.int32)
        self.records[epoch % SLOTS, rank] = words.to(self.words.device)


def int32(*numbers, device):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def no_problem(device):
    return torch.zeros(flags.PROBLEM_WORDS, dtype=torch.int32, device=device)


def write(addresses, epoch, device, *, status=0, problem=None):
    write_flags(
        torch.tensor(addresses, device=device),
        int32(epoch, device=device),
        no_problem(device) if problem is None else problem,
        slots=SLOTS,
        slot_bytes=SLOT_BYTES,
        status=status,
        digest=DIGEST,
    )


def wait(addresses, epoch, device, *, problem=None, timeout=0.05, polls=3):
    """Problem, records and waiting times, poisoned before."""
    problem = no_problem(device) if problem is None else problem
    ranks = len(addresses)
    records = torch.full((ranks, FLAG_WORDS), POISON, dtype=torch.int32, device=device)
    waited = torch.full((ranks,), POISON, dtype=torch.int64, device=device)
    wait_flags(
        torch.tensor(addresses, device=device),
        int32(epoch, device=device),
        problem,
        records,
        waited,
        slots=SLOTS,
        slot_bytes=SLOT_BYTES,
        digest=DIGEST,
        operation=7,
        timeout=timeout,
        polls=polls,
    )
    return problem.tolist(), records.tolist(), waited.tolist()


def test_records_are_those_of_the_windows():
    assert flags.RECORD_WORDS == FLAG_WORDS


def test_examples(device):
    """The numbers of the docstrings of the two kernels."""
    window = Window(1, device)
    arguments = {"slots": SLOTS, "slot_bytes": SLOT_BYTES, "digest": 7}
    addresses = torch.tensor(window.addresses, device=device)
    write_flags(addresses, int32(6, device=device), no_problem(device), status=1, **arguments)
    assert window.records[2, 0].tolist() == [6, 1, 7, POISON]
    window, problem = Window(3, device), no_problem(device)
    for rank, seen in enumerate((5, 1, 5)):
        window.put(5, rank, seen, digest=7)
    records = torch.zeros((3, FLAG_WORDS), dtype=torch.int32, device=device)
    waited = torch.zeros(3, dtype=torch.int64, device=device)
    addresses = torch.tensor(window.addresses, device=device)
    wait_flags(
        addresses, int32(5, device=device), problem, records, waited, operation=9, timeout=0.05,
        polls=3, **arguments,
    )  # fmt: skip
    assert problem.tolist() == [flags.LATE, 9, 5, 1, 1, 5]


@pytest.mark.parametrize("epoch", [1, 6, -1, LAST, FIRST])
@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_writes_one_record_to_each_window(epoch, ranks, device):
    windows = [Window(ranks, device) for _ in range(ranks)]
    me = ranks - 1
    write([window.addresses[me] for window in windows], epoch, device, status=1)
    for window in windows:
        expected = torch.full_like(window.words, POISON)
        start = me * FLAG_WORDS
        expected[epoch % SLOTS, start : start + 3] = int32(epoch, 1, DIGEST, device=device)
        assert torch.equal(window.words, expected)


def test_slots_may_be_gigabytes_apart(device, reserve):
    reserve(2**32)
    memory = torch.empty(2**32, dtype=torch.uint8, device=device)
    address, slot_bytes = memory.data_ptr(), 2**30
    record = memory[3 * slot_bytes :][:16].view(torch.int32)
    record.fill_(POISON)
    problem = no_problem(device)
    arguments = {"slots": SLOTS, "slot_bytes": slot_bytes, "digest": DIGEST}
    addresses, epoch = torch.tensor([address], device=device), int32(3, device=device)
    write_flags(addresses, epoch, problem, **arguments, status=0)
    assert record.tolist() == [3, 0, DIGEST, POISON]
    records = torch.full((1, FLAG_WORDS), POISON, dtype=torch.int32, device=device)
    waited = torch.zeros(1, dtype=torch.int64, device=device)
    wait_flags(
        addresses, epoch, problem, records, waited, **arguments, operation=7, timeout=0.05, polls=3
    )
    assert problem.tolist() == [0] * flags.PROBLEM_WORDS


@pytest.mark.parametrize("epoch", [1, 6, -1, LAST, FIRST])
def test_waits_for_arrived_epochs(epoch, device):
    window = Window(3, device)
    for rank in range(3):
        window.put(epoch, rank, epoch)
    problem, records, waited = wait(window.addresses, epoch, device)
    assert problem == [0] * flags.PROBLEM_WORDS
    assert records == [[epoch, 0, DIGEST, 0]] * 3
    assert all(time >= 0 for time in waited)


@pytest.mark.parametrize(
    "wanted, seen", [(5, 1), (5, POISON), (1, -3), (FIRST, LAST), (FIRST + 1, LAST - 2)]
)
def test_names_the_first_late_rank(wanted, seen, device):
    window = Window(4, device)
    for rank, word in enumerate([wanted, seen, wanted, seen]):
        window.put(wanted, rank, word)
    problem, records, waited = wait(window.addresses, wanted, device)
    assert problem == [flags.LATE, 7, wanted, 1, seen, wanted]
    # The others were still looked at, for the message.
    assert [record[0] for record in records] == [wanted, seen, wanted, seen]
    assert waited[0] <= waited[1] == waited[3]
    if device.type == "cpu":
        assert waited == [0, 3, 3, 3]
    else:
        assert 0.05e9 <= waited[1] < 5e9


@pytest.mark.parametrize("wanted, seen", [(5, 9), (-2, 2), (LAST, FIRST), (LAST - 1, FIRST + 2)])
def test_an_epoch_ahead_is_an_overrun(wanted, seen, device):
    window = Window(2, device)
    window.put(wanted, 0, wanted)
    window.put(wanted, 1, seen)
    problem, _, waited = wait(window.addresses, wanted, device)
    assert problem == [flags.OVERRUN, 7, wanted, 1, seen, wanted]
    if device.type == "cpu":
        assert waited == [0, 0]


def test_an_abort_does_not_end_the_wait(device):
    window = Window(3, device)
    window.put(2, 0, 2)
    window.put(2, 1, 2, status=1, digest=0)
    window.put(2, 2, 2)
    problem, records, _ = wait(window.addresses, 2, device)
    assert problem == [flags.ABORTED, 7, 2, 1, 2, 2]
    assert records == [[2, 0, DIGEST, 0], [2, 1, 0, 0], [2, 0, DIGEST, 0]]


def test_other_arguments_have_another_digest(device):
    window = Window(2, device)
    window.put(2, 0, 2)
    window.put(2, 1, 2, digest=99)
    assert wait(window.addresses, 2, device)[0] == [flags.MISMATCH, 7, 2, 1, 99, DIGEST]


def test_the_first_problem_stays_unless_a_later_one_breaks_the_group(device):
    window = Window(4, device)
    window.put(3, 0, 3, digest=99)
    window.put(3, 1, 3, status=1)
    window.put(3, 2, 3)
    window.put(3, 3, 3)
    problem = no_problem(device)
    assert wait(window.addresses, 3, device, problem=problem)[0][:4] == [flags.MISMATCH, 7, 3, 0]
    for rank in range(4):
        window.put(4, rank, 4, status=1)
    # The next operation is waited for, but the host has not seen yet what came before.
    actual, records, _ = wait(window.addresses, 4, device, problem=problem)
    assert actual[:4] == [flags.MISMATCH, 7, 3, 0]
    assert records[3] == [4, 1, DIGEST, 0]
    window.put(5, 0, 5, status=1)
    window.put(5, 1, 5)
    window.put(5, 2, 1)
    window.put(5, 3, 9)
    actual, _, _ = wait(window.addresses, 5, device, problem=problem)
    assert actual == [flags.LATE, 7, 5, 2, 1, 5]


@pytest.mark.parametrize("what", [flags.LATE, flags.OVERRUN])
def test_nothing_is_done_in_a_broken_group(what, device):
    window = Window(2, device)
    before = window.words.clone()
    problem = no_problem(device)
    problem[0] = what
    write(window.addresses, 1, device, problem=problem)
    assert torch.equal(window.words, before)
    actual, records, waited = wait(window.addresses, 1, device, problem=problem)
    assert actual == [what, 0, 0, 0, 0, 0]
    assert records == [[POISON] * 4] * 2
    assert waited == [POISON] * 2


@pytest.mark.parametrize("what", [flags.MISMATCH, flags.ABORTED])
def test_a_group_that_is_not_broken_goes_on(what, device):
    window = Window(1, device)
    problem = no_problem(device)
    problem[0] = what
    write(window.addresses, 1, device, problem=problem)
    assert window.records[1, 0, 0] == 1


def test_a_wait_may_be_tried_again(device):
    window = Window(1, device)
    window.put(1, 0, 0)
    assert wait(window.addresses, 1, device)[0][0] == flags.LATE
    write(window.addresses, 1, device)
    assert wait(window.addresses, 1, device)[0][0] == 0


def test_host_and_kernel_read_each_others_flags(device):
    if device.type != "cpu":
        pytest.skip("the host's flags are in its own memory")
    window = Window(1, device)
    window.put(9, 0, 5)
    atomics.store_release(window.addresses[0] + 9 % SLOTS * SLOT_BYTES, 9)
    assert wait(window.addresses, 9, device)[0][0] == 0
    write(window.addresses, 10, device)
    assert atomics.load_acquire(window.addresses[0] + 10 % SLOTS * SLOT_BYTES) == 10


ROUNDS = range(LAST - 10, LAST + 15)  # across the wrap
PAYLOAD = 64


def _ping_pong(ctx, path):
    """Each rank writes what follows from the round, then its flag; reads after the peer's."""
    num_words = SLOTS * SLOT_BYTES // 4
    words = 2 * (num_words + SLOTS * PAYLOAD)
    memory = torch.from_file(path, shared=True, size=words, dtype=torch.int32).view(2, -1)
    windows = [Window(2, "cpu", part[:num_words]) for part in memory]
    data = [part[num_words:].view(SLOTS, PAYLOAD) for part in memory]
    me, peer = ctx.rank, 1 - ctx.rank
    for number in ROUNDS:
        epoch = atomics.wrap(number)
        data[peer][epoch % SLOTS] = (
            torch.arange(PAYLOAD, dtype=torch.int32) * (me + 2) + number % 999
        )
        write([windows[0].addresses[me], windows[1].addresses[me]], epoch, "cpu")
        problem, records, _ = wait(windows[me].addresses, epoch, ctx.device, polls=2**18)
        assert problem == [0] * flags.PROBLEM_WORDS
        assert [record[0] for record in records] == [epoch, epoch]
        expected = torch.arange(PAYLOAD, dtype=torch.int32) * (peer + 2) + number % 999
        assert torch.equal(data[me][epoch % SLOTS], expected)
    return True


def test_two_processes(tmp_path, device):
    if device.type != "cpu":
        pytest.skip("processes share host memory here")
    path = tmp_path / "windows"
    words = torch.full((2 * (SLOTS * SLOT_BYTES // 4 + SLOTS * PAYLOAD),), ROUNDS[0] - 1)
    words.int().numpy().tofile(path)
    assert testing.run_processes(2, functools.partial(_ping_pong, path=str(path))) == [True, True]


def test_a_wait_sees_a_flag_that_is_written_while_it_runs(device):
    if device.type != "cuda":
        pytest.skip("two processes show it where kernels run in the interpreter")
    window = Window(2, device)
    for rank in range(2):
        window.put(1, rank, 0)
    problem = no_problem(device)
    addresses = torch.tensor(window.addresses, device=device)
    # Loading a kernel can wait for all that run, and so for the wait that the kernel is to end.
    elsewhere = Window(2, device)
    write(elsewhere.addresses, 1, device)
    wait(elsewhere.addresses, 1, device, timeout=60.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        wait_flags(
            addresses,
            int32(1, device=device),
            problem,
            torch.zeros((2, FLAG_WORDS), dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
            slots=SLOTS,
            slot_bytes=SLOT_BYTES,
            digest=DIGEST,
            operation=7,
            timeout=60.0,
        )
    with torch.cuda.stream(torch.cuda.Stream()):
        write(window.addresses, 1, device)
    torch.cuda.synchronize()
    assert problem.tolist() == [0] * flags.PROBLEM_WORDS


WAIT = {
    "addresses": torch.zeros(2, dtype=torch.int64),
    "epoch": torch.zeros(1, dtype=torch.int32),
    "problem": torch.zeros(flags.PROBLEM_WORDS, dtype=torch.int32),
    "records": torch.zeros((2, 4), dtype=torch.int32),
    "waited": torch.zeros(2, dtype=torch.int64),
    "slots": 4,
    "slot_bytes": 256,
    "digest": 0,
    "operation": 0,
    "timeout": 1.0,
}


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"addresses": torch.zeros(2)}, TypeError, "addresses must be one of"),
        ({"addresses": torch.zeros(0).long()}, ValueError, "addresses must have at least one rank"),
        ({"addresses": torch.zeros(4).long()[::2]}, ValueError, "addresses must be contiguous"),
        ({"epoch": torch.zeros(1).long()}, TypeError, "epoch must be one of"),
        ({"epoch": torch.zeros(2).int()}, ValueError, "epoch must have the shape"),
        ({"problem": torch.zeros(5).int()}, ValueError, "problem must have the shape"),
        ({"slots": 3}, ValueError, "slots must be a power of two, got 3"),
        ({"slots": 0}, ValueError, "slots must be a power of two, got 0"),
        ({"slot_bytes": 8}, ValueError, "slot_bytes must be a multiple of 16, got 8"),
        ({"records": torch.zeros((2, 3)).int()}, ValueError, "records must have the shape"),
        ({"records": torch.zeros((2, 8)).int()[:, ::2]}, ValueError, "records must be contiguous"),
        ({"waited": torch.zeros(2).int()}, TypeError, "waited must be one of"),
    ],
)
def test_rejects(changed, error, message):
    with pytest.raises(error, match=f"wait_flags: {message}") as caught:
        wait_flags(**WAIT | changed)
    assert isinstance(caught.value, MoeError)
    if set(changed) <= {"addresses", "epoch", "problem", "slots", "slot_bytes"}:
        arguments = {
            name: value
            for name, value in WAIT.items()
            if name in ("addresses", "epoch", "problem", "slots", "slot_bytes", "digest")
        }
        with pytest.raises(error, match=f"write_flags: {message}"):
            write_flags(**arguments | changed, status=0)

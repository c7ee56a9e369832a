"""Records of ranks, and what a rank does when they do not come or say something else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lockstep_windows import DIGEST, Case, Group

from moe_triton.errors import MoeError
from moe_triton.layout import Ring
from moe_triton.layout.windows import (
    ABORT,
    ABORTED,
    BROKEN,
    DATA,
    LATE,
    MISMATCH,
    OVERRUN,
    RECEIVED,
    SENT,
    SOFT,
    WHAT,
)

MOMENT = 1e-5  # seconds; the interpreter looks ten times


# Of a receive that found a problem: work that is queued behind it finds no rows.
ZERO = ("counts", "recv_counts_cumsum", "offsets", "totals")


@pytest.fixture
def opened(device):
    def make(**options):
        group = Group(Case(world_size=3), device, **options)
        return group, group.windows["dispatch"]

    return make


def send(steps, windows, ranks, status=DATA, digest=DIGEST, extra=0):
    for rank in ranks:
        steps.send_record(windows[rank], digest=digest, status=status, extra=extra)


def receive(steps, windows, digest=DIGEST, **options):
    """The problem of rank 0."""
    steps.recv_records(windows[0], digest=digest, timeout=MOMENT, **options)
    assert int(windows[0].notice) == int(windows[0].problem[WHAT])
    return windows[0].problem.tolist()


def records(group, rank, epoch):
    windows = group.windows["dispatch"][rank]
    start = windows.ring.record(epoch, 0)
    return windows.own[start : start + 48].view(torch.int32).view(3, 4).tolist()


def test_example(steps, opened):
    group, windows = opened(epoch=5)
    send(steps, windows, [1], ABORT, 7, extra=9)
    for rank in range(3):
        assert records(group, rank, 6)[1] == [6, ABORT, 7, 9]
    assert [int(one.state[SENT]) for one in windows] == [5, 6, 5]


def test_all_records_arrive(steps, opened):
    _, windows = opened(epoch=2**31 - 2)
    for epoch in (2**31 - 1, -(2**31), 1 - 2**31):
        send(steps, windows, range(3))
        assert not any(receive(steps, windows, peek=True))
        assert not any(receive(steps, windows))
        assert windows[0].state[[SENT, RECEIVED]].tolist() == [epoch] * 2
        for rank in (1, 2):
            steps.recv_records(windows[rank], digest=DIGEST, timeout=0)


def receive_in_two_tries(steps, windows):
    """Rank 1 sends late: rank 0 receives once more."""
    send(steps, windows, [0, 2])
    assert receive(steps, windows)[WHAT] == LATE
    send(steps, windows, [1])
    windows[0].problem.zero_()
    windows[0].notice.zero_()
    assert not any(receive(steps, windows))


def test_records_from_before_the_wrap_are_old(steps, opened):
    """Their numbers are larger than that of the epoch that is waited for."""
    _, windows = opened(epoch=2**31 - 5)
    for _ in range(8):
        receive_in_two_tries(steps, windows)
        for rank in (1, 2):
            steps.recv_records(windows[rank], digest=DIGEST, timeout=0)


def test_names_the_first_late_rank(steps, opened):
    _, windows = opened(epoch=4)
    send(steps, windows, [0])
    assert receive(steps, windows) == [LATE, 0, 5, 1, 4, 5, BROKEN, 0]
    assert int(windows[0].state[RECEIVED]) == 4


def test_a_late_epoch_can_be_received_again(steps, opened):
    _, windows = opened()
    receive_in_two_tries(steps, windows)
    assert int(windows[0].state[RECEIVED]) == 1


def test_an_overrun_breaks_the_group(steps, opened):
    _, windows = opened(slots=2)
    send(steps, windows, range(3))
    for _ in range(2):
        send(steps, windows, [2])
    assert receive(steps, windows) == [OVERRUN, 0, 1, 2, 3, 1, BROKEN, 0]


@pytest.mark.parametrize("hard, severity", [(False, SOFT), (True, BROKEN)])
def test_an_abort(hard, severity, steps, opened):
    """The epoch ends unless the abort breaks the group."""
    _, windows = opened(hard=hard)
    send(steps, windows, [0, 2])
    send(steps, windows, [1], ABORT)
    assert receive(steps, windows) == [ABORTED, 0, 1, 1, 1, 1, severity, 0]
    assert int(windows[0].state[RECEIVED]) == (0 if hard else 1)


def test_other_arguments(steps, opened):
    _, windows = opened()
    send(steps, windows, [0, 1])
    send(steps, windows, [2], digest=-5)
    assert receive(steps, windows) == [MISMATCH, 0, 1, 2, -5, DIGEST, SOFT, 0]


def test_the_first_problem_stays_unless_a_later_one_is_worse(steps, opened):
    _, windows = opened()
    send(steps, windows, [0, 1], ABORT)
    send(steps, windows, [2], digest=3)
    assert receive(steps, windows)[WHAT] == ABORTED
    send(steps, windows, range(3), digest=4)
    assert receive(steps, windows)[:4] == [ABORTED, 0, 1, 0]
    assert receive(steps, windows)[WHAT] == LATE
    assert int(windows[0].state[RECEIVED]) == 2


def test_after_a_soft_problem_the_next_round_is_right(steps, device):
    group = Group(Case(max_tokens=3), device)
    dispatch = group.windows["dispatch"]
    send(steps, dispatch, [0, 1])
    send(steps, dispatch, [2], ABORT)
    for windows in dispatch:
        received = steps.dispatch_recv(
            windows, group.layout, 4, None, totals_dtype=torch.int64, digest=DIGEST, timeout=0
        )
        assert not any(getattr(received, name).any() for name in ZERO)
        assert windows.problem[WHAT] == ABORTED
        windows.problem.zero_()
    group.round(steps, 1)


def test_nothing_moves_in_a_broken_group(steps, device):
    group = Group(Case(max_tokens=3), device)
    layout, tokens = group.layout, group.draw(1)
    dispatch, combine = (group.windows[kind][0] for kind in ("dispatch", "combine"))
    send(steps, group.windows["dispatch"], [0])
    assert receive(steps, group.windows["dispatch"])[WHAT] == LATE
    mine = tokens[0]
    kept = [one.own.clone() for kind in group.windows.values() for one in kind]
    states = dispatch.state.clone(), combine.state.clone()
    positions = steps.dispatch_send(
        dispatch, layout, mine.x, mine.ids, mine.weights, None, None, digest=DIGEST
    )
    received = steps.dispatch_recv(
        dispatch, layout, 4, None, totals_dtype=torch.int64, digest=DIGEST, timeout=1.0
    )
    assert not any(getattr(received, name).any() for name in ZERO)
    assert not steps.dispatch_totals(dispatch, layout, digest=DIGEST, timeout=1.0).any()
    starts = torch.zeros_like(received.group_starts)
    steps.combine_send(combine, layout, mine.x, starts, None, digest=DIGEST)
    out = torch.full_like(mine.x, -7)
    steps.combine_recv(
        combine, layout, mine.ids, positions, mine.weights, None, None, out, None,
        digest=DIGEST, timeout=1.0,
    )  # fmt: skip
    steps.send_record(combine, digest=DIGEST, status=DATA)
    steps.recv_records(combine, digest=DIGEST, timeout=1.0)
    assert (out == -7).all()
    assert dispatch.state.equal(states[0])
    assert combine.state.equal(states[1])
    for was, one in zip(
        kept, (one for kind in group.windows.values() for one in kind), strict=True
    ):
        assert was.equal(one.own)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bases": torch.zeros(3)}, "bases must be torch.int64, got torch.float32"),
        ({"state": torch.zeros(3, dtype=torch.int32)}, r"state must .* shape \(8,\), got \(3,\)"),
        ({"problem": torch.zeros(16, dtype=torch.int32)[::2]}, "problem must be a contiguous"),
        ({"problem": torch.zeros(8, dtype=torch.int32, device="meta")}, "problem must be on"),
        ({"ring": Ring(3, 64, 1, 64)}, "slots must be a power of two, got 3"),
        ({"ring": Ring(4, 64, 1, 24)}, "slots of a multiple of 16 bytes"),
    ],
)
def test_windows_reject(change, message, opened):
    _, windows = opened()
    with pytest.raises(MoeError, match=message):
        dataclasses.replace(windows[0], **change)

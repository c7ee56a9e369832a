"""The layout of ranks, and which rank's failure is the one to report."""

from __future__ import annotations

import sys

import pytest

from moe_triton.errors import BrokenGroupError, PeerAbortError, PeerTimeoutError
from moe_triton.testing.world import Failure, Layout, WorkerDiedError, check_transport, raise_first


def test_layout_of_four_by_two():
    """World rank = ep_rank * 2 + tp_rank: planes {0, 2, 4, 6} and {1, 3, 5, 7}, pairs {0, 1} ..."""
    layout = Layout(8, 2)
    assert layout.ep_world_size == 4
    assert [layout.ep_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [layout.tp_rank(rank) for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert layout.ep_ranks(4) == [0, 2, 4, 6]
    assert layout.ep_ranks(5) == [1, 3, 5, 7]
    assert layout.tp_ranks(4) == layout.tp_ranks(5) == [4, 5]


@pytest.mark.parametrize("tp_world_size", [0, 1])
def test_layout_without_tensor_parallelism(tp_world_size):
    layout = Layout(3, tp_world_size)
    assert layout == Layout(3)
    assert layout.ep_ranks(1) == [0, 1, 2]
    assert layout.tp_ranks(1) == [1]


@pytest.mark.parametrize("world_size, tp_world_size", [(0, 1), (-1, 1), (3, 2), (0, 2)])
def test_layout_refuses_sizes_that_do_not_fit(world_size, tp_world_size):
    with pytest.raises(ValueError, match=f"multiple of tp_world_size .* got {world_size}"):
        Layout(world_size, tp_world_size)


def test_transport_is_checked():
    check_transport("auto")
    with pytest.raises(ValueError, match=r"must be one of .*'symmetric'.*, got 'telegraph'"):
        check_transport("telegraph")


TIMEOUT = PeerTimeoutError("op", (0,), "rank 0 did not come")
ABORT = PeerAbortError("op", 0, "bad ids")
BROKEN = BrokenGroupError("op", "broken")


@pytest.mark.parametrize(
    "errors, expected",
    [
        pytest.param([KeyError("a"), KeyError("b")], 0, id="the first in time"),
        pytest.param([ABORT, KeyError("a")], 1, id="the rank that rejected, not its peer"),
        pytest.param([TIMEOUT, BROKEN, KeyError("a")], 2, id="what kept the peers waiting"),
        pytest.param([TIMEOUT, BROKEN], 0, id="the first echo, if there is nothing else"),
        pytest.param(
            [RuntimeError("connection closed by peer"), WorkerDiedError(1, 42, -9)],
            1,
            id="the death, not the closed connection",
        ),
    ],
)
def test_the_cause_is_preferred(errors, expected):
    # Listed backwards: the time decides, not the place.
    failures = [Failure(rank, float(rank), error) for rank, error in enumerate(errors)][::-1]
    with pytest.raises(type(errors[expected])) as caught:
        raise_first(failures)
    assert caught.value is errors[expected]
    assert caught.value.failed_rank == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from 3.11 on")
def test_notes_name_the_ranks():
    failures = [Failure(3, 1.0, KeyError("a"), "the traceback"), Failure(1, 2.0, ABORT)]
    with pytest.raises(KeyError) as caught:
        raise_first(failures, unfinished=[0])
    assert str(caught.value.__cause__) == "\nthe traceback"
    assert caught.value.__notes__ == [
        "on rank 3",
        "other ranks: rank 1: PeerAbortError, rank 0: no answer",
    ]


OWN_TEXT = PeerAbortError("op", 0, "bad ids")
TWO_ARGUMENTS = OSError(2, "missing")


@pytest.mark.parametrize(
    "error, text, notes",
    [
        (ValueError("bad"), "bad (on rank 3)", []),
        (OWN_TEXT, "op: rank 0 rejected this call: bad ids (on rank 3)", []),
        (RuntimeError(), "(on rank 3)", []),
        (WorkerDiedError(3, 42, 1), "the process of rank 3 (pid 42) died with exit code 1", []),
        (KeyError("a"), "'a'", ["on rank 3"]),
        (TWO_ARGUMENTS, "[Errno 2] missing", ["on rank 3"]),
        (SystemExit(3), "3", ["on rank 3"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_the_text_names_the_rank(error, text, notes):
    """Where the text is the exception's argument; a second report does not repeat it."""
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            raise_first([Failure(3, 1.0, error)])
        assert str(caught.value) == text
        if sys.version_info >= (3, 11):
            assert getattr(caught.value, "__notes__", []) == notes


class StubbornError(Exception):
    def __setattr__(self, name, value):
        raise AttributeError(name)


def test_an_exception_that_takes_no_attributes_is_raised_all_the_same():
    with pytest.raises(StubbornError):
        raise_first([Failure(0, 0.0, StubbornError())])


@pytest.mark.parametrize(
    "exitcode, text", [(3, "exit code 3"), (-9, r"exit code -9 \(SIGKILL\)"), (-250, "code -250")]
)
def test_death_says_how(exitcode, text):
    with pytest.raises(WorkerDiedError, match=rf"rank 2 \(pid 42\) died with .*{text}"):
        raise WorkerDiedError(2, 42, exitcode)

"""Errors carry codes, name argument, contract and value, and survive pickling."""

from __future__ import annotations

import pickle

import pytest

from moe_triton import errors

EXAMPLES = [
    errors.MissingArgumentError("op", "x", "be given", None),
    errors.ArgumentTypeError("op", "x", "be float16", "int8"),
    errors.ArgumentValueError("op", "x", "have 2 rows", 3),
    errors.ArgumentNameError("op", "group_ep", "name a group", "'a'"),
    errors.ArgumentMismatchError("op", "hidden", 4, 8, rank=1),
    errors.PeerAbortError("op", 1, "x must have 2 rows, got 3"),
    errors.PeerTimeoutError("op", (1, 2), "ranks [1, 2] did not come"),
    errors.BrokenGroupError("op", "the group is broken"),
    errors.ReceiveOverflowError("op", 1, 9, 8),
    errors.UnavailableError("op", "no device"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize(
    "kind, builtin, code",
    [
        (errors.MissingArgumentError, TypeError, 161001),
        (errors.ArgumentTypeError, TypeError, 161002),
        (errors.ArgumentNameError, ValueError, 161002),
        (errors.ArgumentValueError, ValueError, 561002),
        (errors.ArgumentMismatchError, ValueError, 561002),
        (errors.PeerAbortError, RuntimeError, None),
        (errors.PeerTimeoutError, RuntimeError, None),
    ],
)
def test_kinds_and_codes(kind, builtin, code):
    assert issubclass(kind, errors.MoeError)
    assert issubclass(kind, builtin)
    assert kind.code == code


def test_a_message_has_three_parts():
    error = errors.ArgumentValueError("dispatch", "expert_ids", "be in [0, 4)", "7 for token 1")
    assert str(error) == "dispatch: expert_ids must be in [0, 4), got 7 for token 1"
    assert (error.op, error.argument) == ("dispatch", "expert_ids")


def test_a_mismatch_names_both_values_and_the_rank():
    error = errors.ArgumentMismatchError("dispatch", "hidden", 4, 8, rank=3)
    assert "hidden" in str(error)
    assert "got 4 on this rank and 8 on rank 3" in str(error)

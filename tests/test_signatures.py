"""What depends on the signature of a call is computed once for each."""

from __future__ import annotations

import pytest
import torch

from moe_triton import signatures

X = torch.zeros(3, 4)


class Counted:
    """A function that counts its calls."""

    def __init__(self, **options):
        self.calls = 0
        self.remembered = signatures.once_per_signature(self.first_of, **options)

    def first_of(self, *arguments):
        self.calls += 1
        if arguments[0] == "wrong":
            raise ValueError("wrong")
        return arguments[0]

    def __call__(self, *arguments):
        before = self.calls
        self.remembered(*arguments)
        return self.calls - before


@pytest.mark.parametrize(
    "other",
    [X.double(), X[:2], torch.zeros(4, 3).T, X.to_sparse(), X.to("meta"), None, 3, "text"],
    ids=["dtype", "shape", "stride", "layout", "device", "missing", "number", "text"],
)
def test_another_argument_is_new(other):
    counted = Counted()
    assert counted(5, X, None) == 1
    assert counted(5, X.clone(), None) == 0
    assert counted(5, other, None) == 1
    assert counted(6, X, None) == 1


def test_the_result_is_remembered():
    remembered = signatures.once_per_signature(lambda x, number: (x.shape, number))
    first = remembered(X, 2)
    assert first == ((3, 4), 2)
    assert remembered(X + 1, 2) is first


def test_errors_are_not_remembered():
    counted = Counted()
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            counted("wrong", X)
    assert counted.calls == 2


def test_what_cannot_be_hashed_is_always_new():
    counted = Counted()
    assert counted([1, 2], X) == counted([1, 2], X) == 1


def test_the_result_depends_on_what_it_is_within():
    where = ["here"]
    counted = Counted(within=lambda first, _: (first, where[0]))
    assert [counted(1, X), counted(1, X)] == [1, 0]
    where[0] = "there"
    assert counted(1, X) == 1


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(signatures, "MOST", 2)
    counted = Counted()
    for number in range(5):
        assert counted(number) == 1
    assert counted(4) == 0
    assert sum(counted(number) for number in range(4)) >= 3

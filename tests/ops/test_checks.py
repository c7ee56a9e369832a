"""Signatures of arguments that have passed their checks."""

from __future__ import annotations

import pytest
import torch

from moe_triton.ops import checks

X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    "other",
    [
        X.double(),
        X[:2],
        X.to_sparse(),
        X.to("meta"),
        None,
        3,
        "text",
        [1, 2],
    ],
    ids=["dtype", "shape", "layout", "device", "missing", "number", "text", "list"],
)
def test_another_argument_has_not_passed(other):
    passed = checks.Signatures()
    passed.add(passed.of(X, 5, None))
    assert passed.of(X.clone(), 5, None) in passed
    assert passed.of(other, 5, None) not in passed
    assert passed.of(X, 6, None) not in passed


def test_what_is_no_tensor_is_always_new():
    passed = checks.Signatures()
    passed.add(passed.of("text"))
    assert passed.of("text") not in passed


def test_memory_is_bounded():
    passed = checks.Signatures(most=2)
    for number in range(5):
        passed.add(passed.of(number))
    assert passed.of(4) in passed
    assert sum(passed.of(number) in passed for number in range(5)) <= 2

"""Gating and replicas, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moe_triton import ref


def test_softmax_gating_by_hand():
    logits = torch.tensor([[1.0, 2, 3, 4], [4, 4, 1, 1]]).log()
    weights, ids, scores = ref.top_k_gating(logits, 2)
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3], [0.4, 0.4]]))
    assert ids.tolist() == [[3, 2], [0, 1]]
    torch.testing.assert_close(scores.sum(1), torch.ones(2))


def test_bias_chooses_but_does_not_weigh():
    logits = torch.zeros((1, 4))
    bias = torch.tensor([0.0, 0.0, 5.0, 1.0])
    weights, ids, _ = ref.top_k_gating(logits, 2, bias=bias, scoring="sigmoid", scaling=3.0)
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("by_two, expected", [(False, [2, 3]), (True, [0, 1])])
def test_groups_limit_the_choice(by_two, expected):
    # Group 0 has the better pair, group 1 the best expert.
    scores = torch.tensor([[0.6, 0.5, 0.9, 0.1]])
    _, ids, _ = ref.top_k_gating(
        torch.logit(scores), 2, groups=2, group_by_two=by_two, scoring="sigmoid"
    )
    assert ids.tolist() == [expected]

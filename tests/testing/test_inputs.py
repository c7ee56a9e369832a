"""Shapes, determinism, distinct ids and the promised skew of the generated inputs."""

from __future__ import annotations

import pytest
import torch

from moe_triton import testing

ROUTINGS = (testing.routing_uniform, testing.routing_zipf, testing.routing_hot)


def popularity(ids, num_experts):
    return torch.bincount(ids.flatten().long(), minlength=num_experts)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "num_tokens, num_experts, top_k",
    [
        pytest.param(0, 8, 2, id="no tokens"),
        pytest.param(1, 1, 1, id="one of each"),
        pytest.param(33, 8, 8, id="every expert"),
        pytest.param(512, 256, 8, id="usual"),
    ],
)
def test_ids_are_distinct_and_in_range(routing, num_tokens, num_experts, top_k):
    ids = routing(num_tokens, num_experts, top_k, seed=3)
    assert ids.shape == (num_tokens, top_k)
    assert ids.dtype == torch.int32
    assert all(0 <= e < num_experts for e in ids.flatten().tolist())
    assert all(len(set(row)) == top_k for row in ids.tolist())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_seed_decides(routing):
    first = routing(64, 32, 4, seed=1)
    torch.manual_seed(99)  # the global generator does not matter
    assert torch.equal(first, routing(64, 32, 4, seed=1))
    assert not torch.equal(first, routing(64, 32, 4, seed=2))


def test_uniform_has_no_favourite():
    counts = popularity(testing.routing_uniform(20_000, 16, 4, seed=0), 16)
    assert (counts / 20_000 - 4 / 16).abs().max() < 0.02


def test_zipf_follows_its_exponent():
    """With one choice per token the counts are the popularity itself."""
    num_tokens, num_experts = 50_000, 16
    expected = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -1.2
    counts = popularity(testing.routing_zipf(num_tokens, num_experts, 1, seed=0), num_experts)
    assert (counts / num_tokens - expected / expected.sum()).abs().max() < 0.01


def test_zipf_is_skewed_alike_for_every_seed():
    for seed in range(3):
        counts = popularity(testing.routing_zipf(4096, 64, 8, seed=seed), 64)
        assert counts.argmax() == 0
        assert counts[:8].sum() > 4 * counts[8:16].sum() / 2 > 4 * counts[56:].sum() / 2


def test_zipf_with_exponent_zero_is_uniform():
    zipf = testing.routing_zipf(100, 16, 4, seed=5, exponent=0.0)
    assert torch.equal(zipf, testing.routing_uniform(100, 16, 4, seed=5))


def test_hot_sends_every_token_to_one_expert():
    ids = testing.routing_hot(4096, 8, 3, seed=0, expert=5)
    assert (ids[:, 0] == 5).all()
    fillers = popularity(ids[:, 1:], 8)
    assert fillers[5] == 0
    assert (fillers[fillers > 0] / 4096 - 2 / 7).abs().max() < 0.05


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("top_k", [0, 9])
def test_more_choices_than_experts_are_refused(routing, top_k):
    with pytest.raises(ValueError, match=rf"top_k must be in \[1, 8\].*got {top_k}"):
        routing(4, 8, top_k)


def test_hot_expert_must_exist():
    with pytest.raises(ValueError, match=r"expert must be in \[0, 8\), got 8"):
        testing.routing_hot(4, 8, 2, expert=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tokens(dtype):
    x = testing.tokens(256, 512, dtype, seed=1)
    assert x.shape == (256, 512)
    assert x.dtype == dtype
    assert torch.equal(x, testing.tokens(256, 512, dtype, seed=1))
    assert not torch.equal(x, testing.tokens(256, 512, dtype, seed=2))
    assert x.float().mean().abs() < 0.02
    assert (x.float().std() - 1).abs() < 0.02
    assert testing.tokens(0, 8).shape == (0, 8)


def test_weights_are_positive_and_normalised():
    w = testing.weights(1000, 8, seed=1)
    assert w.shape == (1000, 8)
    assert w.dtype == torch.float32
    assert (w > 0).all()
    assert (w.sum(dim=1) - 1).abs().max() < 1e-6
    assert torch.equal(w, testing.weights(1000, 8, seed=1))
    assert not torch.equal(w, testing.weights(1000, 8, seed=2))
    assert testing.weights(0, 8).shape == (0, 8)

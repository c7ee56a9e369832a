"""The order of received rows against its definition."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import ArgumentTypeError, ArgumentValueError
from moe_triton.layout import NOWHERE


def assert_same_permutation(counts, alignment):
    expected = ref.recv_permutation(counts, alignment)
    actual = kernels.recv_permutation(counts, alignment)
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert one.tolist() == other.tolist(), name


def draw(num_experts, world, most, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (num_experts, world), generator=generator)
    counts[torch.rand(num_experts, generator=generator) < 0.3] = 0
    return counts.int().to(device)


def test_example(steps, device):
    """The numbers of the kernel's docstring, and of the kernel that sums the groups."""
    counts = torch.tensor([[1, 0, 2], [2, 1, 0]], dtype=torch.int32, device=device)
    found = steps.recv_permutation(counts)
    assert found.recv_counts_cumsum.tolist() == [1, 1, 3, 5, 6, 6]
    assert found.offsets.tolist() == [3, 6]
    assert found.source.tolist() == [0, 2, 2, 0, 0, 1]
    assert found.index_in_source.tolist() == [0, 0, 1, 1, 2, 0]
    found = steps.recv_permutation(counts, 4)
    assert found.recv_counts_cumsum.tolist() == [1, 1, 3, 5, 6, 6]
    assert found.offsets.tolist() == [4, 8]
    assert found.group_starts.tolist() == [[0, 1, 1, 3], [4, 6, 7, 7]]
    assert found.source.tolist() == [0, 2, 2, NOWHERE, 0, 0, 1, NOWHERE]
    real = found.source != NOWHERE
    assert found.index_in_source[real].tolist() == [0, 0, 1, 1, 2, 0]


@pytest.mark.parametrize("alignment", [1, 4, 128])
@pytest.mark.parametrize(
    "L, W, most",
    [
        pytest.param(1, 1, 3, id="one expert, one source"),
        pytest.param(3, 1, 0, id="nothing comes"),
        pytest.param(32, 8, 5, id="a usual rank"),
        pytest.param(1, 64, 9, id="a shared expert"),
        pytest.param(256, 1, 4, id="all experts on one rank"),
        pytest.param(5, 7, 2, id="odd sizes"),
        pytest.param(200, 700, 1, id="more groups than a tile holds"),
    ],
)
def test_matches_ref(L, W, most, alignment, device):
    assert_same_permutation(draw(L, W, most, device), alignment)


@hypothesis.given(
    num_experts=st.integers(1, 40),
    world=st.integers(1, 20),
    most=st.integers(0, 9),
    alignment=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_any_size(num_experts, world, most, alignment, seed, device):
    assert_same_permutation(draw(num_experts, world, most, device, seed), alignment)


@pytest.mark.parametrize("extra", [0, 5, 10_000])
def test_capacity(extra, device):
    counts = draw(6, 4, 9, device)
    expected = ref.recv_permutation(counts, 8)
    n = len(expected.source)
    found = kernels.recv_permutation(counts, 8, n + extra)
    assert found.source.tolist() == expected.source.tolist() + [NOWHERE] * extra
    assert found.index_in_source.tolist() == expected.index_in_source.tolist() + [0] * extra
    assert found.recv_counts_cumsum.tolist() == expected.recv_counts_cumsum.tolist()
    assert found.offsets.tolist() == expected.offsets.tolist()


def test_a_capacity_that_is_too_small_cuts_the_end_off(device):
    counts = torch.tensor([[3, 2]], dtype=torch.int32, device=device)
    found = kernels.recv_permutation(counts, capacity=4)
    assert found.source.tolist() == [0, 0, 0, 1]
    assert found.offsets.tolist() == [4]


def test_strided_counts(device):
    counts = draw(8, 6, 4, device)
    assert_same_permutation(counts.T, 3)


def test_rejects(device):
    counts = torch.ones((2, 2), dtype=torch.int32, device=device)
    with pytest.raises(ArgumentTypeError, match="counts must be one of"):
        kernels.recv_permutation(counts.long())
    with pytest.raises(ArgumentValueError, match="counts must have the shape"):
        kernels.recv_permutation(counts[0])
    with pytest.raises(ArgumentValueError, match="counts must have an expert"):
        kernels.recv_permutation(counts[:0])
    with pytest.raises(ArgumentValueError, match="alignment must be at least 1, got 0"):
        kernels.recv_permutation(counts, 0)

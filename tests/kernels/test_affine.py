"""Quantisation with a factor and an offset, in fp16, against its definition and by hand."""

from __future__ import annotations

import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.kernels.launch_config import Launch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAN, INF = float("nan"), float("inf")


def one(value, device):
    return torch.tensor([float(value)], device=device)


@pytest.mark.parametrize("function", [kernels.quantize_affine, ref.quantize_affine])
def test_by_hand(function, device):
    """The numbers of the kernel's docstring; NaN; 2049 is 2048 in fp16, and 65520 is infinite."""
    x = torch.tensor([[0.5, 1.5, -2.5, 200, -200, NAN, INF, 2049, 65520]], device=device)
    q = function(x, one(1, device), one(0, device))
    assert q.tolist() == [[0, 2, -2, 127, -128, 0, 127, 127, 127]]
    q = function(x[:, 7:], one(-1, device), one(2050, device))
    assert q.tolist() == [[2, -128]]
    q = function(x[:, 6:7], one(0, device), one(1, device))
    assert q.tolist() == [[0]]


@pytest.mark.parametrize("function", [kernels.quantize_affine, ref.quantize_affine])
def test_each_step_is_rounded(function, device):
    """1.0005 is 1.001 in fp16, and 65.48 is 65.5, which is then 66."""
    assert function(one(1.0005, device)[None], one(1000, device), one(-1000, device)).item() == 1
    x = one(65, device)[None]
    assert function(x, one(1, device), one(0.46, device)).item() == 65
    assert function(x, one(1, device), one(0.48, device)).item() == 66


def test_products_and_sums_are_rounded(device):
    """Products and sums whose last bit decides over the code."""
    random = torch.Generator().manual_seed(5)
    x = (torch.randn(64, 64, generator=random) * 40).to(device)
    for scale, offset in torch.randn(8, 2, 1, generator=random).to(device):
        actual = kernels.quantize_affine(x, scale, offset)
        assert torch.equal(actual, ref.quantize_affine(x, scale, offset))


@hypothesis.given(
    rows=st.integers(0, 5),
    hidden=st.integers(1, 40),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 999),
    shape=st.sampled_from([None, Launch(3, 1, 4, 1), Launch(2, 4, 8, 1)]),
)
def test_any(rows, hidden, dtype, seed, shape, device):
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 2 * hidden, generator=random) * 40).to(device=device, dtype=dtype)
    scale, offset = torch.randn(2, 1, generator=random).to(device)
    for given in (x[:, :hidden], x[:, ::2]):
        with pytest.MonkeyPatch.context() as patch:
            if shape is not None:
                module = importlib.import_module("moe_triton.kernels.affine")
                patch.setattr(module, "tiles", lambda *_: shape)
            actual = kernels.quantize_affine(given, scale, offset)
        assert torch.equal(actual, ref.quantize_affine(given, scale, offset))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 2, dtype=torch.int8)},
        {"x": torch.zeros(2)},
        {"scale": torch.ones(2)},
        {"offset": torch.ones(1).half()},
    ],
)
def test_refused(change, device):
    given = {"x": torch.zeros(2, 2), "scale": torch.ones(1), "offset": torch.ones(1)} | change
    with pytest.raises(MoeError, match=next(iter(change))):
        kernels.quantize_affine(**{name: value.to(device) for name, value in given.items()})

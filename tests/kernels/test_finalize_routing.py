"""Sums of expert rows, biases and skip connections: against the definition, and by hand."""

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
NAN = float("nan")


def run(function, rows, index, weights=None, bias=None, experts=None, skips=(None, None)):
    out = torch.full((len(index), rows.shape[1]), NAN, dtype=rows.dtype, device=rows.device)
    function(rows, index, weights, bias, experts, skips, out)
    return out


def assert_same(*arguments, **named):
    actual, wanted = (
        run(one, *arguments, **named) for one in (kernels.finalize_routing, ref.finalize_routing)
    )
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [kernels.finalize_routing, ref.finalize_routing])
def test_by_hand(function, device):
    """The numbers of the kernel's docstring, and those of fewer arguments."""
    rows = torch.tensor([[1.0], [10.0], [100.0]], device=device)
    index = torch.tensor([[0, 2], [1, -1]], device=device)
    weights = torch.tensor([[2.0, 3.0], [5.0, NAN]], device=device)
    bias = torch.tensor([[0.5], [0.25]], device=device)
    experts = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device=device)
    skips = torch.tensor([[1000.0], [2000.0]], device=device), None
    assert run(function, rows, index).tolist() == [[101.0], [10.0]]
    assert run(function, rows, index, weights).tolist() == [[302.0], [50.0]]
    assert run(function, rows, index, skips=skips).tolist() == [[1101.0], [2010.0]]
    actual = run(function, rows, index, weights.nan_to_num(2), bias, experts, skips)
    assert actual.tolist() == [[1303.75], [2052.25]]
    # Without a bias the weight of NOWHERE is unused; with one it is.
    assert run(function, rows, index, weights, bias, experts)[1].isnan().all()


@pytest.mark.parametrize("function", [kernels.finalize_routing, ref.finalize_routing])
def test_the_order_of_sums(function, device):
    """2**24 takes up 1 only if two of them come together, and float16 is rounded once."""
    rows = torch.tensor([[1.0], [1.0], [2.0**24]], device=device)
    actual = run(function, rows, torch.tensor([[0, 1, 2], [2, 0, 1]], device=device))
    assert actual.tolist() == [[2.0**24 + 2], [2.0**24]]
    halves = torch.tensor([[1.0], [1.0], [2048]], dtype=torch.float16, device=device)
    assert run(function, halves, torch.tensor([[2, 0, 1]], device=device)).item() == 2050


@hypothesis.given(data=st.data())
def test_any(data, device):
    draw = data.draw
    tokens, slots = draw(st.integers(0, 6)), draw(st.integers(0, 4))
    hidden, experts = draw(st.sampled_from([1, 7, 40])), 3
    dtype = draw(st.sampled_from(FLOATS))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def numbers(*shape):
        made = torch.randn(shape[0], 2 * shape[1], generator=random).to(dtype).to(device)
        return made[:, ::2] if draw(st.booleans()) else made[:, : shape[1]]

    rows = numbers(draw(st.integers(1, 5)), hidden)
    index = torch.randint(-1, len(rows), (tokens, slots), generator=random).to(device)
    ids = torch.randint(0, experts, (tokens, slots), generator=random).int().to(device)
    optional = {
        "weights": numbers(tokens, slots) if slots and draw(st.booleans()) else None,
        "bias": numbers(experts, hidden) if draw(st.booleans()) else None,
        "experts": ids,
        "skips": tuple(numbers(tokens, hidden) if draw(st.booleans()) else None for _ in "12"),
    }
    shape = draw(st.sampled_from([None, Launch(3, 1, 4, 1), Launch(2, 4, 8, 1)]))
    with pytest.MonkeyPatch.context() as patch:
        if shape is not None:
            module = importlib.import_module("moe_triton.kernels.finalize_routing")
            patch.setattr(module, "token_tiles", lambda *_: shape)
        assert_same(rows, index, **optional)


GOOD = {
    "rows": torch.zeros(2, 3),
    "index": torch.zeros(4, 2, dtype=torch.int64),
    "weights": None,
    "bias": None,
    "expert_ids": None,
    "skips": (None, None),
    "out": torch.zeros(4, 3),
}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": torch.zeros(2, 3, dtype=torch.int8)},
        {"index": torch.zeros(4, 2, dtype=torch.int32)},
        {"index": torch.zeros(3, 2, dtype=torch.int64)},
        {"weights": torch.zeros(4, 2, dtype=torch.int8)},
        {"weights": torch.zeros(4, 3)},
        {"expert_ids": None, "bias": torch.zeros(2, 3)},
        {"bias": torch.zeros(2, 4), "expert_ids": GOOD["index"].int()},
        {"skips": (None, torch.zeros(4, 4))},
        {"skips": (torch.zeros(4, 3, device="meta"), None)},
        {"out": torch.zeros(4, 4)},
        {"out": torch.zeros(4, 6)[:, ::2]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_refused(change, device):
    if device.type != "cpu":
        pytest.skip("the tensors of this test are on the CPU")
    kernels.finalize_routing(**GOOD)
    with pytest.raises(MoeError, match=next(iter(change))):
        kernels.finalize_routing(**GOOD | change)


@pytest.mark.parametrize("row, expert", [(2, 0), (0, 3), (0, -1)])
def test_numbers_out_of_range_are_errors(row, expert, asserting, device):
    index = torch.tensor([[row]], device=device)
    experts = torch.tensor([[expert]], dtype=torch.int32, device=device)
    with pytest.raises(Exception, match="out of range"):
        run(
            kernels.finalize_routing,
            torch.ones((2, 4), device=device),
            index,
            bias=torch.ones((3, 4), device=device),
            experts=experts,
        )

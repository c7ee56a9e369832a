"""Tokens permuted and quantised in one pass: against the definition, and against two steps."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from triton.runtime.errors import InterpreterError

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.kernels import launch_config
from moe_triton.layout import NOWHERE, RowFormat

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP_K, NUM_SHARED, NUM_EXPERTS = 3, 2, 5


def formats(hidden, dtype=torch.bfloat16):
    return {
        "none": RowFormat(dtype, hidden, 0),
        "static": RowFormat(torch.int8, hidden, 0, "static"),
        "int8": RowFormat(torch.int8, hidden, 0, "per_row", 0),
        "per_row_div": RowFormat(torch.int8, hidden, 0, "per_row_div", 0),
        "e4m3": RowFormat(E4M3, hidden, 0, "per_row", 0),
        "group e4m3": RowFormat(E4M3, hidden, 0, "group", 0, block=128),
        "group e5m2": RowFormat(E5M2, hidden, 0, "group", 0, block=128),
        "mx e4m3": RowFormat(E4M3, hidden, 0, "mx", 0, torch.uint8, 32),
        "mx e5m2": RowFormat(E5M2, hidden, 0, "mx", 0, torch.uint8, 32),
    }


def draw(num_tokens, hidden, device, num_slots=TOP_K + NUM_SHARED, seed=0, dtype=torch.bfloat16):
    """Tokens, their experts, and a row of the output for most of their slots."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num_tokens, hidden), generator=generator).to(dtype)
    ids = torch.randint(-1, NUM_EXPERTS + 1, (num_tokens, TOP_K), generator=generator).int()
    rows = torch.randperm(num_tokens * num_slots + 3, generator=generator)
    index = rows[: num_tokens * num_slots].view(num_tokens, num_slots)
    index[torch.rand(index.shape, generator=generator) < 0.3] = NOWHERE
    return x.to(device), ids.to(device), index.to(device)


def smooth_for(kind, hidden, device):
    shape = {"one": 1, "row": hidden, "experts": (NUM_SHARED + NUM_EXPERTS, hidden)}[kind]
    return (0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(1))).to(device)


def outputs(fmt, index, device):
    count = index.numel() + 3
    out = torch.zeros((count, fmt.hidden), device=device).to(fmt.dtype)
    scales = None
    if fmt.scale_offset is not None:
        scales = torch.zeros((count, fmt.num_scales), device=device).to(fmt.scale_dtype)
    for tensor in (out, scales):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0xA5)
    return out, scales


def assert_same(x, index, fmt, smooth_scales, ids):
    device = x.device
    actual, expected = outputs(fmt, index, device), outputs(fmt, index, device)
    kernels.gather_quant(x, index, fmt, smooth_scales, ids, *actual)
    ref.gather_quant(x, index, fmt, smooth_scales, ids, *expected)
    for one, other in zip(actual, expected, strict=True):
        if other is not None:
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_example(steps, device):
    """The numbers of the kernel's docstring."""
    x = torch.tensor([[127.0, 1.0], [254.0, -2.0]], device=device)
    index = torch.tensor([[3, NOWHERE], [0, 2]], device=device)
    out = torch.full((4, 2), 99, dtype=torch.int8, device=device)
    scales = torch.full((4,), 99.0, device=device)
    fmt = RowFormat(torch.int8, 2, 0, "per_row_div", 0)
    steps.gather_quant(x, index, fmt, None, None, out, scales)
    assert out.tolist() == [[127, -1], [99, 99], [127, -1], [127, 1]]
    assert scales.tolist() == [2.0, 99.0, 2.0, 1.0]


def test_factors_of_each_expert(steps, device):
    """One shared expert with the factors of row 0; experts 0 and 1 with those of rows 1 and 2."""
    fmt = RowFormat(torch.int8, 2, 0, "static")
    smooth_scales = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    out = torch.zeros((3, 2), dtype=torch.int8, device=device)
    ids = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    x, index = torch.ones((1, 2), device=device), torch.tensor([[0, 1, 2]], device=device)
    steps.gather_quant(x, index, fmt, smooth_scales, ids, out)
    assert out.tolist() == [[5, 6], [3, 4], [1, 2]]


@pytest.mark.parametrize("scheme", formats(1))
@pytest.mark.parametrize("hidden", [1, 130, 2048, 9000])
def test_matches_ref(hidden, scheme, device):
    x, ids, index = draw(9, hidden, device)
    fmt = formats(hidden)[scheme]
    for kind in ("one", "row", "experts"):
        assert_same(x, index, fmt, smooth_for(kind, hidden, device), ids)
    if scheme != "static":
        assert_same(x, index, fmt, None, None)


@hypothesis.given(
    num_tokens=st.integers(0, 12),
    hidden=st.integers(1, 200),
    scheme=st.sampled_from(sorted(formats(1))),
    kind=st.sampled_from(["row", "experts"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_any_size(num_tokens, hidden, scheme, kind, dtype, seed, device):
    x, ids, index = draw(num_tokens, hidden, device, seed=seed, dtype=dtype)
    fmt = formats(hidden, dtype)[scheme]
    assert_same(x, index, fmt, smooth_for(kind, hidden, device), ids)


@pytest.mark.parametrize("scheme", ["none", "int8", "group e4m3"])
def test_a_tile_for_each_token(scheme, device, monkeypatch):
    few = dataclasses.replace(launch_config.policy(device), tile=1)
    monkeypatch.setattr(launch_config, "policy", lambda device: few)
    x, ids, index = draw(7, 130, device)
    fmt = formats(130)[scheme]
    for kind in ("row", "experts"):
        assert_same(x, index.int(), fmt, smooth_for(kind, 130, device), ids)


def test_is_a_send_and_a_gather(device):
    x, ids, _ = draw(7, 64, device)
    plan = kernels.routing_plan(ids, NUM_EXPERTS)
    start = plan.counts.cumsum(0) - plan.counts
    sent = plan.position_in_expert != NOWHERE
    row = start[ids.reshape(-1).clamp(0, NUM_EXPERTS - 1).long()] + plan.position_in_expert
    index = row.where(sent, NOWHERE).view(ids.shape)
    fmt = RowFormat(torch.int8, 64, 80, "per_row", 64)
    count = int(plan.counts.sum())
    out = torch.empty((count, 64), dtype=torch.int8, device=device)
    scales = torch.empty(count, device=device)
    kernels.gather_quant(x, index, fmt, None, None, out, scales)
    rows = torch.zeros((7, 80), dtype=torch.uint8, device=device)
    ref.encode(x, fmt, rows)
    gathered, gathered_scales = torch.empty_like(out), torch.empty_like(scales)
    ref.gather_rows(
        rows, plan.sorted_slot_ids[:count].long() // TOP_K, fmt, gathered, gathered_scales
    )
    assert torch.equal(out, gathered)
    assert torch.equal(scales, gathered_scales)


def test_tokens_of_a_wider_tensor_into_rows_of_a_wider_one(device):
    x, _, index = draw(6, 96, device)
    fmt = formats(40)["int8"]
    for columns in (slice(8, 48), slice(3, 43), slice(0, 80, 2)):
        assert_same(x[:, columns], index, fmt, None, None)
    for width in (64, 51):
        rows = torch.full((index.numel() + 3, width), 99, dtype=torch.int8, device=device)
        expected, scales = outputs(fmt, index, device)
        ref.gather_quant(x[:, :40], index, fmt, None, None, expected, scales)
        kernels.gather_quant(x[:, :40], index, fmt, None, None, rows[:, 7:47], scales)
        named = index[index != NOWHERE]
        assert torch.equal(rows[named, 7:47], expected[named])
        assert (rows[:, :7] == 99).all() and (rows[:, 47:] == 99).all()


def test_bad_tokens_leave_the_others_alone(device):
    x, _, index = draw(5, 64, device)
    fmt = formats(64)["int8"]
    expected, expected_scales = outputs(fmt, index, device)
    ref.gather_quant(x, index, fmt, None, None, expected, expected_scales)
    x[1], x[3, 5] = float("nan"), float("inf")
    out, scales = outputs(fmt, index, device)
    kernels.gather_quant(x, index, fmt, None, None, out, scales)
    good = index[[0, 2, 4]]
    good = good[good != NOWHERE]
    assert torch.equal(out[good], expected[good])
    assert torch.equal(scales[good], expected_scales[good])


def test_an_index_out_of_range_fails_where_the_device_asserts(asserting, device):
    fmt = formats(8)["int8"]
    x, _, index = draw(3, 8, device)
    out, scales = outputs(fmt, index, device)
    for num_tokens in (1, 3):
        index[num_tokens - 1, 1] = len(out)
        with pytest.raises(InterpreterError, match="index out of range"):
            kernels.gather_quant(x[:num_tokens], index[:num_tokens], fmt, None, None, out, scales)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"index": torch.zeros((2, 1))}, "index must be one of"),
        ({"index": torch.zeros((3, 1), dtype=torch.int64)}, r"index must have the shape \(2, \*\)"),
        ({"x": torch.zeros((2, 4), dtype=torch.int32)}, "x must be one of"),
        ({"smooth_scales": torch.zeros((3, 4))}, "expert_ids must choose the factors of each slot"),
        (
            {"smooth_scales": torch.zeros((3, 4)), "expert_ids": torch.zeros(2)},
            "expert_ids must be one of",
        ),
        ({"smooth_scales": torch.zeros(3)}, r"smooth_scales must have the shape \(4\)"),
        ({"out": torch.zeros((2, 4))}, "out must be one of"),
        ({"out": torch.zeros((2, 5), dtype=torch.int8)}, r"out must have the shape \(\*, 4\)"),
        ({"out": torch.zeros((4, 2), dtype=torch.int8).T}, "out must be contiguous in its"),
        ({"scales": torch.zeros(2, dtype=torch.half)}, "scales must be one of"),
        ({"scales": torch.zeros(3)}, r"scales must have the shape \(2\)"),
        ({"scales": None}, "scales must be a tensor for the scheme 'per_row'"),
        ({"fmt": RowFormat(torch.int8, 4, 0, "static")}, "smooth_scales must hold the factors"),
    ],
)
def test_rejects(change, message, device):
    arguments = {
        "x": torch.zeros((2, 4)),
        "index": torch.zeros((2, 1), dtype=torch.int64),
        "fmt": RowFormat(torch.int8, 4, 0, "per_row", 0),
        "smooth_scales": None,
        "expert_ids": None,
        "out": torch.zeros((2, 4), dtype=torch.int8),
        "scales": torch.zeros(2),
    } | change
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    with pytest.raises(MoeError, match=message):
        kernels.gather_quant(**moved)

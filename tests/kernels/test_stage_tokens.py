"""A rank's rows and headers, against the definition."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from moe_triton import kernels, ref
from moe_triton.errors import MoeError
from moe_triton.kernels import launch_config
from moe_triton.layout import NOWHERE, DispatchHeader, RoutingPlan, RowFormat


def header(num_experts, capacity, weight_dtype, device):
    """A header in memory of its own, poisoned."""
    words = torch.full((1 + num_experts + capacity,), -7, dtype=torch.int32, device=device)
    weights = None
    if weight_dtype is not None:
        weights = torch.full((capacity,), -7.0, dtype=weight_dtype, device=device)
    return DispatchHeader(words[:1], words[1 : 1 + num_experts], words[1 + num_experts :], weights)


def assert_same_send(
    device,
    *,
    num_tokens=6,
    top_k=3,
    hidden=40,
    experts_per_rank=2,
    moe_ranks=3,
    shared_targets=(),
    num_shared_ranks=0,
    per_expert=False,
    static=(),
    scheme="per_row",
    weight_dtype=torch.float32,
    send_weights=True,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)
    num_experts = experts_per_rank * moe_ranks
    num_slots = top_k + len(shared_targets)
    x = torch.randn((num_tokens, hidden), generator=generator).bfloat16().to(device)
    ids = torch.randint(-2, num_experts + 1, (num_tokens, top_k), generator=generator)
    ids[torch.rand(num_tokens, generator=generator) < 0.3] = NOWHERE
    ids = ids.int().to(device)
    weights = torch.rand((num_tokens, top_k), generator=generator).to(device)
    smooth_scales = None
    if per_expert:
        shape = (len(shared_targets) + num_experts, hidden)
        smooth_scales = (0.5 + torch.rand(shape, generator=generator)).to(device)
    elif static:
        smooth_scales = (50 * torch.rand(static, generator=generator)).to(device)
    if static:
        fmt = RowFormat.quantized("int8_static", torch.bfloat16, hidden)
    elif scheme == "none":
        fmt = RowFormat(torch.bfloat16, hidden, -(-hidden * 2 // 16) * 16)
    else:
        payload = -(-hidden // 16) * 16
        fmt = RowFormat(torch.int8, hidden, payload + 16, "per_row", payload)
    world = num_shared_ranks + moe_ranks
    results = []
    for module in (ref, kernels):
        rows = torch.full(
            (num_tokens * num_slots + 2, fmt.stride), 0xA5, dtype=torch.uint8, device=device
        )
        headers = [
            header(num_experts, num_tokens * top_k + 1, weight_dtype, device) for _ in range(world)
        ]
        module.stage_tokens(
            x,
            ids,
            weights if send_weights else None,
            smooth_scales,
            fmt,
            ref.routing_plan(ids, num_experts),
            rows,
            headers,
            experts_per_rank=experts_per_rank,
            shared_targets=shared_targets,
            num_shared_ranks=num_shared_ranks,
        )
        results.append((rows, headers))
    (expected_rows, expected_headers), (rows, headers) = results
    assert torch.equal(rows, expected_rows)
    for rank, (actual, expected) in enumerate(zip(headers, expected_headers, strict=True)):
        for name, one, other in zip(expected._fields, actual, expected, strict=True):
            if other is not None:
                assert one.tolist() == other.tolist(), f"{name} for rank {rank}"


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="usual"),
        pytest.param({"scheme": "none", "hidden": 3}, id="as it is"),
        pytest.param({"num_tokens": 0}, id="no tokens"),
        pytest.param({"num_tokens": 0, "shared_targets": (0,), "num_shared_ranks": 1}, id="none"),
        pytest.param({"moe_ranks": 1, "experts_per_rank": 7}, id="one rank"),
        pytest.param({"moe_ranks": 5, "experts_per_rank": 1}, id="an expert a rank"),
        pytest.param({"num_tokens": 300, "top_k": 8}, id="several blocks"),
        pytest.param({"experts_per_rank": 3000}, id="more experts than a block"),
        pytest.param({"per_expert": True}, id="slots that differ"),
        pytest.param({"static": (1,)}, id="one factor"),
        pytest.param({"static": (40,)}, id="a factor for each column"),
        pytest.param({"per_expert": True, "scheme": "none"}, id="slots that could differ"),
        pytest.param({"weight_dtype": None}, id="no room for weights"),
        pytest.param({"send_weights": False}, id="no weights"),
        pytest.param({"weight_dtype": torch.float64}, id="wide weights"),
    ],
)
def test_matches_ref(sizes, device):
    assert_same_send(device, **sizes)


@pytest.mark.parametrize("send_weights", [False, True])
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize(
    "num_shared_ranks, shared_targets",
    [
        pytest.param(1, (0,), id="one"),
        pytest.param(4, (1, 3), id="two, and ranks that serve others"),
        pytest.param(2, (), id="ranks that serve others"),
    ],
)
def test_shared_experts(num_shared_ranks, shared_targets, per_expert, send_weights, device):
    for num_tokens in (5, 2000):
        assert_same_send(
            device,
            num_tokens=num_tokens,
            hidden=16,
            num_shared_ranks=num_shared_ranks,
            shared_targets=shared_targets,
            per_expert=per_expert,
            send_weights=send_weights,
        )


def test_slots_past_the_room_of_a_header_are_dropped(device):
    """Duplicate expert ids of a token: the memory behind its header is untouched."""
    ids = torch.tensor([[0, 0], [0, 1]], dtype=torch.int32, device=device)
    fmt = RowFormat.tight(torch.bfloat16, 8)
    sent = header(2, 3, torch.float32, device)
    room = [part[:2] for part in (sent.slot_ids, sent.weights)]
    kernels.stage_tokens(
        torch.zeros((2, 8), dtype=torch.bfloat16, device=device),
        ids,
        torch.ones((2, 2), device=device),
        None,
        fmt,
        ref.routing_plan(ids, 2),
        torch.zeros((2, fmt.stride), dtype=torch.uint8, device=device),
        [sent._replace(slot_ids=room[0], weights=room[1])],
        experts_per_rank=2,
        shared_targets=(),
        num_shared_ranks=0,
    )
    poisoned = header(2, 3, torch.float32, device)
    assert sent.slot_ids.tolist() == [0, 1, int(poisoned.slot_ids[2])]
    assert sent.weights.tolist() == [1.0, 1.0, float(poisoned.weights[2])]


def test_example(device):
    """The numbers of the kernel's docstring."""
    ids = torch.tensor([[0, 2], [2, 1], [NOWHERE, NOWHERE]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5, 0.25], [0.75, 1.0], [0.0, 0.0]], device=device)
    fmt = RowFormat.tight(torch.float32, 4)
    rows = torch.zeros((3, fmt.stride), dtype=torch.uint8, device=device)
    headers = [header(4, 2, torch.float32, device) for _ in range(3)]
    kernels.stage_tokens(
        torch.arange(12.0, device=device).view(3, 4),
        ids,
        weights,
        None,
        fmt,
        kernels.routing_plan(ids, 4),
        rows,
        headers,
        experts_per_rank=2,
        shared_targets=(0,),
        num_shared_ranks=1,
    )
    assert fmt.payload(rows).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for one, slot_ids, sent in zip(
        headers, ([2, 5], [0, 4], [1, 3]), ([1, 1], [0.5, 1], [0.25, 0.75]), strict=True
    ):
        assert one.num_tokens.tolist() == [2]
        assert one.counts.tolist() == [1, 1, 2, 0]
        assert one.slot_ids.tolist() == slot_ids
        assert one.weights.tolist() == sent


@pytest.mark.parametrize("shared_targets", [(), (0,)])
def test_several_programs_write_a_header(shared_targets, device, monkeypatch):
    few = dataclasses.replace(launch_config.policy(device), line=32, num_programs=16)
    monkeypatch.setattr(launch_config, "policy", lambda device: few)
    assert_same_send(
        device,
        num_tokens=100,
        top_k=8,
        experts_per_rank=30,
        num_shared_ranks=len(shared_targets),
        shared_targets=shared_targets,
    )


@hypothesis.given(
    num_tokens=st.integers(0, 40),
    top_k=st.integers(1, 9),
    hidden=st.integers(1, 70),
    experts_per_rank=st.integers(1, 5),
    moe_ranks=st.integers(1, 6),
    num_shared_ranks=st.integers(0, 3),
    per_expert=st.booleans(),
    scheme=st.sampled_from(["none", "per_row"]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_size(num_shared_ranks, data, device, **sizes):
    targets = data.draw(st.lists(st.integers(0, 2), max_size=num_shared_ranks, unique=True))
    targets = tuple(rank for rank in targets if rank < num_shared_ranks)
    assert_same_send(device, num_shared_ranks=num_shared_ranks, shared_targets=targets, **sizes)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"expert_ids": torch.zeros((2, 1))}, "expert_ids must be one of"),
        ({"expert_ids": torch.zeros((3, 1), dtype=torch.int32)}, "expert_ids must have the shape"),
        ({"weights": torch.zeros((2, 2))}, r"weights must have the shape \(2, 1\)"),
        ({"weights": torch.zeros((2, 1), dtype=torch.int32)}, "weights must be one of"),
        ({"rows": torch.zeros((2, 16))}, "rows must be one of"),
        ({"rows": torch.zeros((1, 16), dtype=torch.uint8)}, "rows must have at least 2 rows"),
        ({"x": torch.zeros((2, 4)).half()}, "x must be one of"),
        ({"smooth_scales": torch.zeros((3, 5))}, r"smooth_scales must have the shape \(\*, 4\)"),
    ],
)
def test_rejects(change, message, device):
    arguments = {
        "x": torch.zeros((2, 4)),
        "expert_ids": torch.zeros((2, 1), dtype=torch.int32),
        "weights": None,
        "smooth_scales": None,
        "rows": torch.zeros((2, 16), dtype=torch.uint8),
    } | change
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    plan = RoutingPlan(*(torch.zeros(2, dtype=torch.int32, device=device) for _ in range(3)))
    with pytest.raises(MoeError, match=message):
        kernels.stage_tokens(
            **moved,
            fmt=RowFormat(torch.float32, 4, 16),
            plan=plan,
            headers=[header(2, 2, None, device)],
            experts_per_rank=2,
            shared_targets=(),
            num_shared_ranks=0,
        )

"""Calls under the profile of a product: the documents' shapes run, and outputs have their sizes."""

from __future__ import annotations

import functools

import harness
import invalid_calls
import pytest
import torch

from moe_triton import set_profile
from moe_triton.compat import aclnn, torch_npu

DISPATCH = {1: "npu_moe_distribute_dispatch", 2: "npu_moe_distribute_dispatch_v2"}
COMBINE = {1: torch_npu.npu_moe_distribute_combine, 2: torch_npu.npu_moe_distribute_combine_v2}
INDEX = {1: "expand_idx", 2: "assist_info_for_combine"}


@pytest.fixture
def product(request):
    set_profile(request.param)
    yield request.param
    set_profile(None)


def on(name):
    """Run the test under a profile."""
    return pytest.mark.parametrize("product", [name], indirect=True)


def group_of(ctx, experts, **more):
    return {
        **harness.groups_of(ctx),
        "ep_world_size": ctx.ep_world_size,
        "moe_expert_num": experts,
        **more,
    }


def tokens(ctx, count, hidden, top_k, experts):
    """Small integers, and ids that differ from rank to rank."""
    x = torch.arange(count * hidden).reshape(count, hidden) % 7 + ctx.rank % 3
    first = torch.arange(count)[:, None] + ctx.rank
    ids = (first + torch.arange(top_k)) % experts
    return x.bfloat16(), ids.int()


def shapes(outputs):
    return [None if one is None else (tuple(one.shape), one.dtype) for one in outputs]


@on("a2")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("with_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("global_bs", [0, 16 * 256])
def test_sixteen_ranks_of_a2(product, version, with_weights, global_bs):
    """Behind the counts are 2 * G * K * (W / 8) words, and there are always expand_scales."""
    world, experts, top_k, batch, hidden = 16, 32, 3, 2, 64
    spare = 2 * (global_bs or batch * world) * top_k * 2

    def fn(ctx):
        x, ids = tokens(ctx, batch, hidden, top_k, experts)
        weights = torch.full((batch, top_k), 0.5)
        group = group_of(ctx, experts, global_bs=global_bs)
        given = {"x": x, "expert_ids": ids, "expert_scales": weights if with_weights else None}
        outputs = getattr(torch_npu, DISPATCH[version])(**given, **group)
        meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in given.items()}
        group_ep = group["group_ep"]
        name = group_ep if isinstance(group_ep, str) else group_ep.group_name
        empty = getattr(torch.ops.moe_triton, DISPATCH[version])(
            torch.zeros((), device="meta"), **meta, **group | {"group_ep": name}
        )
        assert shapes(empty) == shapes(outputs)
        counts, expand_scales = outputs[4], outputs[6]
        assert counts.shape == (experts + spare,)
        rows = int(counts[experts - 1])
        assert counts[:experts].diff().min() >= 0
        assert expand_scales.shape == (len(outputs[0]),)
        if with_weights:
            assert expand_scales[:rows].tolist() == [0.5] * rows
        given = {
            "expand_x": outputs[0],
            "expert_ids": ids,
            INDEX[version]: outputs[2],
            "expert_scales": weights,
            "expand_scales": expand_scales,
            **group,
        }
        combined = COMBINE[version](**given, ep_send_counts=counts)
        assert combined.equal(1.5 * x)
        return [
            invalid_calls.attempt(functools.partial(COMBINE[version], **given, ep_send_counts=part))
            for part in (counts[:experts], counts[:-1])
        ]

    for refused in harness.run_world("local", world, fn):
        for refusal in refused:
            assert (refusal["error"]["code"], refusal["error"]["argument"]) == (
                561002,
                "ep_send_counts",
            )
            assert "(W * L + 2 * G * K * (W / 8),)" in refusal["error"]["text"]


@on("a2")
def test_the_switches_of_a2_allow_a_quantised_way_back(product, monkeypatch):
    def fn(ctx):
        x, ids = tokens(ctx, 1, 64, 2, 16)
        group, weights = group_of(ctx, 16), torch.ones(1, 2)
        outputs = torch_npu.npu_moe_distribute_dispatch(x, ids, expert_scales=weights, **group)
        given = {"expand_scales": outputs[6], "comm_quant_mode": 2, **group}
        rows, index, counts = outputs[0], outputs[2], outputs[4]
        combine = torch_npu.npu_moe_distribute_combine
        return invalid_calls.attempt(lambda: combine(rows, ids, index, counts, weights, **given))

    for refusal in harness.run_world("local", 16, fn):
        assert refusal["error"]["argument"] == "comm_quant_mode"
    monkeypatch.setenv("HCCL_INTRA_PCIE_ENABLE", "1")
    monkeypatch.setenv("HCCL_INTRA_ROCE_ENABLE", "0")
    for refusal in harness.run_world("local", 16, fn):
        assert refusal["error"] is None


@on("a2")
@pytest.mark.parametrize("quant_mode", [0, 2])
def test_the_example_of_a2(product, quant_mode):
    """The documents' shape: 16 ranks with 8 tokens of 7168, 8 of 16 experts."""

    def fn(ctx):
        x, ids = tokens(ctx, 8, 7168, 8, 16)
        weights, group = torch.full((8, 8), 0.25), group_of(ctx, 16, global_bs=128)
        outputs = torch_npu.npu_moe_distribute_dispatch(
            x, ids, expert_scales=weights, quant_mode=quant_mode, **group
        )
        rows, scales = outputs[:2]
        if quant_mode:
            rows = (rows * scales[:, None]).bfloat16()
        combined = torch_npu.npu_moe_distribute_combine(
            rows, ids, outputs[2], outputs[4], weights, expand_scales=outputs[6], **group
        )
        # Elements are at most 8. Half a step of int8 is 0.032 then, of bfloat16 0.016, both twice,
        # and of the sum 0.032.
        return float((combined - 2 * x).abs().max()) <= (0.128 if quant_mode else 0)

    assert all(harness.run_world("local", 16, fn))


@on("a3")
def test_eight_ranks_in_pairs_of_a3(product):
    """The documents' shape: 8 tokens of 7168, 3 of 7 experts, one shared rank."""

    def fn(ctx):
        x, ids = tokens(ctx, 8, 7168, 3, 7)
        weights = torch.full((8, 3), 0.5)
        group = group_of(ctx, 7, shared_expert_rank_num=1, tp_world_size=2)
        outputs = torch_npu.npu_moe_distribute_dispatch(x, ids, **group)
        assert outputs[4].shape == (16,)
        assert not outputs[6].any()
        combined = torch_npu.npu_moe_distribute_combine(
            outputs[0] / 2,  # each rank of a pair makes half of the sum
            ids,
            outputs[2],
            outputs[4],
            weights,
            tp_send_counts=outputs[5],
            **group,
        )
        return bool(combined.equal(2.5 * x))

    assert all(harness.run_world("local", 16, fn, tp_world_size=2))


FIRST, SLOTS = torch.tensor([True, False]), torch.tensor([[True], [False]])


def refused(call):
    """The code of a refusal and the argument it names."""
    error = invalid_calls.attempt(call)["error"]
    return None if error is None else (error["code"], error["argument"])


@pytest.mark.parametrize(
    "product, comm_type, by_slot, sums, added",
    [
        pytest.param("portable", 0, False, False, False, id="portable"),
        pytest.param("a3", 0, True, False, True, id="row20-row30-a3"),
        pytest.param("950", 2, True, True, True, id="row20-row30-row31-950"),
    ],
    indirect=["product"],
)
def test_split_phase(product, comm_type, by_slot, sums, added):
    """Each op refuses a mask (BS, K), prefix sums, an addend beside shared ranks."""

    def fn(ctx):
        x, ids = torch.ones(2, 1024).bfloat16(), torch.zeros(2, 1, dtype=torch.int32)
        group = {"group_ep": ctx.ep_group, "ep_world_size": 2, "ep_rank_id": ctx.ep_rank}
        group |= {"moe_expert_num": 1, "shared_expert_rank_num": 1, "comm_type": comm_type}
        actual = []
        if by_slot:
            actual.append(
                refused(lambda: op("dispatch_setup")(x, ids, x_active_mask=SLOTS, **group))
            )
        y, index, info = op("dispatch_setup")(x, ids, x_active_mask=FIRST, **group)
        teardown = op("dispatch_teardown")
        if sums:
            actual.append(
                refused(lambda: teardown(x, y, ids, info, expert_token_nums_type=0, **group))
            )
        rows, _, assist, _ = teardown(x, y, ids, info, **group)
        sent, info = op("combine_setup")(rows, ids, assist, **group)
        given = (rows, sent, ids, index, torch.ones(2, 1), info)
        teardown = op("combine_teardown")
        if by_slot:
            actual.append(refused(lambda: teardown(*given, x_active_mask=SLOTS, **group)))
        if added:
            actual.append(refused(lambda: teardown(*given, shared_expert_x=x, **group)))
        out = teardown(*given, x_active_mask=FIRST, **group)
        assert out[:, 0].tolist() == [2, 0]
        return actual

    expected = [(561002, "x_active_mask")] * by_slot
    expected += [(561002, "expert_token_nums_type")] * sums
    expected += [(561002, "x_active_mask")] * by_slot
    expected += [(561002, "shared_expert_x")] * added
    assert harness.run_world("local", 2, fn) == [expected] * 2


def op(name):
    return getattr(torch_npu, f"npu_moe_distribute_{name}")


@on("a3")
@pytest.mark.parametrize(
    "world_size, experts, eplb, successor",
    [(384, 512, 0, 0), (385, 512, 561002, 0), (384, 513, 561002, 0), (769, 512, 561002, 561002)],
    ids=["row28-most", "row28-W", "row28-E", "row28-W of both"],
)
def test_replicas(product, world_size, experts, eplb, successor):
    """The first op of its kind takes less than its successor."""
    ids, out = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    table = torch.ones(experts, 2, dtype=torch.int32)
    keep = torch.zeros(2, 1, dtype=torch.bool)
    given = (0, world_size, 0, out)
    first = aclnn.aclnnMoeEPLBUpdateExpertGetWorkspaceSize
    assert first(ids, table, *given)[0] == eplb
    second = aclnn.aclnnMoeUpdateExpertGetWorkspaceSize
    assert second(ids, table, None, None, None, *given, keep)[0] == successor

"""Dispatch and combine on a GPU: what comes out is what comes out on the CPU, bit for bit.

The ranks of a world share the device, in threads or driven by one thread, eagerly or as a graph.
"""

from __future__ import annotations

import os

import pytest
import torch

from moe_triton import ExpertParallel, SequenceError, UnavailableError, set_backend, testing
from moe_triton.compat import torch_npu
from moe_triton.layout import NOWHERE

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a GPU, and Triton's compiler",
)
DEVICE = torch.device("cuda", 0)
E, K, H, MAX_TOKENS = 16, 4, 256, 24
QUANTS = (None, "int8", "e4m3", "e5m2", "group_e4m3", "group_e5m2", "mx_e4m3", "mx_e5m2")


@pytest.fixture(autouse=True)
def by_device():
    """Each tensor's device chooses the back end, whatever the environment says."""
    yield
    set_backend(None)


def inputs(rank: int, device, seed: int = 0, count: int | None = None):
    count = (MAX_TOKENS, 0, 7, 1)[rank % 4] if count is None else count
    seed = 100 * seed + rank
    ids = testing.routing_zipf(count, E, K, seed=seed)
    weights = testing.weights(count, K, seed=seed)
    x = testing.tokens(count, H, torch.bfloat16, seed=seed)
    return x.to(device), ids.to(device), weights.to(device)


def make(ctx, **options) -> ExpertParallel:
    sizes = {"num_experts": E, "top_k": K, "hidden": H, "max_tokens": MAX_TOKENS}
    ranks = {"rank": ctx.ep_rank, "device": ctx.device}
    return ExpertParallel(ctx.ep_group, **{**sizes, **ranks, **options})


def experts(received) -> torch.Tensor:
    """Each row times the number of its expert."""
    rows = torch.arange(len(received.x), device=received.x.device)
    number = torch.searchsorted(received.offsets, rows, right=True)
    return (received.x.float() * (number[:, None] + 1)).bfloat16()


def rounds(ctx, options: dict) -> list[dict]:
    """Three layers, as CPU tensors without what nobody wrote."""
    found = []
    with make(ctx, **options) as ep:
        for seed in range(3):
            received = ep.dispatch(*inputs(ctx.rank, ctx.device, seed))
            out = ep.combine(experts(received), received.handle)
            n = int(received.offsets[-1])
            found.append(
                {
                    "x": bits(received.x[:n]),
                    "scales": None if received.scales is None else bits(received.scales[:n]),
                    "weights": received.weights[:n].cpu(),
                    "counts": received.tokens_per_expert.cpu(),
                    "out": bits(out),
                }
            )
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def assert_same(found: dict, expected: dict) -> None:
    for name, one in expected.items():
        assert (found[name] is None) == (one is None), name
        assert one is None or torch.equal(found[name], one), name


@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("alignment", [1, 16])
def test_layers(world, quant, alignment):
    options = {"quant": quant, "alignment": alignment}
    found = testing.run_local(world, lambda ctx: rounds(ctx, options), device=DEVICE)
    expected = testing.run_local(world, lambda ctx: rounds(ctx, options))
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("options", [{"exact": True}, {"shared_experts": 1, "shared_ranks": 2}])
def test_layers_with(options):
    found = testing.run_local(4, lambda ctx: rounds(ctx, options), device=DEVICE)
    expected = testing.run_local(4, lambda ctx: rounds(ctx, options))
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert_same(one, other)


def functional(ctx, special: bool) -> list[torch.Tensor]:
    """v2 of both ops, with a mask, experts without a network, and what is added."""
    x, ids, weights = inputs(ctx.rank, ctx.device, count=9)
    arguments = {
        "group_ep": ctx.ep_group,
        "ep_world_size": ctx.ep_world_size,
        "ep_rank_id": ctx.ep_rank,
        "moe_expert_num": E if not special else E - 4,
    }
    more = {"x_active_mask": (torch.arange(9) < 7).to(ctx.device)}
    if special:
        more |= {"zero_expert_num": 1, "copy_expert_num": 1, "const_expert_num": 2}
    outputs = torch_npu.npu_moe_distribute_dispatch_v2(
        x, ids, **arguments, **more, quant_mode=2, expert_scales=weights
    )
    expand_x, scales, assist, _, ends, tp_ends, expand_scales = outputs[:7]
    n = int(ends[-1])
    y = (expand_x.float() * scales[:, None]).bfloat16()
    more |= {"shared_expert_x": x, "expand_scales": expand_scales}
    if special:
        constants = torch.arange(2 * H, device=ctx.device).view(2, H).bfloat16() / H
        more |= {"ori_x": x, "const_expert_v": constants}
        more |= {"const_expert_alpha_1": constants[:, 0].contiguous()}
        more |= {"const_expert_alpha_2": constants[:, 1].contiguous()}
    out = torch_npu.npu_moe_distribute_combine_v2(
        y, ids, assist, ends, weights, **arguments, **more, tp_send_counts=tp_ends
    )
    return [bits(one) for one in (expand_x[:n], scales[:n], assist[: 3 * n], ends, out)]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("world", [1, 4])
def test_functions(world, special):
    found = testing.run_local(world, lambda ctx: functional(ctx, special), device=DEVICE)
    expected = testing.run_local(world, lambda ctx: functional(ctx, special))
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("quant", [None, "int8", "e4m3"])
@pytest.mark.parametrize("world", [1, 8])
def test_a_graph_of_a_layer(world, quant):
    """Captured once; replayed with other inputs, of fewer tokens too, between eager calls."""
    with testing.lockstep(world, lambda ctx: make(ctx, quant=quant), device=DEVICE) as ranks:
        given = [inputs(rank, DEVICE, count=MAX_TOKENS) for rank in range(world)]

        def layer() -> list[torch.Tensor]:
            pending = [ep.dispatch_setup(*one) for ep, one in zip(ranks, given, strict=True)]
            rows = [ep.dispatch_teardown(one) for ep, one in zip(ranks, pending, strict=True)]
            sent = [
                ep.combine_setup(experts(one), one.handle)
                for ep, one in zip(ranks, rows, strict=True)
            ]
            return [ep.combine_teardown(one) for ep, one in zip(ranks, sent, strict=True)]

        torch.cuda.synchronize()  # windows may still be cleared, on another stream
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):  # compiles, and copies tables to the device: some for each slot
                layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer()
        for seed, count in ((1, MAX_TOKENS), (2, 5), (3, MAX_TOKENS), (4, 1)):
            for rank, buffers in enumerate(given):
                fresh = inputs(rank, DEVICE, seed, MAX_TOKENS)
                fresh[1][count:] = NOWHERE
                for buffer, values in zip(buffers, fresh, strict=True):
                    buffer.copy_(values)
            graph.replay()
            found = [out.clone() for out in captured]
            eager = layer()
            for one, other in zip(found, eager, strict=True):
                assert torch.equal(one, other)
                assert not one[count:].any()
                assert bool(one[:count].any())


def test_ranks_on_different_streams():
    """What one rank issues may then run before what another issued earlier: refused."""

    def fn(ctx):
        stream = torch.cuda.Stream() if ctx.rank == 1 else torch.cuda.current_stream()
        refused = pytest.raises(SequenceError, match="one stream")
        with make(ctx, timeout=20) as ep, torch.cuda.stream(stream), refused:
            ep.dispatch(*inputs(ctx.rank, ctx.device))

    testing.run_local(2, fn, device=DEVICE)


def test_a_device_that_is_not_the_back_ends():
    set_backend("cuda")
    with pytest.raises(UnavailableError, match="cpu"):
        testing.run_local(1, make)

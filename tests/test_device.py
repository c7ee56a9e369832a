"""Dispatch and combine on a GPU give the bits of the CPU.

The ranks of a world share the device, in threads or driven by one thread, eagerly or as a graph.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from lockstep_layer import bits, drive, experts

from moe_triton import ExpertParallel, UnavailableError, comm, set_backend, testing
from moe_triton.compat import torch_npu
from moe_triton.layout import NOWHERE

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a GPU, and Triton's compiler",
)
DEVICE = torch.device("cuda", 0)
E, K, H, MAX_TOKENS = 16, 4, 256, 24
QUANTS = (
    None,
    "int8",
    "e4m3",
    "e5m2",
    "group_e4m3",
    "group_e5m2",
    "pow2_e4m3",
    "mx_e4m3",
    "mx_e5m2",
)


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


def rounds(ctx, options: dict) -> list[dict]:
    """Outputs of three layers, as CPU tensors without the unwritten rows."""
    outputs = []
    with make(ctx, **options) as ep:
        for seed in range(3):
            received = ep.dispatch(*inputs(ctx.rank, ctx.device, seed))
            out = ep.combine(experts(received), received.handle)
            n = int(received.offsets[-1])
            outputs.append(
                {
                    "x": bits(received.x[:n]),
                    "scales": None if received.scales is None else bits(received.scales[:n]),
                    "weights": received.weights[:n].cpu(),
                    "counts": received.tokens_per_expert.cpu(),
                    "out": bits(out),
                }
            )
    return outputs


def check_on_device(world: int, fn) -> None:
    """The tensors that ``fn(ctx)`` returns are equal on the device and on the CPU."""
    on_device = testing.run_local(world, fn, device=DEVICE)
    for got, expected in zip(on_device, testing.run_local(world, fn), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


OPTIONS = [{"quant": quant, "alignment": alignment} for quant in QUANTS for alignment in (1, 16)]


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("options", [*OPTIONS, {"exact": True}], ids=str)
def test_layers(world, options):
    check_on_device(world, lambda ctx: rounds(ctx, options))


def test_layers_with_shared_ranks():
    check_on_device(4, lambda ctx: rounds(ctx, {"shared_experts": 1, "shared_ranks": 2}))


def functional(ctx, special: bool) -> list[torch.Tensor]:
    """v2 of both ops, with a mask, zero-computation experts and an addend."""
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
    outputs = expand_x[:n], scales[:n], assist[: 3 * n], ends, out
    return [bits(output) for output in outputs]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("world", [1, 4])
def test_functions(world, special):
    check_on_device(world, lambda ctx: functional(ctx, special))


@pytest.mark.parametrize("quant", [None, "int8", "e4m3"])
@pytest.mark.parametrize("world", [1, 8])
def test_a_graph_of_a_layer(world, quant):
    """Captured once; replayed with other inputs, of fewer tokens too, between eager calls."""
    with testing.lockstep(world, lambda ctx: make(ctx, quant=quant), device=DEVICE) as ranks:
        batches = [inputs(rank, DEVICE, count=MAX_TOKENS) for rank in range(world)]

        torch.cuda.synchronize()  # windows may still be cleared, on another stream
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):  # compiles, and copies tables to the device: some for each slot
                drive(ranks, batches)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, captured = drive(ranks, batches)
        for seed, count in ((1, MAX_TOKENS), (2, 5), (3, MAX_TOKENS), (4, 1)):
            for rank, buffers in enumerate(batches):
                fresh = inputs(rank, DEVICE, seed, MAX_TOKENS)
                fresh[1][count:] = NOWHERE
                for buffer, values in zip(buffers, fresh, strict=True):
                    buffer.copy_(values)
            graph.replay()
            replayed = [out.clone() for out in captured]
            _, sums = drive(ranks, batches)
            for got, eager in zip(replayed, sums, strict=True):
                assert torch.equal(got, eager)
                assert not got[count:].any()
                assert bool(got[:count].any())


def test_all_to_all_v():
    """The bits of the CPU, with a capacity too, whose counts stay on the device."""
    matrix = [[1, 2], [3, 0]]

    def fn(ctx):
        x = torch.arange(6, dtype=torch.int16, device=ctx.device).view(3, 2) + 10 * ctx.rank
        group = {"group": ctx.ep_group, "rank": ctx.ep_rank}
        rows, counts = comm.all_to_all_v(x, matrix[ctx.rank], **group)
        given = torch.tensor(matrix[ctx.rank], device=ctx.device)
        for _ in range(3):
            some, received = comm.all_to_all_v(x, given, capacity=4, **group)
            assert received.tolist() == counts
        return [rows, some[: len(rows)]]

    check_on_device(2, lambda ctx: [part.cpu() for part in fn(ctx)])


def test_ranks_on_different_streams():
    """Kernels wait for records of peers whose work runs later, although it was issued earlier."""

    def fn(ctx):
        with contextlib.ExitStack() as scope:
            if ctx.device.type == "cuda" and ctx.rank == 1:
                scope.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            return rounds(ctx, {"timeout": 20})

    check_on_device(2, fn)


def test_a_device_of_another_back_end():
    set_backend("cuda")
    with pytest.raises(UnavailableError, match="cpu"):
        testing.run_local(1, make)

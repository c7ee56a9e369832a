"""A layer as engines write it: routing, all-to-all, experts, the way back, under the profiler."""

import json
import os
import pathlib
import sys
import tempfile

import torch
import torch.distributed as dist
import torch_npu

WORLD, E, N, H, K = 2, 4, 6, 32, 2
LOCAL = E // WORLD


def layer(x, ids, weights):
    """Expert e multiplies by e + 1."""
    rows, row_idx, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x,
        ids,
        active_num=N * K,
        expert_num=E,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
    )
    received_counts = torch.empty_like(counts)
    dist.all_to_all_single(received_counts, counts)
    sent, received = (c.view(WORLD, LOCAL).sum(1).tolist() for c in (counts, received_counts))
    given = torch.empty(sum(received), H, dtype=x.dtype, device="npu")
    dist.all_to_all_single(given, rows, received, sent)
    first = 1 + LOCAL * dist.get_rank()
    factors = torch.arange(first, first + LOCAL, device="npu").repeat(WORLD)
    given *= factors.repeat_interleave(received_counts).unsqueeze(1)
    back = torch.empty_like(rows)
    dist.all_to_all_single(back, given, sent, received)
    return torch_npu.npu_moe_finalize_routing(
        back, None, None, None, weights, row_idx, None, drop_pad_mode=2
    )


def work(rank, port):
    torch.npu.set_device(rank)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("hccl", init_method=store, rank=rank, world_size=WORLD)
    torch.manual_seed(rank)
    x = torch.randn(N, H, device="npu")
    ids = torch.rand(N, E, device="npu").topk(K).indices.int()
    weights = torch.rand(N, K, device="npu")
    with torch_npu.profiler.profile(
        activities=[torch_npu.profiler.ProfilerActivity.NPU]
    ) as profiler:
        out = layer(x, ids, weights)
    wanted = x * ((ids + 1) * weights).sum(1, keepdim=True)
    torch.testing.assert_close(out, wanted)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        names = [event["name"] for event in json.loads(path.read_text())]
    assert names.count("MoeInitRoutingV3") == names.count("MoeFinalizeRoutingV2") == 1
    assert names.count("hcom_alltoallv_") == 3
    dist.destroy_process_group()
    print("npu finished!", flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.spawn(work, args=(sys.argv[1],), nprocs=WORLD)

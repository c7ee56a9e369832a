"""Dispatch and combine on four forked ranks with a shared expert, int8 on the way."""

import sys

import numpy as np
import torch
import torch.distributed as dist
import torch_npu
from torch.multiprocessing import Process

world_size = 4
shared_ranks = 1
experts = 6
bs, h, k = 5, 64, 3


def work(rank):
    torch_npu.npu.set_device(rank)
    address = f"tcp://127.0.0.1:{sys.argv[1]}"
    dist.init_process_group(backend="hccl", rank=rank, world_size=world_size, init_method=address)
    ep_group = dist.new_group(backend="hccl", ranks=list(range(world_size)))
    for other in range(world_size):
        group = dist.new_group(backend="hccl", ranks=[other])
        if other == rank:
            tp_group = group
    name = ep_group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    tp_name = tp_group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    assert name == ep_group.get_hccl_comm_name(rank) != tp_name

    torch.manual_seed(rank)
    x = torch.randn(bs, h, dtype=torch.bfloat16).npu()
    ids = np.stack([np.random.permutation(experts)[:k] for _ in range(bs)]).astype(np.int32)
    expert_ids = torch.from_numpy(ids).npu()
    expert_scales = torch.rand(bs, k, device=f"npu:{rank}")
    common = {
        "expert_ids": expert_ids,
        "group_ep": name,
        "group_tp": tp_name,
        "ep_world_size": world_size,
        "tp_world_size": 1,
        "ep_rank_id": rank,
        "tp_rank_id": 0,
        "expert_shard_type": 0,
        "shared_expert_rank_num": shared_ranks,
        "moe_expert_num": experts,
        "global_bs": bs * world_size,
    }
    expand_x, dynamic_scales, expand_idx, _, ep_recv_counts, tp_recv_counts, _ = (
        torch_npu.npu_moe_distribute_dispatch(x=x, quant_mode=2, **common)
    )
    assert expand_x.dtype == torch.int8
    rows = (expand_x.float() * dynamic_scales[:, None]).to(torch.bfloat16)
    out = torch_npu.npu_moe_distribute_combine(
        expand_x=rows,
        expand_idx=expand_idx,
        ep_send_counts=ep_recv_counts,
        tp_send_counts=tp_recv_counts,
        expert_scales=expert_scales,
        **common,
    )
    torch.npu.synchronize()
    # Experts that change nothing: each weight counts, and the shared expert once.
    expected = x.float() * (expert_scales.sum(1, keepdim=True) + 1)
    assert (out.float() - expected).abs().max() < 0.1, (out, expected)
    print(f"rank {rank} npu finished!\n", end="", flush=True)


if __name__ == "__main__":
    ranks = [Process(target=work, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    print("run npu success.")

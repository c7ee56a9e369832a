"""The second version of the operators on two forked ranks: a mask, and zero-computation experts."""

import sys

import torch
import torch.distributed as dist
import torch_npu
from torch.multiprocessing import Process

world_size, experts, bs, h = 2, 4, 4, 32
zero, copy = experts, experts + 1  # zero-computation experts come after the routed ones


def moe(x, expert_ids, expert_scales, x_active_mask, group_ep, rank):
    common = {
        "expert_ids": expert_ids,
        "group_ep": group_ep,
        "ep_world_size": world_size,
        "ep_rank_id": rank,
        "moe_expert_num": experts,
        "x_active_mask": x_active_mask,
        "zero_expert_num": 1,
        "copy_expert_num": 1,
        "comm_alg": "fullmesh_v1",
    }
    expand_x, _, assist_info, expert_token_nums, ep_recv_counts, tp_recv_counts, _ = (
        torch_npu.npu_moe_distribute_dispatch_v2(x=x, **common)
    )
    out = torch_npu.npu_moe_distribute_combine_v2(
        expand_x=expand_x * 2,
        assist_info_for_combine=assist_info,
        ep_send_counts=ep_recv_counts,
        tp_send_counts=tp_recv_counts,
        expert_scales=expert_scales,
        ori_x=x,
        **common,
    )
    return out, expert_token_nums


def work(rank):
    torch.npu.set_device(rank)
    address = f"tcp://127.0.0.1:{sys.argv[1]}"
    dist.init_process_group("hccl", rank=rank, world_size=world_size, init_method=address)
    group = dist.new_group(backend="hccl", ranks=[0, 1])
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    x = torch.randn(bs, h).half().npu()
    ids = torch.tensor([[0, 3, zero], [1, zero, zero], [copy, 2, 0], [-1, -1, -1]])
    scales = torch.full((bs, 3), 0.5).npu()
    active = torch.tensor([True, True, True, False]).npu()
    arguments = (x, ids.int().npu(), scales, active, name, rank)
    out, counts = moe(*arguments)
    # Experts double their rows and weights are 0.5: two experts, one, two and a copy, none.
    factors = torch.tensor([[2.0], [1.0], [2.5], [0.0]])
    assert (out.float() - x.float() * factors).abs().max() < 1e-2
    assert counts.sum() == 2 * (2 if rank == 1 else 3)
    print(f"rank {rank} npu finished!\n", end="", flush=True)


if __name__ == "__main__":
    ranks = [Process(target=work, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()

"""The split-phase operators on two ranks."""

import sys

import torch
import torch.distributed as dist
import torch_npu
from torch.multiprocessing import Process

world_size, experts, bs, h, k = 2, 4, 4, 64, 2


def work(rank):
    torch.npu.set_device(rank)
    address = f"tcp://127.0.0.1:{sys.argv[1]}"
    dist.init_process_group("hccl", rank=rank, world_size=world_size, init_method=address)
    group = dist.new_group(backend="hccl", ranks=[0, 1])
    common = {
        "group_ep": group._get_backend(torch.device("npu")).get_hccl_comm_name(rank),
        "ep_world_size": world_size,
        "ep_rank_id": rank,
        "moe_expert_num": experts,
        "global_bs": bs * world_size,
    }
    x = torch.randn(bs, h).bfloat16().npu()
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(bs)]).int().npu()
    y, expand_idx, sending = torch_npu.npu_moe_distribute_dispatch_setup(
        x=x,
        expert_ids=ids,
        # 1 + experts rows, as in the document.
        scales=torch.ones(1 + experts, h).npu(),
        quant_mode=2,
        **common,
    )
    torch.npu.synchronize()
    rows, scales, assist, counts = torch_npu.npu_moe_distribute_dispatch_teardown(
        x=x, y=y, expert_ids=ids, comm_cmd_info=sending, quant_mode=2, **common
    )
    rows = (rows.float() * scales[:, None]).bfloat16()
    quantised, returning = torch_npu.npu_moe_distribute_combine_setup(
        expand_x=rows, expert_ids=ids, assist_info_for_combine=assist, **common
    )
    torch.npu.synchronize()
    out = torch_npu.npu_moe_distribute_combine_teardown(
        expand_x=rows,
        quant_expand_x=quantised,
        expert_ids=ids,
        expand_idx=expand_idx,
        expert_scales=torch.full((bs, k), 0.5).npu(),
        comm_cmd_info=returning,
        **common,
    )
    total = counts.sum()
    dist.all_reduce(total, group=group)
    assert total == world_size * bs * k
    # Identity experts, so the difference is the error of int8.
    assert (out - x).abs().max() < x.abs().max() / 50
    print(f"rank {rank} npu finished!\n", end="", flush=True)


if __name__ == "__main__":
    ranks = [Process(target=work, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()

"""Two forked ranks in graph mode, against the same model run eagerly."""

import sys

import torch
import torch.distributed as dist
import torch_npu
import torchair
from torch.multiprocessing import Process
from torchair.configs.compiler_config import CompilerConfig

world_size, experts, bs, h, k = 2, 4, 3, 32, 2


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((h,), 2.0, dtype=torch.bfloat16))

    def forward(self, x, expert_ids, expert_scales, group_ep, rank):
        out = torch_npu.npu_moe_distribute_dispatch(
            x=x + torch.zeros(h, dtype=x.dtype, device="npu"),
            expert_ids=expert_ids,
            group_ep=group_ep,
            ep_world_size=world_size,
            ep_rank_id=rank,
            moe_expert_num=experts,
        )
        expand_x, _, expand_idx, _, ep_recv_counts, tp_recv_counts, _ = out
        torch_npu._npu_distribute_barrier(expert_ids, group_ep, world_size)
        return torch_npu.npu_moe_distribute_combine(
            expand_x=expand_x * self.scale,
            expert_ids=expert_ids,
            expand_idx=expand_idx,
            ep_send_counts=ep_recv_counts,
            tp_send_counts=tp_recv_counts,
            expert_scales=expert_scales,
            group_ep=group_ep,
            ep_world_size=world_size,
            ep_rank_id=rank,
            moe_expert_num=experts,
        )


def work(rank):
    torch.npu.set_device(rank)
    address = f"tcp://127.0.0.1:{sys.argv[1]}"
    dist.init_process_group("hccl", rank=rank, world_size=world_size, init_method=address)
    group = dist.new_group(backend="hccl", ranks=[0, 1])
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    x = torch.randn(bs, h, dtype=torch.bfloat16).npu()
    expert_ids = torch.tensor([[0, 3], [1, 2], [3, 1]], dtype=torch.int32).npu()
    arguments = (x, expert_ids, torch.rand(bs, k).npu(), name, rank)
    model = Model().npu()
    config = CompilerConfig()
    config.mode = "reduce-overhead"
    config.experimental_config.frozen_parameter = True
    backend = torchair.get_npu_backend(compiler_config=config)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
        assert torch.equal(compiled(*arguments), model(*arguments))
    torch.npu.synchronize()
    print(f"rank {rank} npu finished!\n", end="", flush=True)


if __name__ == "__main__":
    ranks = [Process(target=work, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()

"""Two spawned ranks that meet through the environment, and collectives on npu tensors."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_npu


def barriers(rank, group):
    token = torch.ones(1, dtype=torch.int32).npu()
    everybody = torch.tensor([1, 2, 0, 2, 0, 1, 0, 1], dtype=torch.int32).npu()
    limit = torch.tensor([20_000_000], dtype=torch.int32).npu()
    for options in ({}, {"time_out": limit, "elastic_info": everybody}):
        out = torch_npu._npu_distribute_barrier(x_ref=token, group=group, world_size=2, **options)
        assert torch.equal(out, token)

    def refused(world_size, **options):
        try:
            torch_npu._npu_distribute_barrier(token, group, world_size, **options)
        except (RuntimeError, ValueError) as error:
            return str(error)

    assert "world_size must be the size of group" in refused(3)
    assert "elastic_info" in refused(2, elastic_info=torch.ones(8, dtype=torch.int32))
    if rank == 0:  # alone
        assert "Timed out" in refused(2, time_out=limit // 100)


def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ["HCCL_BUFFSIZE"] = "400"
    device = torch.device("npu", rank)
    torch.npu.set_device(device)
    dist.init_process_group("hccl", rank=rank, world_size=2, device_id=device)
    assert dist.get_backend() == "hccl"
    total = torch.full((3,), float(rank + 1), device=device)
    dist.all_reduce(total)
    assert total.tolist() == [3, 3, 3]
    received = torch.empty(2).npu()
    dist.all_to_all_single(received, torch.tensor([0.0, 1.0]).npu() + 10 * rank)
    assert received.tolist() == [rank, rank + 10]
    objects = [None, None]
    dist.all_gather_object(objects, rank)
    assert objects == [0, 1]
    dist.barrier(device_ids=[rank])
    dist.barrier()

    group = dist.new_group(backend="hccl", ranks=[0, 1])
    barriers(rank, group._get_backend(torch.device("npu")).get_hccl_comm_name(rank))
    dist.barrier()
    print(f"rank {rank} npu finished!\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)

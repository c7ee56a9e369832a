"""Two spawned ranks that meet through the environment, and collectives on npu tensors."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_npu


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

    group = dist.distributed_c10d._get_default_group()
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    token = torch.ones(1, dtype=torch.int32).npu()
    everybody = torch.tensor([1, 2, 0, 2, 0, 1, 0, 1], dtype=torch.int32).npu()
    limit = torch.tensor([20_000_000], dtype=torch.int32).npu()
    for options in ({}, {"time_out": limit, "elastic_info": everybody}):
        out = torch_npu._npu_distribute_barrier(x_ref=token, group=name, world_size=2, **options)
        assert torch.equal(out, token)
    try:
        torch_npu._npu_distribute_barrier(token, name, 2, elastic_info=everybody * 0 + 1)
    except RuntimeError as error:
        assert "elastic_info" in str(error)
    else:
        raise AssertionError
    print(f"rank {rank} npu finished!\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)

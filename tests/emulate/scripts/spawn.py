"""Two spawned ranks, rendezvous by environment variables, and collectives on npu tensors."""

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


def collectives(rank):
    """Collectives that hccl has and gloo lacks."""
    mine = torch.tensor([1.5, 2.0, 0.5, 4.0]).npu() * (rank + 1)
    float8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
    for dtype in (*float8, torch.int16, torch.uint16):
        sent = mine.to(dtype)
        received = torch.empty(3 if rank == 0 else 5).to(dtype).npu()
        received_splits, sent_splits = ([2, 1], [2, 2]) if rank == 0 else ([2, 3], [1, 3])
        dist.all_to_all_single(received, sent, received_splits, sent_splits)
        both = [(torch.tensor([1.5, 2.0, 0.5, 4.0]) * (r + 1)).to(dtype).float() for r in range(2)]
        wanted = [*both[0][:2], *both[1][:1]] if rank == 0 else [*both[0][2:], *both[1][1:]]
        assert received.float().tolist() == wanted, (received, wanted)
        dist.broadcast(sent, 1)
        assert sent.float().tolist() == both[1].tolist()
    stacked = torch.empty(2, 3).npu()
    dist.all_gather_into_tensor(stacked, torch.arange(3.0).npu() + 10 * rank)
    assert stacked.tolist() == [[0, 1, 2], [10, 11, 12]]
    uneven = [torch.empty(1).npu(), torch.empty(3).npu()]
    for asynchronous in (False, True):
        mine = torch.full((1 + 2 * rank,), rank + 1.0)
        work = dist.all_gather(uneven, mine, async_op=asynchronous)
        assert work.wait() if asynchronous else work is None
        assert [part.tolist() for part in uneven] == [[1], [2, 2, 2]]
    dist.all_to_all(uneven, [torch.full((1 + 2 * rank,), 10.0 * rank + peer) for peer in range(2)])
    assert [part.tolist() for part in uneven] == [[rank], [10 + rank] * 3]
    total = torch.empty(1 + 2 * rank).npu()
    dist.reduce_scatter(total, [torch.ones(1), torch.full((3,), 5.0 + rank)])
    assert total.tolist() == ([2] if rank == 0 else [11, 11, 11])


def comm_names(rank):
    fresh = dist.new_group(backend="hccl", ranks=[0, 1])
    backend = fresh._get_backend(torch.device("npu"))
    assert backend.get_hccl_comm_name(rank, init_comm=False) == ""
    name = backend.get_hccl_comm_name(rank)
    assert name and backend.get_hccl_comm_name(rank, init_comm=False) == name
    used = dist.new_group(backend="hccl", ranks=[0, 1])
    dist.all_reduce(torch.ones(1).npu(), group=used)
    assert used.get_hccl_comm_name(rank, init_comm=False) not in ("", name)


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
    collectives(rank)
    comm_names(rank)
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

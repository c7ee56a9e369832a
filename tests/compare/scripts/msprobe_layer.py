"""Two MoE layers over 4 ranks, dumped by msprobe: run by `moe-triton npu-run`, as on an NPU.

Layer 0 has masks, layer 1 uneven batches; both have int8 rows and a shared expert on two ranks.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_npu

RANKS, HIDDEN, TOP_K, EXPERTS, SHARED = 4, 64, 3, 8, 2
LAYERS = ([5, 5, 5, 5], [3, 6, 1, 4])
CONFIG = {
    "task": "tensor",
    "rank": [],
    "step": [],
    "level": "L1",
    "tensor": {"scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics"},
}


def layer(number, rank, group):
    generator = torch.Generator().manual_seed(100 * number + rank)
    tokens = LAYERS[number][rank]
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)]
    ).int()
    weights = (4 * torch.rand(tokens, TOP_K, generator=generator)).softmax(1)
    shared = {"shared_expert_num": 1, "shared_expert_rank_num": SHARED}
    common = {"group_ep": group, "ep_world_size": RANKS, "ep_rank_id": rank}
    common |= {"moe_expert_num": EXPERTS, **shared}
    if number == 0:
        mask = torch.ones(tokens, TOP_K, dtype=torch.bool)
        mask[2, 1:] = False
        mask[4] = False
        common["x_active_mask"] = mask.npu()
    else:
        common["global_bs"] = max(LAYERS[number]) * RANKS
    smooth = None
    if number == 1:
        smooth = 0.5 + torch.rand(1 + EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(7))
        smooth = smooth.npu()
    x, ids, weights = x.npu(), ids.npu(), weights.npu()
    rows, scales, assist, per_expert, counts, _, _ = torch_npu.npu_moe_distribute_dispatch_v2(
        x, ids, quant_mode=2, scales=smooth, **common
    )
    hidden = torch.zeros(rows.shape, dtype=torch.bfloat16)
    received = int(counts[-1])
    # Each expert is another factor.
    factors = 1 + rank + 0.25 * torch.arange(len(per_expert)).repeat_interleave(per_expert.cpu())
    tokens = rows[:received].float() * scales[:received, None]
    hidden[:received] = (tokens * factors[:, None]).bfloat16()
    torch_npu.npu_moe_distribute_combine_v2(hidden, ids, assist, counts, weights, **common)


def run(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", rank=rank, world_size=RANKS)
    group = dist.distributed_c10d._get_default_group()
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
    dist.all_reduce(torch.zeros(1).npu())
    from msprobe.pytorch import PrecisionDebugger

    debugger = PrecisionDebugger(config_path=str(folder / "config.json"))
    for function in ("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"):
        debugger.register_custom_api(torch_npu, function, "NPU")
    debugger.start()
    for number in range(len(LAYERS)):
        layer(number, rank, name)
    debugger.stop()
    debugger.step()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"dump_path": str(target / "dump")}
    (target / "config.json").write_text(json.dumps(config))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mp.spawn(run, (target,), nprocs=RANKS)

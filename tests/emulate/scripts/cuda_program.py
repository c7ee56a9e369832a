"""A program for CUDA that uses NPUs through transfer_to_npu; one rank."""

import socket

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401 - programs import it first
from torch_npu.contrib import transfer_to_npu  # noqa: F401 - this is the test

assert torch.cuda.is_available() and torch.cuda.device_count() == 16
torch.cuda.set_device(2)
assert torch.cuda.current_device() == torch.npu.current_device() == 2
layer = torch.nn.Linear(3, 3).cuda()
x = torch.ones(2, 3, device="cuda:2", dtype=torch.float32)
for y in (layer(x), x.cuda(), x.to(torch.device("cuda")), torch.zeros(2).to("cuda:1")):
    assert y.is_cuda and y.is_npu
with torch.cuda.stream(torch.cuda.Stream()), torch.autocast("cuda", dtype=torch.bfloat16):
    assert layer(x).dtype == torch.bfloat16
assert torch.cuda.amp.autocast_mode.autocast  # torch.compile looks for it
assert isinstance(torch.cuda.amp.autocast(dtype=torch.bfloat16), torch.autocast)
torch.cuda.synchronize()
assert torch.cuda.memory_allocated() > 0

with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
assert dist.get_backend() == "hccl"
dist.all_reduce(x)
dist.destroy_process_group()
print("npu finished!")

"""What a rank of each client needs: a gloo group, the module deep_ep, and a batch of tokens.

    python CLIENT.py JOB RANK

JOB is a JSON file with "ranks" and "port".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe_triton.compat import deep_ep

_JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
RANK, WORLD = int(sys.argv[2]), _JOB["ranks"]
LOCAL, TOP_K = 3, 2
EXPERTS = LOCAL * WORLD


def start() -> dist.ProcessGroup:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{_JOB['port']}"
    dist.init_process_group("gloo", init_method=address, rank=RANK, world_size=WORLD)
    deep_ep.install()
    group = dist.group.WORLD
    assert group is not None
    return group


def batch(hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, H], distinct expert ids [T, K] and weights [T, K]; ranks have 5, 6, ... tokens."""
    torch.manual_seed(RANK)
    tokens = 5 + RANK
    ids = torch.rand(tokens, EXPERTS).argsort(1)[:, :TOP_K].contiguous()
    return torch.randn(tokens, hidden).to(dtype), ids, torch.rand(tokens, TOP_K)


def factor(experts: torch.Tensor) -> torch.Tensor:
    """What expert e multiplies its rows by."""
    return 1 + experts.float() / 4


def finish() -> None:
    dist.barrier()
    dist.destroy_process_group()

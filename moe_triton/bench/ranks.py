"""The ranks of a bench: processes of torchrun, where it runs under one."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

TIMEOUT = 300.0  # seconds; many ranks may share few cores

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rank:
    """A rank, with the names that ``testing.RankContext`` has.

    Attributes:
        rank: of the group.
        world_size: W.
        ep_group: that ``ExpertParallel`` takes; None for a rank alone.
        device: of this rank.
    """

    rank: int
    world_size: int
    ep_group: Any
    device: torch.device


def of_torchrun() -> int:
    """The ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def torchrun(device: torch.device) -> Iterator[Rank | None]:
    """This rank of torchrun's group, or None where there is none."""
    if of_torchrun() < 2:
        yield None
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=dt.timedelta(seconds=TIMEOUT))
    try:
        yield Rank(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, device)
    finally:
        dist.destroy_process_group()


def gathered(own: T) -> list[T]:
    """What every rank of torchrun's group measured."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks

"""A stand-in for torch's symmetric memory, which has no back end for CPUs.

It has what ``moe_triton.comm.symm_mem`` uses of ``_SymmetricMemory``, over memfd and the store of
the process group, and can fail in the ways of the original.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_triton import backend, comm
from moe_triton.comm import symm_mem, transport
from moe_triton.comm.memory import Block
from moe_triton.comm.ring_protocol import RingProtocol
from moe_triton.comm.shm import MemfdMemory

_LOOKS = 2**20  # that the interpreter takes for a second


@dataclasses.dataclass(frozen=True)
class Memory:
    """All ranks' blocks of one rendezvous: torch's handle."""

    rank: int
    world_size: int
    buffer_ptrs: list[int]
    blocks: list[Block]

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # Torch's tensor does not own the memory, which callers may hold for longer.
        assert rank != self.rank, "the rank's own block is its own tensor"
        return self.blocks[rank].data[: sizes[0]].view(dtype)


class StandIn:
    """torch's class.

    Args:
        far: ranks that are reached over a network: their pointers are 0.
        offset: bytes from the start of the allocation to the memory that callers get.
        unknown: the rendezvous does not know the memory.
        failing: the rendezvous of this rank raises before its peers hear of it.
        hanging: the rendezvous of this rank never comes to the others.
    """

    def __init__(
        self,
        *,
        far: tuple[int, ...] = (),
        offset: int = 0,
        unknown: bool = False,
        failing: bool = False,
        hanging: bool = False,
    ) -> None:
        self._far, self._offset, self._unknown = far, offset, unknown
        self._failing, self._hanging = failing, hanging
        self._blocks: dict[int, Block] = {}

    def get_backend(self, device: torch.device) -> str:
        return "CUDA"

    def empty_strided_p2p(
        self, size: tuple[int], stride: tuple[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        assert (stride, dtype) == ((1,), torch.uint8)
        if device.type != "cpu":
            raise RuntimeError(f"the stand-in does not support device type {device.type}")
        block = MemfdMemory().allocate(size[0] + self._offset)
        block.data.fill_(0xA5)  # torch zeroes the signal pad alone
        data = block.data[self._offset :]
        self._blocks[data.data_ptr()] = block
        return data

    def rendezvous(self, tensor: torch.Tensor, group_name: str) -> Memory | None:
        own = self._blocks.pop(tensor.data_ptr(), None)
        if own is None or self._unknown:
            return None
        if self._failing:
            raise RuntimeError("recvmsg: no descriptor came")
        while self._hanging:
            time.sleep(1)
        group = dist.distributed_c10d._resolve_process_group(group_name)
        rank, size = group.rank(), group.size()
        store = dist.distributed_c10d._get_process_group_store(group)
        number = store.add(f"stand-in/{rank}", 1)  # outlives the stand-in of one test
        store = dist.PrefixStore(f"stand-in/{number}", store)
        store.set(f"handle/{rank}", json.dumps(own.handle))
        blocks = []
        for peer in range(size):
            handle = json.loads(store.get(f"handle/{peer}"))
            blocks.append(own if peer == rank else MemfdMemory().open(handle))
        store.set(f"opened/{rank}", "")
        store.wait([f"opened/{peer}" for peer in range(size)])
        own.release()
        pointers = [
            0 if peer in self._far else block.data.data_ptr() for peer, block in enumerate(blocks)
        ]
        return Memory(rank, size, pointers, blocks)


@contextlib.contextmanager
def installed(
    stand_in: StandIn | None = None, facts: symm_mem.DeviceFacts | None = None
) -> Iterator[None]:
    """Windows of this process come from the provider, with a stand-in for torch and for devices."""
    torch_class = stand_in or StandIn()
    own = facts or symm_mem.DeviceFacts(f"cpu-{os.getpid()}", "CUDA", ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symm_mem, "_torch_class", lambda: torch_class)
        patch.setattr(symm_mem, "_device_facts", lambda device: own)
        patch.setattr(symm_mem, "_finds_device", lambda: True)
        patch.setattr(symm_mem.SymmetricMemory, "serves", lambda self, device: True)
        yield


@contextlib.contextmanager
def asynchronous(looks: int = 500) -> Iterator[None]:
    """As on devices: no host waits or reads counts, and interpreted kernels poll for their peers.

    Must be entered in a process before it imports Triton.

    Args:
        looks: that stand for a second; one takes the interpreter about a millisecond.
    """
    backend.set_backend("interpret")
    with installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RingProtocol, "host_waits", lambda self, device: self.group.in_process)
        for module in (comm, transport):
            patch.setattr(module, "fixed_shapes", lambda device: True)
        patch.setattr(RingProtocol, "kernel_timeout", lambda self, _: self.timeout * looks / _LOOKS)
        try:
            yield
        finally:
            backend.set_backend(None)


def on_provider(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``fn(ctx)`` with the provider installed."""

    def wrapped(ctx: Any) -> Any:
        with installed():
            return fn(ctx)

    return wrapped

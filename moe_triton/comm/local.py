"""Memory of an in-process world: ranks are threads, so a peer's block is the same tensor."""

from __future__ import annotations

import itertools
import weakref

import torch

from .memory import HOST, Block, Handle

_next = itertools.count()
_blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()


class LocalMemory:
    """Blocks that threads of this process find by number, in the memory of any device."""

    name = "local"

    def allocate(self, num_bytes: int, device: torch.device = HOST) -> Block:
        """A zeroed block; it lives as long as a rank references it."""
        data = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        if device.type != "cpu":
            # The zeros must come before writes on another stream.
            torch.get_device_module(device).current_stream(device).synchronize()
        number = next(_next)
        block = _blocks[number] = Block(data, {"number": number})
        return block

    def open(self, handle: Handle) -> Block:
        """The block behind a peer's handle."""
        block = _blocks.get(int(handle["number"]))
        if block is None:
            raise FileNotFoundError(f"block {handle['number']} has been freed")
        return block

"""Memory of an in-process world: all ranks are threads, so a peer's buffer is simply the tensor."""

from __future__ import annotations

import itertools
import weakref

import torch

from .memory import Block

_next = itertools.count()
_blocks: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()


class LocalMemory:
    """Blocks that threads of this process find by number."""

    name = "local"

    def allocate(self, num_bytes: int) -> Block:
        """A zeroed block; it lives as long as somebody holds a view of it."""
        data = torch.zeros(num_bytes, dtype=torch.uint8)
        number = next(_next)
        _blocks[number] = data
        return Block(data, {"number": number})

    def open(self, handle: dict[str, int | str]) -> Block:
        """The block behind a peer's handle."""
        data = _blocks.get(int(handle["number"]))
        if data is None:
            raise FileNotFoundError(f"block {handle['number']} is no longer held by anybody")
        return Block(data, handle)

"""The interface of memory providers: blocks that all ranks of a group read and write.

A provider allocates a block here and opens the blocks of peers by their handles, which are small
dictionaries that travel through the group's store or in handshakes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch

HOST = torch.device("cpu")
Handle: TypeAlias = "dict[str, int | str]"


def on_host(tensor: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor; of one on a device, a copy."""
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


@dataclasses.dataclass
class Block:
    """One rank's memory as this process has mapped it.

    Attributes:
        data: [num_bytes] uint8, initially zero.
        handle: for peers to open it.
        hide: removes the name or descriptor by which peers open the block; None once removed.
        mapping: keeps the memory mapped, where the tensor does not.
    """

    data: torch.Tensor
    handle: Handle
    hide: Callable[[], None] | None = None
    mapping: object = None

    def release(self) -> None:
        """Let no further peer open this block; views of it stay valid. Idempotent."""
        if self.hide is not None:
            self.hide()
            self.hide = None


class Memory(Protocol):
    """A provider of blocks that are opened one by one, without their owners.

    Both methods raise ``OSError`` where the system refuses.
    """

    name: str

    def allocate(self, num_bytes: int, device: torch.device = HOST) -> Block:
        """A zeroed block of this rank; ``OSError`` for a device that the provider cannot serve."""
        ...

    def open(self, handle: Handle) -> Block:
        """A peer's block."""
        ...


class CollectiveMemory(Protocol):
    """A provider whose blocks all ranks open together.

    ``allocate`` and ``open_all`` raise ``OSError`` where the system refuses.
    """

    name: str

    def serves(self, device: torch.device) -> bool:
        """Whether blocks on ``device`` come from this provider."""
        ...

    def allocate(self, num_bytes: int, device: torch.device) -> Block:
        """A zeroed block of this rank."""
        ...

    def open_all(self, own: Block, handles: Sequence[Handle]) -> list[Block]:
        """The blocks of all ranks, in their order; blocks the host until all ranks call it."""
        ...

"""What a memory provider gives: blocks that all ranks of a group read and write.

A provider allocates a block here and opens the blocks of peers by their handles, which are small
dictionaries that travel through the group's store or announcements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch


@dataclasses.dataclass
class Block:
    """One rank's memory as this process sees it.

    Attributes:
        data: [num_bytes] uint8, zero at first.
        handle: what peers need to open it.
        hide: takes away what lets peers find the block; None when there is nothing, or no more.
    """

    data: torch.Tensor
    handle: dict[str, int | str]
    hide: Callable[[], None] | None = None

    def release(self) -> None:
        """No further peer will open this block; views of it stay valid. May be called again."""
        if self.hide is not None:
            self.hide()
            self.hide = None


class Memory(Protocol):
    """A provider of blocks.

    Both methods raise ``OSError`` when the system refuses.
    """

    name: str

    def allocate(self, num_bytes: int) -> Block:
        """A zeroed block of this rank."""
        ...

    def open(self, handle: dict[str, int | str]) -> Block:
        """A peer's block."""
        ...

"""What a memory provider gives: blocks that all ranks of a group read and write.

A provider allocates a block here and opens the blocks of peers by their handles, which are small
dictionaries that travel through the group's store or announcements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch

HOST = torch.device("cpu")


@dataclasses.dataclass
class Block:
    """One rank's memory as this process sees it.

    Attributes:
        data: [num_bytes] uint8, zero at first.
        handle: what peers need to open it.
        flags: [flag_bytes] uint8 in host memory for flags, or None where they stand in the data.
        hide: takes away what lets peers find the block; None when there is nothing, or no more.
    """

    data: torch.Tensor
    handle: dict[str, int | str]
    flags: torch.Tensor | None = None
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

    def allocate(self, num_bytes: int, device: torch.device = HOST, flag_bytes: int = 0) -> Block:
        """A zeroed block of this rank; ``OSError`` too without memory of ``device``.

        A provider of host memory may leave the flags to the data.
        """
        ...

    def open(self, handle: dict[str, int | str]) -> Block:
        """A peer's block."""
        ...

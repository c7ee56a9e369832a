"""Pack tensors one after the other into bytes, each at a multiple of 16."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..layout import align


def packed_bytes(sizes: Sequence[int]) -> int:
    """Bytes that ``write_packed`` uses for parts of these sizes."""
    return sum(map(align, sizes))


def write_packed(data: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Write tensors into the bytes ``data``, each at a multiple of 16."""
    start = 0
    for part in parts:
        num_bytes = part.numel() * part.element_size()
        target = data[start : start + num_bytes].view(part.dtype)
        target.view(part.shape).copy_(part)
        start += align(num_bytes)


class PackedReader:
    """Reads the tensors of ``write_packed``, one after the other."""

    def __init__(self, data: torch.Tensor) -> None:
        self._unread = data

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, a view."""
        num_bytes = math.prod(shape) * dtype.itemsize
        part = self._unread[:num_bytes].view(dtype).view(shape)
        self._unread = self._unread[align(num_bytes) :]
        return part

"""Tensors one after the other in a piece of memory, each at a multiple of 16 bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..layout import align


def packed_bytes(sizes: Sequence[int]) -> int:
    """Bytes that parts of these sizes take one after the other, as ``write_packed`` lays them."""
    return sum(map(align, sizes))


def write_packed(data: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Write tensors into the bytes ``data``, each where a multiple of 16 bytes begins."""
    start = 0
    for part in parts:
        num_bytes = part.numel() * part.element_size()
        place = data[start : start + num_bytes].view(part.dtype)
        place.view(part.shape).copy_(part)
        start += align(num_bytes)


class PackedReader:
    """Reads what ``write_packed`` wrote, one tensor after the other."""

    def __init__(self, data: torch.Tensor) -> None:
        self._rest = data

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor, a view."""
        num_bytes = math.prod(shape) * dtype.itemsize
        part = self._rest[:num_bytes].view(dtype).view(shape)
        self._rest = self._rest[align(num_bytes) :]
        return part

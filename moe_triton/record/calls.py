"""A recorded call of one operator on one rank, whatever files it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ArgumentError


class FileError(ArgumentError, ValueError):
    """A file cannot be read, or does not hold what it should; names the file.

    Raised with the path in place of an argument: what the file must be, and what it is.
    """


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which is read when asked for.

    Attributes:
        path: of the file, for messages.
        read: reads it.
        dtype: that the description of the call gives, or None without one.
        shape: likewise.
        widened: whether the file stores bfloat16 as float32.
    """

    path: str
    read: Callable[[], torch.Tensor]
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None
    widened: bool = False

    def load(self) -> torch.Tensor:
        """The tensor, on the CPU.

        Raises:
            FileError: the file is missing, broken, or another tensor than described.
        """
        tensor = self.read()
        for what, described, actual in (
            ("dtype", self.dtype, tensor.dtype),
            ("shape", self.shape, tuple(tensor.shape)),
        ):
            if described is not None and described != actual:
                contract = f"hold a tensor of {what} {described}, as the dump describes it"
                raise FileError("compare", self.path, contract, str(actual))
        return tensor


@dataclasses.dataclass(frozen=True)
class RankCall:
    """One call on one rank.

    Attributes:
        op: the operator, a name of torch_npu.
        name: of the call in its dump.
        step: folder of the training or inference step, "" without one.
        rank: folder of the rank, or another name of it.
        arguments: by name: ``StoredTensor``, numbers, texts, None; without defaults. ``group_ep``
            and ``group_tp`` are any hashable names.
        outputs: by name: ``StoredTensor``, or None where the operator returned None.
        notes: what the reader assumed or could not use.
        problem: why the call cannot be rebuilt, or "".
        index: of the call among those of its operator on the rank, or None if unknown.
    """

    op: str
    name: str
    step: str
    rank: str
    arguments: Mapping[str, Any]
    outputs: Mapping[str, StoredTensor | None]
    notes: tuple[str, ...] = ()
    problem: str = ""
    index: int | None = None

    def number(self, name: str, default: int = 0) -> int:
        """An integer argument."""
        value = self.arguments.get(name)
        return value if isinstance(value, int) else default

    @property
    def group(self) -> str | None:
        """Name of the expert-parallel group, None if the call does not say it."""
        name = self.arguments.get("group_ep")
        return None if name is None else str(name)

    @property
    def ep_rank(self) -> int:
        """Rank in the expert-parallel group."""
        return self.number("ep_rank_id")

    @property
    def tp_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.number("tp_rank_id") if self.tp_world == 2 else 0

    @property
    def tp_world(self) -> int:
        """Ranks of the tensor-parallel group, 1 without one."""
        return max(self.number("tp_world_size"), 1)

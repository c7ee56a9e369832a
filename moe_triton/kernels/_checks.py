"""Checks of launchers: dtypes, shapes, strides and devices of tensors, for memory safety."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..errors import ArgumentTypeError, ArgumentValueError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    *,
    dtypes: Collection[torch.dtype],
    shape: tuple[int | None, ...],
    device: torch.device,
    strided_columns: bool = True,
) -> None:
    """Raise unless a tensor has one of ``dtypes`` and ``shape`` and is on ``device``.

    Args:
        op: for the message.
        name: of the argument, for the message.
        tensor: value of the argument.
        dtypes: allowed dtypes.
        shape: None stands for any size.
        device: of the op's first argument.
        strided_columns: whether the last dimension may have a stride other than 1.
    """
    if tensor.dtype not in dtypes:
        raise ArgumentTypeError(op, name, f"be one of {[*dtypes]}", tensor.dtype)
    if not _has_shape(tensor, shape):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ArgumentValueError(op, name, f"have the shape ({wanted})", tuple(tensor.shape))
    if tensor.device != device:
        raise ArgumentValueError(op, name, f"be on {device}", tensor.device)
    if not strided_columns and not _adjacent(tensor):
        contract = "be contiguous in its last dimension"
        raise ArgumentValueError(op, name, contract, f"strides {tensor.stride()}")


def _has_shape(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    actual = tensor.shape
    if len(actual) != len(shape):
        return False
    for size, wanted in zip(actual, shape, strict=True):  # noqa: SIM110 - faster than a generator
        if wanted not in (None, size):
            return False
    return True


def _adjacent(tensor: torch.Tensor) -> bool:
    """Whether the last dimension has stride 1, or no need of one."""
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 or tensor.numel() == 0


def with_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose first element can be read, as NPUs do for masked lanes."""
    return tensor if tensor.numel() else tensor.new_zeros(1)


def with_adjacent_columns(rows: torch.Tensor) -> torch.Tensor:
    """[.., H] rows, copied if the stride of their columns is not 1."""
    return rows if rows.shape[-1] <= 1 or rows.stride(-1) == 1 else rows.contiguous()

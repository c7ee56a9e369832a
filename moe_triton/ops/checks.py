"""Argument checks, to be called in the order of the aclnn interface: missing, dtype, shape, value.

``expert_parallel`` and ``ascend`` share them. Each raises an ``ArgumentError`` of ``op`` for the
named argument. Values of tensors are checked only on the CPU, where that costs no synchronisation.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import ArgumentNameError, ArgumentTypeError, ArgumentValueError, MissingArgumentError
from ..topology import Topology

FLOATS = (torch.float16, torch.bfloat16)
_MAX_NAME = 127


def required(op: str, **arguments: object) -> None:
    """No argument is None; ``MissingArgumentError``."""
    for name, value in arguments.items():
        if value is None:
            raise MissingArgumentError(op, name, "be given", None)


def reserved(op: str, **arguments: object) -> None:
    """Reserved arguments are at a default: None, 0 or the empty string."""
    for name, value in arguments.items():
        tensor = isinstance(value, torch.Tensor)
        if tensor or value not in (None, 0, ""):
            got = "a tensor" if tensor else repr(value)
            raise ArgumentValueError(op, name, "be left at its default, as it is reserved", got)


def group_name(op: str, argument: str, name: object) -> None:
    """A group's name has at most 127 characters; process groups and None pass."""
    if isinstance(name, str) and len(name) > _MAX_NAME:
        contract = f"be at most {_MAX_NAME} characters long"
        raise ArgumentNameError(op, argument, contract, f"{len(name)} characters")


def dtype(op: str, name: str, tensor: torch.Tensor | None, allowed: Sequence[torch.dtype]) -> None:
    """``tensor`` is None, or a tensor of an allowed dtype; ``ArgumentTypeError``."""
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentTypeError(op, name, "be a tensor", type(tensor).__name__)
    if tensor.dtype not in allowed:
        names = " or ".join(str(choice).removeprefix("torch.") for choice in allowed)
        raise ArgumentTypeError(op, name, f"be {names}", tensor.dtype)


def integers(op: str, **arguments: object) -> None:
    """All arguments are integers, Python's or numpy's."""
    for name, value in arguments.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ArgumentTypeError(op, name, "be an integer", repr(value))


def integer_list(op: str, name: str, values: object) -> None:
    """``values`` is a list of integers, or another sequence of them such as a ``torch.Size``."""
    fits = isinstance(values, Sequence) and all(
        isinstance(value, numbers.Integral) and not isinstance(value, bool) for value in values
    )
    if not fits:
        raise ArgumentTypeError(op, name, "be a list of integers", repr(values))


def reals(op: str, **arguments: object) -> None:
    """All arguments are numbers, Python's or numpy's."""
    for name, value in arguments.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise ArgumentTypeError(op, name, "be a number", repr(value))


def flags(op: str, **arguments: object) -> None:
    """All arguments are True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ArgumentTypeError(op, name, "be True or False", repr(value))


def shape(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    expected: Sequence[int | None],
    meaning: str,
    device: torch.device,
) -> None:
    """``tensor`` is None, or dense, of the expected shape and on ``device``.

    Args:
        op: for error messages.
        name: of the argument.
        tensor: the argument.
        expected: sizes, None for any.
        meaning: of the shape in letters, for error messages.
        device: of the call.
    """
    if tensor is None:
        return
    if tensor.layout != torch.strided:
        raise ArgumentValueError(op, name, "be a dense tensor", tensor.layout)
    fits = tensor.dim() == len(expected) and all(
        wanted is None or size == wanted
        for size, wanted in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        sizes = ["any" if size is None else str(size) for size in expected]
        contract = f"have shape {meaning} = ({', '.join(sizes)})"
        raise ArgumentValueError(op, name, contract, f"shape {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ArgumentValueError(op, name, f"be on {device}", f"a tensor on {tensor.device}")


def value(op: str, name: str, holds: bool, contract: str, got: object) -> None:
    """``holds`` is true, or the value ``got`` breaks its contract; ``ArgumentValueError``."""
    if not holds:
        raise ArgumentValueError(op, name, contract, got)


def indices(op: str, name: str, tensor: torch.Tensor, end: int, *, start: int = 0) -> None:
    """On the CPU: all entries are in [start, end)."""
    if tensor.device.type != "cpu":
        return
    wrong = ((tensor < start) | (tensor >= end)).nonzero()
    if len(wrong):
        where = tuple(wrong[0].tolist())
        got = f"{int(tensor[where])} at {list(where)}"
        raise ArgumentValueError(op, name, f"be in [{start}, {end})", got)


def topology(
    op: str,
    world: int,
    num_experts: int,
    num_shared: int,
    num_shared_ranks: int,
    *,
    names: tuple[str, str, str] = ("moe_expert_num", "shared_expert_num", "shared_expert_rank_num"),
) -> Topology:
    """Make the placement of the experts of valid numbers, whose argument names are ``names``."""
    experts, shared, ranks = names
    value(op, ranks, 0 <= num_shared_ranks < world, f"be in [0, {world})", num_shared_ranks)
    if num_shared_ranks == 0:
        value(op, shared, num_shared in (0, 1), f"be 0 or 1 when {ranks} is 0", num_shared)
        num_shared = 0
    else:
        value(op, shared, num_shared > 0, f"be positive when {ranks} is not 0", num_shared)
        contract = f"be a multiple of {shared} = {num_shared}"
        value(op, ranks, num_shared_ranks % num_shared == 0, contract, num_shared_ranks)
    moe = world - num_shared_ranks
    contract = f"be a positive multiple of the {moe} ranks with routed experts"
    value(op, experts, num_experts > 0 and num_experts % moe == 0, contract, num_experts)
    return Topology(world, num_experts, num_shared, num_shared_ranks)


def expert_ids(
    op: str,
    name: str,
    ids: torch.Tensor,
    num_experts: int,
    *,
    num_zero_computation: int = 0,
    active: torch.Tensor | None = None,
    absent: int | None = None,
    otherwise: str = "",
) -> None:
    """On the CPU: active ids name experts, and no token names a routed expert twice.

    Args:
        op: for error messages.
        name: of the argument.
        ids: [T, K].
        num_experts: E, the routed experts.
        num_zero_computation: experts after those.
        active: [T, K] bool, the slots to check; None for all.
        absent: a negative id of a slot without an expert, not checked; not with ``active``.
        otherwise: other values that an id may have, for error messages.
    """
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    # In NumPy, whose calls cost less than PyTorch's: the tensors are small. Negative ids are large
    # as unsigned integers.
    values = ids.detach().numpy()
    unsigned = values.view(f"u{values.itemsize}")
    wrong = unsigned >= num_experts + num_zero_computation
    checked = None if active is None else active.numpy()
    if checked is not None:
        wrong &= checked
    elif absent is not None:
        wrong &= values != absent
    if wrong.any():
        token, slot = np.argwhere(wrong)[0].tolist()
        got = f"{values[token, slot]} for token {token}, slot {slot}"
        contract = f"be in [0, {num_experts + num_zero_computation}){otherwise}"
        raise ArgumentValueError(op, name, contract, got)
    ordered = np.sort(values if checked is None else np.where(checked, values, -1))
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if repeated.any():
        later = ordered[:, 1:]
        repeated &= (later >= 0) & (later < num_experts)
    if repeated.any():
        token, slot = np.argwhere(repeated)[0].tolist()
        got = f"{ordered[token, slot]} twice for token {token}"
        raise ArgumentValueError(op, name, "name distinct experts for each token", got)

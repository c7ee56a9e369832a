"""Checks of the arguments that several calls take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import ArgumentTypeError
from ...ops import checks

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_INDICES = (torch.int64, torch.int32)

#: Tokens, or quantised tokens and their scales.
Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def split_tokens(op: str, x: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens [T, H] and their scales, [T] or [T, C] of any dtype, or None.

    Raises:
        ArgumentTypeError, ArgumentValueError: neither a floating tensor, nor a float8 tensor and
            its scales.
    """
    checks.required(op, x=x)
    scales = None
    if isinstance(x, Sequence):
        if len(x) != 2 or not all(isinstance(part, torch.Tensor) for part in x):
            contract = "be a tensor, or a tensor and its scales"
            raise ArgumentTypeError(op, "x", contract, f"{type(x).__name__} of {len(x)}")
        x, scales = x
    checks.dtype(op, "x", x, FLOATS if scales is None else (*FLOAT8, torch.int8, torch.uint8))
    checks.shape(op, "x", x, (None, None), "(T, H)", x.device)
    contract = "have at least one column"
    checks.value(op, "x", x.shape[1] > 0, contract, f"shape {tuple(x.shape)}")
    if scales is not None:
        columns = (None,) * (scales.dim() - 1)
        contract = "be scales of one or two dimensions"
        checks.value(op, "x[1]", scales.dim() in (1, 2), contract, f"{scales.dim()} dimensions")
        checks.shape(op, "x[1]", scales, (len(x), *columns), "(T, C)", x.device)
    return x, scales


def check_topk(
    op: str,
    topk_idx: Any,
    topk_weights: Any,
    num_tokens: int | None,
    num_experts: int,
    device: torch.device,
) -> None:
    """Expert ids [T, K] in [-1, E), and float32 weights of the same shape or None."""
    checks.required(op, topk_idx=topk_idx)
    checks.dtype(op, "topk_idx", topk_idx, _INDICES)
    checks.dtype(op, "topk_weights", topk_weights, (torch.float32, torch.float64))
    checks.shape(op, "topk_idx", topk_idx, (num_tokens, None), "(T, K)", device)
    checks.indices(op, "topk_idx", topk_idx, num_experts, start=-1)
    checks.shape(op, "topk_weights", topk_weights, tuple(topk_idx.shape), "(T, K)", device)


def check_num_experts(op: str, num_experts: Any, world_size: int) -> None:
    """A positive multiple of the ranks."""
    checks.required(op, num_experts=num_experts)
    checks.integers(op, num_experts=num_experts)
    fits = num_experts > 0 and num_experts % world_size == 0
    contract = f"be a positive multiple of the {world_size} ranks"
    checks.value(op, "num_experts", fits, contract, num_experts)


def check_rows(op: str, x: Any, num_rows: int, *, exact: bool = True) -> None:
    """Rows [R, H] that combine returns: as many as were received, or with padding more."""
    checks.required(op, x=x)
    checks.dtype(op, "x", x, FLOATS)
    checks.shape(op, "x", x, (None, None), "(R, H)", x.device)
    fits = len(x) == num_rows if exact else len(x) >= num_rows
    contract = f"have {'' if exact else 'at least '}the {num_rows} rows of its dispatch"
    checks.value(op, "x", fits, contract, f"shape {tuple(x.shape)}")


def biases(op: str, bias: Any, x: torch.Tensor, num_tokens: int) -> list[torch.Tensor]:
    """The tensors of a bias: none, one, or two of the dtype of ``x``, each [T, H]."""
    if bias is None:
        return []
    addends = list(bias) if isinstance(bias, (tuple, list)) else [bias]
    contract = "be a tensor or two"
    checks.value(op, "bias", len(addends) <= 2, contract, f"{len(addends)} of them")
    for addend in addends:
        checks.dtype(op, "bias", addend, (x.dtype,))
        checks.shape(op, "bias", addend, (num_tokens, x.shape[1]), "(T, H)", x.device)
    return [addend.detach() for addend in addends]

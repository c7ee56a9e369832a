"""Scales and factors of quantised rows, as callers see and give them."""

from __future__ import annotations

import torch

from ..errors import ArgumentTypeError, ArgumentValueError
from ..layout import QUANTS
from ..topology import Topology
from . import checks

E8M0 = torch.float8_e8m0fnu


def as_e8m0(quant: str | None, scales: torch.Tensor) -> torch.Tensor:
    """View MX scales, which travel as bytes, as float8_e8m0fnu; others are returned unchanged."""
    return scales.view(E8M0) if quant is not None and QUANTS[quant].scheme == "mx" else scales


def dequantize(
    op: str, x: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Rows times their scales, in float32 and rounded once.

    Args:
        op: for error messages.
        x: [n, H] payload.
        scales: [n], [n, ceil(H / 128)], or [n, C] of E8M0 with one for every 32 elements; None
            where the rows are not quantised.
        dtype: of the result.

    Raises:
        ArgumentTypeError: ``dtype`` is not floating.
        ArgumentValueError: int8 rows without scales, as "int8_static" sends them.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentTypeError(op, "dtype", "be a floating dtype", dtype)
    if scales is None:
        if x.dtype == torch.int8:
            contract = 'be one with scales: only the caller has the factors of "int8_static"'
            raise ArgumentValueError(op, "quant", contract, "int8 rows without scales")
        return x.to(dtype)
    if scales.dim() == 1:
        factors = scales[:, None]
    else:
        block = QUANTS["mx_e4m3" if scales.dtype == E8M0 else "group_e4m3"].block
        factors = scales.float().repeat_interleave(block, dim=1)[:, : x.shape[1]]
    return (x.float() * factors).to(dtype)


def check_factors(
    op: str,
    scales: torch.Tensor | None,
    quant: str | None,
    topology: Topology,
    hidden: int,
    device: torch.device,
) -> None:
    """The caller's factors fit the quantisation: required, optional or forbidden, and their shape.

    Args:
        op: for error messages.
        scales: the factors, or None.
        quant: the quantisation, or None.
        topology: of the experts.
        hidden: H.
        device: of the tokens.
    """
    scheme = "none" if quant is None else QUANTS[quant].scheme
    if scheme == "static":
        contract = "be given where factors are static"
        checks.value(op, "scales", scales is not None, contract, None)
    if scales is None:
        return
    has_factors = scheme in ("static", "per_row", "group", "group_pow2")
    contract = f"be None where rows are {quant or 'unquantised'}"
    checks.value(op, "scales", has_factors, contract, tuple(scales.shape))
    if scheme == "static" and scales.dim() == 1:
        fits = len(scales) in (1, hidden)
        contract = f"have shape (1,), (H,) = ({hidden},) or (shared + moe experts, H)"
        checks.value(op, "scales", fits, contract, f"shape {tuple(scales.shape)}")
        checks.shape(op, "scales", scales, (None,), "(1,) or (H,)", device)
        return
    expected = (topology.num_shared_experts + topology.num_experts, hidden)
    checks.shape(op, "scales", scales, expected, "(shared + moe experts, H)", device)

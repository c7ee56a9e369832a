"""Scales of quantised rows as callers see them, and the factors that callers give."""

from __future__ import annotations

import torch

from ..layout import QUANTS
from ..topology import Topology
from . import checks

E8M0 = torch.float8_e8m0fnu


def as_e8m0(quant: str | None, scales: torch.Tensor) -> torch.Tensor:
    """Scales as they come out: those of MX travel as bytes."""
    return scales.view(E8M0) if quant is not None and QUANTS[quant].scheme == "mx" else scales


def check_factors(
    op: str,
    scales: torch.Tensor | None,
    quant: str | None,
    topology: Topology,
    hidden: int,
    device: torch.device,
) -> None:
    """The factors of a quantisation that the caller makes, or makes not.

    Args:
        op: for error messages.
        scales: the factors.
        quant: the quantisation.
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
    takes = scheme in ("static", "per_row", "group")
    what = quant or "unquantised"
    checks.value(op, "scales", takes, f"be None where rows are {what}", tuple(scales.shape))
    if scheme == "static" and scales.dim() == 1:
        fits = len(scales) in (1, hidden)
        contract = f"have shape (1,), (H,) = ({hidden},) or (shared + moe experts, H)"
        checks.value(op, "scales", fits, contract, f"shape {tuple(scales.shape)}")
        checks.shape(op, "scales", scales, (None,), "(1,) or (H,)", device)
        return
    expected = (topology.num_shared_experts + topology.num_experts, hidden)
    checks.shape(op, "scales", scales, expected, "(shared + moe experts, H)", device)

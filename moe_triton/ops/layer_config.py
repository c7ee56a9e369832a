"""Sizes of an expert-parallel layer: their checks, and the bytes of its windows."""

from __future__ import annotations

from typing import Literal

import torch

from .. import comm
from ..comm import MoeConfig, WindowBytes
from ..comm import TransportName as TransportName  # noqa: PLC0414 (mypy's mark of a re-export)
from ..layout import QUANTS
from . import checks

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# For type checkers: the names of ``layout.QUANTS``.
QuantName = Literal[
    "int8_static",
    "int8",
    "e4m3",
    "e5m2",
    "group_e4m3",
    "group_e5m2",
    "pow2_e4m3",
    "mx_e4m3",
    "mx_e5m2",
]
QuantGradient = Literal["straight_through"]


def layer_config(
    op: str,
    world_size: int,
    *,
    num_experts: int,
    top_k: int,
    hidden: int,
    max_tokens: int,
    dtype: torch.dtype,
    quant: str | None,
    shared_experts: int,
    shared_ranks: int,
    max_recv_tokens: int | None,
    alignment: int,
    per_expert_scales: bool = False,
) -> MoeConfig:
    """Check the arguments of ``ExpertParallel``, and make its configuration of them.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks its contract.
    """
    sizes = {
        "num_experts": num_experts,
        "top_k": top_k,
        "hidden": hidden,
        "max_tokens": max_tokens,
        "shared_experts": shared_experts,
        "shared_ranks": shared_ranks,
        "alignment": alignment,
    }
    checks.integers(op, **sizes)
    # Ranks compare their arguments as JSON, which has no numpy integers.
    num_experts, top_k, hidden, max_tokens = map(int, (num_experts, top_k, hidden, max_tokens))
    shared_experts, shared_ranks, alignment = map(int, (shared_experts, shared_ranks, alignment))
    names = ("num_experts", "shared_experts", "shared_ranks")
    topology = checks.topology(
        op, world_size, num_experts, shared_experts, shared_ranks, names=names
    )
    contract = f"be in [1, {num_experts}], the number of experts"
    checks.value(op, "top_k", 1 <= top_k <= num_experts, contract, top_k)
    checks.value(op, "hidden", hidden >= 1, "be positive", hidden)
    checks.value(op, "max_tokens", max_tokens >= 0, "not be negative", max_tokens)
    checks.value(op, "dtype", dtype in DTYPES, f"be one of {[*DTYPES]}", dtype)
    contract = f"be None or one of {[*QUANTS]}"
    checks.value(op, "quant", quant is None or quant in QUANTS, contract, repr(quant))
    checks.value(op, "alignment", alignment >= 1, "be positive", alignment)
    if max_recv_tokens is not None:
        checks.integers(op, max_recv_tokens=max_recv_tokens)
        max_recv_tokens = int(max_recv_tokens)
        checks.value(
            op, "max_recv_tokens", max_recv_tokens >= 0, "not be negative", max_recv_tokens
        )
    return MoeConfig(
        topology,
        top_k,
        hidden,
        max_tokens,
        dtype,
        quant,
        per_expert=per_expert_scales,
        with_weights=True,
        max_rows=max_recv_tokens,
        alignment=alignment,
    )


def window_bytes(
    *,
    world_size: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    quant: QuantName | None = None,
    per_expert_scales: bool = False,
    shared_experts: int = 0,
    shared_ranks: int = 0,
    max_recv_tokens: int | None = None,
    alignment: int = 1,
    in_flight: int = 1,
) -> WindowBytes:
    """Bytes of the windows that ``ExpertParallel`` with these arguments allocates on each rank.

    They hold the worst case, which ``max_recv_tokens`` lowers; the system commits a page when it
    is first written.

    Args:
        world_size: W.
        num_experts: E.
        top_k: K.
        hidden: H.
        max_tokens: most tokens of a rank.
        dtype: of the tokens.
        quant: None, or a name of ``layout.QUANTS``, as for ``ExpertParallel``.
        per_expert_scales: dispatch gets smooth scales per expert: each slot is a row of its own.
        shared_experts: NS.
        shared_ranks: S.
        max_recv_tokens: most rows a rank receives, or None for the worst case.
        alignment: the rows of each expert are padded to a multiple of this.
        in_flight: operations that may be set up before the first is torn down.

    Returns:
        Bytes of the dispatch and of the combine windows; both 0 for a world of one rank.

    Raises:
        ArgumentTypeError, ArgumentValueError: an argument breaks its contract.
    """
    op = "window_bytes"
    checks.integers(op, world_size=world_size, in_flight=in_flight)
    checks.value(op, "world_size", world_size >= 1, "be positive", world_size)
    checks.value(op, "in_flight", in_flight >= 1, "be positive", in_flight)
    config = layer_config(
        op,
        int(world_size),
        num_experts=num_experts,
        top_k=top_k,
        hidden=hidden,
        max_tokens=max_tokens,
        dtype=dtype,
        quant=quant,
        shared_experts=shared_experts,
        shared_ranks=shared_ranks,
        max_recv_tokens=max_recv_tokens,
        alignment=alignment,
        per_expert_scales=per_expert_scales,
    )
    if world_size == 1:
        return WindowBytes(0, 0)
    return comm.window_bytes(config, in_flight=int(in_flight))

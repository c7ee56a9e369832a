"""How much memory the windows of a model take."""

from __future__ import annotations

import torch

from .. import comm
from ..comm import MoeConfig, WindowBytes
from . import checks


def window_bytes(
    *,
    world_size: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    quant: str | None = None,
    per_expert_scales: bool = False,
    shared_experts: int = 0,
    shared_ranks: int = 0,
    max_recv_tokens: int | None = None,
    in_flight: int = 1,
) -> WindowBytes:
    """Bytes of the windows that ``ExpertParallel`` with these arguments sets aside on each rank.

    They hold the worst case, which ``max_recv_tokens`` lowers; pages are taken as rows are written.

    Args:
        world_size: W.
        num_experts: E.
        top_k: K.
        hidden: H.
        max_tokens: most tokens of a rank.
        dtype: of the tokens.
        quant: None or "int8".
        per_expert_scales: dispatch gets smooth scales per expert, so that copies of a token differ.
        shared_experts: NS.
        shared_ranks: S.
        max_recv_tokens: most rows a rank receives, or None for the worst case.
        in_flight: operations that may be set up before the first is torn down.

    Returns:
        Bytes of the dispatch and of the combine windows; both 0 for a world of one rank.

    Raises:
        ArgumentTypeError, ArgumentValueError: there is no such layer.
    """
    op = "window_bytes"
    checks.integers(
        op,
        world_size=world_size,
        num_experts=num_experts,
        top_k=top_k,
        hidden=hidden,
        max_tokens=max_tokens,
        shared_experts=shared_experts,
        shared_ranks=shared_ranks,
        in_flight=in_flight,
    )
    checks.value(op, "world_size", world_size >= 1, "be positive", world_size)
    checks.value(op, "in_flight", in_flight >= 1, "be positive", in_flight)
    names = ("num_experts", "shared_experts", "shared_ranks")
    topology = checks.topology(
        op, world_size, num_experts, shared_experts, shared_ranks, names=names
    )
    checks.layer(op, topology, top_k, hidden, max_tokens, dtype, quant, max_recv_tokens)
    if world_size == 1:
        return WindowBytes(0, 0)
    config = MoeConfig(
        topology,
        top_k,
        hidden,
        max_tokens,
        dtype,
        quant,
        per_expert_scales,
        with_weights=True,
        max_rows=max_recv_tokens,
    )
    return comm.window_bytes(config, in_flight=in_flight)

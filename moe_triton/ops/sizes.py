"""How much memory the windows of a model take."""

from __future__ import annotations

import torch

from .. import comm
from ..comm import MoeConfig, WindowBytes
from ..topology import Topology


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
    in_flight: int = 1,
) -> WindowBytes:
    """Bytes of the windows that ``ExpertParallel`` with these arguments sets aside on each rank.

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
        in_flight: operations that may be set up before the first is torn down.

    Returns:
        Bytes of the dispatch and of the combine windows; both 0 for a world of one rank.
    """
    if world_size == 1:
        return WindowBytes(0, 0)
    config = MoeConfig(
        Topology(world_size, num_experts, shared_experts if shared_ranks else 0, shared_ranks),
        top_k,
        hidden,
        max_tokens,
        dtype,
        quant,
        per_expert_scales,
        with_weights=True,
    )
    return comm.window_bytes(config, in_flight=in_flight)

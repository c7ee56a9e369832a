"""The outputs of dispatch and combine before they have values: what a compiler has to know.

Nothing here raises: a wrong argument gives some size, often 0, and the op itself says what is wrong
when it runs, on the ranks that run it.
Source: the output tables of aclnnMoeDistributeDispatch and aclnnMoeDistributeCombine, V1 to V4.
"""

from __future__ import annotations

import torch

from ..errors import MoeError
from ..topology import Topology
from . import checks
from .arguments import GroupArguments
from .distribute import DispatchOutput
from .names import DISPATCH_V2
from .returned import ASSIST_WORDS


def dispatch_outputs(
    op: str,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    arguments: GroupArguments,
    *,
    expert_scales: torch.Tensor | None = None,
    quant_mode: int = 0,
) -> DispatchOutput:
    """What ``distribute_dispatch`` returns for these arguments, with no values yet."""
    num_tokens, top_k = _sizes(expert_ids)
    _, hidden = _sizes(x)
    rows, local = _capacity(arguments, num_tokens, top_k)
    world, tp = max(arguments.ep_world_size, 1), max(arguments.tp_world_size, 1)
    int32, assist = torch.int32, None
    if op == DISPATCH_V2:
        assist = x.new_empty(max(num_tokens * top_k, ASSIST_WORDS * rows), dtype=int32)
    return DispatchOutput(
        expand_x=x.new_empty((tp * rows, hidden), dtype=torch.int8 if quant_mode else x.dtype),
        dynamic_scales=x.new_empty(tp * rows, dtype=torch.float32) if quant_mode else None,
        expand_idx=x.new_empty(num_tokens * top_k, dtype=int32),
        assist_info=assist,
        expert_token_nums=x.new_empty(local, dtype=torch.int64),
        ep_recv_counts=x.new_empty(tp * world * local, dtype=int32),
        tp_recv_counts=x.new_empty(tp, dtype=int32) if tp > 1 else None,
        expand_scales=None if expert_scales is None else x.new_empty(rows, dtype=torch.float32),
        waited=x.new_empty(world, dtype=torch.int64),
    )


def combine_output(expand_x: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """The tensor that ``distribute_combine`` returns for these arguments, with no values yet."""
    (num_tokens, _), (_, hidden) = _sizes(expert_ids), _sizes(expand_x)
    return expand_x.new_empty((num_tokens, hidden))


def _sizes(matrix: torch.Tensor) -> tuple[int, int]:
    """Rows and columns; 0 where there are none."""
    rows, columns, *_ = *matrix.shape, 0, 0
    return rows, columns


def _capacity(arguments: GroupArguments, num_tokens: int, top_k: int) -> tuple[int, int]:
    """A and L of this rank."""
    world, rank = max(arguments.ep_world_size, 1), arguments.ep_rank_id
    try:
        placement = checks.topology(
            "",
            world,
            arguments.moe_expert_num,
            arguments.shared_expert_num,
            arguments.shared_expert_rank_num,
        )
    except MoeError:
        placement = Topology(world, 0)
    max_tokens = max(arguments.global_bs, 0) // world if arguments.global_bs else num_tokens
    return placement.capacity(rank, max_tokens, top_k), placement.num_local_experts(rank)

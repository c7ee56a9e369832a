"""Physical experts of a token's slots: replicas of a logical expert, and slots below a threshold.

    eplb_map:     id -> table[id, 1 + number], number by rank or by token
    keep_experts: weights[t, k] >= threshold[k] * sum_k weights[t, k]

Letters: T tokens, K experts per token, E experts, F columns of the table of replicas.
Bytes:   eplb_map reads T * K ids, counts and physical ids, writes T * K ids; keep_experts reads
         T * K * 4 twice, writes T * K.
Source:  Ascend's ``aclnnMoeEPLBUpdateExpert``; ``moe_triton.ref.expert_map``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..errors import ArgumentValueError
from ._checks import FLOATS, INDICES, check_tensor
from ._common import divide
from .launch_config import line, tiles

_MAX_TOKENS = 256  # of a block that keeps experts: an NPU takes 192 bytes of its 192 KB for each


@triton.jit(do_not_specialize=["num_ids", "num_experts", "top_k", "rank", "world_size"])
def _eplb_map_kernel(
    ids_ptr,  # [T, K] int32 | int64
    table_ptr,  # [E, F] int32
    out_ptr,  # [T, K] of the dtype of ids
    num_ids,
    num_experts,
    top_k,
    num_columns,
    rank,
    world_size,
    BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace logical ids by physical ones.

    Example: ids [[0, 1], [2, 3], [1, 2]],
        table [[1, 5, 0, 0], [2, 0, 4, 0], [3, 1, 3, 6], [2, 7, 2, 0]], world size 8:
        [[5, 0], [1, 7], [0, 1]] on rank 0, [[5, 0], [3, 2], [0, 6]] by token.
    """
    for tile in range(tl.program_id(0), tl.cdiv(num_ids, BLOCK), tl.num_programs(0)):
        slot_id = tile * BLOCK + tl.arange(0, BLOCK)
        mask = slot_id < num_ids
        expert = tl.load(ids_ptr + slot_id, mask=mask, other=0).to(tl.int64)
        tl.device_assert((expert >= 0) & (expert < num_experts), "expert_ids out of range")
        row_ptr = table_ptr + expert * num_columns
        count = tl.load(row_ptr, mask=mask, other=1)
        tl.device_assert((count >= 1) & (count < num_columns), "number of replicas out of range")
        if BY_TOKEN:
            token = divide(slot_id, top_k)
            number = token - divide(token, count) * count
        else:
            # Exact in fp32, in which a 910B divides: these are ranks.
            number = rank // ((world_size + count - 1) // count)
        physical = tl.load(row_ptr + 1 + number, mask=mask, other=0)
        tl.store(out_ptr + slot_id, physical.to(out_ptr.dtype.element_ty), mask=mask)


def eplb_map(
    expert_ids: torch.Tensor, table: torch.Tensor, *, rank: int | None, world_size: int
) -> torch.Tensor:
    """Replace each logical expert by the physical id of one of its replicas.

    Example: table [[1, 5, 0], [2, 0, 4]], world size 8: id 1 becomes 0 on ranks 0 to 3, 4 on ranks
    4 to 7; with rank None, 0 and 4 for tokens in turn.

    Arguments as in ``ref.eplb_map``.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape or device that does not fit, or a rank outside the world.
    """
    op, device = "eplb_map", expert_ids.device
    check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=(None, None), device=device)
    check_tensor(op, "table", table, dtypes=(torch.int32,), shape=(None, None), device=device)
    if table.shape[1] < 2:
        raise ArgumentValueError(op, "table", "have at least 2 columns", tuple(table.shape))
    if rank is not None and not 0 <= rank < world_size:
        raise ArgumentValueError(op, "rank", f"be in [0, {world_size})", rank)
    ids = expert_ids.contiguous()
    out = torch.empty_like(ids)
    if ids.numel() == 0:
        return out
    launch = tiles(device, 1, ids.numel())
    _eplb_map_kernel[(launch.num_programs,)](
        ids,
        table.contiguous(),
        out,
        ids.numel(),
        len(table),
        ids.shape[1],
        table.shape[1],
        0 if rank is None else rank,
        world_size,
        BY_TOKEN=rank is None,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return out


@triton.jit(do_not_specialize=["num_tokens", "top_k"])
def _keep_experts_kernel(
    weights_ptr,  # [T, K] fp32
    threshold_ptr,  # [K] fp32
    active_ptr,  # [T] uint8, or None
    keep_ptr,  # [T, K] uint8
    num_tokens,
    top_k,
    BLOCK_T: tl.constexpr,
):
    """Compare weights with a share of their sum.

    Example: weights [[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]], threshold [0, 0.3], active [1, 1, 0]:
        [[1, 0], [1, 1], [0, 0]].
    """
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        token = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = token < num_tokens
        active = mask
        if active_ptr is not None:
            active = tl.load(active_ptr + token, mask=mask, other=0) != 0
        total = tl.zeros((BLOCK_T,), tl.float32)
        for k in range(top_k):
            total = total + tl.load(weights_ptr + token * top_k + k, mask=mask, other=0.0)
        for k in range(top_k):
            weight = tl.load(weights_ptr + token * top_k + k, mask=mask, other=0.0)
            keep = active & (weight >= tl.load(threshold_ptr + k) * total)
            tl.store(keep_ptr + token * top_k + k, keep.to(tl.uint8), mask=mask)


def keep_experts(
    weights: torch.Tensor, threshold: torch.Tensor, active: torch.Tensor | None
) -> torch.Tensor:
    """Mark the slots to keep: weight >= threshold * sum of the token's weights.

    Arguments as in ``ref.keep_experts``.

    Raises:
        ArgumentTypeError: a dtype that is not listed above.
        ArgumentValueError: a shape or device that does not fit.
    """
    op, device = "keep_experts", weights.device
    check_tensor(op, "weights", weights, dtypes=FLOATS[2:3], shape=(None, None), device=device)
    num_tokens, top_k = weights.shape
    check_tensor(op, "threshold", threshold, dtypes=FLOATS[2:3], shape=(top_k,), device=device)
    if active is not None:
        check_tensor(op, "active", active, dtypes=(torch.bool,), shape=(num_tokens,), device=device)
        active = active.contiguous().view(torch.uint8)
    keep = torch.empty((num_tokens, top_k), dtype=torch.uint8, device=device)
    if keep.numel() == 0:
        return keep.view(torch.bool)
    launch = line(device, num_tokens)
    _keep_experts_kernel[(launch.num_programs,)](
        weights.contiguous(),
        threshold.contiguous(),
        active,
        keep,
        num_tokens,
        top_k,
        BLOCK_T=min(launch.block, _MAX_TOKENS),
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    return keep.view(torch.bool)

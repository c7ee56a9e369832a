"""The rows that a dispatch of version 2 received: their handle, and their layout for the caller.

Letters as in ``elastic``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ...layout import NOWHERE
from . import routing
from .arguments import Tokens
from .handle import EPHandle
from .transfer import as_bytes

SCALE_ALIGNMENT = 16  # bytes, of a column of scales


class OutputLayout(NamedTuple):
    """Options of the output of a dispatch.

    Attributes:
        expand: one row per expert, sorted by expert.
        zero_padding: zero the padding between the experts' rows.
        column_major_scales: with columns that begin at a multiple of 16 bytes.
        cpu_sync: as many rows as came; else as many as can come.
        expert_ids: set ``EPHandle.recv_expert_ids``.
    """

    expand: bool
    zero_padding: bool
    column_major_scales: bool
    cpu_sync: bool
    expert_ids: bool


def make_handle(
    local: torch.Tensor,
    source_tokens: torch.Tensor,
    per_source: list[int],
    topk_idx: torch.Tensor,
    layout: OutputLayout,
    *,
    num_experts: int,
    expert_alignment: int,
    num_max_tokens_per_rank: int,
    num_sms: int,
    dst_buffer_slot_idx: torch.Tensor,
) -> EPHandle:
    """Describe the received rows.

    Args:
        local: [R, K] int64 local experts, or ``NOWHERE``.
        source_tokens: [R, 1] int32 token of each row in its source.
        per_source: [W] rows from each rank.
        topk_idx: [T, K] the ids of dispatch.
        layout: of the output.
        num_experts: E.
        expert_alignment: as ``EPHandle``.
        num_max_tokens_per_rank: M.
        num_sms: as ``EPHandle``.
        dst_buffer_slot_idx: as ``EPHandle``.
    """
    device, (num_rows, top_k) = local.device, local.shape
    world = len(per_source)
    num_local = num_experts // world
    counts_of_sources = torch.tensor(per_source, device=device)
    sources = torch.repeat_interleave(
        torch.arange(world, device=device), counts_of_sources, output_size=num_rows
    )
    slots_in_token = torch.arange(top_k, device=device)
    last = torch.where(local >= 0, slots_in_token, NOWHERE).amax(1)
    expanded = routing.expand(local, num_local, expert_alignment)
    padded = routing.align(expanded.counts, expert_alignment)
    psum = expanded.ends if layout.expand else padded.cumsum(0)
    metadata = torch.cat(
        [
            (sources * num_max_tokens_per_rank + source_tokens.flatten())[:, None],
            (sources * top_k + last)[:, None],
            expanded.slots if layout.expand else torch.full_like(local, NOWHERE),
        ],
        1,
    ).int()
    num_expanded = int(padded.sum())
    per_expert: list[int] = padded.tolist()
    if not layout.cpu_sync:
        most = world * num_max_tokens_per_rank
        metadata = pad(metadata, (0, 0, 0, most - num_rows), value=NOWHERE)
        num_rows, per_expert = most, []
        most = most * min(top_k, num_local) + (expert_alignment - 1) * num_local
        num_expanded = -(-most // expert_alignment) * expert_alignment
    expert_ids = None
    if layout.expert_ids:
        expert_ids = torch.full((num_expanded,), NOWHERE, dtype=torch.int32, device=device)
        valid = expanded.slots >= 0
        expert_ids[expanded.slots[valid]] = local[valid].int()
    return EPHandle(
        do_expand=layout.expand,
        num_experts=num_experts,
        expert_alignment=expert_alignment,
        num_max_tokens_per_rank=num_max_tokens_per_rank,
        num_sms=num_sms,
        topk_idx=topk_idx,
        num_recv_tokens=num_rows,
        num_expanded_tokens=num_expanded,
        num_recv_tokens_per_expert_list=per_expert,
        psum_num_recv_tokens_per_scaleup_rank=counts_of_sources.cumsum(0).int(),
        psum_num_recv_tokens_per_expert=psum.int(),
        num_unaligned_recv_tokens_per_expert=expanded.counts.int(),
        recv_src_metadata=metadata,
        dst_buffer_slot_idx=dst_buffer_slot_idx,
        recv_expert_ids=expert_ids,
    )


def lay_out(
    columns: list[torch.Tensor],
    weights: torch.Tensor | None,
    local: torch.Tensor,
    id_dtype: torch.dtype,
    handle: EPHandle,
    layout: OutputLayout,
) -> tuple[Tokens, torch.Tensor | None, torch.Tensor | None]:
    """The received rows in the layout that was asked for.

    Args:
        columns: the rows [R, H], and their scales [R, C] or [R] if they have any.
        weights: [R, K] or None.
        local: [R, K] int64 local experts, or ``NOWHERE``.
        id_dtype: of the ids to return.
        handle: of the rows.
        layout: of the output.

    Returns:
        recv_x, recv_topk_idx and recv_topk_weights of ``ElasticBuffer.dispatch``.
    """
    num_rows = len(local)
    if layout.expand:
        slots = handle.expanded_rows(num_rows)
        valid = slots >= 0
        index, source = slots[valid], valid.nonzero()[:, 0]
        size, zero = handle.num_expanded_tokens, layout.zero_padding
        placed = [_placed(column, source, index, size, zero=zero) for column in columns]
        if weights is not None:
            copies = torch.arange(len(index), device=index.device)
            weights = _placed(weights[valid], copies, index, size, zero=zero)
        ids = None
    else:
        index = source = torch.arange(num_rows, device=local.device)
        size = handle.num_recv_tokens
        placed = columns
        ids = local.to(id_dtype)
        if size > num_rows:
            placed = [_placed(column, source, index, size) for column in columns]
            ids = pad(ids, (0, 0, 0, size - num_rows), value=NOWHERE)
            if weights is not None:
                weights = _placed(weights, source, index, size)
    if len(placed) == 1:
        return placed[0], ids, weights
    tokens, scales = placed
    if layout.column_major_scales and scales.dim() == 2:
        per_column = SCALE_ALIGNMENT // scales.itemsize
        height = -(-len(scales) // per_column) * per_column
        columns_first = scales.new_empty_strided(tuple(scales.shape), (1, height))
        scales = columns_first.copy_(scales)
    return (tokens, scales), ids, weights


def _placed(
    rows: torch.Tensor, source: torch.Tensor, index: torch.Tensor, size: int, *, zero: bool = False
) -> torch.Tensor:
    """``size`` rows with ``rows[source]`` at ``index``; the others zero or unwritten."""
    shape = (size, *rows.shape[1:])
    out = rows.new_zeros(shape) if zero else rows.new_empty(shape)
    # torch cannot index every float8: use its bytes.
    as_bytes(out)[index] = as_bytes(rows.contiguous())[source]
    return out

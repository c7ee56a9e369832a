"""The rows that the setups of the split-phase ops return: as they are sent, where Ascend has them.

Nothing here is read again: what travels is in the windows.
Source: the operator documents of aclnnMoeDistributeDispatchSetup and ...CombineSetup.
"""

from __future__ import annotations

import torch

from ...comm import CombineInput, Pending
from ...layout import QUANTS, RowFormat, align
from .dispatch import Dispatch


def message_format(quant: str | None, dtype: torch.dtype, hidden: int) -> RowFormat:
    """A row of y: the payload, then the scales where Ascend's ops put them."""
    fmt = RowFormat.quantized(quant, dtype, hidden)
    scheme = "none" if quant is None else QUANTS[quant].scheme
    size = hidden * fmt.dtype.itemsize
    if scheme in ("none", "static"):
        return fmt._replace(stride=align(align(size, 32), 512))
    start = align(size, {"per_row": 32, "group": 128, "mx": 256}[scheme])
    total = start + fmt.num_scales * fmt.scale_dtype.itemsize
    return fmt._replace(scale_offset=start, stride=align(total, 512))


def messages(dispatch: Dispatch) -> torch.Tensor:
    """y: [BS * (K + NS), size] the row of each slot in token order, then those of shared experts.

    What lies between the payload, the scales and the end of a row is not written.
    """
    config, tokens = dispatch.call.config, dispatch.tokens
    quant, steps, x = dispatch.rows.quant, dispatch.call.steps, tokens.x
    num_tokens, top_k = tokens.expert_ids.shape
    num_shared = config.topology.num_shared_experts
    fmt = message_format(quant, x.dtype, x.shape[1])
    shape = (num_tokens * (top_k + num_shared), fmt.stride)
    y = torch.empty(shape, dtype=torch.uint8, device=x.device)
    routed = y[: num_tokens * top_k].view(num_tokens, top_k, fmt.stride)
    shared = y[num_tokens * top_k :].view(num_shared, num_tokens, fmt.stride)
    places = [routed[:, k] for k in range(top_k)] + list(shared.unbind(0))
    factors = tokens.smooth_scales
    if factors is None or factors.dim() == 1:
        rows = torch.empty((num_tokens, fmt.stride), dtype=torch.uint8, device=x.device)
        steps.encode(x, fmt, rows, factors)
        for part in places:
            part.copy_(rows)
    else:
        expert = tokens.expert_ids.long().clamp(0, config.topology.num_experts - 1)
        for slot, part in enumerate(places):
            chosen = slot - top_k
            row = factors[num_shared + expert[:, slot]] if slot < top_k else factors[chosen]
            made = torch.empty(part.shape, dtype=torch.uint8, device=x.device)
            steps.encode(x, fmt, made, row)
            part.copy_(made)
    return y.view(dispatch.rows.dtype)


def sent_rows(
    pending: Pending[CombineInput], expand_x: torch.Tensor, capacity: int
) -> torch.Tensor:
    """quant_expand_x: the rows as they return with comm_quant_mode 2, else not written."""
    call, hidden = pending.call, expand_x.shape[1]
    size = quant_row_bytes(hidden)
    sent = torch.empty((capacity, size), dtype=torch.uint8, device=expand_x.device)
    fmt = call.config.return_format
    if fmt.scheme == "block8":
        n = len(pending.data.recv_permutation.source)
        placed = fmt._replace(scale_offset=align(hidden, 32), stride=size)
        call.steps.encode(expand_x[:n], placed, sent[:n])
    return sent.view(torch.int8)


def quant_row_bytes(hidden: int) -> int:
    """Of a row of quant_expand_x."""
    return align(align(hidden, 32) + align(hidden, 8) // 8 * 4, 512)

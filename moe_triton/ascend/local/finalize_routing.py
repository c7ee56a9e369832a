"""The op behind ``npu_moe_finalize_routing``: sum the experts' rows of each token.

Shapes and errors are documented in ``compat.torch_npu``. ``finalize_routing_outputs`` is the fake
implementation and never raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import checks
from ...ops.device_steps import steps_on
from ..op_names import FINALIZE_ROUTING as OP
from .gather import FLOATS

_PADDED = (1, 3)  # values of drop_pad_mode
_BY_COLUMN = (0, 1)


def source_rows(index: Tensor, top_k: int, drop_pad_mode: int | None) -> Tensor:
    """[N, K] the row of each slot, from expanded_src_to_dst_row."""
    if (drop_pad_mode or 0) in _BY_COLUMN:
        return index.view(top_k, -1).T
    return index.view(-1, top_k)


def finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """Add the weighted rows and biases of each token's experts to two skips."""
    rows, index, experts = expanded_permuted_rows, expanded_src_to_dst_row, export_for_source_row
    mode, top_k = 0 if drop_pad_mode is None else drop_pad_mode, 1 if k is None else k
    checks.required(OP, expanded_permuted_rows=rows, expanded_src_to_dst_row=index)
    checks.integers(OP, drop_pad_mode=mode, k=top_k)
    checks.dtype(OP, "expanded_permuted_rows", rows, FLOATS)
    for name, tensor in (("skip1", skip1), ("skip2", skip2), ("bias", bias)):
        checks.dtype(OP, name, tensor, (rows.dtype,))
    checks.dtype(OP, "scales", scales, [*dict.fromkeys((*FLOATS[:3], rows.dtype))])
    for name, tensor in (
        ("expanded_src_to_dst_row", index),
        ("export_for_source_row", experts),
    ):
        checks.dtype(OP, name, tensor, (torch.int32,))

    device = rows.device
    checks.value(OP, "drop_pad_mode", 0 <= mode <= 3, "be in [0, 3]", mode)
    padded = mode in _PADDED
    shape, meaning = ((None,) * 3, "(E, C, H)") if padded else ((None,) * 2, "(N * K, H)")
    checks.shape(OP, "expanded_permuted_rows", rows, shape, meaning, device)
    checks.shape(OP, "expanded_src_to_dst_row", index, (None,), "(N * K,)", device)
    num_slots = len(index)
    if scales is not None:
        checks.shape(OP, "scales", scales, (None, None), "(N, K)", device)
        top_k = scales.shape[1]
        fits = scales.numel() == num_slots and top_k > 0
        contract = f"have K > 0 and as many elements as expanded_src_to_dst_row, {num_slots}"
        checks.value(OP, "scales", fits, contract, f"shape {tuple(scales.shape)}")
    else:
        contract = f"divide N * K = len(expanded_src_to_dst_row) = {num_slots}"
        checks.value(OP, "k", top_k > 0 and num_slots % top_k == 0, contract, top_k)
    num_tokens = num_slots // top_k
    if not padded:
        contract = f"have N * K = {num_slots} rows when drop_pad_mode is {mode}"
        checks.value(OP, "expanded_permuted_rows", len(rows) == num_slots, contract, len(rows))
    flat = rows.reshape(-1, rows.shape[-1]) if padded else rows
    sizes = (num_tokens, flat.shape[1])
    checks.shape(OP, "skip1", skip1, sizes, "(N, H)", device)
    checks.shape(OP, "skip2", skip2, sizes, "(N, H)", device)
    fits = skip2 is None or skip1 is not None
    checks.value(OP, "skip2", fits, "be None when skip1 is None", "a tensor")
    checks.shape(OP, "bias", bias, (None, flat.shape[1]), "(E, H)", device)
    checks.shape(OP, "export_for_source_row", experts, (num_tokens, top_k), "(N, K)", device)
    if bias is not None:
        contract = "be given when bias is given"
        checks.value(OP, "export_for_source_row", experts is not None, contract, None)
        assert experts is not None
        checks.indices(OP, "export_for_source_row", experts, len(bias))
    checks.indices(OP, "expanded_src_to_dst_row", index, len(flat), start=-1)

    out = flat.new_empty(sizes)
    row_index = source_rows(index, top_k, mode).long()
    finalize = steps_on(device).finalize_routing
    finalize(flat, row_index, scales, bias, experts, (skip1, skip2), out)
    return out


def finalize_routing_outputs(
    *,
    expanded_permuted_rows: Tensor,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    k: int | None,
    **_: object,
) -> Tensor:
    """Fake output of ``finalize_routing``."""
    if scales is None:
        num_tokens = expanded_src_to_dst_row.numel() // max(1 if k is None else k, 1)
    else:
        num_tokens = scales.shape[:1].numel()
    hidden = expanded_permuted_rows.shape[-1:].numel()
    return expanded_permuted_rows.new_empty((num_tokens, hidden))

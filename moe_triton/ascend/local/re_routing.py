"""The ops behind ``npu_moe_re_routing`` and ``npu_moe_compute_expert_tokens``.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ArgumentTypeError
from ...layout import NOWHERE
from ...ops import checks
from ...ops.device_steps import steps_on
from ...ops.quantization import E8M0
from ..op_names import COMPUTE_EXPERT_TOKENS, RE_ROUTING
from ..quant_modes import named_dtype
from .gather import gather

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # on 950
_MAX_HIDDEN = 16384  # of re_routing, exclusive
_MAX_EXPERTS = 2048  # of compute_expert_tokens


def re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reorder rows from (rank, expert) to (expert, rank)."""
    op, counts = RE_ROUTING, expert_token_num_per_rank
    checks.required(op, tokens=tokens, expert_token_num_per_rank=counts)
    checks.integers(op, expert_token_num_type=expert_token_num_type, idx_type=idx_type)
    checks.dtype(op, "tokens", tokens, (*checks.FLOATS, torch.int8, *_FLOAT8))
    checks.dtype(op, "expert_token_num_per_rank", counts, (torch.int32, torch.int64))
    mx = (E8M0, torch.uint8) if tokens.dtype in _FLOAT8 else ()
    checks.dtype(op, "per_token_scales", per_token_scales, (torch.float32, *mx))
    kind = named_dtype(op, "tokens_dtype", tokens_dtype)
    if kind not in (None, tokens.dtype):
        raise ArgumentTypeError(op, "tokens_dtype", f"be that of tokens, {tokens.dtype}", kind)

    device = tokens.device
    checks.shape(op, "tokens", tokens, (None, None), "(A, H)", device)
    num_rows, hidden = tokens.shape
    contract = f"have 1 to {_MAX_HIDDEN - 1} columns"
    checks.value(op, "tokens", 0 < hidden < _MAX_HIDDEN, contract, f"shape {tuple(tokens.shape)}")
    checks.shape(op, "expert_token_num_per_rank", counts, (None, None), "(N, E)", device)
    shape: tuple[int | None, ...] = (num_rows,)
    if per_token_scales is not None and per_token_scales.dtype in mx:
        shape += (None,) * (per_token_scales.dim() - 1)
    checks.shape(op, "per_token_scales", per_token_scales, shape, "(A,)", device)
    known = expert_token_num_type == 1
    checks.value(op, "expert_token_num_type", known, "be 1", expert_token_num_type)
    checks.value(op, "idx_type", idx_type == 0, "be 0", idx_type)
    checks.indices(op, "expert_token_num_per_rank", counts, num_rows + 1)
    if device.type == "cpu":
        total = int(counts.sum())
        contract = f"add up to the rows of tokens, A = {num_rows}"
        checks.value(op, "expert_token_num_per_rank", total == num_rows, contract, total)

    index = _permutation(counts.int(), num_rows)
    if per_token_scales is None:
        scales = torch.zeros(num_rows, dtype=torch.float32, device=device)
    else:
        # The CPU cannot index float8.
        one_byte = per_token_scales.dtype == E8M0
        scales = per_token_scales.view(torch.uint8) if one_byte else per_token_scales
        scales = scales[index].view(per_token_scales.dtype)
    return gather(tokens, index), scales, index.int(), counts.sum(0, dtype=counts.dtype)


def _permutation(counts: Tensor, num_rows: int) -> Tensor:
    """[A] int64: the input row of each output row."""
    if counts.numel() == 0:
        return counts.new_empty(0, dtype=torch.int64)
    permutation = steps_on(counts.device).recv_permutation(counts.T.contiguous(), capacity=num_rows)
    assert permutation.index_in_source is not None
    per_rank = counts.sum(1)
    starts = per_rank.cumsum(0) - per_rank
    index = starts[permutation.source.clamp(min=0)] + permutation.index_in_source
    # Counts on a device are not checked: a sum below A leaves zero rows at the end.
    return index.where(permutation.source != NOWHERE, NOWHERE)


def re_routing_outputs(
    *,
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    per_token_scales: Tensor | None,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fake outputs of ``re_routing``."""
    if per_token_scales is None:
        scales = tokens.new_empty(tokens.shape[:1], dtype=torch.float32)
    else:
        scales = per_token_scales.new_empty(per_token_scales.shape)
    counts = expert_token_num_per_rank
    return (
        tokens.new_empty(tokens.shape),
        scales,
        tokens.new_empty(tokens.shape[:1], dtype=torch.int32),
        counts.new_empty(counts.shape[1:]),
    )


def compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    """Count the entries of a sorted list up to each expert."""
    op = COMPUTE_EXPERT_TOKENS
    checks.required(op, sorted_expert_for_source_row=sorted_expert_for_source_row)
    checks.integers(op, num_expert=num_expert)
    checks.dtype(op, "sorted_expert_for_source_row", sorted_expert_for_source_row, (torch.int32,))
    device = sorted_expert_for_source_row.device
    checks.shape(
        op, "sorted_expert_for_source_row", sorted_expert_for_source_row, (None,), "(rows,)", device
    )
    fits = 0 < num_expert <= _MAX_EXPERTS
    checks.value(op, "num_expert", fits, f"be in [1, {_MAX_EXPERTS}]", num_expert)
    checks.indices(op, "sorted_expert_for_source_row", sorted_expert_for_source_row, 2**31 - 1)
    if device.type == "cpu":
        falls = (sorted_expert_for_source_row[1:] < sorted_expert_for_source_row[:-1]).nonzero()
        first = int(falls[0]) if len(falls) else 0
        got = f"{sorted_expert_for_source_row[first : first + 2].tolist()} at {first}"
        checks.value(op, "sorted_expert_for_source_row", not len(falls), "not descend", got)
    plan = steps_on(device).routing_plan(sorted_expert_for_source_row[:, None], int(num_expert))
    return plan.counts.cumsum(0, dtype=torch.int32)


def compute_expert_tokens_outputs(
    *, sorted_expert_for_source_row: Tensor, num_expert: int
) -> Tensor:
    """Fake output of ``compute_expert_tokens``."""
    return sorted_expert_for_source_row.new_empty(max(num_expert, 0), dtype=torch.int32)

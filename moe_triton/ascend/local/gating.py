"""The ops behind ``npu_moe_gating_top_k`` and its variants: choose the experts of each token.

Shapes and errors are documented in ``compat.torch_npu``. ``*_outputs`` are the fake implementations
and never raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import checks
from ...ops.device_steps import steps_on
from ..op_names import GATING_TOP_K, GATING_TOP_K_SOFTMAX, GATING_TOP_K_SOFTMAX_V2

_FLOATS = (*checks.FLOATS, torch.float32)
_INDICES = (torch.int32, torch.int64)
_MAX_EXPERTS = 2048  # of gating_top_k
_MAX_TOP_K = 1024  # of the softmax ops
_SCORINGS = ("softmax", "sigmoid")  # by norm_type


def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the experts with the best scores within the best groups."""
    op = GATING_TOP_K
    checks.required(op, x=x)
    checks.integers(
        op,
        k=k,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
    )
    checks.flags(op, out_flag=out_flag)
    checks.reals(op, routed_scaling_factor=routed_scaling_factor, eps=eps)
    checks.dtype(op, "x", x, _FLOATS)
    checks.dtype(op, "bias", bias, (x.dtype,))
    checks.dtype(op, "input_ids", input_ids, _INDICES)
    checks.dtype(op, "tid2eid", tid2eid, _INDICES)

    device = x.device
    checks.shape(op, "x", x, (None, None), "(N, E)", device)
    num_experts = x.shape[1]
    fits = 1 <= num_experts <= _MAX_EXPERTS
    contract = f"have 1 to {_MAX_EXPERTS} columns"
    checks.value(op, "x", fits, contract, f"shape {tuple(x.shape)}")
    checks.shape(op, "bias", bias, (num_experts,), "(E,)", device)
    for name, number in (("group_select_mode", group_select_mode), ("norm_type", norm_type)):
        checks.value(op, name, number in (0, 1), "be 0 or 1", number)
    checks.value(op, "renorm", renorm == 0, "be 0", renorm)
    fits = group_count >= 1 and num_experts % group_count == 0
    contract = f"be a positive divisor of E = {num_experts}"
    checks.value(op, "group_count", fits, contract, group_count)
    members = num_experts // group_count
    fits = 1 <= k_group <= group_count
    checks.value(op, "k_group", fits, f"be in [1, group_count] = [1, {group_count}]", k_group)
    by_two = group_select_mode == 1 and group_count > 1
    contract = "be 0 when groups have one expert"
    checks.value(op, "group_select_mode", not by_two or members > 1, contract, group_select_mode)
    most = k_group * members
    contract = f"be in [1, {most}], as k_group groups have {most} experts"
    checks.value(op, "k", 1 <= k <= most, contract, k)
    table_ids = _look_up(x, k, input_ids, tid2eid)

    weights, ids, scores = steps_on(device).top_k_gating(
        _dense_rows(x),
        int(k),
        bias=bias,
        chosen_ids=table_ids,
        groups=int(group_count),
        top_groups=int(k_group),
        group_by_two=by_two,
        scoring=_SCORINGS[norm_type],
        scaling=float(routed_scaling_factor),
        epsilon=float(eps),
    )
    return weights.to(x.dtype), ids, scores


def gating_top_k_outputs(*, x: Tensor, k: int, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    """Fake outputs of ``gating_top_k``."""
    return *_fake_choice(x, k), x.new_empty(x.shape, dtype=torch.float32)


def gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the experts with the largest softmax; row_idx numbers the choices column by column."""
    op = GATING_TOP_K_SOFTMAX
    _check_softmax(op, x, finished, k)
    y, ids, _ = _softmax(x, finished, int(k), "softmax")
    num_rows = x.shape[:-1].numel()
    row, column = (torch.arange(n, dtype=torch.int32, device=x.device) for n in (num_rows, k))
    return y, ids, (row[:, None] + column * num_rows).view(ids.shape)


def gating_top_k_softmax_outputs(
    *, x: Tensor, k: int, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake outputs of ``gating_top_k_softmax``."""
    y, ids = _fake_choice(x, k)
    return y, ids, torch.empty_like(ids)


def gating_top_k_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose by the softmax over all experts, or take the softmax of the chosen logits."""
    op = GATING_TOP_K_SOFTMAX_V2
    renorm = 0 if renorm is None else renorm
    output_softmax = False if output_softmax is None else output_softmax
    checks.integers(op, renorm=renorm)
    checks.flags(op, output_softmax=output_softmax)
    _check_softmax(op, x, finished, k)
    checks.value(op, "renorm", renorm in (0, 1), "be 0 or 1", renorm)
    y, ids, scores = _softmax(x, finished, int(k), "chosen" if renorm else "softmax")
    if renorm or not output_softmax:
        scores = scores.new_empty(0)
    return y, ids, scores


def gating_top_k_softmax_v2_outputs(
    *, x: Tensor, k: int, renorm: int | None, output_softmax: bool | None, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake outputs of ``gating_top_k_softmax_v2``."""
    y, ids = _fake_choice(x, k)
    shape = x.shape if output_softmax and not renorm else (0,)
    return y, ids, x.new_empty(shape, dtype=torch.float32)


def _check_softmax(op: str, x: Tensor, finished: Tensor | None, k: int) -> None:
    """Check the arguments that both softmax ops share."""
    checks.required(op, x=x)
    checks.integers(op, k=k)
    checks.dtype(op, "x", x, _FLOATS)
    checks.dtype(op, "finished", finished, (torch.bool,))
    three = x.dim() == 3
    shape, meaning = ((None,) * 3, "(.., N, E)") if three else ((None,) * 2, "(N, E)")
    checks.shape(op, "x", x, shape, meaning, x.device)
    checks.shape(op, "finished", finished, x.shape[:-1], "of x without E", x.device)
    most = min(x.shape[-1], _MAX_TOP_K)
    checks.value(op, "k", 1 <= k <= most, f"be in [1, min(E, {_MAX_TOP_K})] = [1, {most}]", k)


def _softmax(
    x: Tensor, finished: Tensor | None, k: int, scoring: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights in the dtype of x, ids, and scores; leading dimensions as in x."""
    rows = _dense_rows(x.reshape(-1, x.shape[-1]))
    weights, ids, scores = steps_on(x.device).top_k_gating(rows, k, scoring=scoring)
    shape = (*x.shape[:-1], k)
    ids = ids.view(shape)
    if finished is not None:
        ids = ids.masked_fill(finished[..., None], x.shape[-1])
    return weights.to(x.dtype).view(shape), ids, scores.view(x.shape)


def _look_up(x: Tensor, k: int, input_ids: Tensor | None, tid2eid: Tensor | None) -> Tensor | None:
    """[N, K] int32 experts from the table for the tokens' ids; None without a table."""
    op = GATING_TOP_K
    contract = "be given if and only if {} is"
    checks.value(
        op, "input_ids", input_ids is not None or tid2eid is None, contract.format("tid2eid"), None
    )
    checks.value(
        op, "tid2eid", tid2eid is not None or input_ids is None, contract.format("input_ids"), None
    )
    if input_ids is None or tid2eid is None:
        return None
    checks.shape(op, "input_ids", input_ids, (len(x),), "(N,)", x.device)
    checks.shape(op, "tid2eid", tid2eid, (None, k), "(any, k)", x.device)
    checks.indices(op, "input_ids", input_ids, len(tid2eid))
    checks.indices(op, "tid2eid", tid2eid, x.shape[1])
    return tid2eid[input_ids.long()].int()


def _fake_choice(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Fake weights and ids."""
    shape = (*x.shape[:-1], max(k, 0))
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


def _dense_rows(rows: Tensor) -> Tensor:
    """[N, E] rows with stride 1 along E."""
    return rows if rows.stride(1) == 1 else rows.contiguous()

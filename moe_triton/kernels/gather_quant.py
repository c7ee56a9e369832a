"""Permute and quantise in one pass: each token to all rows that want it.

    out[index[t, s]] = codes of x[t];  scales[index[t, s]] = its scales

Token-major: a token is read and quantised once, and its codes go from registers to their K + NS
rows. With smooth factors for each expert, every copy is quantised for itself, from the same read.

Shapes: T tokens, H hidden size, K experts and NS shared experts of a token, E experts, A rows of
        the output, C scales of a row.
Bytes:  reads T * H * x.itemsize, writes n * (H * b + C * scale bytes) for the n rows that are
        named, b bytes a code.
Source: ``moe_triton.ref.gather_quant``; what ``npu_moe_init_routing_v2`` does on one rank.
"""

from __future__ import annotations

import torch

from ..errors import MissingArgumentError
from ..layout import RowFormat
from ._checks import INDICES, check_tensor
from .quantize import write_rows


def gather_quant(
    x: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    smooth_scales: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Write each token to all rows that want it, in the format of dispatched rows.

    Args:
        x: [T, H] tokens.
        index: [T, K + NS] int32 or int64 row of ``out`` for each slot of each token, or
            ``NOWHERE``. A row is named once at most.
        fmt: scheme, dtypes and block of the rows; its stride is not looked at.
        smooth_scales: [1] or [H] fp32 factors of all copies, [NS + E, H] factors of each expert,
            those of shared experts first; or None.
        expert_ids: [T, K], needed where ``smooth_scales`` has a row for each expert.
        out: [A, H] output, of the payload's dtype; rows that are not named stay untouched.
        scales: [A] or [A, C] output of the scales' dtype, or None for a scheme without scales.

    Raises:
        ArgumentTypeError: a dtype that the scheme does not take.
        ArgumentValueError: a wrong shape, stride or device.
        MissingArgumentError: no ``expert_ids`` for factors of each expert, no ``scales``.
    """
    op = "gather_quant"
    check_tensor(op, "index", index, dtypes=INDICES, shape=(len(x), None), device=x.device)
    per_expert = smooth_scales is not None and smooth_scales.dim() == 2
    if per_expert:
        if expert_ids is None:
            raise MissingArgumentError(op, "expert_ids", "choose the factors of each copy", None)
        shape = (len(x), None)
        check_tensor(op, "expert_ids", expert_ids, dtypes=INDICES, shape=shape, device=x.device)
    if scales is not None and scales.dim() == 1:
        scales = scales[:, None]
    write_rows(
        op,
        x,
        fmt,
        out,
        scales,
        smooth_scales,
        index=index,
        expert_ids=expert_ids if per_expert else None,
        num_slots=index.shape[1],
    )

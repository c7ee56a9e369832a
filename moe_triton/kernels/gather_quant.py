"""Permute and quantise in one pass: each token to the rows of its slots.

    out[index[t, s]] = codes of x[t];  scales[index[t, s]] = their scales

A token is read and quantised once, and its codes go from registers to the rows of its K + NS slots.
With smooth factors for each expert, every slot is quantised by itself, from the same read.

Shapes: T tokens, H hidden size, K experts and NS shared experts of a token, E experts, A rows of
        the output, C scales of a row.
Bytes:  reads T * H * x.itemsize, writes n * (H * b + C * scale bytes) for the n rows that are
        named, b bytes a code.
Source: ``moe_triton.ref.gather_quant``; ``npu_moe_init_routing_v2``. The kernel is in ``quantize``.
"""

from __future__ import annotations

import torch

from ..errors import MissingArgumentError
from ..layout import RowFormat
from .quantize import encode_slots


def gather_quant(
    x: torch.Tensor,
    index: torch.Tensor,
    fmt: RowFormat,
    smooth_scales: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Quantise each token and write it to the row of each of its slots.

    Arguments as in ``ref.gather_quant``.

    Raises:
        ArgumentTypeError: a dtype that the scheme does not take.
        ArgumentValueError: a wrong shape, stride or device.
        MissingArgumentError: no ``expert_ids`` for factors of each expert, no factors for "static".
    """
    per_expert = smooth_scales is not None and smooth_scales.dim() == 2
    if per_expert and expert_ids is None:
        contract = "choose the factors of each slot"
        raise MissingArgumentError("gather_quant", "expert_ids", contract, None)
    encode_slots(
        "gather_quant",
        x,
        fmt,
        out,
        scales,
        smooth_scales,
        index=index,
        expert_ids=expert_ids if per_expert else None,
    )

"""The definition of every step in plain PyTorch: CPU back end, test oracle, bench baseline.

Tensors in, tensors out. A kernel computes the same bits; ``comm`` calls either set of steps through
one table, so the names here are the names of that table.

Letters: T tokens of this rank, K experts per token, H hidden size, E routed experts, W ranks,
L experts of one rank, n rows this rank receives. All index tensors are int32 unless said otherwise.
Source: the semantics of Ascend's ``npu_moe_distribute_*`` family.
"""

from __future__ import annotations

from .experts import eplb_map, keep_experts, top_k_gating
from .finalize_routing import finalize
from .move import clear, gather_quant, pack, push
from .quantize import (
    decode,
    encode,
    quantize_affine,
    quantize_blocks,
    quantize_by_division,
    quantize_groups,
    quantize_mx,
    quantize_rows,
    quantize_static,
)
from .routing import arrivals, permutation, plan, returns, sources
from .weighted_sum import accumulator, add_rows, reduce

__all__ = [
    "accumulator",
    "add_rows",
    "arrivals",
    "clear",
    "decode",
    "encode",
    "eplb_map",
    "finalize",
    "gather_quant",
    "keep_experts",
    "pack",
    "permutation",
    "plan",
    "push",
    "quantize_affine",
    "quantize_blocks",
    "quantize_by_division",
    "quantize_groups",
    "quantize_mx",
    "quantize_rows",
    "quantize_static",
    "reduce",
    "returns",
    "sources",
    "top_k_gating",
]

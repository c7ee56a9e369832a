"""The definition of every step in plain PyTorch: CPU back end, test oracle, bench baseline.

Tensors in, tensors out. A kernel computes the same bits; ``comm`` calls either set of steps through
one table, so the names here are the names of that table.

Letters: T tokens of this rank, K experts per token, H hidden size, E routed experts, W ranks,
L experts of one rank, n rows this rank receives. All index tensors are int32 unless said otherwise.
Source: the semantics of Ascend's ``npu_moe_distribute_*`` family.
"""

from __future__ import annotations

from .experts import eplb_map, keep_experts, top_k_gating
from .finalize_routing import finalize_routing
from .move import dispatch_send, gather_quant, gather_rows, zero_padding
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
from .routing import (
    combine_row_index,
    local_permutation,
    recv_permutation,
    recv_row_index,
    routing_plan,
)
from .weighted_sum import accumulator, add_rows, weighted_sum

__all__ = [
    "accumulator",
    "add_rows",
    "combine_row_index",
    "decode",
    "dispatch_send",
    "encode",
    "eplb_map",
    "finalize_routing",
    "gather_quant",
    "gather_rows",
    "keep_experts",
    "local_permutation",
    "quantize_affine",
    "quantize_blocks",
    "quantize_by_division",
    "quantize_groups",
    "quantize_mx",
    "quantize_rows",
    "quantize_static",
    "recv_permutation",
    "recv_row_index",
    "routing_plan",
    "top_k_gating",
    "weighted_sum",
    "zero_padding",
]

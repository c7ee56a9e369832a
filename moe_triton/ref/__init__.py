"""The definition of every step in plain PyTorch: CPU back end, test oracle, bench baseline.

Tensors in, tensors out. ``moe_triton.kernels`` has a launcher of the same name and result, bit for
bit, in a file of the same name; a table of device steps holds the functions of one of the two.

Letters: T tokens of this rank, K experts per token, NS shared experts, H hidden size, E routed
experts, W ranks, L experts of one rank, n rows this rank receives. Index tensors are int32 unless
an argument says otherwise.
Source: the semantics of Ascend's ``npu_moe_distribute_*`` family.
"""

from __future__ import annotations

from .affine import quantize_affine
from .combine_recv import combine_recv
from .combine_send import combine_send
from .dispatch_recv import dispatch_recv, dispatch_totals
from .dispatch_send import dispatch_send
from .expert_map import eplb_map, keep_experts
from .finalize_routing import finalize_routing
from .gather_quant import gather_quant
from .gather_rows import gather_rows, zero_padding
from .gating import top_k_gating
from .local_permutation import local_permutation
from .quantize import encode, quantize_mx, quantize_rows
from .records import recv_records, send_record
from .recv_permutation import recv_permutation
from .routing_plan import routing_plan
from .row_index import combine_row_index, recv_row_index
from .weighted_sum import accumulator, add_rows, weighted_sum

__all__ = [
    "accumulator",
    "add_rows",
    "combine_recv",
    "combine_row_index",
    "combine_send",
    "dispatch_recv",
    "dispatch_send",
    "dispatch_totals",
    "encode",
    "eplb_map",
    "finalize_routing",
    "gather_quant",
    "gather_rows",
    "keep_experts",
    "local_permutation",
    "quantize_affine",
    "quantize_mx",
    "quantize_rows",
    "recv_permutation",
    "recv_records",
    "recv_row_index",
    "routing_plan",
    "send_record",
    "top_k_gating",
    "weighted_sum",
    "zero_padding",
]

"""Triton kernels, one step per file: tensors in, tensors out.

Kernel files take no ranks, process groups, back ends or environment variables. Each launcher but
those of ``flags`` has the name of its step in ``moe_triton.ref``, in a file of the same name:
``ref`` defines the result, the kernel computes the same bits. Launchers check what keeps memory
safe: dtypes, shapes, strides and devices.
"""

from __future__ import annotations

# The link of this name in the repository root is for readers. Importing through it would load each
# module twice and hide the distribution called `kernels`.
if __name__ != "moe_triton.kernels":
    raise ImportError(
        f"moe_triton.kernels must be imported by that name, got {__name__!r} through the link in "
        "the root of the repository: import moe_triton.kernels, or take that folder off sys.path "
        "to import another package of this name",
        name=__name__,
    )

from .affine import quantize_affine
from .dispatch_send import dispatch_send
from .expert_map import eplb_map, keep_experts
from .finalize_routing import finalize_routing
from .flags import wait_flags, write_flags
from .gather_quant import gather_quant
from .gather_rows import gather_rows, zero_padding
from .gating import top_k_gating
from .local_permutation import local_permutation
from .quantize import encode
from .recv_permutation import recv_permutation
from .routing_plan import routing_plan
from .row_index import combine_row_index, recv_row_index
from .weighted_sum import add_rows, weighted_sum

__all__ = [
    "add_rows",
    "combine_row_index",
    "dispatch_send",
    "encode",
    "eplb_map",
    "finalize_routing",
    "gather_quant",
    "gather_rows",
    "keep_experts",
    "local_permutation",
    "quantize_affine",
    "recv_permutation",
    "recv_row_index",
    "routing_plan",
    "top_k_gating",
    "wait_flags",
    "weighted_sum",
    "write_flags",
    "zero_padding",
]

"""Triton kernels, one step per file: tensors in, tensors out.

A kernel file knows nothing of ranks, processes, back ends or the environment, and defines nothing:
what a step means stands in ``moe_triton.ref``. Each file names its launcher after the step
(``plan``, ``gather_quant``, ...); the launchers are the names of this package.
"""

from __future__ import annotations

# The repository root holds a link of this name for readers. Importing through it would make a
# second copy of every module, and hide the unrelated distribution called `kernels`.
if __name__ != "moe_triton.kernels":
    raise ImportError(
        f"these are moe_triton.kernels, found as {__name__!r} through the link at the root of the "
        "repository: import moe_triton.kernels, or take that directory off sys.path if another "
        "package of this name was meant",
        name=__name__,
    )

from .affine import quantize_affine
from .dispatch_send import dispatch_send
from .experts import eplb_map, keep_experts, top_k_gating
from .finalize_routing import finalize_routing
from .flags import wait_flags, write_flags
from .gather_quant import gather_quant
from .gather_rows import gather_rows, zero_padding
from .local_permutation import local_permutation
from .quantize import (
    decode,
    encode,
    quantize_blocks,
    quantize_by_division,
    quantize_groups,
    quantize_mx,
    quantize_rows,
    quantize_static,
)
from .recv_permutation import recv_permutation
from .routing_plan import routing_plan
from .row_index import combine_row_index, recv_row_index
from .weighted_sum import add_rows, weighted_sum

__all__ = [
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
    "wait_flags",
    "weighted_sum",
    "write_flags",
    "zero_padding",
]

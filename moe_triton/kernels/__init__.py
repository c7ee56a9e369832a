"""Triton kernels, one step per file: tensors in, tensors out.

Kernel files take no process groups, back ends or environment variables. Each launcher has the name
of its step in ``moe_triton.ref``, in a file of the same name: ``ref`` defines the result, the
kernel computes the same bits. Launchers check what keeps memory safe: dtypes, shapes, strides and
devices.
"""

from __future__ import annotations

if __name__ == "moe_triton.kernels":
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
    from .quantize import encode
    from .records import recv_records, send_record
    from .recv_permutation import recv_permutation
    from .routing_plan import routing_plan
    from .row_index import combine_row_index, recv_row_index
    from .weighted_sum import add_rows, weighted_sum

    __all__ = [
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
        "recv_permutation",
        "recv_records",
        "recv_row_index",
        "routing_plan",
        "send_record",
        "top_k_gating",
        "weighted_sum",
        "zero_padding",
    ]
else:
    # Reached through the link in the root of the repository, which is for readers.
    import runpy
    from pathlib import Path

    runpy.run_path(str(Path(__file__).resolve().parents[1] / "root_links.py"))["load_other"](
        __name__
    )

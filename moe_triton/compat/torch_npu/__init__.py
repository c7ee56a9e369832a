"""The functions of torch_npu, with their names, argument order and defaults, on any device.

Letters: BS tokens of this rank, H hidden size, K experts per token, W ranks, E routed experts, L
experts of this rank, S shared-expert ranks with NS shared experts, T tensor-parallel ranks (1 or
2), A the most rows that this rank can receive from its group:

    shared rank   A = maxBS * ceil(W / (S / NS))
    other rank    A = maxBS * W * min(L, K)

where maxBS = global_bs / W, or BS when global_bs is 0.

``group_ep`` and ``group_tp`` are names of torch process groups, or names registered with
``moe_triton.comm.register_group``. A ``ProcessGroup`` is accepted too.

Each function calls the custom op of its name in ``torch.ops.moe_triton``, and so can be compiled.
Ops that communicate are for inference and have no gradients; ``ExpertParallel`` has gradients.
Each warns once where inputs of an eager call require gradients. Ops on one device that copy or sum
rows have gradients.
Source: the API documents of torch_npu and the operator documents of aclnnMoeDistribute*.
"""

from __future__ import annotations

from .combine import (
    npu_moe_distribute_combine,
    npu_moe_distribute_combine_add_rms_norm,
    npu_moe_distribute_combine_v2,
)
from .dispatch import npu_moe_distribute_dispatch, npu_moe_distribute_dispatch_v2
from .experts import (
    npu_grouped_matmul,
    npu_grouped_matmul_finalize_routing,
    npu_grouped_matmul_swiglu_quant,
    npu_grouped_matmul_swiglu_quant_v2,
    npu_rms_norm,
    npu_rms_norm_backward,
    npu_swiglu,
    npu_swiglu_backward,
)
from .gating import (
    npu_moe_gating_top_k,
    npu_moe_gating_top_k_backward,
    npu_moe_gating_top_k_softmax,
    npu_moe_gating_top_k_softmax_v2,
)
from .grouped_matmul import npu_alltoallv_gmm, npu_gmm_alltoallv
from .permute import (
    _npu_moe_token_unpermute_with_routing_map,
    npu_moe_token_permute,
    npu_moe_token_permute_grad,
    npu_moe_token_permute_with_routing_map,
    npu_moe_token_permute_with_routing_map_grad,
    npu_moe_token_unpermute,
    npu_moe_token_unpermute_grad,
    npu_moe_token_unpermute_with_routing_map,
    npu_moe_token_unpermute_with_routing_map_grad,
)
from .quantize import (
    npu_dequant_swiglu_quant,
    npu_dynamic_mx_quant,
    npu_dynamic_quant,
    npu_swiglu_quant,
)
from .routing import (
    npu_moe_compute_expert_tokens,
    npu_moe_finalize_routing,
    npu_moe_init_routing,
    npu_moe_init_routing_quant,
    npu_moe_init_routing_v2,
    npu_moe_re_routing,
)
from .split_phase import (
    npu_moe_distribute_combine_setup,
    npu_moe_distribute_combine_teardown,
    npu_moe_distribute_dispatch_setup,
    npu_moe_distribute_dispatch_teardown,
)
from .update_expert import npu_moe_update_expert

__all__ = [
    "_npu_moe_token_unpermute_with_routing_map",
    "npu_alltoallv_gmm",
    "npu_dequant_swiglu_quant",
    "npu_dynamic_mx_quant",
    "npu_dynamic_quant",
    "npu_gmm_alltoallv",
    "npu_grouped_matmul",
    "npu_grouped_matmul_finalize_routing",
    "npu_grouped_matmul_swiglu_quant",
    "npu_grouped_matmul_swiglu_quant_v2",
    "npu_moe_compute_expert_tokens",
    "npu_moe_distribute_combine",
    "npu_moe_distribute_combine_add_rms_norm",
    "npu_moe_distribute_combine_setup",
    "npu_moe_distribute_combine_teardown",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch",
    "npu_moe_distribute_dispatch_setup",
    "npu_moe_distribute_dispatch_teardown",
    "npu_moe_distribute_dispatch_v2",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_backward",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_gating_top_k_softmax_v2",
    "npu_moe_init_routing",
    "npu_moe_init_routing_quant",
    "npu_moe_init_routing_v2",
    "npu_moe_re_routing",
    "npu_moe_token_permute",
    "npu_moe_token_permute_grad",
    "npu_moe_token_permute_with_routing_map",
    "npu_moe_token_permute_with_routing_map_grad",
    "npu_moe_token_unpermute",
    "npu_moe_token_unpermute_grad",
    "npu_moe_token_unpermute_with_routing_map",
    "npu_moe_token_unpermute_with_routing_map_grad",
    "npu_moe_update_expert",
    "npu_rms_norm",
    "npu_rms_norm_backward",
    "npu_swiglu",
    "npu_swiglu_backward",
    "npu_swiglu_quant",
]

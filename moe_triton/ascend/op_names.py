"""Names of the ops, for error messages and profiles."""

from __future__ import annotations

DISPATCH = "npu_moe_distribute_dispatch"
COMBINE = "npu_moe_distribute_combine"
DISPATCH_V2 = "npu_moe_distribute_dispatch_v2"
COMBINE_V2 = "npu_moe_distribute_combine_v2"
COMBINE_ADD_RMS_NORM = "npu_moe_distribute_combine_add_rms_norm"
DISPATCH_SETUP = "npu_moe_distribute_dispatch_setup"
DISPATCH_TEARDOWN = "npu_moe_distribute_dispatch_teardown"
COMBINE_SETUP = "npu_moe_distribute_combine_setup"
COMBINE_TEARDOWN = "npu_moe_distribute_combine_teardown"
UPDATE_EXPERT = "npu_moe_update_expert"
EPLB_UPDATE_EXPERT = "aclnnMoeEPLBUpdateExpert"  # its predecessor; only in the C interface
# On one device.
GATING_TOP_K = "npu_moe_gating_top_k"
GATING_TOP_K_BACKWARD = "npu_moe_gating_top_k_backward"
GATING_TOP_K_SOFTMAX = "npu_moe_gating_top_k_softmax"
GATING_TOP_K_SOFTMAX_V2 = "npu_moe_gating_top_k_softmax_v2"
INIT_ROUTING = "npu_moe_init_routing"
INIT_ROUTING_QUANT = "npu_moe_init_routing_quant"
INIT_ROUTING_V2 = "npu_moe_init_routing_v2"
RE_ROUTING = "npu_moe_re_routing"
FINALIZE_ROUTING = "npu_moe_finalize_routing"
COMPUTE_EXPERT_TOKENS = "npu_moe_compute_expert_tokens"
TOKEN_PERMUTE = "npu_moe_token_permute"
TOKEN_UNPERMUTE = "npu_moe_token_unpermute"
TOKEN_PERMUTE_GRAD = "npu_moe_token_permute_grad"
TOKEN_UNPERMUTE_GRAD = "npu_moe_token_unpermute_grad"
TOKEN_PERMUTE_MAP = "npu_moe_token_permute_with_routing_map"
TOKEN_UNPERMUTE_MAP = "npu_moe_token_unpermute_with_routing_map"
TOKEN_PERMUTE_MAP_GRAD = "npu_moe_token_permute_with_routing_map_grad"
TOKEN_UNPERMUTE_MAP_GRAD = "npu_moe_token_unpermute_with_routing_map_grad"
TOKEN_UNPERMUTE_MAP_INDEX = "_npu_moe_token_unpermute_with_routing_map"
DYNAMIC_QUANT = "npu_dynamic_quant"
DYNAMIC_MX_QUANT = "npu_dynamic_mx_quant"
SWIGLU = "npu_swiglu"
SWIGLU_BACKWARD = "npu_swiglu_backward"
RMS_NORM = "npu_rms_norm"
RMS_NORM_BACKWARD = "npu_rms_norm_backward"
SWIGLU_QUANT = "npu_swiglu_quant"
DEQUANT_SWIGLU_QUANT = "npu_dequant_swiglu_quant"
GROUPED_MATMUL = "npu_grouped_matmul"
GROUPED_MATMUL_SWIGLU_QUANT = "npu_grouped_matmul_swiglu_quant"
GROUPED_MATMUL_SWIGLU_QUANT_V2 = "npu_grouped_matmul_swiglu_quant_v2"
GROUPED_MATMUL_FINALIZE = "npu_grouped_matmul_finalize_routing"
# Over a group, outside the families.
ALLTOALLV_GMM = "npu_alltoallv_gmm"
GMM_ALLTOALLV = "npu_gmm_alltoallv"

FAMILIES = {
    DISPATCH: "v1",
    COMBINE: "v1",
    DISPATCH_V2: "v2",
    COMBINE_V2: "v2",
    COMBINE_ADD_RMS_NORM: "rms",
    DISPATCH_SETUP: "split",
    DISPATCH_TEARDOWN: "split",
    COMBINE_SETUP: "split",
    COMBINE_TEARDOWN: "split",
    UPDATE_EXPERT: "update_expert",
    EPLB_UPDATE_EXPERT: "eplb",
}


def is_dispatch(op: str) -> bool:
    """Whether an op is a dispatch."""
    return op.startswith(DISPATCH)


def family(op: str) -> str:
    """The family of an op in ``profile.Profile``."""
    return FAMILIES[op]

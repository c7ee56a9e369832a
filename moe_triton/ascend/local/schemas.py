"""Schemas of the single-device ops, as torch_npu has them.

torch cannot differentiate keyword-only tensors, so an op with gradients takes them by position
here, and by keyword only in ``compat.torch_npu``.
"""

from __future__ import annotations

from ...ops.custom_op import Function
from ..op_names import (
    COMPUTE_EXPERT_TOKENS,
    DEQUANT_SWIGLU_QUANT,
    DYNAMIC_MX_QUANT,
    DYNAMIC_QUANT,
    FINALIZE_ROUTING,
    GATING_TOP_K,
    GATING_TOP_K_BACKWARD,
    GATING_TOP_K_SOFTMAX,
    GATING_TOP_K_SOFTMAX_V2,
    GROUPED_MATMUL,
    GROUPED_MATMUL_FINALIZE,
    GROUPED_MATMUL_SWIGLU_QUANT,
    GROUPED_MATMUL_SWIGLU_QUANT_V2,
    INIT_ROUTING,
    INIT_ROUTING_QUANT,
    INIT_ROUTING_V2,
    RE_ROUTING,
    RMS_NORM,
    RMS_NORM_BACKWARD,
    SWIGLU,
    SWIGLU_BACKWARD,
    SWIGLU_QUANT,
    TOKEN_PERMUTE,
    TOKEN_PERMUTE_GRAD,
    TOKEN_PERMUTE_MAP,
    TOKEN_PERMUTE_MAP_GRAD,
    TOKEN_UNPERMUTE,
    TOKEN_UNPERMUTE_GRAD,
    TOKEN_UNPERMUTE_MAP,
    TOKEN_UNPERMUTE_MAP_GRAD,
    TOKEN_UNPERMUTE_MAP_INDEX,
)
from . import backward, gating, gradients, init_routing_v1, permute, routing_map
from . import dynamic_quant as dynamic_quantisation
from . import finalize_routing as finalizing
from . import grouped_matmul as matmul
from . import grouped_matmul_fused as fused
from . import init_routing as init_routing_latest
from . import re_routing as rerouting
from . import rms_norm as norm
from . import swiglu as glu
from . import swiglu_quant as glu_quant

gating_top_k = Function(
    GATING_TOP_K,
    "Tensor x, int k, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None, "
    "int k_group=1, int group_count=1, int group_select_mode=0, int renorm=0, int norm_type=0, "
    "bool out_flag=False, float routed_scaling_factor=1.0, float eps=1e-20",
    "(Tensor y, Tensor expert_idx, Tensor out)",
    run=gating.gating_top_k,
    outputs=gating.gating_top_k_outputs,
    backward=backward.gating_backward,
    save=backward.save_gating,
)

gating_top_k_backward = Function(
    GATING_TOP_K_BACKWARD,
    "Tensor x_norm, Tensor grad_y, Tensor expert_idx, *, int renorm=0, int norm_type=0, "
    "float routed_scaling_factor=1.0, float eps=1e-20",
    "Tensor",
    run=gradients.gating_top_k_backward,
    outputs=gradients.gating_top_k_backward_outputs,
)

gating_top_k_softmax = Function(
    GATING_TOP_K_SOFTMAX,
    "Tensor x, Tensor? finished=None, int k=1",
    "(Tensor y, Tensor expert_idx, Tensor row_idx)",
    run=gating.gating_top_k_softmax,
    outputs=gating.gating_top_k_softmax_outputs,
)

gating_top_k_softmax_v2 = Function(
    GATING_TOP_K_SOFTMAX_V2,
    "Tensor x, *, int k=1, Tensor? finished=None, int? renorm=0, bool? output_softmax=False",
    "(Tensor y, Tensor expert_idx, Tensor softmax_result)",
    run=gating.gating_top_k_softmax_v2,
    outputs=gating.gating_top_k_softmax_v2_outputs,
)

token_permute = Function(
    TOKEN_PERMUTE,
    "Tensor tokens, Tensor indices, int? num_out_tokens=None, bool padded_mode=False",
    "(Tensor permuted_tokens, Tensor sorted_indices)",
    run=permute.token_permute,
    outputs=permute.token_permute_outputs,
    backward=backward.permute_backward,
    save=backward.save_permute,
)

token_unpermute = Function(
    TOKEN_UNPERMUTE,
    "Tensor permuted_tokens, Tensor sorted_indices, Tensor? probs=None, bool padded_mode=False, "
    "int[]? restore_shape=None",
    "Tensor",
    run=permute.token_unpermute,
    outputs=permute.token_unpermute_outputs,
    backward=backward.unpermute_backward,
    save=backward.save_unpermute,
)

token_permute_with_routing_map = Function(
    TOKEN_PERMUTE_MAP,
    "Tensor tokens, Tensor routing_map, Tensor? probs=None, int? num_out_tokens=None, "
    "bool drop_and_pad=False",
    "(Tensor permuted_tokens, Tensor permuted_probs, Tensor sorted_indices)",
    run=routing_map.token_permute_with_routing_map,
    outputs=routing_map.token_permute_with_routing_map_outputs,
    backward=backward.permute_map_backward,
    save=backward.save_permute_map,
)

token_unpermute_with_routing_map = Function(
    TOKEN_UNPERMUTE_MAP,
    "Tensor permuted_tokens, Tensor sorted_indices, SymInt[] restore_shape, Tensor? probs=None, "
    "Tensor? routing_map=None, bool drop_and_pad=False",
    "Tensor",
    run=routing_map.token_unpermute_with_routing_map,
    outputs=routing_map.token_unpermute_with_routing_map_outputs,
    backward=backward.unpermute_map_backward,
    save=backward.save_unpermute_map,
)

token_permute_grad = Function(
    TOKEN_PERMUTE_GRAD,
    "Tensor tokens, Tensor grad_permuted_tokens, Tensor indices, Tensor sorted_indices, "
    "bool padded_mode=False",
    "Tensor",
    run=gradients.token_permute_grad,
    outputs=gradients.token_permute_grad_outputs,
)

token_unpermute_grad = Function(
    TOKEN_UNPERMUTE_GRAD,
    "Tensor permuted_tokens, Tensor grad_unpermuted_tokens, Tensor sorted_indices, "
    "Tensor? probs=None, bool padded_mode=False, int[]? restore_shape=None",
    "(Tensor permuted_tokens_grad, Tensor probs_grad)",
    run=gradients.token_unpermute_grad,
    outputs=gradients.token_unpermute_grad_outputs,
)

token_permute_with_routing_map_grad = Function(
    TOKEN_PERMUTE_MAP_GRAD,
    "Tensor permuted_token_out_grad, Tensor? probs_grad, Tensor sorted_indices, "
    "Tensor routing_map, SymInt experts_num, SymInt tokens_num, bool drop_and_pad",
    "(Tensor tokens_grad, Tensor probs_grad_out)",
    run=gradients.token_permute_with_routing_map_grad,
    outputs=gradients.token_permute_with_routing_map_grad_outputs,
)

token_unpermute_with_routing_map_index = Function(
    TOKEN_UNPERMUTE_MAP_INDEX,
    "Tensor permuted_tokens, Tensor sorted_indices, SymInt[] restore_shape, Tensor? probs=None, "
    "Tensor? routing_map=None, bool drop_and_pad=False",
    "(Tensor unpermuted_tokens, Tensor out_index, Tensor permuted_token_id, Tensor permute_probs)",
    run=gradients.token_unpermute_with_routing_map_index,
    outputs=gradients.token_unpermute_with_routing_map_index_outputs,
    backward=backward.unpermute_map_backward,
    save=backward.save_unpermute_map,
)

token_unpermute_with_routing_map_grad = Function(
    TOKEN_UNPERMUTE_MAP_GRAD,
    "Tensor unpermuted_tokens_grad, Tensor out_index, Tensor permuted_token_id, "
    "Tensor? routing_map, Tensor? permuted_tokens, Tensor? probs, bool drop_and_pad, "
    "SymInt[] restore_shape",
    "(Tensor permuted_tokens_grad, Tensor probs_grad)",
    run=gradients.token_unpermute_with_routing_map_grad,
    outputs=gradients.token_unpermute_with_routing_map_grad_outputs,
)

re_routing = Function(
    RE_ROUTING,
    "Tensor tokens, Tensor expert_token_num_per_rank, *, Tensor? per_token_scales=None, "
    "int expert_token_num_type=1, int idx_type=0, int? tokens_dtype=None",
    "(Tensor permute_tokens, Tensor permute_per_token_scales, Tensor permute_token_idx, "
    "Tensor expert_token_num)",
    run=rerouting.re_routing,
    outputs=rerouting.re_routing_outputs,
)

compute_expert_tokens = Function(
    COMPUTE_EXPERT_TOKENS,
    "Tensor sorted_expert_for_source_row, int num_expert",
    "Tensor",
    run=rerouting.compute_expert_tokens,
    outputs=rerouting.compute_expert_tokens_outputs,
)

init_routing = Function(
    INIT_ROUTING,
    "Tensor x, Tensor row_idx, Tensor expert_idx, int active_num",
    "(Tensor expanded_x, Tensor expanded_row_idx, Tensor expanded_expert_idx)",
    run=init_routing_v1.init_routing,
    outputs=init_routing_v1.init_routing_outputs,
)

init_routing_quant = Function(
    INIT_ROUTING_QUANT,
    "Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, "
    "int active_num=1024, int expert_capacity=0, int expert_num=256, int drop_pad_mode=0, "
    "int expert_tokens_num_mode=0, bool expert_tokens_before_capacity_flag=False, "
    "int quant_mode=1",
    "(Tensor expanded_x, Tensor expanded_row_idx, Tensor expert_token_cumsum_or_count, "
    "Tensor expert_tokens_before_capacity, Tensor expanded_scale)",
    run=init_routing_v1.init_routing_quant,
    outputs=init_routing_v1.init_routing_quant_outputs,
)

init_routing_v2 = Function(
    INIT_ROUTING_V2,
    "Tensor x, Tensor expert_idx, Tensor? scale=None, Tensor? offset=None, int active_num=-1, "
    "int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, "
    "int expert_tokens_num_type=0, bool expert_tokens_num_flag=False, int quant_mode=-1, "
    "int[] active_expert_range=[], int row_idx_type=0, int? x_dtype=None, "
    "bool zero_unwritten=False",
    "(Tensor expanded_x, Tensor expanded_row_idx, Tensor expert_token_cumsum_or_count, "
    "Tensor expanded_scale)",
    run=init_routing_latest.init_routing_v2,
    outputs=init_routing_latest.init_routing_v2_outputs,
    backward=backward.init_routing_backward,
    save=backward.save_init_routing,
)

finalize_routing = Function(
    FINALIZE_ROUTING,
    "Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias, Tensor? scales, "
    "Tensor expanded_src_to_dst_row, Tensor? export_for_source_row, int? drop_pad_mode=0, "
    "int? k=1",
    "Tensor",
    run=finalizing.finalize_routing,
    outputs=finalizing.finalize_routing_outputs,
    backward=backward.finalize_backward,
    save=backward.save_finalize,
)

dynamic_quant = Function(
    DYNAMIC_QUANT,
    "Tensor x, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.0',
    "(Tensor y, Tensor scale)",
    run=dynamic_quantisation.dynamic_quant,
    outputs=dynamic_quantisation.dynamic_quant_outputs,
)

dynamic_mx_quant = Function(
    DYNAMIC_MX_QUANT,
    'Tensor x, *, int axis=-1, str round_mode="rint", int dst_type=296, int block_size=32, '
    "int? scale_alg=0, float dst_type_max=0.0, float max_low_bound=0.0",
    "(Tensor y, Tensor mxscale)",
    run=dynamic_quantisation.dynamic_mx_quant,
    outputs=dynamic_quantisation.dynamic_mx_quant_outputs,
)

swiglu = Function(
    SWIGLU,
    "Tensor x, int dim=-1",
    "Tensor",
    run=glu.swiglu,
    outputs=glu.swiglu_outputs,
    backward=glu.backward,
    save=glu.save,
)

swiglu_backward = Function(
    SWIGLU_BACKWARD,
    "Tensor grad_output, Tensor x, int dim=-1",
    "Tensor",
    run=glu.swiglu_backward,
    outputs=glu.swiglu_backward_outputs,
)

rms_norm = Function(
    RMS_NORM,
    "Tensor x, Tensor gamma, float epsilon=1e-06",
    "(Tensor y, Tensor rstd)",
    run=norm.rms_norm,
    outputs=norm.rms_norm_outputs,
    backward=norm.backward,
    save=norm.save,
)

rms_norm_backward = Function(
    RMS_NORM_BACKWARD,
    "Tensor dy, Tensor x, Tensor gamma, Tensor rstd",
    "(Tensor dx, Tensor dgamma)",
    run=norm.rms_norm_backward,
    outputs=norm.rms_norm_backward_outputs,
)

grouped_matmul = Function(
    GROUPED_MATMUL,
    "Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, "
    "Tensor[]? offset=None, Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, "
    "Tensor[]? per_token_scale=None, Tensor? group_list=None, Tensor[]? activation_input=None, "
    "Tensor[]? activation_quant_scale=None, Tensor[]? activation_quant_offset=None, "
    "int? split_item=0, int? group_type=None, int? group_list_type=0, int? act_type=0, "
    "int[]? tuning_config=None, int? output_dtype=None, int? x_dtype=None, "
    "int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None",
    "Tensor[]",
    run=matmul.grouped_matmul,
    outputs=matmul.grouped_matmul_outputs,
)

swiglu_quant = Function(
    SWIGLU_QUANT,
    "Tensor x, *, Tensor? smooth_scales=None, Tensor? offsets=None, Tensor? group_index=None, "
    "bool activate_left=False, int quant_mode=0, int group_list_type=0, int? dst_type=None",
    "(Tensor out, Tensor scale)",
    run=glu_quant.swiglu_quant,
    outputs=glu_quant.swiglu_quant_outputs,
)

dequant_swiglu_quant = Function(
    DEQUANT_SWIGLU_QUANT,
    "Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, Tensor? bias=None, "
    "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, "
    "bool activate_left=False, int quant_mode=0, int? dst_type=None, int? round_mode=None, "
    "int? activate_dim=None, int swiglu_mode=0, float clamp_limit=7.0, float glu_alpha=1.702, "
    "float glu_bias=1.0",
    "(Tensor out, Tensor scale)",
    run=glu_quant.dequant_swiglu_quant,
    outputs=glu_quant.swiglu_quant_outputs,
)

grouped_matmul_swiglu_quant = Function(
    GROUPED_MATMUL_SWIGLU_QUANT,
    "Tensor x, Tensor weight, Tensor group_list, Tensor weight_scale, Tensor x_scale, *, "
    "Tensor? bias=None, Tensor? offset=None",
    "(Tensor out, Tensor scale, Tensor out_offset)",
    run=fused.grouped_matmul_swiglu_quant,
    outputs=fused.grouped_matmul_swiglu_quant_outputs,
)

grouped_matmul_swiglu_quant_v2 = Function(
    GROUPED_MATMUL_SWIGLU_QUANT_V2,
    "Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor x_scale, Tensor group_list, *, "
    "Tensor? smooth_scale=None, Tensor[]? weight_assist_matrix=None, Tensor? bias=None, "
    "int? dequant_mode=0, int? dequant_dtype=0, int? quant_mode=0, int? quant_dtype=1, "
    "int? group_list_type=0, int[]? tuning_config=None, int? x_dtype=None, "
    "int? weight_dtype=None, int? weight_scale_dtype=None, int? x_scale_dtype=None",
    "(Tensor output, Tensor output_scale)",
    run=fused.grouped_matmul_swiglu_quant_v2,
    outputs=fused.grouped_matmul_swiglu_quant_v2_outputs,
)

grouped_matmul_finalize_routing = Function(
    GROUPED_MATMUL_FINALIZE,
    "Tensor x, Tensor w, Tensor group_list, *, Tensor? scale=None, Tensor? bias=None, "
    "Tensor? offset=None, Tensor? pertoken_scale=None, Tensor? shared_input=None, "
    "Tensor? logit=None, Tensor? row_index=None, int? dtype=None, "
    "float? shared_input_weight=1.0, int? shared_input_offset=0, int? output_bs=0, "
    "int? group_list_type=1, int[]? tuning_config=None, int? x_dtype=None, int? w_dtype=None, "
    "int? scale_dtype=None, int? pertoken_scale_dtype=None",
    "Tensor",
    run=fused.grouped_matmul_finalize_routing,
    outputs=fused.grouped_matmul_finalize_routing_outputs,
)

"""Tiny random checkpoints of MoE models, the same in every run.

Their weights are spread so that logits differ: with transformers' own initialisation they are too
flat to have a clear maximum.
"""

from __future__ import annotations

from pathlib import Path

import torch

VOCABULARY = 160
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
FAMILIES = {
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": _GROUPED
    | {
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "glm4_moe": _GROUPED | {"head_dim": 32},
}


def write(family: str, path: Path) -> None:
    """Write the checkpoint of a family into a folder."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **_SIZES, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.05, generator=generator)
            elif name.endswith("embed_tokens.weight"):
                tensor.normal_(std=0.2, generator=generator)
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(path)

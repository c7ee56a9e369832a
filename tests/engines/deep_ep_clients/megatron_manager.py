"""Megatron-Core's ``_DeepepManager``, forward and backward."""

from __future__ import annotations

import types

import common
import torch

group = common.start()

from megatron.core.transformer.moe.token_dispatcher import _DeepepManager  # noqa: E402 - deep_ep first

config = types.SimpleNamespace(
    moe_router_dtype="fp32",
    moe_expert_capacity_factor=None,
    moe_permute_fusion=False,
    moe_deepep_num_sms=20,
    moe_router_padding_for_quantization=False,
    moe_router_padding_for_fp8=False,
)
manager = _DeepepManager(group, common.LOCAL, common.TOP_K, common.EXPERTS, config)
x, ids, weights = common.batch(32, torch.float32)
x.requires_grad_()
probs = torch.zeros(len(x), common.EXPERTS).scatter(1, ids, weights).requires_grad_()

manager.setup_metadata(probs > 0, probs)
rows = manager.dispatch(x)
rows, row_probs = manager.get_permuted_hidden_states_by_experts(rows)
counts = manager.get_number_of_tokens_per_expert()
experts = torch.arange(common.LOCAL).repeat_interleave(counts) + common.RANK * common.LOCAL
rows = rows * (row_probs * common.factor(experts))[:, None]
out = manager.combine(manager.get_restored_hidden_states_by_experts(rows))
out_gradient = torch.randn_like(out)
out.backward(out_gradient)

with torch.no_grad():
    scales = probs * common.factor(torch.arange(common.EXPERTS))
    torch.testing.assert_close(out, x * scales.sum(1, keepdim=True))
    torch.testing.assert_close(x.grad, out_gradient * scales.sum(1, keepdim=True))
    sums = (x * out_gradient).sum(1, keepdim=True)
    expected = sums * common.factor(torch.arange(common.EXPERTS)) * (probs > 0)
    torch.testing.assert_close(probs.grad, expected)
common.finish()

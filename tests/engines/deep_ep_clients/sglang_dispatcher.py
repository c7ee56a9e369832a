"""SGLang's ``DeepEPDispatcher``: normal, and low-latency in bf16 and float8.

What the dispatcher asks the rest of SGLang, and the GPU, is answered here.
"""

from __future__ import annotations

import os
import types

import common
import torch

MOST = 16
os.environ["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = str(MOST)
group = common.start()

from sglang.srt.layers.moe.token_dispatcher import deepep  # noqa: E402 - deep_ep first
from sglang.srt.layers.moe.topk import StandardTopKOutput  # noqa: E402
from sglang.srt.layers.moe.utils import DeepEPMode, DispatcherOutputDtype  # noqa: E402

HIDDEN = 256
state = types.SimpleNamespace(dtype=DispatcherOutputDtype.BF16, extend=True)
resources = types.SimpleNamespace(buffers={})
recorder = types.SimpleNamespace(
    on_deepep_dispatch_normal=lambda *_, **__: None,
    on_deepep_dispatch_low_latency=lambda *_: None,
)
answers = {
    "get_resources": lambda: resources,
    "get_deepep_output_dtype": lambda _: state.dtype,
    "get_is_extend_in_batch": lambda: state.extend,
    "_is_mnnvl_fabric_supported": lambda: False,
    "get_cuda_version": lambda: (12, 8),
    "get_global_expert_distribution_recorder": lambda: recorder,
    "is_tbo_enabled": lambda: False,
    "get_deepep_config": lambda: "",
}
vars(deepep).update(answers)
deepep.deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=0)

x, ids, weights = common.batch(HIDDEN, torch.bfloat16)
topk = StandardTopKOutput(weights, ids.int(), None)
first = common.RANK * common.LOCAL
expected = (x.float() * (weights * common.factor(ids)).sum(1, keepdim=True)).bfloat16()


def dispatcher(dtype: DispatcherOutputDtype) -> deepep.DeepEPDispatcher:
    state.dtype = dtype
    return deepep.DeepEPDispatcher(
        group,
        common.TOP_K,
        num_experts=common.EXPERTS,
        num_local_experts=common.LOCAL,
        hidden_size=HIDDEN,
        params_dtype=torch.bfloat16,
        deepep_mode=DeepEPMode.AUTO,
        async_finish=True,
        return_recv_hook=True,
    )


one = dispatcher(DispatcherOutputDtype.BF16)
out = one.dispatch(x, topk)
assert out.format.is_deepep_normal()
here = out.topk_ids >= 0
scales = (out.topk_weights * common.factor(out.topk_ids + first) * here).sum(1, keepdim=True)
y = (out.hidden_states.float() * scales).bfloat16()
combined = one.combine(deepep.DeepEPNormalCombineInput(y, out.topk_ids, out.topk_weights))
torch.testing.assert_close(combined, expected, rtol=0.02, atol=0.02)

state.extend = False
for dtype, allowed in ((DispatcherOutputDtype.BF16, 0.02), (DispatcherOutputDtype.FP8, 0.1)):
    one = dispatcher(dtype)
    out = one.dispatch(x, topk)
    assert out.format.is_deepep_ll()
    rows = out.hidden_states.float()
    assert rows.shape == (common.LOCAL, MOST * common.WORLD, HIDDEN)
    if out.hidden_states_scale is not None:
        rows = rows * out.hidden_states_scale.repeat_interleave(128, -1)
    y = torch.full_like(rows, float("nan"))
    for expert, count in enumerate(out.masked_m.tolist()):
        y[expert, :count] = rows[expert, :count] * common.factor(torch.tensor(first + expert))
    sent = deepep.DeepEPLLCombineInput(y.bfloat16(), out.topk_ids, out.topk_weights)
    torch.testing.assert_close(one.combine(sent), expected, rtol=allowed, atol=allowed)
common.finish()

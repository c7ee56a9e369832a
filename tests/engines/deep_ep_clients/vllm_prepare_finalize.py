"""vLLM's high-throughput and low-latency DeepEP classes."""

from __future__ import annotations

import common
import torch

group = common.start()

from vllm.model_executor.layers.fused_moe import topk_weight_and_reduce as reduce  # noqa: E402 - as above
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig  # noqa: E402
from vllm.model_executor.layers.fused_moe.prepare_finalize import deepep_ht, deepep_ll  # noqa: E402

from moe_triton.compat import deep_ep  # noqa: E402

HIDDEN, MOST = 2048, 16  # the smallest size that the low-latency class takes
x, ids, weights = common.batch(HIDDEN, torch.bfloat16)
first = common.RANK * common.LOCAL
arguments = (weights, ids, common.EXPERTS, None, False, FusedMoEQuantConfig.make())
scales = (weights * common.factor(ids)).sum(1, keepdim=True)
expected = (x.float() * scales).bfloat16()


def close(out: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)  # bf16 experts


buffer = deep_ep.Buffer(group)
ht = deepep_ht.DeepEPHTPrepareAndFinalize(buffer, common.WORLD, common.WORLD, first)
rows, _, _, row_ids, row_weights = ht.prepare(x, *arguments)
local = (row_ids >= first) & (row_ids < first + common.LOCAL)
factors = (row_weights * common.factor(row_ids) * local).sum(1, keepdim=True)
out = torch.empty_like(x)
y = (rows.float() * factors).bfloat16()
ht.finalize(out, y, weights, ids, False, reduce.TopKWeightAndReduceNoOP())
close(out)

for use_fp8 in (False, True):
    ll = deepep_ll.DeepEPLLPrepareAndFinalize(buffer, MOST, common.WORLD, use_fp8)
    rows, _, tokens, _, _ = ll.prepare(x, *arguments)
    assert rows.shape == (common.LOCAL, MOST * common.WORLD, HIDDEN)
    for expert, count in enumerate(tokens.expert_num_tokens.tolist()):
        rows[expert, :count] *= common.factor(torch.tensor(first + expert))
    out = torch.empty_like(x)
    ll.finalize(out, rows, weights, ids, False, reduce.TopKWeightAndReduceDelegate())
    if use_fp8:
        torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)
    else:
        close(out)
common.finish()

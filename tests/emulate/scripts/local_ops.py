"""A MoE layer on one device as scripts write it: gating, copies by expert, sums; one trained."""

import torch
import torch_npu

n, h, e, k = 5, 8, 4, 2
torch.manual_seed(0)
x = torch.randint(-8, 8, (n, h)).half().npu()
y, expert_idx, row_idx = torch_npu.npu_moe_gating_top_k_softmax(torch.rand(n, e).npu(), None, k)
assert row_idx.cpu()[1].tolist() == [1, 1 + n]

rows, index, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
    x,
    expert_idx,
    active_num=n * k,
    expert_num=e,
    expert_tokens_num_type=1,
    expert_tokens_num_flag=True,
    active_expert_range=[0, e],
    quant_mode=-1,
)
ends = torch_npu.npu_moe_compute_expert_tokens(expert_idx.flatten().sort().values, e)
assert torch.equal(ends.cpu().long(), counts.cpu().cumsum(0))
scales = torch.full((n, k), 0.5).half().npu()
out = torch_npu.npu_moe_finalize_routing(
    rows, None, None, None, scales, index, None, drop_pad_mode=2
)
assert torch.equal(out.cpu(), x.cpu())

tokens = x.float().requires_grad_()
permuted, position = torch_npu.npu_moe_token_permute(tokens, expert_idx)
probs = torch.full((n, k), 0.5).npu().requires_grad_()
total = torch_npu.npu_moe_token_unpermute(2 * permuted, position, probs)
total.sum().backward()
assert torch.equal(tokens.grad.cpu(), torch.full((n, h), 2.0))
assert torch.equal(probs.grad.cpu(), 2 * x.cpu().float().sum(1, keepdim=True).expand(n, k))
print("npu finished!")

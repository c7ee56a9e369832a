"""Dispatch and combine through the two-phase interface of aclnn, on 16 ranks.

    python examples/aclnn_dispatch_combine.py
    python examples/aclnn_dispatch_combine.py --processes

Sizes, limits and the order of calls are those of the example in the operator document of
aclnnMoeDistributeDispatch, for two servers of A2: one expert on each of 16 ranks, 8 tokens per
rank, hidden 7168, top-8. Tokens and routing are random, expert e multiplies by e + 1, and every
rank checks all outputs bit for bit. The document's program passes tensors for parameters that its
text requires to be empty (xActiveMask, tpSendCounts, activationScale, weightScale, groupList), and
too few counts; this example follows the text. Ranks are threads or processes; both commands print

    rank  0 computed 125 of its 128 rows, times 1
    rank 15 computed 37 of its 128 rows, times 16
    16 ranks: all outputs of dispatch and the result of combine are right
"""

import argparse
import os

import torch

from moe_triton import testing
from moe_triton.compat import aclnn

WORLD, SERVERS = 16, 2
TOKENS, HIDDEN, TOP_K = 8, 7168, 8
EXPERTS = 16
CAPACITY = TOKENS * WORLD  # A: every token of every rank, as a rank has one expert
GLOBAL_BS = TOKENS * WORLD


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", action="store_true", help="ranks are processes, not threads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # each rank is a thread or process
    # Worker processes inherit the environment.
    os.environ["MOE_TRITON_PROFILE"] = "a2"
    run = testing.run_processes if arguments.processes else testing.run_local
    for rank, rows in enumerate(run(WORLD, dispatch_and_combine)):
        if rank in (0, WORLD - 1):
            print(f"rank {rank:2} computed {rows:2} of its {CAPACITY} rows, times {rank + 1}")
    print(f"{WORLD} ranks: all outputs of dispatch and the result of combine are right")


def dispatch_and_combine(ctx):
    """Run one rank; returns the number of rows it received."""
    x, expert_ids, expert_scales = tokens_of(ctx.ep_rank)

    # The caller allocates the outputs; all sizes are known before the call.
    expand_x = torch.empty(CAPACITY, HIDDEN, dtype=torch.bfloat16)
    expand_idx = torch.empty(TOKENS * TOP_K, dtype=torch.int32)
    expert_token_nums = torch.empty(1, dtype=torch.int64)
    # The counts, followed by A2's space for server data.
    ep_recv_counts = torch.empty(EXPERTS + 2 * GLOBAL_BS * TOP_K * SERVERS, dtype=torch.int32)
    expand_scales = torch.empty(CAPACITY)
    out = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16)

    group = (ctx.ep_group, WORLD, ctx.ep_rank, EXPERTS)
    no_tp = ("", 0, 0)
    no_shared = (0, 0, 0)  # expertShardType, sharedExpertNum, sharedExpertRankNum

    status, size, executor = aclnn.aclnnMoeDistributeDispatchGetWorkspaceSize(
        x,
        expert_ids,
        None,  # scales
        None,  # xActiveMask
        expert_scales,
        *group,
        *no_tp,
        *no_shared,
        0,  # quantMode
        GLOBAL_BS,
        0,  # expertTokenNumsType: prefix sums
        expand_x,
        None,  # dynamicScales, absent without quantisation
        expand_idx,
        expert_token_nums,
        ep_recv_counts,
        None,  # tpRecvCounts
        expand_scales,
    )
    check(status)
    check(aclnn.aclnnMoeDistributeDispatch(workspace(size), size, executor, None))

    received = int(expert_token_nums[0])
    check_received(ctx.ep_rank, received, expand_x, expand_idx, ep_recv_counts, expand_scales)
    expand_x[:received] *= ctx.ep_rank + 1  # the expert

    status, size, executor = aclnn.aclnnMoeDistributeCombineGetWorkspaceSize(
        expand_x,
        expert_ids,
        expand_idx,
        ep_recv_counts,
        expert_scales,
        None,  # tpSendCounts
        None,  # xActiveMask
        None,  # activationScale
        None,  # weightScale
        None,  # groupList
        expand_scales,
        *group,
        *no_tp,
        *no_shared,
        GLOBAL_BS,
        0,  # outDtype
        0,  # commQuantMode
        0,  # groupListType
        out,
    )
    check(status)
    check(aclnn.aclnnMoeDistributeCombine(workspace(size), size, executor, None))

    # Expert e multiplied by e + 1; the sums are exact in float32.
    factor = (expert_scales * (expert_ids + 1)).sum(1, keepdim=True)
    assert torch.equal(out, (x.float() * factor).bfloat16())
    return received


def check(status):
    if status != aclnn.ACLNN_SUCCESS:
        raise SystemExit(f"status {status}: {aclnn.aclnn_last_error()}")


def workspace(size):
    """Workspace memory; None if the op needs none."""
    return torch.empty(size, dtype=torch.uint8) if size else None


def tokens_of(rank):
    """x, expert ids and weights; small integers and powers of two keep sums exact."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randint(-4, 5, (TOKENS, HIDDEN), generator=generator).bfloat16()
    ids = testing.routing_zipf(TOKENS, EXPERTS, TOP_K, seed=rank, exponent=0.8)
    weights = 2.0 ** -torch.arange(1, TOP_K + 1).repeat(TOKENS, 1)
    return x, ids, weights


def check_received(rank, received, expand_x, expand_idx, ep_recv_counts, expand_scales):
    """Compare dispatch's outputs with the tokens of all ranks for this rank's expert."""
    rows, ends, weights = [], [], []
    for source in range(WORLD):
        x, ids, scales = tokens_of(source)
        token, slot = (ids == rank).nonzero(as_tuple=True)
        rows.append(x[token])
        weights.append(scales[token, slot])
        ends.append(len(torch.cat(rows)))
    assert received == ends[-1]
    assert torch.equal(expand_x[:received], torch.cat(rows))
    assert torch.equal(expand_scales[:received], torch.cat(weights))
    assert ep_recv_counts[:WORLD].tolist() == ends
    # The number of earlier slots with the same expert.
    ids = tokens_of(rank)[1].flatten()
    assert expand_idx.tolist() == [int((ids[:i] == ids[i]).sum()) for i in range(len(ids))]


if __name__ == "__main__":
    main()

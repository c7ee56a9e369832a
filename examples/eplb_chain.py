"""An MoE layer with replicas of popular experts, by torch_npu's functions: 16 ranks, 8 EP x 2 TP.

    python examples/eplb_chain.py
    python examples/eplb_chain.py --processes

npu_moe_update_expert maps the router's expert to one of its replicas,
npu_moe_distribute_dispatch_v2 sends the tokens there, and npu_moe_distribute_combine_add_rms_norm
sends the results back, sums them, adds the residual and the shared expert, and normalises. Two of 6
experts are popular and have a second replica, so 8 physical experts: one per EP rank, half of it on
each TP rank. Sizes are the documents' (8 tokens per rank, hidden 7168, top-3), with the limits of
A3. Every rank compares its results with the layer computed without the library. Ranks are threads
or processes; both commands print

    rows on each EP rank
        6 experts, once each   110  85  61  53  42  33   0   0   busiest 2.3 times the mean
        8, after the update     56  44  61  53  42  33  54  41   busiest 1.3 times the mean
    16 ranks: x equals the dense layer's bit for bit, rstd within 1e-5, y within two roundings
"""

import argparse
import os

import torch

from moe_triton import testing
from moe_triton.compat import torch_npu

EP, TP = 8, 2
TOKENS, HIDDEN, TOP_K = 8, 7168, 3
LOGICAL, INTERMEDIATE = 6, 64
# Row e: the number of replicas of expert e, then their physical ids.
TABLE = torch.tensor(
    [[2, 0, 6], [2, 1, 7], [1, 2, 0], [1, 3, 0], [1, 4, 0], [1, 5, 0]], dtype=torch.int32
)
REPLICA_OF = [0, 1, 2, 3, 4, 5, 0, 1]
EPSILON = 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", action="store_true", help="ranks are processes, not threads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # each rank is a thread or process
    # Worker processes inherit the environment.
    os.environ["MOE_TRITON_PROFILE"] = "a3"
    run = testing.run_processes if arguments.processes else testing.run_local
    results = run(EP * TP, layer, tp_world_size=TP)

    chosen = torch.cat([tokens_of(rank)[1].flatten() for rank in range(EP * TP)])
    print("rows on each EP rank")
    report_load("6 experts, once each", torch.bincount(chosen, minlength=EP).tolist())
    # Both TP ranks of an EP rank have the same rows.
    report_load("8, after the update", [received for received, *_ in results[::TP]])
    for rank, (_, y, rstd, x) in enumerate(results):
        check(rank, y, rstd, x)
    print(
        f"{len(results)} ranks: x equals the dense layer's bit for bit, rstd within 1e-5, "
        "y within two roundings"
    )


def layer(ctx):
    """Run one rank; returns the number of rows it received, and y, rstd and x of its tokens."""
    x, ids, weights, residual, gamma = tokens_of(ctx.rank)
    where = (ctx.ep_group, ctx.ep_world_size, ctx.ep_rank, len(REPLICA_OF))
    tensor_parallel = {
        "group_tp": ctx.tp_group,
        "tp_world_size": ctx.tp_world_size,
        "tp_rank_id": ctx.tp_rank,
    }
    ids, _ = torch_npu.npu_moe_update_expert(
        ids, TABLE, local_rank_id=ctx.ep_rank, world_size=ctx.ep_world_size
    )
    rows, _, assist, token_nums, counts, tp_counts, scales = (
        torch_npu.npu_moe_distribute_dispatch_v2(
            x, ids, *where, expert_scales=weights, **tensor_parallel
        )
    )
    # This rank's half of the expert, on its own rows and those of its TP peer; combine adds the
    # halves.
    received = int(token_nums.sum())
    half = slice(ctx.tp_rank * INTERMEDIATE // TP, (ctx.tp_rank + 1) * INTERMEDIATE // TP)
    rows[:received] = expert(rows[:received], REPLICA_OF[ctx.ep_rank], half)
    y, rstd, total = torch_npu.npu_moe_distribute_combine_add_rms_norm(
        rows,
        ids,
        assist,
        counts,
        weights,
        residual[:, None],
        gamma,
        *where,
        tp_send_counts=tp_counts,
        expand_scales=scales,
        shared_expert_x=shared_expert(x),
        norm_eps=EPSILON,
        **tensor_parallel,
    )
    return received, y[:, 0], rstd[:, 0], total[:, 0]


def tokens_of(rank):
    """x, expert ids, weights, residual, gamma; small integers and quarters keep sums exact."""
    generator = torch.Generator().manual_seed(rank)
    x, residual = torch.randint(-2, 3, (2, TOKENS, HIDDEN), generator=generator).bfloat16()
    ids = testing.routing_zipf(TOKENS, LOGICAL, TOP_K, seed=rank, exponent=0.8)
    weights = torch.tensor([0.5, 0.25, 0.25]).repeat(TOKENS, 1)
    gamma = (1 + torch.arange(HIDDEN) % 4 / 4).bfloat16()
    return x, ids, weights, residual, gamma


def expert(x, number, part=slice(None)):
    """relu(x @ up) @ down, restricted to ``part`` of the intermediate columns."""
    generator = torch.Generator().manual_seed(1000 + number)
    # Each output column has 4 inputs.
    up, down = (
        torch.zeros(outputs, inputs).scatter_add_(
            1,
            torch.randint(inputs, (outputs, 4), generator=generator),
            torch.randint(2, (outputs, 4), generator=generator) * 2.0 - 1,
        )
        for outputs, inputs in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    )
    return (torch.relu(x.float() @ up[part].T) @ down[:, part].T).bfloat16()


def shared_expert(x):
    """The shared expert, computed locally for every token."""
    return x.roll(1, 1)


def check(rank, y, rstd, x):
    """Compute the layer locally for the tokens of one rank, with whole experts and no replicas."""
    tokens, ids, weights, residual, gamma = tokens_of(rank)
    total = residual.float() + shared_expert(tokens).float()
    for number in range(LOGICAL):
        share = (weights * (ids == number)).sum(1, keepdim=True)
        total += share * expert(tokens, number).float()
    assert torch.equal(x, total.bfloat16())
    expected_rstd = (total.double().square().mean(1, keepdim=True) + EPSILON).rsqrt()
    # Squares may be summed in any order; y is rounded to bfloat16 twice.
    torch.testing.assert_close(rstd.double(), expected_rstd, rtol=1e-5, atol=0)
    expected_y = total * expected_rstd * gamma
    torch.testing.assert_close(y.double(), expected_y, rtol=1.01 * 2**-7, atol=0)


def report_load(what, rows):
    busiest = max(rows) * len(rows) / sum(rows)
    print(
        f"    {what:22} {' '.join(f'{count:3}' for count in rows)}   "
        f"busiest {busiest:.1f} times the mean"
    )


if __name__ == "__main__":
    main()

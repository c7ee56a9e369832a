"""Many rounds with random sizes: exact every time, and nothing grows."""

from __future__ import annotations

import collections
import functools
import resource
import time
from pathlib import Path

import pytest
import shm_names
import torch

from moe_triton import ExpertParallel, testing
from moe_triton.compat import torch_npu

WORLD, MAX_TOKENS, HIDDEN, EXPERTS, TOP_K = 4, 24, 40, 8, 3
WARM_UP = 0.1  # of the rounds, before memory is looked at


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def names(directory: str) -> set[str]:
    return {path.name for path in Path(directory).iterdir()}


def soak(ctx, *, rounds):
    """Alternate between the object and the functional ops; return growth of memory and files."""
    generator = torch.Generator().manual_seed(ctx.rank)

    def number(most):
        return int(torch.randint(most + 1, (), generator=generator))

    before = (0, 0)
    with ExpertParallel(
        ctx.ep_group,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        max_tokens=MAX_TOKENS,
        in_flight=2,
    ) as ep:
        for step in range(rounds):
            count = number(MAX_TOKENS)
            x = torch.randn((count, HIDDEN), generator=generator).to(torch.bfloat16)
            ids = testing.routing_uniform(count, EXPERTS, TOP_K, seed=1000 * step + ctx.rank)
            weights = torch.rand((count, TOP_K), generator=generator)
            # Experts that leave their rows alone: the sum is known without them.
            expected = torch.zeros((count, HIDDEN))
            for k in range(TOP_K):
                expected += x.float() * weights[:, k, None]
            expected = expected.to(torch.bfloat16)
            if step % 2:
                received = ep.dispatch(x, ids, weights)
                out = ep.combine(received.x, received.handle)
            else:
                arguments = (ctx.ep_group, WORLD, ctx.rank, EXPERTS)
                batch = {"global_bs": MAX_TOKENS * WORLD}
                dispatch = torch_npu.npu_moe_distribute_dispatch
                sent = dispatch(x, ids, *arguments, **batch)
                combine = torch_npu.npu_moe_distribute_combine
                out = combine(sent[0], ids, sent[2], sent[4], weights, *arguments, **batch)
            assert torch.equal(out, expected), f"round {step} with {count} tokens"
            if step == int(rounds * WARM_UP):
                before = resident_bytes(), len(names("/proc/self/fd"))
        after = resident_bytes(), len(names("/proc/self/fd"))
    return after[0] - before[0], after[1] - before[1]


def run(rounds):
    before = shm_names.names()
    work = functools.partial(soak, rounds=rounds)
    growth = testing.run_processes(WORLD, work, transport="symmetric")
    assert not shm_names.left(before)
    assert [files for _, files in growth] == [0] * WORLD
    return max(grown for grown, _ in growth)


def test_some_rounds():
    run(60)


@pytest.mark.full
def test_two_thousand_rounds(record_evidence):
    grown = run(2000)
    assert grown < 2 * 2**20
    record_evidence(
        "soak",
        f"2000 rounds, alternately by ExpertParallel and the functional ops, on {WORLD} processes "
        f"with 0 to {MAX_TOKENS} tokens a rank: exact every time; after the first tenth the "
        f"largest rank's resident memory grew by {grown / 2**10:.0f} KiB, its open files by 0",
    )


def pipelined(ctx, *, rounds):
    """Rounds with two operations of each kind in flight; growth of memory, and seconds."""
    generator = torch.Generator().manual_seed(ctx.rank)
    batches = []
    for seed in range(64):
        count = int(torch.randint(MAX_TOKENS + 1, (), generator=generator))
        x = torch.randn((count, HIDDEN), generator=generator).to(torch.bfloat16)
        ids = testing.routing_uniform(count, EXPERTS, TOP_K, seed=1000 * seed + ctx.rank)
        weights = testing.weights(count, TOP_K, seed=1000 * seed + ctx.rank)
        total = torch.zeros((count, HIDDEN))
        for k in range(TOP_K):  # experts that leave their rows alone
            total += x.float() * weights[:, k, None]
        batches.append((x, ids, weights, total.to(torch.bfloat16)))
    order = torch.randint(len(batches), (rounds,), generator=generator).tolist()
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "max_tokens": MAX_TOKENS}
    sent, returned = collections.deque(), collections.deque()
    before, began = 0, time.monotonic()

    def finish(ep):
        pending, expected = returned.popleft()
        assert torch.equal(ep.combine_teardown(pending), expected)

    with ExpertParallel(ctx.ep_group, in_flight=2, **sizes) as ep:
        for step, number in enumerate(order):
            *inputs, expected = batches[number]
            sent.append((ep.dispatch_setup(*inputs), expected))
            if len(sent) == 2:
                pending, expected = sent.popleft()
                received = ep.dispatch_teardown(pending)
                returned.append((ep.combine_setup(received.x, received.handle), expected))
            if len(returned) == 2:
                finish(ep)
            if step == int(rounds * WARM_UP):
                before = resident_bytes()
        ep.check()
        return resident_bytes() - before, time.monotonic() - began


@pytest.mark.full
def test_a_hundred_thousand_rounds(record_evidence):
    rounds = 100_000
    growth = testing.run_processes(
        2, functools.partial(pipelined, rounds=rounds), transport="symmetric"
    )
    grown, seconds = (max(values) for values in zip(*growth, strict=True))
    assert grown < 2 * 2**20
    assert seconds < 300
    record_evidence(
        "soak",
        f"{rounds} rounds with two operations of each kind in flight on 2 processes with 0 to "
        f"{MAX_TOKENS} tokens a rank: exact every time in {seconds:.0f} s; after the first tenth "
        f"the largest rank's resident memory grew by {grown / 2**10:.0f} KiB",
    )

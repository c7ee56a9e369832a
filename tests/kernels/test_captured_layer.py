"""A whole layer on the device of the kernels: all ranks in one thread, and as a graph.

The expected sums are computed from the tokens, without routing. On a CPU the calls run in the
interpreter, and a replay is another call.
"""

from __future__ import annotations

import pytest
import torch

from moe_triton import ExpertParallel, comm, ref, set_backend, testing
from moe_triton.comm import transport
from moe_triton.layout import NOWHERE

E, K, H, MAX_TOKENS = 6, 2, 64, 9
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def on_the_device(device, monkeypatch):
    """Fixed shapes on the CPU too, so that no size depends on data."""
    set_backend("interpret" if device.type == "cpu" else None)
    for module in (comm, transport):
        monkeypatch.setattr(module, "fixed_shapes", lambda _: True)
    yield
    set_backend(None)


def drawn(rank: int, seed: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, ids and weights of a rank; the last tokens of a smaller batch have no expert."""
    seed = 10 * seed + rank
    ids = testing.routing_zipf(MAX_TOKENS, E, K, seed=seed)
    ids[MAX_TOKENS - seed % 4 :] = NOWHERE
    ids[seed % MAX_TOKENS, 1] = NOWHERE
    x = testing.tokens(MAX_TOKENS, H, BF16, seed=seed)
    return x.to(device), ids.to(device), testing.weights(MAX_TOKENS, K, seed=seed).to(device)


def experts(received) -> torch.Tensor:
    """Each row times the number of its expert on its rank, from 1; NaN past the last row."""
    rows = torch.arange(len(received.x), device=received.x.device)
    number = torch.searchsorted(received.offsets, rows, right=True)
    y = received.x.to(BF16) * (number[:, None] + 1)
    return y.masked_fill_((rows >= received.offsets[-1])[:, None], float("nan"))


def expected(x, ids, weights, *, world: int, quant: str | None) -> torch.Tensor:
    """The sum of each token: multiplied, then added, rounded once."""
    rows = x if quant is None else ref.quantize_rows(x.cpu())[0].to(x.device).to(BF16)
    total = torch.zeros(x.shape, device=x.device)
    for k in range(K):
        term = (rows * (ids[:, k, None] % (E // world) + 1)).float() * weights[:, k, None]
        total += term.masked_fill(ids[:, k, None] == NOWHERE, 0.0)
    return total.to(BF16)


def layer(ranks: list[ExpertParallel], given) -> list[torch.Tensor]:
    """Dispatch, experts and combine of all ranks: each operation's setups, then its teardowns."""
    sent = [ep.dispatch_setup(*values) for ep, values in zip(ranks, given, strict=True)]
    received = [ep.dispatch_teardown(one) for ep, one in zip(ranks, sent, strict=True)]
    returned = [
        ep.combine_setup(experts(one), one.handle) for ep, one in zip(ranks, received, strict=True)
    ]
    return [ep.combine_teardown(one) for ep, one in zip(ranks, returned, strict=True)]


@pytest.mark.parametrize("recorded", [False, True], ids=["calls", "graph"])
@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize("world", [1, 3])
def test_layer(world, quant, recorded, captured, device):
    def make(ctx) -> ExpertParallel:
        return ExpertParallel(
            ctx.ep_group,
            rank=ctx.ep_rank,
            num_experts=E,
            top_k=K,
            hidden=H,
            max_tokens=MAX_TOKENS,
            quant=quant,
            device=ctx.device,
        )

    with testing.lockstep(world, make, device=device) as ranks:
        given = [drawn(rank, 0, device) for rank in range(world)]
        results = {}

        def work() -> None:
            results["sums"] = layer(ranks, given)

        replay = captured(work) if recorded else work
        for seed in range(1, 4):
            for rank, values in enumerate(given):
                for tensor, new in zip(values, drawn(rank, seed, device), strict=True):
                    tensor.copy_(new)
            replay()
            for values, actual in zip(given, results["sums"], strict=True):
                wanted = expected(*values, world=world, quant=quant)
                assert torch.equal(actual, wanted)

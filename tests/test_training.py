"""Experts beside data-parallel wrappers: left alone, as they differ between ranks."""

from __future__ import annotations

import harness
import pytest
import torch
from torch import nn

from moe_triton import ArgumentValueError, ExpertParallel
from moe_triton.training import ignore_experts


class Experts(nn.Module):
    local_experts = True

    def __init__(self, rank):
        super().__init__()
        self.w = nn.Parameter(torch.full((2, 3, 3), 1.0 + rank))
        self.scale = nn.Linear(1, 1, bias=False)  # below a module that says so
        self.register_buffer("seen", torch.full((2,), float(rank)))


class Layer(nn.Module):
    def __init__(self, ep):
        super().__init__()
        self.ep = ep
        self.router = nn.Linear(3, 4, bias=False)
        self.experts = Experts(ep.rank)
        nn.init.constant_(self.router.weight, float(ep.rank))
        nn.init.constant_(self.experts.scale.weight, 1.0)

    def forward(self, x):
        """Every token goes to all experts; the sum of the weights is 1."""
        weights = self.router(x).softmax(-1)
        received = self.ep.dispatch(x, torch.arange(4).expand(len(x), 4), weights)
        rows = received.x.view(2, -1, 3)
        y = (rows @ self.experts.w * self.experts.scale.weight).view(-1, 3)
        return self.ep.combine(y, received.handle)


SIZES = {"num_experts": 4, "top_k": 4, "hidden": 3, "max_tokens": 2, "dtype": torch.float32}


@pytest.mark.parametrize("world", ["symmetric", "collective"])
def test_distributed_data_parallel(world):
    def fn(ctx):
        with ExpertParallel(ctx.ep_group, **SIZES, exact=True) as ep:
            model = Layer(ep)
            experts = model.experts
            ignored = ignore_experts(model)
            assert ignored == {experts.w, experts.scale.weight}
            wrapped = nn.parallel.DistributedDataParallel(model)
            before = experts.w.detach().clone(), experts.seen.clone()
            wrapped(torch.full((2, 3), 1.0 + ep.rank)).sum().backward()
            router = model.router.weight
            return *before, experts.w.grad, router.detach().clone(), router.grad

    results = harness.run_world(world, 2, fn)
    for rank, (w, seen, w_grad, router, _) in enumerate(results):
        assert torch.equal(w, torch.full((2, 3, 3), 1.0 + rank))
        assert torch.equal(seen, torch.full((2,), float(rank)))
        # Of both ranks' tokens, 2 of ones and 2 of twos, each with a weight of 1/4.
        torch.testing.assert_close(w_grad, torch.full((2, 3, 3), (2 * 1 + 2 * 2) / 4))
        assert torch.equal(router, torch.zeros(4, 3))
    assert torch.equal(results[0][4], results[1][4])
    assert results[0][4].any()


def test_fully_shard():
    """The experts stay whole; the router is sharded."""

    def fn(ctx):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        with ExpertParallel(ctx.ep_group, **SIZES, exact=True) as ep:
            model = Layer(ep)
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            fully_shard(model, mesh=mesh, ignored_params=ignore_experts(model))
            model(torch.full((2, 3), 1.0 + ep.rank)).sum().backward()
            experts = model.experts
            sharded = [isinstance(p, DTensor) for p in (model.router.weight, experts.w)]
            return sharded, experts.w.detach(), experts.w.grad

    for rank, (sharded, w, w_grad) in enumerate(harness.run_world("collective", 2, fn)):
        assert sharded == [True, False]
        assert torch.equal(w, torch.full((2, 3, 3), 1.0 + rank))
        assert w_grad.isfinite().all() and w_grad.any()


def test_names_that_are_ignored_stay_so():
    with ExpertParallel(None, **SIZES) as ep:
        model = nn.Sequential(Layer(ep), nn.Linear(3, 3))
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(model, ["1.bias"])
    ignore_experts(model)
    assert set(model._ddp_params_and_buffers_to_ignore) == {
        "1.bias",
        "0.experts.w",
        "0.experts.scale.weight",
        "0.experts.seen",
    }


def test_a_model_without_experts():
    with pytest.raises(ArgumentValueError, match="local_experts = True, got Linear"):
        ignore_experts(nn.Linear(2, 2))

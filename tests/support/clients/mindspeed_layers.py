"""MindSpeed's permutations and expert-parallel layers, unmodified, against dense computations.

Run by ``python tests/support/clients mindspeed CHECKOUT``, which starts it through npu-run with the
checkout on its path.
"""

from __future__ import annotations

import socket
import unittest

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401 - makes the device npu
from mindspeed.fsdp.distributed.expert_parallel import dispatcher, dispatcher_mc2
from mindspeed.fsdp.distributed.expert_parallel import utils as fsdp
from mindspeed.te.pytorch.permutation import MoePermuteMaskMap, MoeUnpermuteMaskMap

N, H, E, K, WORLD, F = 24, 16, 8, 2, 4, 12


def random_routing(generator):
    """Tokens, (N, K) experts, (N, K) weights; all experts of a token differ."""
    tokens = torch.randn(N, H, generator=generator)
    scores = torch.rand(N, E, generator=generator)
    weights, ids = scores.topk(K)
    return tokens, ids, weights


def gradients(function, *inputs):
    """The result of a function, and its gradients for a fixed random cotangent."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


class MaskMap(unittest.TestCase):
    """``mindspeed.te.pytorch.permutation``."""

    def setUp(self):
        generator = torch.Generator().manual_seed(1)
        self.tokens, ids, weights = random_routing(generator)
        self.routing_map = torch.zeros(N, E, dtype=torch.bool).scatter_(1, ids, True)
        self.probs = torch.zeros(N, E).scatter_(1, ids, weights)

    def layer(self, capacity, with_probs):
        """Permute, scale, double, unpermute."""
        drop_and_pad = capacity is not None
        rows = N * K if capacity is None else E * capacity

        def run(tokens, probs):
            permuted, permuted_probs, indices = MoePermuteMaskMap.apply(
                tokens, self.routing_map, probs if with_probs else None, rows, drop_and_pad
            )
            if with_probs:
                permuted = permuted * permuted_probs.unsqueeze(-1)
            out = 2 * permuted
            return (
                MoeUnpermuteMaskMap.apply(
                    out, indices, tokens.shape, None, self.routing_map, drop_and_pad
                )
                + 0 * probs.sum()
            )

        return run

    def unpermute_with_probs(self, capacity):
        """Permute without, unpermute with probs."""
        drop_and_pad = capacity is not None
        rows = N * K if capacity is None else E * capacity

        def run(tokens, probs):
            permuted, _, indices = MoePermuteMaskMap.apply(
                tokens, self.routing_map, None, rows, drop_and_pad
            )
            return MoeUnpermuteMaskMap.apply(
                2 * permuted, indices, tokens.shape, probs, self.routing_map, drop_and_pad
            )

        return run

    def kept(self, capacity):
        """(N, E) how often each expert computes each token: padding is the first other tokens."""
        if capacity is None:
            return self.routing_map.float()
        order = (~self.routing_map).to(torch.int8).argsort(dim=0, stable=True)
        return torch.zeros(N, E).scatter_(0, order[:capacity], 1.0)

    def check(self, run, dense):
        actual, wanted = (gradients(f, self.tokens, self.probs) for f in (run, dense))
        for got, want in zip(actual, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_permute_with_probs(self):
        for capacity in (None, 4, 9):
            kept = self.kept(capacity)
            with self.subTest(capacity=capacity):
                self.check(
                    self.layer(capacity, with_probs=True),
                    lambda tokens, probs, kept=kept: 2 * tokens * (kept * probs).sum(1, True),
                )

    def test_permute_without_probs(self):
        for capacity in (None, 4, 9):
            kept = self.kept(capacity)
            with self.subTest(capacity=capacity):
                self.check(
                    self.layer(capacity, with_probs=False),
                    lambda tokens, probs, kept=kept: (
                        2 * tokens * kept.sum(1, True) + 0 * probs.sum()
                    ),
                )

    def test_unpermute_with_probs(self):
        for capacity in (None, 4, 9):
            kept = self.kept(capacity)
            with self.subTest(capacity=capacity):
                self.check(
                    self.unpermute_with_probs(capacity),
                    lambda tokens, probs, kept=kept: 2 * tokens * (kept * probs).sum(1, True),
                )


class Permute(unittest.TestCase):
    """``fsdp.distributed.expert_parallel.utils``: fused and eager functions agree."""

    def test_fused_equals_eager(self):
        tokens, ids, weights = random_routing(torch.Generator().manual_seed(2))

        def layer(fused):
            def run(tokens, weights):
                permuted, indices = fsdp.permute(tokens, ids, fused=fused)
                return fsdp.unpermute(2 * permuted, indices, weights, fused=fused)

            return run

        actual, wanted = (gradients(layer(fused), tokens, weights) for fused in (True, False))
        for got, want in zip(actual, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def expert_weights():
    """The weights of all experts, (E, H, 2 F) and (E, F, H)."""
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(E, H, 2 * F, generator=generator) / 4,
        torch.randn(E, F, H, generator=generator) / 4,
    )


def dense_layer(tokens, ids, weights, gate_up, down):
    """Each token through its experts, one matrix product at a time."""
    hidden = torch.einsum("nh,nkhf->nkf", tokens, gate_up[ids])
    gate, up = hidden.chunk(2, dim=-1)
    rows = torch.einsum("nkf,nkfh->nkh", torch.nn.functional.silu(gate) * up, down[ids])
    return (rows * weights.unsqueeze(-1)).sum(1)


def run_rank(rank, port, kind):
    """One rank of a layer, forward and backward, against the dense layer."""
    torch.npu.set_device(rank)
    dist.init_process_group(
        "hccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    group = dist.group.WORLD
    tokens, ids, weights = random_routing(torch.Generator().manual_seed(10 + rank))
    if kind == "mc2":
        # MindSpeed takes the sizes of groups in its backward pass from what a rank sends, not from
        # what it receives, which is right where both are equal.
        ids = torch.arange(N * K).view(N, K) % E
    local = slice(rank * E // WORLD, (rank + 1) * E // WORLD)
    gate_up, down = expert_weights()
    inputs = [tokens, weights, gate_up, down]

    def distributed(tokens, weights, gate_up, down):
        # Gradients of the local experts only; torch adds zeros for the others.
        local_weights = (gate_up[local], down[local])
        act = torch.nn.functional.silu
        if kind == "mc2":
            return dispatcher_mc2.dispatch_mlp_combine(
                group, tokens, ids, weights, local_weights, act, E
            )
        expert_ids = torch.arange(E) % (E // WORLD)
        return dispatcher.dispatch_mlp_combine(
            group, kind == "fused", tokens, ids, weights, local_weights, act, E, expert_ids
        )

    def dense(tokens, weights, gate_up, down):
        return dense_layer(tokens, ids, weights, gate_up, down)

    actual, wanted = gradients(distributed, *inputs), gradients(dense, *inputs)
    for gradient in wanted[3:]:
        dist.all_reduce(gradient)  # an expert's gradient has the tokens of all ranks
    names = ("output", "tokens", "weights", "gate_up", "down")
    for name, got, want in zip(names, actual, wanted, strict=True):
        part = local if name in ("gate_up", "down") else slice(None)
        torch.testing.assert_close(
            got[part],
            want[part],
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    dist.destroy_process_group()


class ExpertParallel(unittest.TestCase):
    """``fsdp.distributed.expert_parallel`` on 4 processes, against a dense layer."""

    def run_kind(self, kind):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        torch.multiprocessing.spawn(run_rank, args=(port, kind), nprocs=WORLD)

    def test_eager(self):
        self.run_kind("eager")

    def test_fused(self):
        self.run_kind("fused")

    def test_mc2(self):
        self.run_kind("mc2")


if __name__ == "__main__":
    unittest.main()

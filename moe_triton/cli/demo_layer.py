"""The demo's MoE layer: DeepSeek-V3's at one eighth, and its dense computation.

Letters: T tokens, H hidden size, I width of an expert, E routed experts, K experts per token,
W ranks, S ranks that hold the shared expert. Weights are drawn from seeds per expert, so that a
rank creates its own experts and the dense layer all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from ..topology import Topology

BF16_ROUNDOFF = 2.0**-8  # largest relative error of rounding to bf16
_NUM_GROUPS = 8  # of experts, DeepSeek-V3's n_group
_TOP_GROUPS = 4  # groups that a token may choose from
_WEIGHT_SCALE = 2.5  # sum of the weights of a token, DeepSeek-V3's routed_scaling_factor
_SKEW = 0.15  # strength of the gate's correction bias, in units of its scores


@dataclasses.dataclass(frozen=True)
class Layer:
    """A DeepSeek-V3 MoE layer with H and I at one eighth, and about a third of the experts.

    Attributes:
        world_size: W.
        num_tokens: T of each rank.
        seed: of weights and tokens.
        hidden: H.
        width: I.
        top_k: K.
    """

    world_size: int
    num_tokens: int
    seed: int = 0
    hidden: int = 7168 // 8
    width: int = 2048 // 8
    top_k: int = 8

    @property
    def shared_ranks(self) -> int:
        """S; 0 in small worlds, where every rank computes the shared expert itself."""
        return self.world_size // 4

    @property
    def num_experts(self) -> int:
        """E: about 96, a multiple of the groups and of the ranks with routed experts."""
        unit = math.lcm(_NUM_GROUPS, self.world_size - self.shared_ranks)
        return unit * max(1, round(96 / unit))

    @property
    def topology(self) -> Topology:
        """The placement of experts on ranks."""
        return Topology(
            self.world_size, self.num_experts, min(self.shared_ranks, 1), self.shared_ranks
        )

    @property
    def shared_expert(self) -> int:
        """The number of the shared expert for ``expert``."""
        return self.num_experts

    def _generator(self, *what: int) -> torch.Generator:
        seed = self.seed
        for number in what:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        return torch.Generator().manual_seed(seed)

    def tokens(self, rank: int) -> torch.Tensor:
        """[T, H] bf16 tokens of a rank."""
        x = torch.randn(self.num_tokens, self.hidden, generator=self._generator(0, rank))
        return x.bfloat16()

    def gate(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts as DeepSeek-V3 does: the best experts of the best groups.

        The correction bias, with which a trained model balances its experts, follows Zipf's law
        here and makes a few experts popular. It affects the choice and not the weights.

        Args:
            x: [T, H] bf16.

        Returns:
            ids: [T, K] int32.
            weights: [T, K] fp32, a row's sum is 2.5.
        """
        generator = self._generator(1)
        # float64: the last bits of a matrix product may depend on the number of rows, and a token
        # must choose the same experts on its rank and in the dense layer.
        router = torch.randn(
            self.hidden, self.num_experts, generator=generator, dtype=torch.float64
        )
        scores = (x.double() @ router / self.hidden**0.5).sigmoid()
        popularity = torch.randperm(self.num_experts, generator=generator).double() + 1
        biased = (scores - _SKEW * popularity.log()).view(len(x), _NUM_GROUPS, -1)
        group_scores = biased.topk(2, dim=2).values.sum(2)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(1, group_scores.topk(_TOP_GROUPS, dim=1).indices, value=True)
        allowed = biased.masked_fill(~kept[:, :, None], -math.inf).flatten(1)
        ids = allowed.topk(self.top_k, dim=1).indices
        chosen = scores.gather(1, ids)
        weights = _WEIGHT_SCALE * chosen / chosen.sum(1, keepdim=True)
        return ids.int(), weights.float()

    def expert(self, number: int) -> Expert:
        """Draw one expert's weights."""
        generator = self._generator(2, number)
        gate_up = torch.randn(self.hidden, 2 * self.width, generator=generator)
        down = torch.randn(self.width, self.hidden, generator=generator)
        return Expert(gate_up.div_(self.hidden**0.5), down.div_(self.width**0.5))


@dataclasses.dataclass(frozen=True)
class Expert:
    """A SwiGLU feed-forward network in fp32.

    Attributes:
        gate_up: [H, 2 * I].
        down: [I, H].
    """

    gate_up: torch.Tensor
    down: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, H] fp32 -> [n, H] fp32."""
        gate, up = (x @ self.gate_up).chunk(2, dim=1)
        return (torch.nn.functional.silu(gate) * up) @ self.down


@functools.lru_cache(maxsize=1)
def rank_experts(layer: Layer, rank: int) -> list[Expert]:
    """The experts of a rank, cached."""
    if layer.topology.is_shared_rank(rank):
        return [layer.expert(layer.shared_expert)]
    return [layer.expert(number) for number in layer.topology.local_experts(rank)]


@functools.lru_cache(maxsize=1)
def replicated_expert(layer: Layer) -> Expert:
    """The shared expert of every rank, cached."""
    return layer.expert(layer.shared_expert)


@dataclasses.dataclass(frozen=True)
class Dense:
    """The layer's output computed in one process, in fp32.

    Attributes:
        out: [N, H] for all tokens.
        tolerance: [N, H] largest difference due to rounding to bf16: each expert's row is rounded
            once, and the sum once, by at most 2**-8 of the value; plus 1 % for the order of fp32
            sums.
    """

    out: torch.Tensor
    tolerance: torch.Tensor


def dense(
    layer: Layer,
    inputs: list[torch.Tensor],
    shared_inputs: list[torch.Tensor],
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> list[Dense]:
    """Compute the layer expert by expert in this process, for several inputs at once.

    Args:
        layer: whose experts to use.
        inputs: [N, H] fp32 each, inputs of the routed experts.
        shared_inputs: as many, inputs of the shared expert.
        ids: [N, K] int32.
        weights: [N, K] fp32.
    """
    outs = [torch.zeros_like(x) for x in inputs]
    sizes = [torch.zeros_like(x) for x in inputs]  # sums of absolute values
    for number in range(layer.num_experts):
        token, slot = (ids == number).nonzero(as_tuple=True)
        expert, weight = layer.expert(number), weights[token, slot, None]
        for x, out, size in zip(inputs, outs, sizes, strict=True):
            rows = expert(x[token]) * weight
            out.index_add_(0, token, rows)
            size.index_add_(0, token, rows.abs())
    shared = layer.expert(layer.shared_expert)
    for x, out, size in zip(shared_inputs, outs, sizes, strict=True):
        rows = shared(x)
        out.add_(rows)
        size.add_(rows.abs())
    return [
        Dense(out, 1.01 * BF16_ROUNDOFF * (size + out.abs()))
        for out, size in zip(outs, sizes, strict=True)
    ]

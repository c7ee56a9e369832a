"""A layer that can be trained: over ranks with ``ExpertParallel``, and dense on one.

An expert is tanh(row @ matrix). The matrices are picked by index, without a loop over experts, so
that the same code runs compiled, where no shape depends on data.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import cloudpickle
import torch

from moe_triton import ExpertParallel

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclasses.dataclass(frozen=True)
class TrainedLayer:
    """Sizes and options of a layer, and the values that each rank brings.

    ``tokens`` has the number of tokens of each rank. ``nowhere`` sends some slots to no expert.
    """

    tokens: tuple[int, ...] = (5, 5)
    num_experts: int = 4
    top_k: int = 2
    hidden: int = 6
    dtype: torch.dtype = torch.float64
    shared_experts: int = 0
    shared_ranks: int = 0
    weighted: bool = True
    addend: bool = False
    nowhere: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def make(self, group, **options) -> ExpertParallel:
        return ExpertParallel(
            group,
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden=self.hidden,
            max_tokens=max(self.tokens),
            dtype=self.dtype,
            shared_experts=self.shared_experts,
            shared_ranks=self.shared_ranks,
            **dict(self.options),
            **options,
        )

    def matrices(self) -> torch.Tensor:
        """[E + NS, H, H] of all experts, the shared ones last."""
        return self._draw(99, self.num_experts + self.shared_experts, self.hidden, self.hidden)

    def local(self, ep: ExpertParallel) -> slice:
        """The slice of this rank's matrices."""
        if ep.is_shared_rank:
            first = self.num_experts + ep.rank // (self.shared_ranks // self.shared_experts)
            return slice(first, first + 1)
        return slice(ep.local_experts.start, ep.local_experts.stop)

    def ids(self, rank: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(rank)
        count = self.tokens[rank]
        ids = torch.rand(count, self.num_experts, generator=random).argsort(1)[:, : self.top_k]
        if self.nowhere:
            ids[::2, 0] = -1
            ids[1::4] = -1
        return ids

    def inputs(self, rank: int) -> dict[str, torch.Tensor]:
        """The inputs of a rank with gradients: x, weights and, if used, addend."""
        count = self.tokens[rank]
        actual = {"x": self._draw(10 * rank, count, self.hidden)}
        if self.weighted:
            actual["weights"] = self._draw(10 * rank + 1, count, self.top_k).to(self.weight_dtype)
        if self.addend:
            actual["addend"] = self._draw(10 * rank + 2, count, self.hidden)
        return actual

    def cotangent(self, rank: int) -> torch.Tensor:
        """[T, H] that the loss multiplies a rank's outputs with."""
        return self._draw(10 * rank + 3, self.tokens[rank], self.hidden)

    def _draw(self, seed: int, *shape: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(shape, generator=random, dtype=torch.float64).to(self.dtype)


def apply_experts(received, matrices: torch.Tensor) -> torch.Tensor:
    """[A, H] outputs of this rank's experts, whose matrices are [L, H, H]."""
    row = torch.arange(len(received.x))
    expert = torch.bucketize(row, received.offsets, right=True).clamp(max=len(matrices) - 1)
    return torch.bmm(received.x[:, None], matrices[expert])[:, 0].tanh()


def over_ranks(ep: ExpertParallel, ids, matrices, x, weights=None, addend=None) -> torch.Tensor:
    """[T, H] of this rank, with this rank's matrices."""
    received = ep.dispatch(x, ids, weights)
    y = apply_experts(received, matrices)
    return ep.combine(y, received.handle, shared_expert_x=addend)


def in_halves(ep, ids, matrices, x, weights) -> torch.Tensor:
    """Two micro-batches, the second sent before the first has been received."""
    parts = [(x[:2], ids[:2], weights[:2]), (x[2:], ids[2:], weights[2:])]
    dispatching = [ep.dispatch_setup(*part) for part in parts]
    combining, outputs = [], []
    for pending in dispatching:
        received = ep.dispatch_teardown(pending)
        combining.append(ep.combine_setup(apply_experts(received, matrices), received.handle))
    for pending in combining:
        outputs.append(ep.combine_teardown(pending))
    return torch.cat(outputs)


def dense(layer: TrainedLayer, ids, matrices, x, weights=None, addend=None) -> torch.Tensor:
    """[T, H] of one rank, with all matrices, in the dtype of x."""
    outputs = torch.einsum("th,ehg->teg", x, matrices).tanh()
    routed = outputs.gather(1, ids.clamp(min=0)[..., None].expand(-1, -1, x.shape[1]))
    factors = (ids >= 0).to(x.dtype)
    if weights is not None:
        factors = factors * weights
    out = (routed * factors[..., None]).sum(1)
    if layer.shared_experts:
        takes_part = (ids >= 0).any(1, keepdim=True)
        out = out + (outputs[:, layer.num_experts :].sum(1) * takes_part)
    return out if addend is None else out + addend


def dense_gradients(layer: TrainedLayer, forward=dense) -> list[dict[str, torch.Tensor]]:
    """For each rank: its outputs, and the gradients of its inputs and of all matrices.

    The loss is the sum over all ranks of outputs times cotangents, computed in float64.
    """
    matrices = layer.matrices().double().requires_grad_()
    actual, loss = [], 0.0
    for rank in range(len(layer.tokens)):
        inputs = {k: v.double().requires_grad_() for k, v in layer.inputs(rank).items()}
        out = forward(layer, layer.ids(rank), matrices, **inputs)
        loss = loss + (out * layer.cotangent(rank).double()).sum()
        actual.append((inputs, out))
    loss.backward()
    return [
        {"out": out.detach(), "matrices": matrices.grad, **{k: v.grad for k, v in inputs.items()}}
        for inputs, out in actual
    ]


def rank_gradients(layer: TrainedLayer, ep: ExpertParallel, forward=over_ranks) -> dict:
    """The same of one rank, computed over the ranks; only this rank's matrices have gradients."""
    inputs = {k: v.requires_grad_() for k, v in layer.inputs(ep.rank).items()}
    matrices = layer.matrices()[layer.local(ep)].requires_grad_()
    out = forward(ep, layer.ids(ep.rank), matrices, **inputs)
    (out * layer.cotangent(ep.rank)).sum().backward()
    gradients = {k: v.grad for k, v in inputs.items()}
    return {"out": out.detach(), "matrices": matrices.grad, **gradients, "local": layer.local(ep)}


def assert_gradients(got: list[dict], expected: list[dict], **tolerance) -> None:
    """Ranks agree with the dense layer on outputs and gradients."""
    matrices = torch.zeros_like(expected[0]["matrices"])
    for mine, theirs in zip(got, expected, strict=True):
        matrices[mine["local"]] += mine["matrices"]  # copies of a shared expert add up
        assert mine.keys() - {"local"} == theirs.keys()
        for name in theirs.keys() - {"matrices"}:
            wanted = theirs[name].to(mine[name].dtype)
            torch.testing.assert_close(mine[name], wanted, **tolerance, msg=_named(name))
    torch.testing.assert_close(
        matrices, expected[0]["matrices"], **tolerance, msg=_named("matrices")
    )


def _named(name: str):
    return lambda message: f"{name}: {message}"

"""A layer of ``ExpertParallel`` for tests, and the same layer without any ranks.

Its experts work element by element, so that the result is the same to the bit whatever rows they
get together.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import cloudpickle
import definition
import numpy as np
import pytest
import torch
from definition_numbers import ROW_DTYPES

from moe_triton import ExpertParallel, MoeError, testing

# Worker processes import the package, not the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SIZES = {"num_experts": 6, "top_k": 2, "hidden": 24, "max_tokens": 7}
AT_ONCE = 5.0  # seconds, far below the time-out of 30 s


def make(ctx, **options) -> ExpertParallel:
    return ExpertParallel(ctx.ep_group, rank=ctx.ep_rank, **{**SIZES, **options})


def expert(x: torch.Tensor, number: int) -> torch.Tensor:
    """One expert; shared experts have the numbers after the routed ones."""
    return (x.float() * (1 + number / 8) + number / 4).to(x.dtype)


def run_experts(ep: ExpertParallel, received, numbers, dtype, *, out=None) -> torch.Tensor:
    """The outputs of this rank's experts; rows after the last one are NaN."""
    if out is None:
        out = torch.full(received.x.shape, float("nan"), dtype=dtype)
    static = received.x.dtype == torch.int8 and received.scales is None
    x = received.x.to(dtype) if static else received.dequantized(dtype)
    start = 0
    for number, count in zip(numbers, received.tokens_per_expert.tolist(), strict=True):
        rows = slice(start, start + count)
        out[rows] = expert(x[rows], number)
        start += count
    assert start == int(received.num_tokens)
    return out


# quant_mode and rows of definition.quantise.
QUANTS = {
    "int8_static": (1, "int8"),
    "int8": (2, "int8"),
    "e4m3": (2, "e4m3"),
    "e5m2": (2, "e5m2"),
    "group_e4m3": (3, "e4m3"),
    "group_e5m2": (3, "e5m2"),
    "mx_e4m3": (4, "e4m3"),
    "mx_e5m2": (4, "e5m2"),
}


def dequantised(codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """float32 values of [n, H] codes with a scale per row, or per block of elements."""
    if scales is None:
        return codes.float()
    if scales.dim() == 1:
        return codes.float() * scales[:, None]
    block = 32 if scales.dtype == torch.float8_e8m0fnu else 128
    return codes.float() * scales.float().repeat_interleave(block, 1)[:, : codes.shape[1]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of a layer, each rank's tokens, and the result without any ranks."""

    world: int = 3
    num_experts: int = 6
    top_k: int = 2
    hidden: int = 24
    tokens: tuple[int, ...] = (7, 7, 7)
    max_tokens: int = 7
    dtype: torch.dtype = torch.bfloat16
    quant: str | None = None
    smooth: bool = False
    shared_experts: int = 0
    shared_ranks: int = 0
    exact: bool = False
    routing: str = "uniform"
    weighted: bool = True
    id_dtype: torch.dtype = torch.int32
    addend: bool = False
    max_recv_tokens: int | None = None

    def options(self) -> dict[str, Any]:
        names = ("num_experts", "top_k", "hidden", "max_tokens", "dtype", "quant")
        names += ("shared_experts", "shared_ranks", "exact", "max_recv_tokens")
        return {name: getattr(self, name) for name in names}

    def numbers(self, rank: int) -> range:
        """The experts on ``rank``."""
        if rank < self.shared_ranks:
            first = self.num_experts + rank // (self.shared_ranks // self.shared_experts)
            return range(first, first + 1)
        local = self.num_experts // (self.world - self.shared_ranks)
        first = (rank - self.shared_ranks) * local
        return range(first, first + local)

    def inputs(self, rank: int, seed: int = 0) -> dict[str, Any]:
        """Arguments of dispatch."""
        count, seed = self.tokens[rank], 100 * seed + rank
        draw = getattr(testing, f"routing_{self.routing}")
        ids = draw(count, self.num_experts, self.top_k, seed=seed).to(self.id_dtype)
        weights = testing.weights(count, self.top_k, seed=seed)
        inputs = {
            "x": testing.tokens(count, self.hidden, self.dtype, seed=seed),
            "topk_ids": ids,
            "topk_weights": weights if self.weighted else None,
        }
        if self.smooth:
            rows = self.shared_experts + self.num_experts
            inputs["scales"] = 0.5 + testing.weights(rows, self.hidden, seed=seed)
        return inputs

    def rows_of(self, inputs, token: int, number: int) -> torch.Tensor:
        """[1, H] the token as expert ``number`` receives it."""
        x = inputs["x"][token]
        if self.quant is None:
            return x[None]
        smooth = inputs.get("scales")
        if smooth is not None:
            first = number - self.num_experts
            row = first if first >= 0 else self.shared_experts + number
            smooth = smooth[row].numpy()
        mode, rows = QUANTS[self.quant]
        codes, scales = definition.quantise(x.float().numpy(), smooth, mode, rows)
        codes = torch.from_numpy(codes)[None].view(ROW_DTYPES[rows])
        if scales is not None:
            scales = torch.from_numpy(np.array(scales)[None])
            scales = scales.view(torch.float8_e8m0fnu) if mode == 4 else scales
        return dequantised(codes, scales).to(self.dtype)

    def dense(self, inputs, addend: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty_like(inputs["x"])
        shared = range(self.num_experts, self.num_experts + self.shared_experts)
        for token, ids in enumerate(inputs["topk_ids"].tolist()):
            total = torch.zeros(self.hidden)
            for slot, number in enumerate(ids):
                y = expert(self.rows_of(inputs, token, number), number)[0].float()
                weights = inputs["topk_weights"]
                total = total + (y if weights is None else y * weights[token, slot])
            for number in shared if self.shared_ranks else ():
                total = total + expert(self.rows_of(inputs, token, number), number)[0].float()
            if addend is not None:
                total = total + addend[token].float()
            out[token] = total.to(self.dtype)
        return out

    def forward(self, ep: ExpertParallel, inputs, addend=None) -> torch.Tensor:
        received = ep.dispatch(**inputs)
        y = run_experts(ep, received, self.numbers(ep.rank), self.dtype)
        return ep.combine(y, received.handle, shared_expert_x=addend)

    def check(self, ep: ExpertParallel, seed: int = 0) -> None:
        """One layer on one rank equals the dense one."""
        inputs = self.inputs(ep.rank, seed)
        addend = testing.tokens(len(inputs["x"]), self.hidden, self.dtype, seed=seed + 7)
        addend = addend if self.addend else None
        before = {name: value if value is None else value.clone() for name, value in inputs.items()}
        out = self.forward(ep, inputs, addend)
        assert out.dtype == self.dtype
        assert torch.equal(out, self.dense(inputs, addend)), f"layer {self}"
        for name, value in before.items():
            assert value is None or torch.equal(inputs[name], value), f"{name} was changed"


LAYERS = {
    "bf16": Layer(),
    "fp16": Layer(dtype=torch.float16),
    "shared_expert_x": Layer(addend=True),
    "no weights": Layer(weighted=False, addend=True),
    "int64 ids": Layer(id_dtype=torch.int64),
    "int8 with scales": Layer(quant="int8", smooth=True),
    "int8": Layer(quant="int8"),
    **{name: Layer(quant=name, hidden=130) for name in QUANTS if not name.startswith("int8")},
    "int8_static": Layer(quant="int8_static", smooth=True, shared_experts=1, shared_ranks=1),
    "group_e5m2 with scales": Layer(quant="group_e5m2", hidden=129, smooth=True, exact=True),
    "odd sizes": Layer(hidden=1, num_experts=3, top_k=3),
    "exact": Layer(exact=True),
    "hot": Layer(routing="hot", tokens=(7, 7, 7)),
    "skewed": Layer(routing="zipf", num_experts=12, top_k=5),
    "all experts": Layer(top_k=6),
    "one idle rank": Layer(tokens=(7, 0, 4)),
    "idle but one": Layer(tokens=(0, 0, 1)),
    "all idle": Layer(tokens=(0, 0, 0), addend=True),
    "all idle, exact": Layer(tokens=(0, 0, 0), exact=True),
    "no tokens at all": Layer(tokens=(0, 0, 0), max_tokens=0),
    "limit": Layer(tokens=(1, 1, 1), max_recv_tokens=6),
    "exactly the limit": Layer(tokens=(2, 2, 2), routing="hot", top_k=1, max_recv_tokens=6),
    "one shared rank": Layer(shared_experts=1, shared_ranks=1, addend=True),
    "two shared ranks, one routed": Layer(shared_experts=1, shared_ranks=2, tokens=(3, 7, 5)),
    "two shared experts, one routed": Layer(shared_experts=2, shared_ranks=2, quant="int8"),
    "shared, scales, idle": Layer(
        shared_experts=1, shared_ranks=1, quant="int8", smooth=True, tokens=(0, 7, 2), exact=True
    ),
}
LARGER = {
    "W 5, NS 2, R 2": Layer(world=5, tokens=(3, 1, 0, 5, 2), shared_experts=2, shared_ranks=4),
    "W 5, S 2": Layer(
        world=5, tokens=(4, 4, 4, 4, 4), shared_experts=1, shared_ranks=2, quant="int8"
    ),
    "W 4, NS 3": Layer(world=4, tokens=(1, 2, 3, 4), shared_experts=3, shared_ranks=3, exact=True),
    "W 6": Layer(world=6, tokens=(1, 2, 3, 4, 5, 6), num_experts=12, top_k=4, routing="zipf"),
}
FULL = Layer()  # 7 tokens on each rank


def error_of(call, *args, **options) -> MoeError:
    with pytest.raises(MoeError) as caught:
        call(*args, **options)
    return caught.value

"""Permute and unpermute, with indices and with maps: definitions in loops, gradients, errors.

All results are exact: rows are moved, or summed in a stated order and rounded once.
"""

from __future__ import annotations

import compilers
import harness
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from moe_triton import MoeError
from moe_triton.compat import torch_npu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

permute = torch_npu.npu_moe_token_permute
unpermute = torch_npu.npu_moe_token_unpermute
permute_map = torch_npu.npu_moe_token_permute_with_routing_map
unpermute_map = torch_npu.npu_moe_token_unpermute_with_routing_map

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
int32 = torch.int32


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums(rows, terms: list[list[tuple]], hidden: int) -> torch.Tensor:
    """Sum the terms (row, weight) of each token in order."""
    out = torch.zeros(len(terms), hidden, dtype=accumulator(rows.dtype))
    for token, of_token in enumerate(terms):
        for row, weight in of_token:
            if 0 <= row < len(rows):
                out[token] += rows[row].to(out.dtype) * weight.to(out.dtype)
    return out.to(rows.dtype)


def in_order(experts: list[int]) -> tuple[list[int], list[int]]:
    """Slots sorted by (expert, slot), and the sorted position of each."""
    order = sorted(range(len(experts)), key=lambda copy: (experts[copy], copy))
    position = [0] * len(experts)
    for place, copy in enumerate(order):
        position[copy] = place
    return order, position


def drawn(data):
    """Draw sizes, a dtype, a generator and a kind of strides."""
    draw = data.draw
    sizes = draw(st.integers(0, 6)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 17]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    kind = draw(st.sampled_from(harness.STRIDES))
    return *sizes, draw(st.sampled_from(FLOATS)), random, kind


def test_the_documented_example(back_end):
    tokens = torch.arange(1.0, 5)[:, None].expand(-1, 2).half()
    indices = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0]], dtype=int32)
    permuted, position = permute(tokens, indices)
    assert permuted[:, 0].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert position.tolist() == [0, 4, 5, 1, 2, 6, 7, 3]
    assert position.dtype == int32
    assert torch.equal(permuted[position.long()], tokens.repeat_interleave(2, 0))


@hypothesis.given(data=st.data())
def test_any_permute(back_end, data):
    num_tokens, top_k, hidden, dtype, random, kind = drawn(data)
    flat = data.draw(st.booleans())
    experts = torch.randint(0, 4, (num_tokens, 1 if flat else top_k), generator=random)
    experts = experts.to(data.draw(st.sampled_from([int32, torch.int64])))
    tokens = torch.randn(num_tokens, hidden, generator=random).to(dtype)
    copies = experts.numel()
    number = data.draw(st.sampled_from([None, 0, 1, 3, 99, -1, -copies]))
    hypothesis.assume(number is None or number >= -copies)
    order, position = in_order(experts.flatten().tolist())
    kept_slots = order[:number] if number else order
    out, positions = permute(
        harness.strided(tokens, kind),
        experts[:, 0] if flat else harness.strided(experts, kind),
        number,
    )
    assert torch.equal(out, tokens[[copy // experts.shape[1] for copy in kept_slots]])
    assert positions.tolist() == position
    assert out.is_contiguous()


@hypothesis.given(data=st.data())
def test_any_unpermute(back_end, data):
    """Indices that are negative or beyond the last row are left out."""
    num_tokens, top_k, hidden, dtype, random, kind = drawn(data)
    rows = data.draw(st.integers(0, 8))
    permuted = torch.randn(rows, hidden, generator=random).to(dtype)
    weighted = data.draw(st.booleans())
    top_k = top_k if weighted else 1
    index = torch.randint(-2, rows + 2, (num_tokens * top_k,), generator=random).to(int32)
    probs = torch.rand(num_tokens, top_k, generator=random)
    probs = probs.to(data.draw(st.sampled_from([dtype, torch.float32])))
    out = unpermute(harness.strided(permuted, kind), index, probs if weighted else None)
    if not weighted:
        probs = torch.ones(num_tokens, 1)
    terms = [
        [(int(index[t * top_k + k]), probs[t, k]) for k in range(top_k)] for t in range(num_tokens)
    ]
    assert out.dtype == dtype
    assert torch.equal(out, sums(permuted, terms, hidden))


@pytest.mark.parametrize("dtype", FLOATS)
def test_unpermute_undoes_permute(back_end, dtype):
    """Weights are powers of two that add up to 1, so nothing rounds."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(-64, 64, (9, 5), generator=random).to(dtype)
    indices = torch.stack([torch.randperm(6, generator=random)[:3] for _ in range(9)])
    probs = torch.tensor([0.5, 0.25, 0.25]).repeat(9, 1)
    permuted, position = permute(tokens, indices)
    assert torch.equal(unpermute(permuted, position, probs), tokens)


def test_permuted_integers(back_end):
    tokens = torch.tensor([[1, -1], [2, -2]], dtype=torch.int8)
    permuted, _ = permute(tokens, torch.tensor([[1], [0]]))
    assert permuted.tolist() == [[2, -2], [1, -1]]
    assert permuted.dtype == torch.int8


def test_nan_stays_in_its_rows(back_end):
    tokens = torch.tensor([[1.0], [float("nan")], [3.0]])
    permuted, position = permute(tokens, torch.tensor([[0, 1]] * 3))
    out = unpermute(permuted, position, torch.ones(3, 2))
    assert out.isnan().tolist() == [[False], [True], [False]]


# Routing maps.


def maps(num_tokens: int, num_experts: int, top_k: int, random, dtype) -> torch.Tensor:
    """A map with ``top_k`` experts per token."""
    out = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    for row in out:
        row[torch.randperm(num_experts, generator=random)[:top_k]] = True
    return out.to(dtype)


def test_the_documented_example_of_maps(back_end):
    tokens = torch.tensor([0.1, 0.2, 0.3]).half()[:, None].expand(-1, 4)
    routing_map = torch.ones(3, 2, dtype=torch.int8)
    probs = torch.tensor([[0.5, 0.3], [0.4, 0.6], [0.2, 0.8]]).half()
    permuted, permuted_probs, position = permute_map(
        tokens, routing_map, probs=probs, num_out_tokens=6
    )
    assert torch.equal(permuted, tokens.repeat(2, 1))
    assert torch.equal(permuted_probs, probs.T.flatten())
    assert position.tolist() == [0, 3, 1, 4, 2, 5]
    permuted, permuted_probs, position = permute_map(
        tokens, routing_map, num_out_tokens=4, drop_and_pad=True
    )
    assert torch.equal(permuted, tokens[[0, 1, 0, 1]])
    assert permuted_probs is None
    assert position.tolist() == [0, 1, 0, 1]


def test_the_documented_example_of_maps_back(back_end):
    permuted = torch.tensor([[1.0] * 4, [2.0] * 4]).half()
    position = torch.tensor([0, 1], dtype=int32)
    routing_map = torch.eye(2, dtype=torch.int8)
    probs = torch.eye(2).half()
    out = unpermute_map(permuted, position, [2, 4], probs=probs, routing_map=routing_map)
    assert torch.equal(out, permuted)
    out = unpermute_map(
        permuted, position, [2, 4], probs=probs / 2, routing_map=routing_map, drop_and_pad=True
    )
    assert torch.equal(out, permuted / 2)


@hypothesis.given(data=st.data())
def test_any_map(back_end, data):
    num_tokens, num_experts, hidden, dtype, random, kind = drawn(data)
    top_k = data.draw(st.integers(0, num_experts))
    map_dtype = data.draw(st.sampled_from([torch.bool, torch.int8]))
    routing_map = maps(num_tokens, num_experts, top_k, random, map_dtype)
    tokens = torch.randn(num_tokens, hidden, generator=random).to(dtype)
    probs = torch.rand(num_tokens, num_experts, generator=random)
    probs = probs.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    copies = [(e, t) for e in range(num_experts) for t in range(num_tokens) if routing_map[t, e]]
    permuted, permuted_probs, position = permute_map(
        harness.strided(tokens, kind),
        harness.strided(routing_map, kind),
        probs=harness.strided(probs, kind),
        num_out_tokens=num_tokens * top_k,
    )
    assert torch.equal(permuted, tokens[[t for _, t in copies]])
    assert permuted_probs.tolist() == [probs[t, e].item() for e, t in copies]
    by_token = sorted(copies, key=lambda copy: (copy[1], copy[0]))
    assert position.tolist() == [copies.index(copy) for copy in by_token]

    use_probs = data.draw(st.booleans())
    back = unpermute_map(
        permuted,
        position,
        [num_tokens, hidden],
        probs=probs if use_probs else None,
        routing_map=routing_map if use_probs else None,
    )
    tensor = torch.ones(())
    terms = [[] for _ in range(num_tokens)]
    for e, t in by_token:
        terms[t].append((copies.index((e, t)), probs[t, e] if use_probs else tensor))
    assert torch.equal(back, sums(permuted, terms, hidden))


@hypothesis.given(data=st.data())
def test_any_padded_map(back_end, data):
    num_tokens, num_experts, hidden, dtype, random, _ = drawn(data)
    routing_map = torch.rand(num_tokens, num_experts, generator=random) < 0.4
    tokens = torch.randn(num_tokens, hidden, generator=random).to(dtype)
    probs = torch.rand(num_tokens, num_experts, generator=random).to(dtype)
    number = data.draw(st.integers(0, num_tokens * num_experts))
    capacity = number // num_experts
    copies = []
    for e in range(num_experts):
        own = [t for t in range(num_tokens) if routing_map[t, e]]
        others = [t for t in range(num_tokens) if not routing_map[t, e]]
        copies += [(e, t) for t in (own + others)[:capacity]]
    permuted, permuted_probs, position = permute_map(
        tokens, routing_map, probs=probs, num_out_tokens=number, drop_and_pad=True
    )
    assert position.tolist() == [t for _, t in copies]
    assert torch.equal(permuted, tokens[[t for _, t in copies]])
    assert permuted_probs.tolist() == [probs[t, e].item() for e, t in copies]

    use_probs = data.draw(st.booleans())
    back = unpermute_map(
        permuted,
        position,
        (num_tokens, hidden),
        probs=probs if use_probs else None,
        drop_and_pad=True,
    )
    terms = [[] for _ in range(num_tokens)]
    for row, (e, t) in enumerate(copies):
        terms[t].append((row, probs[t, e] if use_probs else torch.ones(())))
    assert torch.equal(back, sums(permuted, terms, hidden))


def test_slots_without_a_copy_are_left_out(back_end):
    """Token 1 has one expert for its two slots."""
    routing_map = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.int8)
    probs = torch.tensor([[2.0, 9, 3], [9, 5, 9]])
    rows = torch.tensor([[1.0], [10], [100]])
    index = torch.tensor([0, 2, 1, -1], dtype=int32)
    out = unpermute_map(rows, index, [2, 1], probs=probs, routing_map=routing_map)
    assert out.tolist() == [[302.0], [50.0]]


# Gradients.

DOUBLE = torch.Generator().manual_seed(1)
TOKENS = torch.randn(4, 3, dtype=torch.float64, generator=DOUBLE)
ROWS = torch.randn(8, 3, dtype=torch.float64, generator=DOUBLE)
PROBS = torch.rand(4, 2, dtype=torch.float64, generator=DOUBLE)
CHANCES = torch.rand(4, 3, dtype=torch.float64, generator=DOUBLE)
INDICES = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
POSITION = permute(TOKENS, INDICES)[1]
MAP = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 0]], dtype=torch.int8)
PADDED = permute_map(TOKENS, MAP, num_out_tokens=9, drop_and_pad=True)[2]
MISSING = torch.tensor([5, -1, 0, 7, 99, 3, 2, 2], dtype=int32)  # and one row twice

DIFFERENTIABLE = {
    "permute": (lambda x: permute(x, INDICES)[0], TOKENS),
    "permute, some dropped": (lambda x: permute(x, INDICES, 5)[0], TOKENS),
    "unpermute": (lambda x, p: unpermute(x, POSITION, p), ROWS, PROBS),
    "unpermute, no probs": (lambda x: unpermute(x, POSITION), ROWS),
    "unpermute, some missing": (lambda x, p: unpermute(x, MISSING, p), ROWS, PROBS),
    "unpermute, no rows": (lambda p: unpermute(ROWS[:0], POSITION, p), PROBS),
    "map": (
        lambda x, p: permute_map(x, MAP, probs=p, num_out_tokens=8)[:2],
        TOKENS,
        CHANCES,
    ),
    "map, no probs": (lambda x: permute_map(x, MAP, num_out_tokens=8)[0], TOKENS),
    "map, padded": (
        lambda x, p: permute_map(x, MAP, probs=p, num_out_tokens=9, drop_and_pad=True)[:2],
        TOKENS,
        CHANCES,
    ),
    "map back": (
        lambda x, p: unpermute_map(x, POSITION, [4, 3], probs=p, routing_map=MAP),
        ROWS,
        CHANCES,
    ),
    "map back, no probs": (lambda x: unpermute_map(x, POSITION, [4, 3]), ROWS),
    "map back, padded": (
        lambda x, p: unpermute_map(x, PADDED, [4, 3], probs=p, drop_and_pad=True),
        torch.cat([ROWS, ROWS[:1]]),
        CHANCES,
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name, back_end):
    call, *inputs = DIFFERENTIABLE[name]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(call, leaves)
    if back_end != "cpu":
        return  # the formulas are the same ones
    assert torch.autograd.gradgradcheck(call, leaves)
    for chosen in leaves if len(leaves) > 1 else []:  # one input alone
        partly_detached = [tensor if tensor is chosen else tensor.detach() for tensor in leaves]
        assert torch.autograd.gradcheck(call, partly_detached)


def finalized(x, p):
    return torch_npu.npu_moe_finalize_routing(x, None, None, None, p, POSITION, None, 2)


@pytest.mark.parametrize(
    "call, trained, sizes",
    [
        (lambda x, _: unpermute(x, POSITION), "x", [8]),
        (lambda x, p: unpermute(x, POSITION, p), "x", [8, 8]),
        (lambda x, p: unpermute(x, POSITION, p), "p", [8, 24]),
        (lambda x, _: permute_map(x[:4], MAP, num_out_tokens=8)[0], "x", [8]),
        (lambda x, _: unpermute_map(x, POSITION, [4, 3]), "x", [8]),
        (finalized, "x", [8, 8]),
        (finalized, "p", [8, 24]),
    ],
)
def test_only_tensors_that_a_gradient_needs_are_saved(call, trained, sizes):
    """Index 8 elements, probs 8, rows 24; rows are kept for the gradient of the probs alone."""
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    inputs = {"x": ROWS.clone(), "p": PROBS.clone()}
    inputs[trained].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(*inputs.values())
    assert sorted(saved) == sizes
    out.sum().backward()


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_gradients_have_the_dtypes_of_their_tensors(dtype):
    tokens, probs = TOKENS.to(dtype).requires_grad_(), PROBS.float().requires_grad_()
    permuted, position = permute(tokens, INDICES, np.int64(8))
    assert permuted.requires_grad and not position.requires_grad
    unpermute(permuted, position, probs).sum().backward()
    assert tokens.grad.dtype == dtype and probs.grad.dtype == torch.float32
    torch.testing.assert_close(
        tokens.grad.float(), probs.detach().sum(1, keepdim=True).expand(-1, 3), rtol=1e-2, atol=0
    )


def test_gradients_of_few_bits_are_summed_in_more():
    """256 + 1 + 1 is 256 when each bfloat16 sum is rounded."""
    tokens = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    permuted, _ = permute(tokens, torch.tensor([[0, 1, 2]]))
    permuted.backward(torch.tensor([[256.0], [1], [1]]).bfloat16())
    assert tokens.grad.item() == 258


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@compilers.usual
def test_compiled(name):
    call, *inputs = DIFFERENTIABLE[name]
    compilers.check(call, *(tensor.clone().requires_grad_() for tensor in inputs))


# Refusals.

T, IDS = torch.zeros(4, 3), torch.zeros(4, 2, dtype=int32)
S = torch.zeros(8, dtype=int32)
M = torch.tensor([[True, True, False]] * 4)
BAD = {
    "no tokens": (permute, {"tokens": None}, 161001, "tokens"),
    "no indices": (permute, {"indices": None}, 161001, "indices"),
    "tokens int32": (permute, {"tokens": T.int()}, 161002, "tokens"),
    "indices int8": (permute, {"indices": IDS.to(torch.int8)}, 161002, "indices"),
    "number a word": (permute, {"num_out_tokens": "1"}, 161002, "num_out_tokens"),
    "padded a number": (permute, {"padded_mode": 0}, 161002, "padded_mode"),
    "tokens 1-D": (permute, {"tokens": T[0]}, 561002, "tokens"),
    "indices N + 1": (permute, {"indices": torch.cat([IDS, IDS])}, 561002, "indices"),
    "indices 3-D": (permute, {"indices": IDS[..., None]}, 561002, "indices"),
    "indices 0-D": (permute, {"indices": IDS[0, 0]}, 561002, "indices"),
    "no columns": (permute, {"indices": IDS[:, :0]}, 561002, "indices"),
    "negative index": (permute, {"indices": IDS - 1}, 561002, "indices"),
    "index 2**24": (permute, {"indices": IDS + 2**24}, 561002, "indices"),
    "fewer than none": (permute, {"num_out_tokens": -9}, 561002, "num_out_tokens"),
    "padded": (permute, {"padded_mode": True}, 561002, "padded_mode"),
    "back: no rows": (unpermute, {"permuted_tokens": None}, 161001, "permuted_tokens"),
    "back: no index": (unpermute, {"sorted_indices": None}, 161001, "sorted_indices"),
    "back: int8": (unpermute, {"permuted_tokens": T.to(torch.int8)}, 161002, "permuted_tokens"),
    "back: index int64": (unpermute, {"sorted_indices": S.long()}, 161002, "sorted_indices"),
    "back: probs int": (unpermute, {"probs": IDS}, 161002, "probs"),
    "back: rows 3-D": (unpermute, {"permuted_tokens": T[None]}, 561002, "permuted_tokens"),
    "back: index 2-D": (unpermute, {"sorted_indices": IDS}, 561002, "sorted_indices"),
    "back: probs 1-D": (unpermute, {"probs": torch.zeros(8)}, 561002, "probs"),
    "back: probs for others": (unpermute, {"probs": torch.zeros(3, 2)}, 561002, "probs"),
    "back: padded": (unpermute, {"padded_mode": True}, 561002, "padded_mode"),
    "map: no map": (permute_map, {"routing_map": None}, 161001, "routing_map"),
    "map: tokens int8": (permute_map, {"tokens": T.to(torch.int8)}, 161002, "tokens"),
    "map: int32": (permute_map, {"routing_map": M.int()}, 161002, "routing_map"),
    "map: probs of another dtype": (permute_map, {"probs": T.half()}, 161002, "probs"),
    "map: number a word": (permute_map, {"num_out_tokens": "8"}, 161002, "num_out_tokens"),
    "map: 1-D": (permute_map, {"routing_map": M[0]}, 561002, "routing_map"),
    "map: no experts": (permute_map, {"routing_map": M[:, :0]}, 561002, "routing_map"),
    "map: a two": (permute_map, {"routing_map": 2 * M.to(torch.int8)}, 561002, "routing_map"),
    "map: probs E + 1": (permute_map, {"probs": torch.zeros(4, 4)}, 561002, "probs"),
    "map: too many": (permute_map, {"num_out_tokens": 13}, 561002, "num_out_tokens"),
    "map: negative": (permute_map, {"num_out_tokens": -1}, 561002, "num_out_tokens"),
    "map: another K": (permute_map, {"num_out_tokens": 4}, 561002, "routing_map"),
    "map: K is 1": (permute_map, {"num_out_tokens": None}, 561002, "routing_map"),
    "map back: no shape": (unpermute_map, {"restore_shape": None}, 161001, "restore_shape"),
    "map back: probs": (unpermute_map, {"probs": T.double()}, 161002, "probs"),
    "map back: one size": (unpermute_map, {"restore_shape": 4}, 161002, "restore_shape"),
    "map back: float": (unpermute_map, {"restore_shape": [4.0, 3]}, 161002, "restore_shape"),
    "map back: H + 1": (unpermute_map, {"restore_shape": [4, 4]}, 561002, "restore_shape"),
    "map back: 3-D": (unpermute_map, {"restore_shape": [4, 3, 1]}, 561002, "restore_shape"),
    "map back: N does not divide": (
        unpermute_map,
        {"restore_shape": [3, 3]},
        561002,
        "sorted_indices",
    ),
    "map back: probs without map": (unpermute_map, {"probs": T}, 561002, "routing_map"),
    "map back: two shapes": (
        unpermute_map,
        {"probs": T, "routing_map": M[:, :2]},
        561002,
        "probs",
    ),
    "map back: padded, few rows": (
        unpermute_map,
        {"drop_and_pad": True, "permuted_tokens": T},
        561002,
        "permuted_tokens",
    ),
    "map back: padded, not for each expert": (
        unpermute_map,
        {"drop_and_pad": True, "probs": T},
        561002,
        "sorted_indices",
    ),
    "map back: padded, no such token": (
        unpermute_map,
        {"drop_and_pad": True, "sorted_indices": S + 4},
        561002,
        "sorted_indices",
    ),
}
GOOD = {
    permute: {"tokens": T, "indices": IDS},
    unpermute: {"permuted_tokens": torch.zeros(8, 3), "sorted_indices": S},
    permute_map: {"tokens": T, "routing_map": M, "num_out_tokens": 8},
    unpermute_map: {
        "permuted_tokens": torch.zeros(8, 3),
        "sorted_indices": S,
        "restore_shape": [4, 3],
    },
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    op, changes, code, argument = BAD[name]
    op(**GOOD[op])
    with pytest.raises(MoeError) as caught:
        op(**GOOD[op] | changes)
    assert (caught.value.code, caught.value.argument) == (code, argument)
